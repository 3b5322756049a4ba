"""What receivers see of the outbound client, what it says of them, and what it refuses to touch.

Receivers are real: servers on loopback in the client's own loop, uvloop's, which play a script on each connection. The
loop runs only inside `Net.run` and what is built on it, so that a test reads as steps. Nothing is measured: where time
has to pass, the client's constants are made short, and GUARD only ends what would hang. Whatever a test does, `net`
checks at its end that every exchange was told of exactly once and that no connection or exchange is left.
"""

import asyncio
import functools
import itertools
import os
import random
import re
import socket
import ssl
import struct
import threading
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, TypeVar

import h11
import pytest
import trustme
import uvloop
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

import outbound
from outbound import Client, DroppedError, ForbiddenError, Guard, OutboundError, Response, Url, parse, request

Value = TypeVar("Value")
Result = Response | OutboundError
Play = Callable[["Peer"], Awaitable[None]]

GUARD_TIME = 20.0  # seconds; only ever reached by what hangs
SHORT = 0.15  # seconds: a time-out that a test wants to come
LOOPBACK = [ip_network("127.0.0.0/8"), ip_network("::1/128")]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Peer:
    """A receiver's side of one connection."""

    def __init__(self, receiver: "Receiver", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.receiver = receiver
        self.number = receiver.accepted  # the how manieth connection it is
        self.reader = reader
        self.writer = writer

    async def request(self) -> bytes:
        """Read a request, with its body. Raises IncompleteReadError if the client closes instead."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"\r\nContent-Length: ([0-9]+)", head)
        request = head + await self.reader.readexactly(int(length[1]) if length else 0)
        self.receiver.requests.append(request)
        return request

    async def send(self, *pieces: bytes) -> None:
        """Send pieces, each by itself."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def closed(self) -> None:
        """Wait until the client has closed."""
        while await self.reader.read(65536):
            pass

    async def reset(self) -> None:
        """Close by force."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Receiver:
    """A server that plays a script on each of its connections."""

    def __init__(self, play: Play, host: str, tls: ssl.SSLContext | None) -> None:
        self.requests: list[bytes] = []
        self.accepted = 0
        self.open = 0
        self.most = 0  # open at the same time
        self.host = host
        self.port = 0
        self._play = play
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            await self._play(Peer(self, reader, writer))
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass  # the client has closed, or the test is over
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()

    def url(self, path: str = "/", *, host: str = "", secure: bool | None = None) -> Url:
        """Return the URL of something here."""
        name = host or (f"[{self.host}]" if ":" in self.host else self.host)
        scheme = "https" if (self._tls is not None if secure is None else secure) else "http"
        return parse(f"{scheme}://{name}:{self.port}{path}".encode())


class Call:
    """An exchange, and what became of it."""

    def __init__(self) -> None:
        self.results: list[Result] = []

    @property
    def result(self) -> Result:
        assert len(self.results) == 1, self.results
        return self.results[0]

    @property
    def status(self) -> int:
        assert isinstance(self.result, Response), self.result
        return self.result.status

    @property
    def error(self) -> str:
        assert isinstance(self.result, OutboundError), self.result
        return str(self.result)


class Net:
    """A loop, receivers on it, and clients of them."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self.errors: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self.calls: list[Call] = []
        self.clients: list[Client] = []
        self.receivers: list[Receiver] = []

    def run(self, work: Coroutine[Any, Any, Value]) -> Value:
        return self.loop.run_until_complete(asyncio.wait_for(work, GUARD_TIME))

    def client(self, guard: Guard | None = None, **options: int) -> Client:
        """Return a further client, which may reach loopback if nothing else is said."""

        async def make() -> Client:
            return Client(guard or Guard(LOOPBACK), **options)

        client = self.run(make())
        self.clients.append(client)
        return client

    @functools.cached_property
    def plain(self) -> Client:
        """The client of tests that need nothing special."""
        return self.client()

    def receiver(
        self, play: Play, host: str = "127.0.0.1", *, port: int = 0, tls: ssl.SSLContext | None = None
    ) -> Receiver:
        receiver = Receiver(play, host, tls)
        self.run(receiver.start(port))
        self.receivers.append(receiver)
        return receiver

    def send(self, url: Url, client: Client | None = None, method: str = "GET", body: bytes = b"") -> Call:
        """Begin an exchange."""
        call = Call()
        self.calls.append(call)
        data = request(url, method, url.target, body=body)
        (client or self.plain).send(url, data, call.results.append, repeatable=method == "GET")
        assert call.results == [], "told from within"
        return call

    def until(self, holds: Callable[[], object]) -> None:
        """Let the loop run until something holds."""

        async def wait() -> None:
            while not holds():  # noqa: ASYNC110  # a counter tells nobody that it changes
                await asyncio.sleep(0.002)

        self.run(wait())

    def finish(self, *calls: Call) -> None:
        self.until(lambda: all(call.results for call in calls))

    def ask(self, *urls: Url, client: Client | None = None) -> list[Result]:
        """Exchange with all at the same time; return what became of each."""
        calls = [self.send(url, client) for url in urls]
        self.finish(*calls)
        return [call.result for call in calls]

    def status(self, url: Url, client: Client | None = None) -> int:
        call = self.send(url, client)
        self.finish(call)
        return call.status

    def error(self, url: Url, client: Client | None = None) -> str:
        call = self.send(url, client)
        self.finish(call)
        return call.error

    def spin(self) -> None:
        """Let everything happen that can happen at once."""
        for _ in range(20):
            self.run(asyncio.sleep(0))

    def close(self) -> None:
        for client in self.clients:
            self.run(client.settle())
            assert client.pending == 0
            client.close()
        self.until(lambda: not any(client.connections for client in self.clients))
        for receiver in self.receivers:
            self.run(receiver.stop())
        self.spin()
        for call in self.calls:
            assert len(call.results) == 1, call.results
        assert [client.pending for client in self.clients if client.pending] == []
        assert self.errors == []


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    monkeypatch.setattr(outbound, "SWEEP_TIME", 0.02)
    for name in ("EXCHANGE_TIME", "IDLE_TIME", "QUEUE_TIME"):  # what is seen is not to come of itself after a while
        monkeypatch.setattr(outbound, name, 2 * GUARD_TIME)
    world = Net()
    try:
        yield world
        world.close()
    finally:
        for client in world.clients:
            client.close()
        world.spin()
        world.loop.close()


class Names:
    """A resolver that is told what to say, one answer after the other; the last stays."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gates: dict[str, threading.Event] = {}  # what a look-up of a name waits for
        self._answers: dict[str, list[Sequence[str]]] = {}

    def __setitem__(self, name: str, answers: Sequence[Sequence[str]]) -> None:
        self._answers[name] = list(answers)

    def __call__(self, host: str) -> list[outbound.Address]:
        self.asked.append(host)
        if host in self.gates:
            assert self.gates[host].wait(GUARD_TIME)
        answers = self._answers.get(host)
        if answers is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [ip_address(text) for text in (answers.pop(0) if len(answers) > 1 else answers[0])]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    stand_in = Names()
    monkeypatch.setattr(outbound, "resolve", stand_in)
    yield stand_in
    for gate in stand_in.gates.values():
        gate.set()


# Scripts


def answer(*pieces: bytes) -> Play:
    """Answer every request with the same."""

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(*(pieces or (OK,)))

    return play


def last_words(*pieces: bytes) -> Play:
    """Answer one request, and close."""

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(*pieces)

    return play


def hold(gate: asyncio.Event, then: bytes = OK) -> Play:
    """Answer once the gate is open."""

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            await gate.wait()
            await peer.send(then)

    return play


async def hang(peer: Peer) -> None:
    """Take everything and say nothing."""
    await peer.request()
    await peer.closed()


def hang_after(data: bytes) -> Play:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(data)
        await peer.closed()

    return play


def endless(start: bytes, more: bytes) -> Play:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(start)
        while True:
            await peer.send(more)

    return play


def slowly(data: bytes) -> Play:
    """Answer byte by byte, without end."""

    async def play(peer: Peer) -> None:
        await peer.request()
        for at in itertools.count():
            await peer.send(data[at % len(data) :][:1])
            await asyncio.sleep(0.01)

    return play


# What is answered


@pytest.mark.parametrize(
    ("data", "status", "kept"),
    [
        pytest.param(OK, 200, True, id="content-length"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, True, id="empty"),
        pytest.param(b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", 200, True, id="no-reason"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", 204, True, id="204"),
        pytest.param(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n", 304, True, id="304"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0\r\nA: b\r\nC: d\r\n\r\n",
            200,
            True,
            id="chunked-trailers",
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, Chunked\r\n\r\n0\r\n\r\n", 200, True, id="two-codings"
        ),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, True, id="100"),
        pytest.param(
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK, 200, True, id="103"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nUpgrade: h2c\r\nConnection: Upgrade, Keep-Alive\r\nContent-Length: 0\r\n\r\n",
            200,
            True,
            id="offers-upgrade",
        ),
        pytest.param(
            b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", 200, True, id="1.0-keep-alive"
        ),
        pytest.param(b"HTTP/1.1 500 Oh\r\nContent-Length: 3\r\n\r\nno!", 500, True, id="500"),
        pytest.param(b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n", 302, True, id="redirect"),
        pytest.param(b"HTTP/1.1 429 Wait\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n", 429, True, id="429"),
        pytest.param(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, False, id="1.0"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", 200, False, id="connection-close"
        ),
        pytest.param(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", 204, False, id="204-close"),
        pytest.param(OK + b"HTTP/1.1 200 OK\r\n", 200, False, id="more-than-asked"),
        pytest.param(OK + OK, 200, False, id="twice"),
        pytest.param(OK + b"H", 200, False, id="one-byte-more"),
        pytest.param(OK + b"\0garbage", 200, False, id="garbage-behind"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok..", 200, False, id="behind-close"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n"
            + b"x" * 70000,
            200,
            False,
            id="much-more-than-asked",
        ),
    ],
)
@pytest.mark.parametrize("bytewise", [False, True])
def test_answers_in_every_framing_are_understood(
    net: Net, data: bytes, status: int, kept: bool, bytewise: bool
) -> None:
    size = 1 if bytewise and len(data) < 1000 else len(data)
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    receiver = net.receiver(answer(*pieces))
    for _ in range(3):
        assert net.status(receiver.url("/a?b=c")) == status
        if not kept:
            net.until(lambda: net.plain.connections == 0)
    assert receiver.accepted == (1 if kept else 3)
    assert [request.partition(b"\r\n")[0] for request in receiver.requests] == [b"GET /a?b=c HTTP/1.1"] * 3


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\nuntil the end", id="1.1"),
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\n", id="1.0"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nuntil the end", id="not-chunked"),
        pytest.param(
            b"HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\nHTTP/1.1 200 OK\r\n\r\n..", id="after-interim"
        ),
    ],
)
def test_a_body_may_end_with_the_connection(net: Net, data: bytes) -> None:
    receiver = net.receiver(last_words(data))
    assert [net.status(receiver.url()) for _ in range(2)] == [200, 200]
    assert receiver.accepted == 2


def test_the_time_to_try_again_is_passed_on(net: Net) -> None:
    head = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n"
    receiver = net.receiver(answer(head + b"Retry-After:  120 \r\n\r\n"))
    assert net.ask(receiver.url()) == [Response(503, "120")]
    assert net.ask(net.receiver(answer(head + b"\r\n")).url()) == [Response(503, "")]
    long = net.ask(net.receiver(answer(head + b"retry-after: " + b"9" * 999 + b"\r\n\r\n")).url())[0]
    assert isinstance(long, Response)
    assert len(long.retry_after) <= 64


def test_the_time_to_try_again_is_that_of_the_answer_and_not_of_the_last(net: Net) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n")
        await answer()(peer)

    receiver = net.receiver(play)
    assert [net.ask(receiver.url()) for _ in range(2)] == [[Response(503, "7")], [Response(200, "")]]
    assert receiver.accepted == 1


def test_a_redirect_is_not_followed(net: Net) -> None:
    other = net.receiver(answer())
    place = f"http://127.0.0.1:{other.port}/".encode()
    receiver = net.receiver(answer(b"HTTP/1.1 307 Go\r\nContent-Length: 0\r\nLocation: " + place + b"\r\n\r\n"))
    assert net.status(receiver.url()) == 307
    assert (other.accepted, len(receiver.requests)) == (0, 1)


def test_a_post_carries_its_body(net: Net) -> None:
    receiver = net.receiver(answer())
    call = net.send(receiver.url("/in"), method="POST", body=b'{"count": 7}')
    empty = net.send(receiver.url("/in"), method="POST")
    net.finish(call, empty)
    assert [call.status, empty.status] == [200, 200]
    bodies = {request.partition(b"\r\n\r\n")[2] for request in receiver.requests}
    assert bodies == {b'{"count": 7}', b""}
    assert all(b"\r\nContent-Type: application/json\r\n" in request for request in receiver.requests)


def of_size(size: int) -> bytes:
    """Return an answer of that many bytes."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %5d\r\n\r\n"
    length = size - len(head % size)
    return head % length + b"x" * length


def test_a_large_answer_within_the_bound_is_read(net: Net) -> None:
    receiver = net.receiver(answer(of_size(outbound.MAX_RESPONSE)))
    assert [net.status(receiver.url()) for _ in range(4)] == [200] * 4
    assert receiver.accepted == 1


def test_a_slow_answer_is_awaited(net: Net) -> None:
    gate = asyncio.Event()
    receiver = net.receiver(hold(gate))
    call = net.send(receiver.url())
    net.until(lambda: receiver.requests)
    net.spin()
    assert call.results == []
    gate.set()
    net.finish(call)
    assert call.status == 200


# What is not answered, or not with HTTP

CUT = "closed before the response's end"
NOT_HTTP = "not HTTP/1.1"


@pytest.mark.parametrize(
    ("data", "error"),
    [
        pytest.param(b"", CUT, id="nothing"),
        pytest.param(b"HTTP/1.1 2", CUT, id="amid-start-line"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Le", CUT, id="amid-field"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", CUT, id="amid-head"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n", CUT, id="interim-only"),
        pytest.param(b"HTTP/1.1 000 None\r\nContent-Length: 0\r\n\r\n", CUT, id="status-0"),
        pytest.param(b"SSH-2.0-OpenSSH_9.9\r\n", NOT_HTTP, id="ssh"),
        pytest.param(b"\x15\x03\x03\x00\x02\x02\x46", NOT_HTTP, id="tls-alert"),
        pytest.param(b"<html>sorry</html>", NOT_HTTP, id="html"),
        pytest.param(b"\0" * 100, NOT_HTTP, id="nul"),
        pytest.param(b"HTTP/1.1 2x0 OK\r\n\r\n", NOT_HTTP, id="bad-status"),
        pytest.param(b"HTTP/7.5 200 OK\r\n\r\n", NOT_HTTP, id="bad-version"),
        pytest.param(b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", NOT_HTTP, id="bare-lf"),
        pytest.param(b"HTTP/1.1 200 OK\r\nBad Field: 0\r\n\r\n", NOT_HTTP, id="bad-field"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", NOT_HTTP, id="negative-length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", NOT_HTTP, id="two-lengths"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", NOT_HTTP, id="both"
        ),
        pytest.param(
            b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc", "change of protocol", id="101"
        ),
    ],
)
def test_a_bad_answer_is_an_error(net: Net, data: bytes, error: str) -> None:
    receiver = net.receiver(last_words(data))
    assert error in net.error(receiver.url())
    net.until(lambda: net.plain.connections == 0)
    assert len(receiver.requests) == receiver.accepted == 1, "sent again"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", id="no-body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nshor", id="wrong-length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", id="amid-chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", id="no-last-chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: b", id="amid-trailer"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", id="bad-chunk"),
    ],
)
def test_a_status_holds_whatever_becomes_of_the_body(net: Net, data: bytes) -> None:
    receiver = net.receiver(last_words(data))
    assert net.status(receiver.url()) == 200
    net.until(lambda: net.plain.connections == 0)
    assert len(receiver.requests) == receiver.accepted == 1, "sent again"


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_a_reset_is_an_error_at_every_stage(net: Net, data: bytes) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(data)
        await asyncio.sleep(0.03)  # what was sent is to get there before the reset, which may overtake it
        await peer.reset()

    receiver = net.receiver(play)
    assert CUT in net.error(receiver.url())
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("force", [False, True])
def test_a_receiver_that_closes_at_once_is_an_error(net: Net, force: bool) -> None:
    async def play(peer: Peer) -> None:
        if force:
            await peer.reset()

    receiver = net.receiver(play)
    results = net.ask(*[receiver.url()] * 20)
    assert all(isinstance(result, OutboundError) for result in results)
    assert receiver.requests == []


