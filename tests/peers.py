"""Servers that play a script on each connection, in the loop of the outbound client that they are for.

The loop runs only inside `Net.run` and what is built on it, so that a test reads as steps. Nothing is measured: where
time has to pass, the client's constants are made short, and GUARD_TIME only ends what would hang. Whatever a test does,
`Net.close` checks that every exchange was told of exactly once and that no connection or exchange is left.
"""

import asyncio
import functools
import itertools
import re
import socket
import ssl
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

import trustme
import uvloop

import outbound
from outbound import Client, Guard, OutboundError, Response, Url, parse, request

CUT = "closed before the response's end"
NOT_HTTP = "not HTTP/1.1"

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
        """Send pieces, each by itself. Raises ConnectionResetError if the client has closed."""
        for piece in pieces:
            if self.writer.transport.is_closing():  # uvloop raises RuntimeError for a write to it
                raise ConnectionResetError("the client has closed")
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
        assert self.errors == [], self.errors


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


def serving(authority: trustme.CA, *identities: str, **options: Any) -> ssl.SSLContext:
    """Return a receiver's settings, with a certificate for some names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*identities, **options).configure_cert(context)
    return context


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