@pytest.mark.parametrize("secure", [False, True])
def test_a_receiver_that_speaks_first_does_no_harm(net: Net, trusted: trustme.CA, secure: bool) -> None:
    async def play(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    receiver = net.receiver(play, tls=serving(trusted, "127.0.0.1") if secure else None)
    for _ in range(5):
        net.ask(receiver.url())  # whether it is taken for the answer is a matter of time


@pytest.mark.parametrize(
    ("play", "error"),
    [
        pytest.param(endless(b"HTTP/1.1 200 OK\r\n", b"A: " + b"x" * 1000 + b"\r\n"), "head is over", id="fields"),
        pytest.param(endless(b"HTTP/1.1 200 OK\r\nA: ", b"x" * 1000), "head is over", id="field"),
        pytest.param(endless(b"HTTP/1.1 200 ", b"x" * 1000), "head is over", id="reason"),
        pytest.param(endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "head is over", id="interim"),
    ],
)
def test_an_endless_answer_is_cut(net: Net, play: Play, error: str) -> None:
    receiver = net.receiver(play)
    assert error in net.error(receiver.url())
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    "play",
    [
        pytest.param(endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 9999), id="body"),
        pytest.param(endless(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 9999), id="length"),
        pytest.param(
            endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"3e8\r\n" + b"x" * 1000 + b"\r\n"),
            id="chunks",
        ),
        pytest.param(
            endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n", b"x" * 9999),
            id="chunk",
        ),
        pytest.param(
            endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;a=", b"x" * 9999),
            id="chunk-extension",
        ),
        pytest.param(
            endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: " + b"x" * 1000 + b"\r\n"),
            id="trailers",
        ),
    ],
)
def test_an_endless_body_is_cut_and_its_status_holds(net: Net, play: Play) -> None:
    receiver = net.receiver(play)
    assert net.status(receiver.url()) == 200
    net.until(lambda: receiver.open == 0)
    assert len(receiver.requests) == 1


def test_an_answer_over_the_bound_ends_the_connection_however_it_comes(net: Net) -> None:
    data = of_size(outbound.MAX_RESPONSE + 1)
    for pieces in ([data], [data[:9000], data[9000:]], [data[at : at + 4096] for at in range(0, len(data), 4096)]):
        receiver = net.receiver(answer(*pieces))
        assert [net.status(receiver.url()) for _ in range(2)] == [200, 200]
        assert receiver.accepted == 2


@pytest.mark.parametrize(
    "play",
    [
        pytest.param(hang, id="hanging"),
        pytest.param(slowly(b"HTTP/1.1 100 Continue\r\n\r\n"), id="dripping-interim"),
        pytest.param(slowly(b"HTTP/1.1 200 OK and so on and so on"), id="dripping-head"),
    ],
)
def test_an_answer_that_takes_too_long_is_an_error(net: Net, monkeypatch: pytest.MonkeyPatch, play: Play) -> None:
    monkeypatch.setattr(outbound, "EXCHANGE_TIME", SHORT)
    receiver = net.receiver(play)
    assert re.fullmatch(r"no response within 0\.15 s", net.error(receiver.url()))
    net.until(lambda: receiver.open == 0)
    assert len(receiver.requests) == 1


def test_a_body_that_takes_too_long_is_not_waited_for(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "EXCHANGE_TIME", SHORT)
    receiver = net.receiver(hang_after(b"HTTP/1.1 200 OK\r\n\r\nsome"))
    assert net.status(receiver.url()) == 200
    net.until(lambda: receiver.open == 0)


# Connections


def test_at_most_so_many_connections_to_an_origin_are_opened_and_used_again(net: Net) -> None:
    client = net.client(per_origin=3)
    gate = asyncio.Event()
    receiver = net.receiver(hold(gate))
    calls = [net.send(receiver.url(f"/{number}"), client) for number in range(50)]
    net.until(lambda: len(receiver.requests) == 3)
    net.spin()
    assert (len(receiver.requests), client.pending, client.waiting(receiver.url())) == (3, 50, 50)
    assert client.connections == 3
    gate.set()
    net.finish(*calls)
    assert {call.status for call in calls} == {200}
    assert receiver.accepted == receiver.most == 3
    assert len(set(receiver.requests)) == 50
    assert client.waiting(receiver.url()) == 0


def test_one_after_the_other_takes_one_connection(net: Net) -> None:
    receiver = net.receiver(answer())
    assert [net.status(receiver.url()) for _ in range(20)] == [200] * 20
    assert receiver.accepted == 1


def test_an_idle_connection_is_closed_after_a_while(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "IDLE_TIME", SHORT)
    receiver = net.receiver(answer())
    assert net.status(receiver.url()) == 200
    net.until(lambda: receiver.open == 0)
    assert net.status(receiver.url()) == 200
    assert receiver.accepted == 2


def test_hosts_and_ports_and_schemes_are_origins_of_their_own(net: Net) -> None:
    here, there = net.receiver(answer()), net.receiver(answer(), "127.0.0.2")
    net.ask(here.url(), there.url(), here.url(), there.url())
    net.until(lambda: net.plain.connections == here.accepted + there.accepted)
    assert (len(here.requests), len(there.requests)) == (2, 2)
    assert f"Host: 127.0.0.2:{there.port}\r\n".encode() in there.requests[0]


def test_a_connection_that_says_something_unasked_is_not_used_again(net: Net) -> None:
    gate = asyncio.Event()

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await gate.wait()
        await peer.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        await peer.closed()

    receiver = net.receiver(play)
    assert net.status(receiver.url()) == 200
    gate.set()
    net.until(lambda: net.plain.connections == 0)
    assert net.status(receiver.url()) == 200
    assert receiver.accepted == 2


def test_an_idle_connection_that_the_peer_closes_is_forgotten(net: Net) -> None:
    receiver = net.receiver(last_words(OK))
    for _ in range(3):
        assert net.status(receiver.url()) == 200
        net.until(lambda: net.plain.connections == 0)
    assert (receiver.accepted, len(receiver.requests)) == (3, 3)


@pytest.mark.parametrize("force", [False, True])
def test_a_connection_closed_under_a_request_is_replaced_once(net: Net, force: bool) -> None:
    """The first connection answers once and closes when it is asked again; the second is good."""

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        if peer.number > 1:
            await peer.send(OK)
            await peer.closed()
        elif force:
            await peer.reset()

    receiver = net.receiver(play)
    assert [net.status(receiver.url(f"/{number}")) for number in (1, 2, 3)] == [200, 200, 200]
    assert receiver.accepted == 2
    targets = [request.split()[1] for request in receiver.requests]
    assert targets == [b"/1", b"/2", b"/2", b"/3"]


def test_a_request_is_tried_again_only_once(net: Net) -> None:
    async def play(peer: Peer) -> None:
        if peer.number == 1:
            await peer.request()
            await peer.send(OK)
        await peer.request()

    receiver = net.receiver(play)
    assert net.status(receiver.url()) == 200
    assert CUT in net.error(receiver.url())
    assert (receiver.accepted, len(receiver.requests)) == (2, 3)


@pytest.mark.parametrize("part", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n"])
def test_a_request_that_was_answered_in_part_is_not_tried_again(net: Net, part: bytes) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        await peer.send(part)

    receiver = net.receiver(play)
    assert net.status(receiver.url()) == 200
    assert CUT in net.error(receiver.url())
    assert (receiver.accepted, len(receiver.requests)) == (1, 2)


def test_a_post_is_tried_again_only_if_it_may_be(net: Net) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        if peer.number == 1:
            await peer.send(OK)
            await peer.request()
        else:
            await peer.send(OK)
            await peer.closed()

    for again, outcome in ((False, CUT), (True, "")):
        receiver = net.receiver(play)
        assert net.status(receiver.url()) == 200
        url = receiver.url()
        answers: list[outbound.Response | outbound.OutboundError] = []
        net.plain.send(url, request(url, "POST", "/", body=b"{}"), answers.append, repeatable=again)
        net.until(lambda: bool(answers))  # noqa: B023
        assert (outcome in str(answers[0])) if outcome else answers[0] == outbound.Response(200, "")
        assert len(receiver.requests) == 2 + again


def test_what_timed_out_is_not_tried_again(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await hang(peer)

    receiver = net.receiver(play)
    assert net.status(receiver.url()) == 200
    monkeypatch.setattr(outbound, "EXCHANGE_TIME", SHORT)
    assert "no response within" in net.error(receiver.url())
    assert (receiver.accepted, len(receiver.requests)) == (1, 2)


def test_a_second_try_goes_to_a_fresh_connection_and_not_to_another_old_one(
    net: Net, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "LOOKUP_TIME", -1.0)  # every connection looks the name up
    shut, slow = asyncio.Event(), asyncio.Event()
    took: list[tuple[int, bytes]] = []

    async def play(peer: Peer) -> None:
        while True:
            target = (await peer.request()).split()[1]
            took.append((peer.number, target))
            if target == b"/shut" and peer.number < 3:
                await shut.wait()
                return
            if target == b"/slow":
                await slow.wait()
            elif target == b"/warm":
                await both.wait()
            await peer.send(OK)

    both = asyncio.Event()
    receiver = net.receiver(play)
    names["a.test"] = [["127.0.0.1"]]
    client = net.client(per_origin=2)
    warm = [net.send(receiver.url("/warm", host="a.test"), client) for _ in range(2)]
    net.until(lambda: len(took) == 2)
    both.set()
    net.finish(*warm)
    names.gates["a.test"] = threading.Event()
    calls = [net.send(receiver.url(f"/{what}", host="a.test"), client) for what in ("shut", "slow")]
    net.until(lambda: len(took) == 4)
    shut.set()
    net.until(lambda: len(names.asked) == 3)  # the second try is on its way, as far as the look-up
    slow.set()
    net.finish(calls[1])
    names.gates["a.test"].set()
    net.finish(calls[0])
    assert [call.status for call in calls] == [200, 200]
    assert [number for number, target in took if target == b"/shut"][1:] == [3]


# Many origins


def test_a_hanging_origin_holds_up_no_other(net: Net) -> None:
    gate = asyncio.Event()
    bad, good = net.receiver(hold(gate)), net.receiver(answer(), "127.0.0.2")
    stuck = [net.send(bad.url()) for _ in range(200)]
    assert net.ask(*[good.url()] * 200) == [Response(200, "")] * 200
    assert not any(call.results for call in stuck)
    gate.set()
    net.finish(*stuck)
    assert bad.most <= outbound.CONNECTIONS


def test_all_origins_share_a_bound_and_half_of_it_is_for_newcomers(net: Net) -> None:
    net.plain = net.client(in_all=4)
    greedy_gate, gate = asyncio.Event(), asyncio.Event()
    greedy = net.receiver(hold(greedy_gate))
    stuck = [net.send(greedy.url()) for _ in range(10)]
    net.until(lambda: len(greedy.requests) == 2)
    others = [net.receiver(hold(gate), f"127.0.0.{number}") for number in (2, 3, 4)]
    calls = [net.send(other.url()) for other in others for _ in range(2)]
    net.until(lambda: others[0].requests and others[1].requests)
    net.spin()
    assert net.plain.connections == 4
    assert [receiver.accepted for receiver in (greedy, *others)] == [2, 1, 1, 0]
    gate.set()
    net.finish(*calls)  # the third had to wait for the place of another, but not for the greedy one
    assert not any(call.results for call in stuck)
    greedy_gate.set()
    net.finish(*stuck)
    assert {call.status for call in stuck + calls} == {200}


def test_an_idle_connection_makes_room_for_another_origin(net: Net) -> None:
    net.plain = net.client(in_all=3)
    full = [net.receiver(answer(), f"127.0.0.{number}") for number in (1, 2, 3)]
    assert net.ask(*(receiver.url() for receiver in full)) == [Response(200, "")] * 3
    late = net.receiver(answer(), "127.0.0.4")
    assert net.ask(*[late.url()] * 5) == [Response(200, "")] * 5
    assert net.plain.connections <= 3
    net.until(lambda: sum(receiver.open for receiver in full) == 2)
    net.spin()
    assert sum(receiver.open for receiver in full) == 2, "more than one made room"
    assert late.most == 1


def test_a_busy_origin_gives_a_place_to_one_that_has_none(net: Net) -> None:
    net.plain = net.client(in_all=4)
    tick, never = asyncio.Semaphore(0), asyncio.Event()

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            await tick.acquire()
            await peer.send(OK)

    busy = net.receiver(play)
    work = [net.send(busy.url()) for _ in range(9)]
    net.until(lambda: len(busy.requests) == 2)
    held = [net.receiver(hold(never), f"127.0.0.{number}") for number in (2, 3)]
    stuck = [net.send(receiver.url()) for receiver in held]
    net.until(lambda: all(receiver.requests for receiver in held))
    late = net.receiver(answer(), "127.0.0.4")
    call = net.send(late.url())
    net.spin()
    assert call.results == []
    tick.release()
    net.finish(call)
    assert call.status == 200
    net.until(lambda: busy.open == 1)
    assert sum(bool(other.results) for other in work) == 1
    never.set()
    for _ in work:
        tick.release()
    net.finish(*work, *stuck)


def test_with_more_origins_than_connections_all_are_served(net: Net) -> None:
    net.plain = net.client(in_all=2)
    receivers = [net.receiver(answer(), f"127.0.0.{number}") for number in range(1, 13)]
    urls = [receiver.url() for receiver in receivers for _ in range(5)]
    assert net.ask(*urls) == [Response(200, "")] * 60


def test_what_waits_too_long_for_a_connection_is_dropped(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = asyncio.Event()
    receiver = net.receiver(hold(gate))
    client = net.client(per_origin=1)
    first = net.send(receiver.url(), client)
    net.until(lambda: receiver.requests)
    monkeypatch.setattr(outbound, "QUEUE_TIME", SHORT)
    late = [net.send(receiver.url(), client) for _ in range(3)]
    net.finish(*late)
    assert {type(call.result) for call in late} == {DroppedError}
    assert {call.error for call in late} == {"waited 0.15 s for a connection"}
    assert first.results == []
    gate.set()
    net.finish(first)
    assert first.status == 200
    assert len(receiver.requests) == 1


def test_what_waits_can_be_dropped(net: Net) -> None:
    gate = asyncio.Event()
    receiver, other = net.receiver(hold(gate)), net.receiver(hold(gate), "127.0.0.2")
    client = net.client(per_origin=1)
    first, kept = net.send(receiver.url(), client), net.send(other.url(), client)
    net.until(lambda: receiver.requests and other.requests)
    late, later = net.send(receiver.url(), client), net.send(other.url(), client)
    client.drop(receiver.url(), DroppedError("enough"))
    client.drop(parse(b"http://127.0.0.3/"), DroppedError("nothing to drop"))
    assert late.error == "enough"
    assert client.waiting(receiver.url()) == 1
    gate.set()
    net.finish(first, kept, later)
    assert [first.status, kept.status, later.status] == [200, 200, 200]
    assert (len(receiver.requests), len(other.requests)) == (1, 2)


def test_who_asks_again_when_told_is_not_told_for_ever(net: Net) -> None:
    gate = asyncio.Event()
    receiver = net.receiver(hold(gate))
    client = net.client(per_origin=1)
    first = net.send(receiver.url(), client)
    net.until(lambda: receiver.requests)
    again: list[Call] = []
    told: list[Result] = []

    def done(result: Result) -> None:
        told.append(result)
        again.append(net.send(receiver.url(), client))

    client.send(receiver.url(), request(receiver.url(), "GET", "/"), done, repeatable=True)
    client.drop(receiver.url(), DroppedError("enough"))
    assert [str(result) for result in told] == ["enough"]
    gate.set()
    net.finish(first, *again)
    assert [call.status for call in (first, *again)] == [200, 200]


def test_each_connection_that_ends_is_followed_by_another_while_there_is_work(net: Net) -> None:
    client = net.client(per_origin=2)
    closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    receiver = net.receiver(last_words(closing))
    assert net.ask(*[receiver.url()] * 20, client=client) == [Response(200, "")] * 20
    assert receiver.accepted == len(receiver.requests) == 20


def test_the_next_in_the_queue_goes_on_after_a_failure(net: Net) -> None:
    async def play(peer: Peer) -> None:
        while (await peer.request()).startswith(b"GET /good "):
            await peer.send(OK)
        await peer.send(b"no")

    client = net.client(per_origin=1)
    receiver = net.receiver(play)
    calls = [net.send(receiver.url(path), client) for path in ("/bad", "/good", "/bad", "/good", "/good")]
    net.finish(*calls)
    assert [isinstance(call.result, Response) for call in calls] == [False, True, False, True, True]
    assert (receiver.accepted, len(receiver.requests)) == (3, 5)


@pytest.mark.parametrize("seed", range(4))
def test_in_the_greatest_disorder_each_exchange_ends_once(net: Net, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Receivers that do at each turn one of many things, with too few connections and too little time."""
    for name, value in {"EXCHANGE_TIME": 0.1, "QUEUE_TIME": 0.5, "IDLE_TIME": 0.05}.items():
        monkeypatch.setattr(outbound, name, value)
    chance = random.Random(seed)
    turns: list[tuple[bytes, str]] = [
        *[(OK, "on")] * 6,
        *((OK, "close"), (OK, "reset"), (OK[:-1], "close"), (OK[:-1], "reset"), (OK + b"x", "on")),
        *((b"", "close"), (b"", "reset"), (b"", "hang"), (b"garbage", "on"), (OK[:20], "hang")),
    ]

    async def play(peer: Peer) -> None:
        after = "on"
        while after == "on":
            await peer.request()
            data, after = chance.choice(turns)
            await peer.send(data)
        if after == "hang":
            await peer.closed()
        elif after == "reset":
            await peer.reset()

    bad = [net.receiver(play, f"127.0.0.{number}") for number in range(1, 11)]
    client = net.client(per_origin=3, in_all=8)
    calls = []
    for _ in range(15):
        calls += [net.send(chance.choice(bad).url(), client) for _ in range(20)]
        net.run(asyncio.sleep(0.01))
        if chance.random() < 0.2:
            client.drop(chance.choice(bad).url(), DroppedError("enough"))
        assert client.connections <= 8
    net.run(client.settle())
    assert all(len(call.results) == 1 for call in calls)
    assert any(isinstance(call.result, Response) for call in calls)
    assert sum(len(receiver.requests) for receiver in bad) <= 2 * len(calls)
    assert [client.waiting(receiver.url()) for receiver in bad] == [0] * 10
    monkeypatch.setattr(outbound, "EXCHANGE_TIME", GUARD_TIME)
    monkeypatch.setattr(outbound, "QUEUE_TIME", GUARD_TIME)
    good = net.receiver(answer(), "127.0.0.20")
    assert net.status(good.url(), client) == 200


def test_who_fails_when_told_harms_no_other(net: Net) -> None:
    told: list[Result] = []

    def done(result: Result) -> None:
        told.append(result)
        raise ValueError("what they were told was too much")

    good, bad = net.receiver(answer()), parse(b"http://127.0.0.9:%d/" % net.receiver(answer()).port)
    for url in (good.url(), bad):
        for _ in range(3):
            net.plain.send(url, request(url, "GET", "/"), done, repeatable=True)
    net.run(net.plain.settle())
    assert len(told) == len(net.errors) == 6
    net.errors.clear()
    assert net.status(good.url()) == 200


# Connecting


def test_nobody_listens(net: Net) -> None:
    receiver = net.receiver(answer())
    net.run(receiver.stop())
    results = net.ask(*[receiver.url()] * 20)
    assert {str(result) for result in results} == {"Connection refused"}
    net.until(lambda: net.plain.connections == 0)


def test_the_first_address_that_answers_is_taken(net: Net, names: Names) -> None:
    receiver = net.receiver(answer())
    names["a.test"] = [["127.0.0.9", "::1", "127.0.0.1", "127.0.0.8"]]  # nobody listens on the first two
    assert net.ask(*[receiver.url(host="a.test")] * 3) == [Response(200, "")] * 3
    assert names.asked == ["a.test"]
    assert f"Host: a.test:{receiver.port}\r\n".encode() in receiver.requests[0]


def test_an_error_when_no_address_answers(net: Net, names: Names) -> None:
    receiver = net.receiver(answer())
    names["a.test"] = [["127.0.0.9", "127.0.0.8"]]
    assert net.error(receiver.url(host="a.test")) == "Connection refused"


@pytest.fixture
def full_listener() -> Iterator[socket.socket]:
    """A listener whose queue is full: the kernel answers no further connection."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(8)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener
        for sock in waiting:
            sock.close()


def test_a_connection_that_takes_too_long_is_an_error(
    net: Net, monkeypatch: pytest.MonkeyPatch, full_listener: socket.socket
) -> None:
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)
    url = parse(b"http://127.0.0.1:%d/" % full_listener.getsockname()[1])
    assert {str(result) for result in net.ask(*[url] * 5)} == {"no connection in time"}
    net.until(lambda: net.plain.connections == 0)


def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    net: Net, names: Names, monkeypatch: pytest.MonkeyPatch, full_listener: socket.socket
) -> None:
    monkeypatch.setattr(outbound, "CONNECT_TIME", 2.0)
    port = full_listener.getsockname()[1]
    receiver = net.receiver(answer(), "127.0.0.2", port=port)
    names["a.test"] = [["127.0.0.1", "127.0.0.2"]]
    assert net.status(receiver.url(host="a.test")) == 200


def test_an_error_comes_in_time_though_more_is_asked_for_all_the_while(
    net: Net, monkeypatch: pytest.MonkeyPatch, full_listener: socket.socket
) -> None:
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)
    url = parse(b"http://127.0.0.1:%d/" % full_listener.getsockname()[1])
    first = net.send(url)
    more = []

    async def ask_on() -> None:
        while not first.results:
            more.append(net.send(url))
            await asyncio.sleep(0.02)

    net.run(ask_on())
    net.finish(*more)
    assert {call.error for call in (first, *more)} == {"no connection in time"}


def test_every_one_gets_an_error_with_one_connection_at_a_time(net: Net, full_listener: socket.socket) -> None:
    """What is asked for while an attempt is under way gets one of its own when that fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbound, "CONNECT_TIME", SHORT)
        client = net.client(per_origin=1)
        url = parse(b"http://127.0.0.1:%d/" % full_listener.getsockname()[1])
        first = net.send(url, client)
        net.run(asyncio.sleep(0.03))
        second = net.send(url, client)
        net.finish(first, second)
        assert (first.error, second.error) == ("no connection in time", "no connection in time")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this host has no ::1")
def test_ipv6(net: Net, names: Names) -> None:
    receiver = net.receiver(answer(), "::1")
    names["six.test"] = [["127.0.0.1", "::1"]]
    assert net.status(receiver.url()) == 200
    assert net.status(receiver.url(host="[0:0::0:1]")) == 200
    assert net.status(receiver.url(host="six.test")) == 200
    assert f"Host: [::1]:{receiver.port}\r\n".encode() in receiver.requests[0]
    assert receiver.accepted == 2
    assert "may be reached" in net.error(receiver.url(), net.client(Guard()))


# The end


def test_settling_waits_for_all_that_is_pending(net: Net) -> None:
    gate = asyncio.Event()
    receiver = net.receiver(hold(gate))
    client = net.client(per_origin=1)
    net.run(client.settle())  # nothing is pending
    calls = [net.send(receiver.url(), client) for _ in range(5)]
    waiters = [net.loop.create_task(client.settle()) for _ in range(2)]
    net.until(lambda: receiver.requests)
    net.spin()
    assert not any(waiter.done() for waiter in waiters)
    gate.set()

    async def settle() -> None:
        await asyncio.gather(*waiters)

    net.run(settle())
    assert [call.status for call in calls] == [200] * 5


def test_closing_ends_everything_with_an_error(net: Net, names: Names, full_listener: socket.socket) -> None:
    gate = asyncio.Event()
    names["lost.test"] = [["127.0.0.1"]]
    names.gates["lost.test"] = threading.Event()
    held, idle = net.receiver(hold(gate)), net.receiver(answer(), "127.0.0.2")
    client = net.client(per_origin=2)
    assert net.ask(idle.url(), client=client) == [Response(200, "")]
    calls = [
        *(net.send(held.url(), client) for _ in range(5)),  # two under way, the others in the queue
        net.send(held.url(host="lost.test"), client),  # a look-up
        net.send(parse(b"http://127.0.0.1:%d/" % full_listener.getsockname()[1]), client),  # connecting
    ]
    net.until(lambda: len(held.requests) == 2 and names.asked)
    calls.append(net.send(held.url(host="127.0.0.1"), client))
    calls.append(net.send(parse(b"http://127.0.0.3/"), client))  # not even begun
    client.close()
    net.until(lambda: client.connections == 0 and idle.open == 0)
    assert {call.error for call in calls} == {"stopped"}
    assert client.pending == 0
    names.gates["lost.test"].set()
    net.spin()


def test_closing_does_not_take_back_a_status_that_is_known(net: Net) -> None:
    client = net.client()
    call = net.send(net.receiver(hang_after(b"HTTP/1.1 200 OK\r\n\r\nsome")).url(), client)
    net.until(lambda: any(c._status for origin in client._origins.values() for c in origin.connections))
    client.close()
    assert call.status == 200


def test_what_is_asked_for_after_closing_is_an_error(net: Net, names: Names) -> None:
    receiver = net.receiver(answer())
    names["a.test"] = [["127.0.0.1"]]
    client = net.client()
    assert net.ask(receiver.url(), client=client) == [Response(200, "")]
    client.close()
    results = net.ask(receiver.url(), receiver.url(host="a.test"), client=client)
    assert [str(result) for result in results] == ["stopped", "stopped"]
    client.close()
    assert receiver.accepted == 1


def test_an_exchange_can_be_awaited_or_left(net: Net) -> None:
    gate = asyncio.Event()
    good, held = net.receiver(answer()), net.receiver(hold(gate), "127.0.0.2")
    bad = net.receiver(last_words(b"no"), "127.0.0.3")

    def ask(url: Url) -> Coroutine[Any, Any, Response]:
        return net.plain.exchange(url, request(url, "POST", url.target, "A: b\r\n", b"{}"))

    assert net.run(ask(good.url("/x"))) == Response(200, "")
    assert good.requests[0].startswith(b"POST /x HTTP/1.1\r\n")
    assert b"\r\nA: b\r\n" in good.requests[0]
    with pytest.raises(OutboundError, match=NOT_HTTP):
        net.run(ask(bad.url()))
    left = net.loop.create_task(ask(held.url()))
    net.until(lambda: held.requests)
    left.cancel()
    gate.set()
    net.run(net.plain.settle())
    assert left.cancelled()


def test_an_origin_without_work_is_forgotten(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "IDLE_TIME", 0.0)
    receiver = net.receiver(answer())
    for number in range(1, 30):
        net.send(receiver.url(host=f"127.0.1.{number}"))  # nobody listens there
    assert net.status(receiver.url()) == 200
    net.until(lambda: not net.plain._origins)
    assert net.plain.connections == 0
    assert net.status(receiver.url()) == 200


# TLS


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusted(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """An authority that the system trusts."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return authority


def serving(authority: trustme.CA, *identities: str, **options: Any) -> ssl.SSLContext:
    """Return a receiver's settings, with a certificate for some names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*identities, **options).configure_cert(context)
    return context


def test_tls_with_a_good_certificate(net: Net, names: Names, trusted: trustme.CA) -> None:
    context = serving(trusted, "good.test", "*.many.test")
    context.set_alpn_protocols(["h2", "http/1.1"])
    shown: list[str | None] = []
    context.sni_callback = lambda _, name, __: shown.append(name)
    spoken: list[tuple[str | None, str | None]] = []

    async def play(peer: Peer) -> None:
        tls = peer.writer.get_extra_info("ssl_object")
        spoken.append((tls.selected_alpn_protocol(), tls.version()))
        await answer()(peer)

    receiver = net.receiver(play, tls=context)
    names["good.test"] = names["a.many.test"] = names["good.test."] = [["127.0.0.1"]]
    assert [net.status(receiver.url(host="good.test")) for _ in range(3)] == [200] * 3
    assert receiver.accepted == 1
    assert net.status(receiver.url(host="a.many.test")) == 200
    assert net.status(receiver.url(host="GOOD.test.")) == 200
    assert shown == ["good.test", "a.many.test", "good.test"]
    assert spoken == [("http/1.1", "TLSv1.3")] * 3


def test_tls_to_an_address(net: Net, trusted: trustme.CA) -> None:
    context = serving(trusted, "127.0.0.1")
    shown: list[str | None] = []
    context.sni_callback = lambda _, name, __: shown.append(name)
    receiver = net.receiver(answer(), tls=context)
    assert net.status(receiver.url()) == 200
    assert shown == [None]
    other = net.receiver(answer(), "127.0.0.2", tls=context)
    assert "TLS failed: CERTIFICATE_VERIFY_FAILED" in net.error(other.url())
    assert other.requests == []


def utc_days(number: int) -> datetime:
    return datetime.now(UTC) + timedelta(days=number)


@pytest.mark.parametrize(
    ("identity", "options"),
    [
        pytest.param("other.test", {}, id="other-name"),
        pytest.param("*.good.test", {}, id="wildcard-below"),
        pytest.param("sub.good.test", {}, id="sub-domain"),
        pytest.param("127.0.0.1", {}, id="its-address"),
        pytest.param("good.test", {"not_before": utc_days(-9), "not_after": utc_days(-1)}, id="expired"),
        pytest.param("good.test", {"not_before": utc_days(1), "not_after": utc_days(9)}, id="not-yet"),
    ],
)
def test_tls_with_a_bad_certificate(
    net: Net, names: Names, trusted: trustme.CA, identity: str, options: dict[str, datetime]
) -> None:
    names["good.test"] = [["127.0.0.1"]]
    receiver = net.receiver(answer(), tls=serving(trusted, identity, **options))
    assert net.error(receiver.url(host="good.test")) == "TLS failed: CERTIFICATE_VERIFY_FAILED"
    assert receiver.requests == []
    assert net.plain.connections == 0


def test_tls_with_a_certificate_that_nobody_trusts(net: Net, names: Names, trusted: trustme.CA) -> None:
    names["good.test"] = [["127.0.0.1"]]
    stranger = trustme.CA()
    receiver = net.receiver(answer(), tls=serving(stranger, "good.test"))
    assert net.error(receiver.url(host="good.test")) == "TLS failed: CERTIFICATE_VERIFY_FAILED"
    assert receiver.requests == []


def test_tls_with_a_server_that_does_not_speak_it(net: Net) -> None:
    async def play(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await peer.closed()

    receiver = net.receiver(play)
    assert net.error(receiver.url(secure=True)).startswith("TLS failed: ")
    assert receiver.requests == []


@pytest.mark.parametrize("force", [False, True])
def test_tls_that_ends_amid_the_handshake(net: Net, force: bool) -> None:
    async def play(peer: Peer) -> None:
        await peer.reader.read(1)
        if force:
            await peer.reset()

    assert net.error(net.receiver(play).url(secure=True))
    assert net.plain.connections == 0


def test_a_handshake_that_takes_too_long_is_an_error(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)

    async def play(peer: Peer) -> None:
        await peer.closed()

    receiver = net.receiver(play)
    results = net.ask(*[receiver.url(secure=True)] * 5)
    assert {str(result) for result in results} == {"no connection in time"}
    net.until(lambda: net.plain.connections == receiver.open == 0)


def test_old_tls_is_refused(net: Net, trusted: trustme.CA) -> None:
    context = serving(trusted, "127.0.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    receiver = net.receiver(answer(), tls=context)
    assert net.error(receiver.url())
    assert receiver.accepted == 0

    async def connect() -> None:
        old = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.set_ciphers("ALL:@SECLEVEL=0")
        _, writer = await asyncio.open_connection("127.0.0.1", receiver.port, ssl=old)
        writer.close()
        await writer.wait_closed()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net.run(connect())  # it serves those who put up with it

    newer = serving(trusted, "127.0.0.1")
    newer.maximum_version = ssl.TLSVersion.TLSv1_2
    assert net.status(net.receiver(answer(), tls=newer).url()) == 200


def test_plain_text_to_a_server_of_tls(net: Net, trusted: trustme.CA) -> None:
    receiver = net.receiver(answer(), tls=serving(trusted, "127.0.0.1"))
    assert net.error(receiver.url(secure=False))
    assert receiver.requests == []


def test_tls_answers_in_every_framing(net: Net, trusted: trustme.CA) -> None:
    context = serving(trusted, "127.0.0.1")
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    good = net.receiver(answer(*(chunks[at : at + 1] for at in range(len(chunks)))), tls=context)
    assert [net.status(good.url()) for _ in range(2)] == [200, 200]
    assert good.accepted == 1
    assert net.status(net.receiver(last_words(b"HTTP/1.1 200 OK\r\n\r\nthe rest"), tls=context).url()) == 200
    assert CUT in net.error(net.receiver(last_words(b"HTTP/1.1 200 OK\r\n"), tls=context).url())


def test_tls_connection_closed_under_a_request_is_replaced(net: Net, trusted: trustme.CA) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        if peer.number > 1:
            await peer.send(OK)
            await peer.closed()

    receiver = net.receiver(play, tls=serving(trusted, "127.0.0.1"))
    assert [net.status(receiver.url()) for _ in range(3)] == [200] * 3
    assert (receiver.accepted, len(receiver.requests)) == (2, 4)


# Names


def test_a_name_that_leads_to_a_forbidden_address_is_refused(net: Net, names: Names) -> None:
    receiver = net.receiver(answer())
    names["inside.test"] = [["127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"]]
    client = net.client(Guard())
    results = net.ask(*[receiver.url(host="inside.test")] * 5, receiver.url(), client=client)
    assert {type(result) for result in results} == {ForbiddenError}
    assert receiver.accepted == 0
    assert client.connections == 0


def test_localhost_is_refused_as_the_system_resolves_it(net: Net) -> None:
    receiver = net.receiver(answer())
    [result] = net.ask(receiver.url(host="localhost"), client=net.client(Guard()))
    assert isinstance(result, ForbiddenError)
    assert receiver.accepted == 0
    assert net.status(receiver.url(host="localhost")) == 200


def test_of_several_addresses_only_allowed_ones_are_connected_to(net: Net, names: Names) -> None:
    good = net.receiver(answer())
    inside = net.receiver(answer(), "127.0.0.2", port=good.port)
    client = net.client(Guard([ip_network("127.0.0.1/32"), ip_network("127.0.0.9/32")]))
    names["mixed.test"] = [["127.0.0.2", "127.0.0.9", "127.0.0.1", "127.0.0.2"]]
    assert net.ask(*[good.url(host="mixed.test")] * 3, client=client) == [Response(200, "")] * 3
    assert inside.accepted == 0


def test_a_name_that_changes_its_mind_is_judged_each_time(
    net: Net, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that says a good address at first and a forbidden one then: rebinding."""
    monkeypatch.setattr(outbound, "LOOKUP_TIME", -1.0)
    good = net.receiver(last_words(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"))
    inside = net.receiver(answer(), "127.0.0.2", port=good.port)
    client = net.client(Guard([ip_network("127.0.0.1/32")]))
    names["rebinds.test"] = [["127.0.0.1"], ["127.0.0.2"]]
    url = good.url(host="rebinds.test")
    assert net.ask(url, client=client) == [Response(200, "")]
    assert names.asked == ["rebinds.test"], "looked up again after it was judged"
    net.until(lambda: client.connections == 0)
    [result] = net.ask(url, client=client)
    assert isinstance(result, ForbiddenError)
    assert names.asked == ["rebinds.test"] * 2
    assert (good.accepted, inside.accepted) == (1, 0)


def test_an_unknown_name_is_an_error(net: Net, names: Names) -> None:
    assert net.error(parse(b"http://nobody.test/")) == "Name or service not known"
    assert net.error(parse(b"http://nobody.test/")) == "Name or service not known"
    assert names.asked == ["nobody.test"]


def test_a_name_without_addresses_is_an_error(net: Net, names: Names) -> None:
    names["empty.test"] = [[]]
    assert net.error(parse(b"http://empty.test/"))


def test_a_look_up_is_shared_and_kept_for_a_while(net: Net, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver, other = net.receiver(answer()), net.receiver(answer())
    names["a.test"] = [["127.0.0.1"]]
    names.gates["a.test"] = threading.Event()
    calls = [net.send(where.url(host="a.test")) for where in (receiver, other) for _ in range(9)]
    net.until(lambda: names.asked)
    net.spin()
    names.gates["a.test"].set()
    net.finish(*calls)
    assert names.asked == ["a.test"]
    third = net.receiver(answer())
    assert net.status(third.url(host="a.test")) == 200
    assert names.asked == ["a.test"]
    monkeypatch.setattr(outbound, "LOOKUP_TIME", -1.0)  # that was long ago
    assert net.status(net.receiver(answer()).url(host="a.test")) == 200
    assert names.asked == ["a.test"] * 2


def test_a_look_up_that_hangs_holds_up_no_other_origin(net: Net, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = net.receiver(answer())
    names["a.test"] = names["lost.test"] = [["127.0.0.1"]]
    names.gates["lost.test"] = threading.Event()
    stuck = [net.send(receiver.url(host="lost.test")) for _ in range(5)]
    net.until(lambda: names.asked)
    assert net.ask(receiver.url(host="a.test"), receiver.url()) == [Response(200, "")] * 2
    assert not any(call.results for call in stuck)
    names.gates["lost.test"].set()
    net.finish(*stuck)
    assert {call.status for call in stuck} == {200}


def test_a_look_up_that_takes_too_long_is_an_error(net: Net, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)
    names.gates["lost.test"] = threading.Event()
    results = net.ask(*[parse(b"http://lost.test/")] * 3)
    assert {str(result) for result in results} == {"no connection in time"}
    net.until(lambda: net.plain.connections == 0)


def test_so_many_names_are_looked_up_at_a_time(net: Net, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "LOOKUPS", 2)
    receiver = net.receiver(answer())
    for number in range(5):
        names[f"{number}.test"] = [["127.0.0.1"]]
        names.gates[f"{number}.test"] = threading.Event()
    calls = [net.send(receiver.url(host=f"{number}.test")) for number in range(5)]
    net.until(lambda: len(names.asked) == 2)
    net.spin()
    assert len(names.asked) == 2
    for gate in names.gates.values():
        gate.set()
    net.finish(*calls)
    assert {call.status for call in calls} == {200}


def test_look_ups_that_nobody_waits_for_count_until_they_end(
    net: Net, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "LOOKUPS", 1)
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)
    receiver = net.receiver(answer())
    names["lost.test"] = names["a.test"] = names["b.test"] = [["127.0.0.1"]]
    names.gates["lost.test"] = threading.Event()
    assert net.error(receiver.url(host="lost.test")) == "no connection in time"
    assert net.error(receiver.url(host="a.test")) == "no connection in time"
    assert names.asked == ["lost.test"]
    names.gates["lost.test"].set()
    monkeypatch.setattr(outbound, "CONNECT_TIME", GUARD_TIME)
    assert net.status(receiver.url(host="b.test")) == 200


def test_without_a_thread_a_look_up_is_an_error(net: Net, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "LOOKUPS", 1)
    receiver = net.receiver(answer())
    names["a.test"] = names["b.test"] = [["127.0.0.1"]]

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert net.error(receiver.url(host="a.test")) == "no thread to look the name up"
    assert net.status(receiver.url(host="b.test")) == 200


# URLs


@pytest.mark.parametrize(
    ("text", "url"),
    [
        (b"http://a", Url(False, "a", 80, "/", "")),
        (b"http://a/", Url(False, "a", 80, "/", "")),
        (b"HTTPS://Example.COM/Path?Query#Fragment", Url(True, "example.com", 443, "/Path", "?Query")),
        (b"http://a?x=1", Url(False, "a", 80, "/", "?x=1")),
        (b"http://a#f?x", Url(False, "a", 80, "/", "")),
        (b"http://a/?", Url(False, "a", 80, "/", "?")),
        (b"http://a/b?c?d/e:@", Url(False, "a", 80, "/b", "?c?d/e:@")),
        (b"http://a:8080/", Url(False, "a", 8080, "/", "")),
        (b"https://a:80/", Url(True, "a", 80, "/", "")),
        (b"http://a:00080/", Url(False, "a", 80, "/", "")),
        (b"http://a:65535", Url(False, "a", 65535, "/", "")),
        (b"http://a_b.c-d.example./", Url(False, "a_b.c-d.example.", 80, "/", "")),
        (b"http://xn--bcher-kva.example/", Url(False, "xn--bcher-kva.example", 80, "/", "")),
        (b"http://1.2.3.4/", Url(False, "1.2.3.4", 80, "/", "")),
        (b"http://1.2.3.4.example/", Url(False, "1.2.3.4.example", 80, "/", "")),
        (b"http://[::1]/", Url(False, "::1", 80, "/", "")),
        (b"http://[2001:DB8:0:0::1]:81/", Url(False, "2001:db8::1", 81, "/", "")),
        (b"http://[::ffff:1.2.3.4]/", Url(False, str(IPv6Address("::ffff:1.2.3.4")), 80, "/", "")),
        (b"http://u:p@a/", Url(False, "a", 80, "/", "", "Basic dTpw")),
        (b"http://u@a/", Url(False, "a", 80, "/", "", "Basic dTo=")),
        (b"http://%3A:%0D%0A@a/", Url(False, "a", 80, "/", "", "Basic OjoNCg==")),
        (b"http://@a/", Url(False, "a", 80, "/", "", "Basic Og==")),
        (b"http://a/%0d%0a/../\"<>\\^`{|}[]@:'", Url(False, "a", 80, "/%0d%0a/../\"<>\\^`{|}[]@:'", "")),
        (b"http://" + b"a" * 63 + b".b/", Url(False, "a" * 63 + ".b", 80, "/", "")),
        (b"http://a/" + b"x" * 4087, Url(False, "a", 80, "/" + "x" * 4087, "")),
    ],
)
def test_good_urls(text: bytes, url: Url) -> None:
    assert parse(text) == url
    assert len(set(url.origin)) == 3


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"a",
        b"/a",
        b"//a/b",
        b"a.example/b",
        b"http:",
        b"http:/a",
        b"http://",
        b"http:///a",
        b"http://?a",
        b"http://#a",
        b"http://:80/",
        b"http://a:/",
        b"ftp://a/",
        b"file:///etc/passwd",
        b"javascript://a/",
        b"httpx://a/",
        b" http://a/",
        b"http://a/ ",
        b"http://a/\n",
        b"http://a\n",
        b"http://a/b c",
        b"http://a/\r\nX: y",
        b"http://a\r\nX: y/",
        b"http://a/?\r\nX: y",
        b"http://a/#\r\nX: y",
        b"http://u\r\n@a/",
        b"http://a/\0",
        b"http://a/\x7f",
        b"http://a/\xc3\xa4",
        b"http://\xc3\xa4/",
        b"http://a/#\xff",
        b"http://a:0/",
        b"http://a:65536/",
        b"http://a:99999999/",
        b"http://a:-1/",
        b"http://a:+80/",
        b"http://a:8 0/",
        b"http://a:x/",
        b"http://a b/",
        b"http://a%2eb/",
        b"http://a\\b/",
        b"http://good.example\\@b/",
        b"http://a@b@c/",
        b"http://a@b\\@c/",
        b"http://u:p@/",
        b"http://.a/",
        b"http://a..b/",
        b"http://./",
        b"http://-a/",
        b"http://a-/",
        b"http://a.-b.c/",
        b"http://" + b"a" * 64 + b"/",
        b"http://" + b"a." * 127 + b"/",
        b"http://127.1/",
        b"http://2130706433/",
        b"http://0x7f000001/",
        b"http://0x7f.1/",
        b"http://0X7F.0.0.1/",
        b"http://0177.0.0.1/",
        b"http://127.0.0.01/",
        b"http://127.0.0.0x1/",
        b"http://127.0.0.1./",
        b"http://256.0.0.1/",
        b"http://1.2.3/",
        b"http://1.2.3.4.5/",
        b"http://a.1/",
        b"http://a.0x/",
        b"http://[]/",
        b"http://[::1/",
        b"http://::1/",
        b"http://[::1]a/",
        b"http://[::1]:x/",
        b"http://[1.2.3.4]/",
        b"http://[:::]/",
        b"http://[::g]/",
        b"http://[::1%lo]/",
        b"http://[::1%25lo]/",
        b"http://[v1.a]/",
        b"http://a/" + b"x" * 4088,
    ],
)
def test_bad_urls(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"^expected ") as caught:
        parse(text)
    assert not isinstance(caught.value, UnicodeError)
    assert re.fullmatch(r"expected [a-zA-Z0-9 ]+", str(caught.value)), "it may repeat what came in"


def test_what_of_a_url_may_be_logged() -> None:
    assert parse(b"http://[::1]/secret?token").place == "http://[::1]:80"
    assert parse(b"https://u:p@a.example/secret?token").place == "https://a.example:443"


_URL_BYTES = st.one_of(
    st.binary(max_size=40),
    st.lists(
        st.sampled_from(
            [
                *(b"http://", b"https://", b"HTTP://", b"a", b"b.example", b"127.0.0.1", b"[::1]", b"[::ffff:1.2.3.4]"),
                *(b":", b"80", b"443", b"@", b"/", b"?", b"#", b"%0d%0a", b"\r\n", b"\r", b"\n", b"\0", b" ", b"\t"),
                *(b"\r\nX: y\r\n", b"\\", b".", b"..", b"0x7f", b"1", b"-", b"_", b"\x80", b"\xe2\x80\xa8", b"u:p"),
            ]
        ),
        max_size=9,
    ).map(b"".join),
    st.from_regex(rb"https?://([a-z0-9:%!]{0,9}@)?[a-z0-9.\-_\[\]:]{1,20}(:[0-9]{0,6})?(/.{0,20})?(\?.{0,9})?"),
)


@examples(deadline=None)
@given(
    _URL_BYTES | _URL_BYTES.map(b"http://".__add__) | _URL_BYTES.map(b"https://a/".__add__),
    st.sampled_from(["GET", "POST"]),
    st.sampled_from([b"", b'{"count": 1}']),
)
@example(b"http://u@[::1]:8080/a?b#c", "POST", b"{}")
@example(b"https://a:443", "GET", b"")
def test_whatever_is_parsed_makes_one_well_formed_request(text: bytes, method: str, body: bytes) -> None:
    try:
        url = parse(text)
    except ValueError:
        return
    data = request(url, method, url.target, body=body)
    head, end, rest = data.partition(b"\r\n\r\n")
    assert (end, rest) == (b"\r\n\r\n", body)
    start, *lines = head.split(b"\r\n")
    assert re.fullmatch(rb"%b /[!-~]* HTTP/1\.1" % method.encode(), start)
    assert b"#" not in start
    assert all(re.fullmatch(rb"[A-Za-z-]+: [!-~]([ -~]*[!-~])?", line) for line in lines)
    fields = {name: value for name, _, value in (line.partition(b": ") for line in lines)}
    expected = {b"Host", b"User-Agent"} | ({b"Authorization"} if url.authorization else set())
    if body or method == "POST":
        expected |= {b"Content-Type", b"Content-Length"}
    assert set(fields) == expected
    assert len(lines) == len(expected), "a field stands there twice"

    again = parse((b"https://" if url.secure else b"http://") + fields[b"Host"] + url.target.encode())
    assert again == url._replace(authorization="")
    server = h11.Connection(h11.SERVER)
    server.receive_data(data)
    event = server.next_event()
    assert isinstance(event, h11.Request)
    assert event.target == url.target.encode()


# The guard

SPECIAL_4 = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
    *("224.0.0.0/4", "240.0.0.0/4"),
]
EDGES_4 = [
    (str(ip_address(int(ip_network(block)[at]) + step)), block, step == 0)
    for block in SPECIAL_4
    for at, step in ((0, 0), (-1, 0), (0, -1), (-1, 1))
    if 0 <= int(ip_network(block)[at]) + step < 2**32
]
NO_GLOBALS = [ip_network("192.88.99.0/24"), ip_network("192.0.0.0/24")]  # here ipaddress has exceptions, or none


def embedded(address: IPv4Address) -> list[IPv6Address]:
    """Return the IPv6 addresses that lead to an IPv4 address."""
    number = int(address)
    return [
        IPv6Address((0xFFFF << 32) | number),  # mapped
        IPv6Address(int(IPv6Address("64:ff9b::")) | number),  # NAT64
        IPv6Address((0x2002 << 112) | (number << 80)),  # 6to4
        IPv6Address((0x2002 << 112) | (number << 80) | 1),
    ]


@pytest.mark.parametrize(("text", "block", "within"), EDGES_4)
def test_the_edges_of_special_ipv4_blocks(text: str, block: str, within: bool) -> None:
    address = IPv4Address(text)
    expected = not within and not any(address in ip_network(other) for other in SPECIAL_4)
    forms: list[outbound.Address] = [address, *embedded(address)]
    assert {Guard().allows(form) for form in forms} == {expected}
    if not address.is_multicast and not any(address in block for block in NO_GLOBALS):
        assert address.is_global == expected


CLOSED_6 = [
    *("::", "::1", "::2", "::7f00:1", "::127.0.0.1", "::8.8.8.8", "::ffff:0:0", "::ffff:0:8.8.8.8", "::1:0:0:0"),
    *("64:ff9a:ffff:ffff:ffff:ffff:ffff:ffff", "64:ff9b::1:0:0", "64:ff9b:1::", "64:ff9b:1:ffff::1", "100::", "100::1"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a9fe:a9fe::", "2002:c0a8::1"),
    *("2001::", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:1ff:ffff::", "2001:2::1", "2001:10::1"),
    *("2001:20::1", "2001:db8::", "2001:db8::1", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", "3fff::", "3fff:fff::1"),
    *("1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "4000::", "5f00::1", "fc00::", "fc00::1", "fd00::1", "fdff:ffff::1"),
    *("fd00:ec2::254", "fe00::1", "fe80::", "fe80::1", "fe80::1%lo", "febf:ffff::1", "fec0::1", "ff00::", "ff02::1"),
    *("ff0e::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "::ffff:127.0.0.1", "::ffff:169.254.169.254"),
    *("::ffff:10.0.0.1", "::ffff:224.0.0.1", "::ffff:0.0.0.0", "::ffff:255.255.255.255"),
]
OPEN_6 = [
    *("2001:200::", "2001:200::1", "2001:4860:4860::8888", "2001:db7:ffff::1", "2001:db9::", "2000::", "2000::1"),
    *("2003::1", "2606:4700:4700::1111", "2a00:1450:4001::1", "3ffe::1", "3fff:1000::", "3fff:ffff::1"),
    *("::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1", "2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
]


@pytest.mark.parametrize("text", CLOSED_6)
def test_closed_ipv6_addresses(text: str) -> None:
    assert not Guard().allows(ip_address(text))


@pytest.mark.parametrize("text", OPEN_6)
def test_open_ipv6_addresses(text: str) -> None:
    address = IPv6Address(text)
    assert Guard().allows(address)
    inner = address.ipv4_mapped or address
    assert inner.is_global


@examples(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_ipv4_is_judged_as_python_does(number: int) -> None:
    address = IPv4Address(number)
    if not any(address in block for block in NO_GLOBALS):
        assert Guard().allows(address) == (address.is_global and not address.is_multicast)
    assert {Guard().allows(form) for form in embedded(address)} == {Guard().allows(address)}


@examples(deadline=None)
@given(
    st.integers(0, 2**128 - 1) | st.integers(0x2 << 124, (0x4 << 124) - 1) | st.integers(0x2001 << 112, 0x2003 << 112)
)
def test_ipv6_is_judged_no_milder_than_python_does(number: int) -> None:
    address = IPv6Address(number)
    if Guard().allows(address):
        assert (address.ipv4_mapped or address).is_global
        assert not address.is_multicast


def test_what_is_allowed_is_allowed_in_every_form() -> None:
    guard = Guard([ip_network("10.1.0.0/16"), ip_network("fd12::/16"), ip_network("fe80::/10")])
    for text in ("10.1.0.0", "10.1.255.255", "::ffff:10.1.2.3", "64:ff9b::a01:203", "2002:a01:203::"):
        assert guard.allows(ip_address(text)), text
    for text in ("10.0.255.255", "10.2.0.0", "127.0.0.1", "::1", "fd13::1", "::ffff:10.2.0.0", "::10.1.2.3"):
        assert not guard.allows(ip_address(text)), text
    for text in ("fd12::1", "fe80::1", "fe80::1%lo", "8.8.8.8", "2606:4700:4700::1111"):
        assert guard.allows(ip_address(text)), text


METADATA = ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::"]


@pytest.mark.parametrize("block", ["0.0.0.0/0", "169.254.0.0/16", "169.254.169.0/24", "169.254.169.254/31", "::/0"])
def test_a_block_does_not_allow_the_metadata_address(block: str) -> None:
    guard = Guard([ip_network(block)])
    assert not any(guard.allows(ip_address(text)) for text in (*METADATA, "fd00:ec2::254", "fd00:ec2::254%lo"))
    assert guard.allows(ip_address("169.254.169.255")) == (ip_address("169.254.169.255") in ip_network(block))


def test_the_metadata_address_is_allowed_by_itself() -> None:
    guard = Guard([ip_network("169.254.169.254/32")])
    assert all(guard.allows(ip_address(text)) for text in METADATA)
    assert not guard.allows(ip_address("169.254.169.253"))
    assert not guard.allows(ip_address("fd00:ec2::254"))
    six = Guard([ip_network("fd00::/8"), ip_network("fd00:ec2::254/128")])
    assert six.allows(ip_address("fd00:ec2::254"))
    assert six.allows(ip_address("fd00:ec2::253"))
    assert not any(six.allows(ip_address(text)) for text in METADATA)


def test_everything_is_everything() -> None:
    guard = Guard(everything=True)
    assert all(guard.allows(ip_address(text)) for text in (*METADATA, *CLOSED_6, *OPEN_6, "127.0.0.1"))


@pytest.mark.parametrize(
    ("text", "public", "local"),
    [
        (b"http://example.com/", True, True),
        (b"http://8.8.8.8/", True, True),
        (b"http://127.0.0.1/", False, True),
        (b"http://[::1]/", False, False),
        (b"http://[::ffff:127.0.0.1]/", False, True),
        (b"http://localhost/", False, True),
        (b"http://LOCALHOST./", False, True),
        (b"http://a.localhost/", False, True),
        (b"http://localhost.example/", True, True),
        (b"http://notlocalhost/", True, True),
        (b"http://169.254.169.254/latest", False, False),
    ],
)
def test_a_host_that_says_enough_is_judged_unresolved(text: bytes, public: bool, local: bool) -> None:
    assert Guard().allows_url(parse(text)) == public
    assert Guard([ip_network("127.0.0.0/8")]).allows_url(parse(text)) == local
