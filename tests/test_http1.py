"""What a client sees of one connection: bytes in, answers out, and the moments between.

Two wires carry the same questions. `Memory` drives the protocol through a transport that asserts what asyncio only
assumes, on a loop whose time is virtual; `Socket` is uvloop's server on a free port, and a blocking socket. `talk`
on either returns everything the server says until it ends the connection. Every answer read here goes through h11
and then through `replies`, which checks what all answers have in common.
"""

import asyncio
import contextlib
import itertools
import random
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self, cast

import h11
import pytest
import uvloop
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from virtual_time import VirtualLoop

import dedup
import fixed_answers
import http1
import outbound
import reporter
import verve_server

NOW = 1795329060.0  # where every clock stands
DATE = "Sun, 22 Nov 2026 06:31:00 GMT"
GUARD = 10.0  # seconds; only ever reached by a server that hangs

PATH = b"/api/verve/accept"
HOST = b"Host: a\r\n"
START = b"GET /api/verve/accept?id=7 HTTP/1.1"
MARK = b"zqxj"  # raw input, never to be repeated
NEXT = b"GET /api/verve/accept?id=999 HTTP/1.1\r\nHost: a\r\n\r\n"  # behind a refused request: never to be read


def get(id_: bytes | int = 7, fields: bytes = HOST, method: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
    text = b"%d" % id_ if isinstance(id_, int) else id_
    return b"%b %b?id=%b %b\r\n%b\r\n" % (method, PATH, text, version, fields)


def line(start: bytes, fields: bytes = HOST) -> bytes:
    return start + b"\r\n" + fields + b"\r\n"


def framed(fields: bytes, body: bytes = b"") -> bytes:
    return get(7, HOST + fields) + body


def chunked(body: bytes) -> bytes:
    return framed(b"Transfer-Encoding: chunked\r\n", body)


def words(text: str) -> list[bytes]:
    """Split at bars, and read escapes as Python does."""
    return [word.encode("latin-1").decode("unicode_escape").encode("latin-1") for word in text.split("|")]


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


class Reply(NamedTuple):
    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def closes(self) -> bool:
        return self.fields.get("connection") == "close"


def replies(stream: bytes) -> list[Reply]:
    """Read answers with h11 and check what every one of them owes; one without its body must have answered HEAD."""
    found: list[Reply] = []
    start = 0
    while start < len(stream):
        end = stream.index(b"\r\n\r\n", start) + 4
        body = b"ok" if stream.startswith(b"ok", end) else b"failed" if stream.startswith(b"failed", end) else b""
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET" if body else "HEAD", target="/", headers=[("Host", "a")]))
        client.send(h11.EndOfMessage())
        client.receive_data(stream[start:end] + body)
        event = client.next_event()
        assert isinstance(event, h11.InformationalResponse | h11.Response), event
        fields = {name.decode(): value.decode() for name, value in event.headers}
        assert len(fields) == len(event.headers)
        assert event.http_version == b"1.1"
        assert not any(reply.closes for reply in found[-1:]), "an answer follows one that closes"
        start = end + len(body)
        if isinstance(event, h11.InformationalResponse):
            assert (event.status_code, fields, body) == (100, {}, b"")
        else:
            if body:
                data = client.next_event()
                assert isinstance(data, h11.Data)
                assert data.data == body
            assert isinstance(client.next_event(), h11.EndOfMessage)
            expected = b"ok" if event.status_code == 200 else b"failed"
            assert body in (expected, b"")
            assert fields["content-length"] == str(len(expected))
            assert fields["content-type"] == "text/plain; charset=utf-8"
            assert fields["date"] == DATE
            assert fields.get("connection") in (None, "close", "keep-alive")
            assert ("verve-error" in fields) == (event.status_code != 200)
            assert re.fullmatch(r"[A-Za-z0-9 ,;:/.'-]{10,120}", fields.get("verve-error", "an error is a sentence"))
            assert ("retry-after" in fields) == (event.status_code == 503)
            assert ("allow" in fields) == (event.status_code == 405)
        found.append(Reply(event.status_code, fields, body))
    return found


def statuses(stream: bytes) -> list[int]:
    return [reply.status for reply in replies(stream)]


# The wires


class Transport(asyncio.Transport):
    """A connection without a socket: first the protocol's side, as asyncio has it, then the peer's.

    Asserts that nothing is written after write_eof, close, abort or connection_lost. Like a socket's transport it
    hands out nothing while reading is paused, in pieces of at most 256 KiB, calls pause_writing from within write,
    each as often as resume_writing and in turn, and connection_lost from the loop.
    """

    HIGH, LOW, READ = 64 * 1024, 16 * 1024, 256 * 1024  # bytes

    def __init__(self, loop: VirtualLoop, protocol: http1.Connection, polite: bool = True) -> None:
        super().__init__()
        self.loop = loop
        self.protocol = protocol
        self.taken = bytearray()  # what the peer has read
        self.buffer = bytearray()  # what it has not
        self.inbox = bytearray()  # what the protocol has not read
        self.taking = True  # the peer reads
        self.polite = polite  # the peer answers the server's FIN with its own
        self.reading = True
        self.choked = False  # between pause_writing and resume_writing
        self.closing = self.aborted = self.shut = self.lost = False  # shut: after write_eof
        self.finished = self.told = False  # the peer has shut its side; the protocol knows
        protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.lost, "write after connection_lost"
        assert not self.closing, "write after close or abort"
        assert not self.shut, "write after write_eof"
        self.buffer += data
        self.flush()
        if len(self.buffer) > self.HIGH and not self.choked:
            self.choked = True
            self.protocol.pause_writing()

    def write_eof(self) -> None:
        assert not self.closing, "write_eof after close or abort"
        assert not self.shut, "write_eof twice"
        self.shut = True
        self.flush()

    def get_write_buffer_size(self) -> int:
        return len(self.buffer)

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True
        self.flush()

    def abort(self) -> None:
        self.aborted = self.closing = True
        self.buffer.clear()
        self.flush()

    def pause_reading(self) -> None:
        assert not self.lost, "pause_reading after connection_lost"
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.lost, "resume_reading after connection_lost"
        self.reading = True
        self.loop.call_soon(self.deliver)

    @property
    def sent(self) -> bytes:
        return bytes(self.taken)

    @property
    def ended(self) -> bool:
        """The server will say nothing more."""
        return self.shut or self.closing

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.inbox += piece
            self.deliver()

    def finish(self) -> None:
        self.finished = True
        self.deliver()

    def take(self) -> None:
        self.taking = True
        self.flush()

    def lose(self, error: Exception | None = None) -> None:
        self.closing = True
        if not self.lost:
            self.lost = True
            self.protocol.connection_lost(error)

    def deliver(self) -> None:
        while self.inbox and self.reading and not self.closing:
            data = bytes(self.inbox[: self.READ])
            del self.inbox[: self.READ]
            self.protocol.data_received(data)
        if self.finished and not self.told and self.reading and not self.closing:
            self.told = True
            if not self.protocol.eof_received():
                self.close()

    def flush(self) -> None:
        if self.taking:
            self.taken += self.buffer
            self.buffer.clear()
        if self.choked and not self.closing and len(self.buffer) <= self.LOW:
            self.choked = False
            self.protocol.resume_writing()
        if not self.buffer:
            if self.closing:
                self.loop.call_soon(self.lose)
            elif self.shut and self.polite:
                self.loop.call_soon(self.finish)


class Store(dedup.MemoryStore):
    """Counts, and remembers what it was asked to count."""

    def __init__(self, max_ids: int = 1000) -> None:
        super().__init__(60, max_ids, lambda: NOW)
        self.added: list[int] = []

    def add(self, number: int, done: dedup.Done, counted: dedup.Counted | None = None) -> int | None:
        self.added.append(number)
        return super().add(number, done, counted)


class Telling(Store):
    """Has an answer that tells which id was asked for: every third is refused."""

    def add(self, number: int, done: dedup.Done, counted: dedup.Counted | None = None) -> int | None:
        self.added.append(number)
        return number % 3

    @staticmethod
    def status(number: int) -> int:
        return 503 if number % 3 == dedup.FULL else 200


class Waiting(Telling):
    """Gives no answer before it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[int, dedup.Done]] = []
        self.peak = 0

    def add(self, number: int, done: dedup.Done, counted: dedup.Counted | None = None) -> int | None:
        super().add(number, done, counted)
        self.waiting.append((number, done))
        self.peak = max(self.peak, len(self.waiting))
        return None

    def give(self, count: int = 1, chance: random.Random | None = None) -> None:
        """Give answers, oldest first or by chance."""
        for _ in range(count):
            number, done = self.waiting.pop(chance.randrange(len(self.waiting)) if chance else 0)
            done(number % 3)


def serve(store: dedup.Store, **options: Any) -> http1.Server:
    """Return a server as the front door wires it; to be called on its loop."""
    answers = fixed_answers.FixedAnswers()
    endpoint = verve_server.Endpoint(store, answers, reporter.Callbacks(outbound.Client(outbound.Guard()), "GET"))
    return http1.Server(endpoint, answers, endpoint.outcomes, **{"clock": lambda: NOW, **options})


class Mixed(Telling):
    """Answers some at once and others, odd ones, when the loop turns."""

    loop: VirtualLoop

    def add(self, number: int, done: dedup.Done, counted: dedup.Counted | None = None) -> int | None:
        outcome = super().add(number, done, counted)
        if number % 2:
            self.loop.call_soon(done, number % 3)
            return None
        return outcome


class Memory:
    """Server and peers in one thread, on virtual time."""

    def __init__(self, store: Store | None = None, **options: Any) -> None:
        self.store = store or Store()
        self.loop = VirtualLoop()
        if isinstance(self.store, Mixed):
            self.store.loop = self.loop

        async def start() -> http1.Server:
            return serve(self.store, **options)

        self.server = self.loop.run_until_complete(start())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AssertionError):  # of a transport that a failed test has left amid something
            self.loop.run_until_complete(self.server.drain(0))
        self.loop.advance()
        self.loop.close()
        assert self.loop.errors == []
        assert not self.server.connections

    def connect(self, polite: bool = True) -> Transport:
        return Transport(self.loop, self.server(), polite)

    def advance(self, seconds: float = 0) -> None:
        self.loop.advance(seconds)

    def settle(self) -> None:
        """Let every connection have all the turns that it wants."""
        quiet = 0
        while quiet < 2:
            self.advance()
            quiet = 0 if self.server.round_robin.waiting else quiet + 1

    def talk(self, *pieces: bytes, finish: bool = True) -> bytes:
        """Send pieces, then shut the sending side, or else wait for the server to end the connection by itself."""
        peer = self.connect()
        peer.send(*pieces)
        while peer.protocol.replies.slots or peer.protocol._unread:
            self.advance()
        if finish:
            peer.finish()
        self.advance()
        assert peer.lost, "the server did not end the connection"
        assert not peer.aborted
        return peer.sent


class Socket:
    """The server on uvloop in a thread of its own, the peers on blocking sockets."""

    def __init__(
        self, store: Store | None = None, connection: type[http1.Connection] = http1.Connection, **options: Any
    ) -> None:
        self.store = store or Store()
        self.errors: list[dict[str, Any]] = []
        self.door = socket.create_server(("127.0.0.1", 0))
        self.address = self.door.getsockname()
        self.loop = uvloop.new_event_loop()
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

        async def start() -> None:
            self.server = serve(self.store, **options)
            self.listener = await self.loop.create_server(lambda: connection(self.server), sock=self.door)

        self.run(start())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self.listener.close()
            await self.server.drain(0)
            await self.listener.wait_closed()

        self.run(stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(GUARD)
        self.loop.close()
        assert self.errors == []

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(GUARD)

    def connect(self) -> socket.socket:
        peer = socket.create_connection(self.address, GUARD)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return peer

    def talk(self, *pieces: bytes, finish: bool = True) -> bytes:
        with self.connect() as peer:
            with contextlib.suppress(BrokenPipeError):  # refused before the last piece; what it says counts
                for piece in pieces:
                    peer.sendall(piece)
                if finish:
                    peer.shutdown(socket.SHUT_WR)
            return rest(peer)


def rest(peer: socket.socket) -> bytes:
    """Read until the server ends the connection."""
    return b"".join(iter(lambda: peer.recv(65536), b""))


WIRES: dict[str, Callable[[Store], Memory | Socket]] = {"memory": Memory, "socket": Socket}


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> Iterator[Memory | Socket]:
    with WIRES[request.param](Store()) as wire:
        yield wire


@pytest.fixture
def memory() -> Iterator[Memory]:
    with Memory() as memory:
        yield memory


@pytest.fixture
def later() -> Iterator[tuple[Memory, Waiting]]:
    store = Waiting()
    with Memory(store) as memory:
        yield memory, store


# The endpoint's answers

FAILURES = {  # of section 4: request, status. All hold MARK
    "id missing": (get(b"&x=zqxj"), 400),
    "id twice": (get(b"7&id=zqxj"), 400),
    "id no integer": (get(b"zqxj"), 400),
    "id of 65 bits": (get(b"9223372036854775808&zqxj"), 400),
    "endpoint twice": (get(b"7&endpoint=http://zqxj.example/&endpoint=http://zqxj.example/"), 400),
    "endpoint relative": (get(b"7&endpoint=/zqxj"), 400),
    "endpoint ftp": (get(b"7&endpoint=ftp://zqxj.example/"), 400),
    "endpoint empty": (get(b"7&endpoint=&zqxj"), 400),
    "endpoint on loopback": (get(b"7&endpoint=http://127.0.0.1/zqxj"), 400),
    "another path": (line(b"GET /zqxj HTTP/1.1"), 404),
    "another path and method": (line(b"POST /zqxj HTTP/1.1"), 404),
    "another method": (get(b"7&zqxj", method=b"POST"), 405),
    "no method we know": (get(b"7", method=b"ZQXJ") + MARK, 405),
    "malformed line": (line(b"GET /zqxj /zqxj HTTP/1.1"), 400),
    "malformed field": (get(7, HOST + b"zqxj zqxj: zqxj\r\n"), 400),
    "malformed Host": (get(7, b"Host: zqxj/zqxj\r\n"), 400),
    "unknown coding": (get(7, HOST + b"Transfer-Encoding: zqxj\r\n"), 400),
    "long target": (get(b"7&" + MARK * 2048), 414),
    "long headers": (get(7, HOST + b"zqxj: " + MARK * 8192 + b"\r\n"), 431),
    "many headers": (get(7, HOST + b"zqxj: zqxj\r\n" * 100), 431),
    "long body": (get(7, HOST + b"Content-Length: 65537\r\n") + MARK, 413),
}
ENDS = (400, 408, 413, 414, 431)  # HTTP not to be read further; a 400 for the id is not


def test_ok(wire: Memory | Socket) -> None:
    new, duplicate, head, failed = replies(wire.talk(get(), get(), get(method=b"HEAD"), get(b"x", method=b"HEAD")))
    fields = {"content-type": "text/plain; charset=utf-8", "content-length": "2", "date": DATE}
    assert new == duplicate == Reply(200, fields, b"ok")
    assert head == Reply(200, fields, b"")
    assert (failed.status, failed.body, failed.closes) == (400, b"", False)
    assert wire.store.added == [7, 7, 7]
    assert wire.store.count == 1


@pytest.mark.parametrize("case", FAILURES)
def test_failure(wire: Memory | Socket, case: str) -> None:
    request, status = FAILURES[case]
    ends = status in ENDS and not case.startswith(("id", "endpoint"))
    answer = wire.talk(request, finish=not ends)
    (reply,) = replies(answer)
    assert (reply.status, reply.body) == (status, b"failed")
    assert MARK not in answer.lower()
    assert reply.closes is (ends or case == "no method we know")
    assert wire.store.added == []
    if status == 405:
        assert reply.fields["allow"] == "GET, HEAD"


def test_the_date_is_that_of_the_second() -> None:
    now = [NOW + 0.25]
    with Memory(clock=lambda: now[0]) as memory:
        assert b"\r\nDate: Sun, 22 Nov 2026 06:31:00 GMT\r\n" in memory.talk(get())
        now[0] = 1798761599.0
        memory.advance(0.75)
        assert b"\r\nDate: Thu, 31 Dec 2026 23:59:59 GMT\r\n" in memory.talk(get())


def test_a_full_window_is_503_with_retry_after() -> None:
    with Memory(Store(max_ids=2)) as memory:
        *_, duplicate, full = replies(memory.talk(get(1), get(2), get(1), get(3)))
    assert (duplicate.status, full.status, full.body) == (200, 503, b"failed")
    assert int(full.fields["retry-after"]) > 0


INTEGERS: dict[bytes, int] = {
    b"7": 7,
    b"007": 7,
    b"%37": 7,
    b"%30%30%37": 7,
    b"-5": -5,
    b"%2D5": -5,
    b"%2d%35": -5,
    b"-005": -5,
    b"0": 0,
    b"000": 0,
    b"-0": 0,
    b"999999999999999999": 10**18 - 1,
    b"1000000000000000000": 10**18,
    b"0999999999999999999": 10**18 - 1,
    b"9223372036854775807": 2**63 - 1,
    b"09223372036854775807": 2**63 - 1,
    b"-9223372036854775807": -(2**63) + 1,
    b"-9223372036854775808": -(2**63),
    b"0" * 5000 + b"7": 7,
    b"-" + b"0" * 5000 + b"7": -7,
    b"0" * 5000: 0,
}
NO_INTEGERS = [
    *(b"9" * 20, b"9" * 5000, b"-" + b"9" * 5000),
    *words(
        r"|-|+5|%2B5|%2b5|--5|5-|-%205|1.0|1_000|+7|%207|7%20|7+|%097|7%0A|7%0D%0A|%0A7|7%00|%007|1,000|1e3|0x7|0b1|7L|nan"
        r"|inf|true|None|7.|.7|7=|=7|7;|7;id=8|7?|7/|%|%3|7%|7%3|%GG|%%37|%2537|'7'|\x227\x22|[7]|(7)|7:|%FF|7%EF%BB%BF"
        r"|%D9%A7|%d9%a7|%EF%BC%97|%C2%B2|%E2%88%925|%C2%A07"  # digits, a minus and a space, but not in ASCII
        r"|7&id=7|7&id=|7&id|7&%69d=7|7&x=1&i%64=8|10000000000000000000|18446744073709551615|18446744073709551623"
        r"|9223372036854775808|00009223372036854775808|-9223372036854775809"
    ),
]


@pytest.mark.parametrize("before", [b"", get(1), get(1) + get(1)], ids=["alone", "second", "third"])
def test_an_id_is_its_integer_value(memory: Memory, before: bytes) -> None:
    for text, number in INTEGERS.items():
        memory.store.added.clear()
        assert statuses(memory.talk(before, get(text), get(text) + get(text)))[-3:] == [200] * 3, text
        assert memory.store.added[-3:] == [number] * 3, text


@pytest.mark.parametrize("before", [b"", get(1), get(1) + get(1)], ids=["alone", "second", "third"])
def test_what_is_no_id(memory: Memory, before: bytes) -> None:
    for text in NO_INTEGERS:
        memory.store.added.clear()
        answers = replies(memory.talk(before, get(text), get(text) + get(2)))
        assert [reply.status for reply in answers[-3:]] == [400, 400, 200], text
        assert not any(reply.closes for reply in answers), text
        assert set(memory.store.added) <= {1, 2}, text


def test_ids_over_a_socket() -> None:
    with Socket() as wire:
        assert statuses(wire.talk(b"".join(map(get, INTEGERS)))) == [200] * len(INTEGERS)
        assert wire.store.added == list(INTEGERS.values())
        assert statuses(wire.talk(b"".join(map(get, NO_INTEGERS)))) == [400] * len(NO_INTEGERS)


TARGETS = {  # $ stands for the path
    target.replace(b"$", PATH): status
    for status, targets in {
        200: r"$?id=7&|$?&&id=7|$?x=1&id=7|$?id=7&x=1&y&=z&&|$?x=id=8&id=7|$?ids=8&ID=8&id%20=8&id=7|$?%69d=7"
        r"|$?i%64=%37|$?%69%64=007|$?x=%GG&id=7|$?x=?&id=7|$?xendpoint=y&id=7|/api/verve/%61ccept?id=7"
        r"|/%61pi/verve/accep%74?id=7|http://a$?id=7|HTTP://a$?id=7|https://a$?id=7|http://b.c:80$?id=7|http://[::1]:80$?x=http://y/&id=7",
        400: r"$|$?|$?id|$?id=|$?ID=7|$?id%3D7|$?id==7|$??id=7|$?ids=7|$?x=id=7|$?x=1;id=7|$?+id=7|$?id[]=7|$?id=7&id"
        r"|$?id=7&id=7|http://a$?id=x|http://a$",
        404: r"$/?id=7|/$?id=7|/API/verve/accept?id=7|$x?id=7|/api/verve/accep?id=7|$;v=1?id=7|$%20?id=7|$%3Fid=7"
        r"|$%00?id=7|$&id=7|/?id=7|/|/?$?id=7|/x$?id=7|http://a/?id=7|http://a?id=7|http://a|http://a/http://a$?id=7|ftp://a$?id=7",
    }.items()
    for target in words(targets)
}


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_targets(wire: Memory | Socket, method: bytes) -> None:
    requests = [line(b"%b %b HTTP/1.1" % (method, target)) for target in TARGETS]
    stream = wire.talk(*requests)
    assert dict(zip(TARGETS, statuses(stream), strict=True)) == TARGETS
    assert set(wire.store.added) == {7}
    assert (b"\r\n\r\nHTTP/1.1" in stream) is (method == b"HEAD")


METHODS = words(
    r"POST|PUT|DELETE|OPTIONS|PATCH|TRACE|PROPFIND|QUERY|LINK|M-SEARCH|BREW|get|Get|GETX|GE|G|HEADS"
    r"|!#$%&'*+-.^_`~09AZaz\x7c|SETUP|PLAY|DESCRIBE|SOURCE|FLUSH"  # the last of RTSP and ICE, but tokens as any other
)


@pytest.mark.parametrize("method", METHODS)
def test_another_method_is_405_and_no_body_of_it_is_read_as_a_request(memory: Memory, method: bytes) -> None:
    fields = HOST + b"Content-Length: %d\r\n" % len(NEXT)
    for pieces in ([get(7, fields, method) + NEXT], cut(get(7, fields, method) + NEXT, 1)):
        first, *others = replies(memory.talk(*pieces))
        assert (first.status, first.fields["allow"]) == (405, "GET, HEAD")
        assert others == []
    assert memory.store.added == []


# Limits: at each, and one past it

ASKED = len(PATH + b"?id=")
SPARE = len(b"Host: a\r\nX: \r\n")  # what frames the value that fills a header section
BY_ONE = b"1\r\nx\r\n"
LIMITS = {  # request, status; 8 KiB = 8192, 32 KiB = 32768, 64 KiB = 65536
    "target at": (get(b"7&".ljust(8192 - ASKED, b"x")), 200),
    "target past": (get(b"7&".ljust(8193 - ASKED, b"x")), 414),
    "target far past": (get(b"7&".ljust(70_000, b"x")), 414),
    "absolute target at": (line(b"GET http://%b/ HTTP/1.1" % (b"x" * (8192 - len("http:///")))), 404),
    "absolute target past": (line(b"GET http://%b/ HTTP/1.1" % (b"x" * (8193 - len("http:///")))), 414),
    "section at": (framed(b"X: %b\r\n" % (b"x" * (32768 - SPARE))), 200),
    "section past": (framed(b"X: %b\r\n" % (b"x" * (32769 - SPARE))), 431),
    "section far past": (framed(b"X: %b\r\n" % (b"x" * 300_000)), 431),
    "section at, of a name": (framed(b"X%b: \r\n" % (b"x" * (32768 - SPARE))), 200),
    "section past, of a name": (framed(b"X%b: \r\n" % (b"x" * (32769 - SPARE))), 431),
    "both at": (get(b"7&".ljust(8192 - ASKED, b"x"), HOST + b"X: %b\r\n" % (b"x" * (32768 - SPARE))), 200),
    "fields at": (framed(b"X: y\r\n" * 99), 200),
    "fields past": (framed(b"X: y\r\n" * 100), 431),
    "fields far past": (framed(b"X: y\r\n" * 5000), 431),
    "length at": (framed(b"Content-Length: 65536\r\n", b"x" * 65536), 200),
    "length past": (framed(b"Content-Length: 65537\r\n", b"x" * 65537), 413),
    "length of 2**63": (framed(b"Content-Length: 9223372036854775808\r\n"), 413),
    "length of 2**64": (framed(b"Content-Length: 18446744073709551616\r\n"), 413),
    "length of 5000 zeros": (framed(b"Content-Length: %b5\r\n" % (b"0" * 5000), b"hello"), 200),
    "one chunk at": (chunked(b"10000\r\n%b\r\n0\r\n\r\n" % (b"x" * 65536)), 200),
    "one chunk past": (chunked(b"10001\r\n%b\r\n0\r\n\r\n" % (b"x" * 65537)), 413),
    "two chunks past": (chunked(b"10000\r\n%b\r\n%b0\r\n\r\n" % (b"x" * 65536, BY_ONE)), 413),
    "chunks of one at": (chunked(BY_ONE * 65536 + b"0\r\n\r\n"), 200),
    "chunks of one past": (chunked(BY_ONE * 65537 + b"0\r\n\r\n"), 413),
    "chunks of CRLF at": (chunked(b"4\r\n\r\n\r\n\r\n" * 16384 + b"0\r\n\r\n"), 200),
}


@pytest.mark.parametrize("size", [10_000_000, 10], ids=["whole", "in tens"])
@pytest.mark.parametrize("case", LIMITS)
def test_limit(memory: Memory, case: str, size: int) -> None:
    request, status = LIMITS[case]
    first, *others = replies(memory.talk(*cut(request + get(8), size), finish=status < 405))
    assert first.status == status
    assert first.closes is (status > 404)
    assert [reply.status for reply in others] == [200] * (status < 405)  # what follows is read, or is not
    assert memory.store.added == ([7, 8] if status == 200 else [8] if status == 404 else [])


@pytest.mark.parametrize("case", [case for case in LIMITS if not case.startswith("chunks")])
def test_limit_over_a_socket(case: str) -> None:
    request, status = LIMITS[case]
    with Socket() as wire:
        assert statuses(wire.talk(request))[0] == status


ENDLESS = {  # what never comes to its end, and how that is refused
    "method": (b"X" * 70_000, 414),
    "target": (b"GET /" + b"x" * 70_000, 414),
    "fields": (START + b"\r\n" + b"X: y\r\n" * 9000, 431),
    "name": (get()[:-2] + b"x" * 40_000, 431),
    "value": (get()[:-2] + b"x: " + b"y" * 40_000, 431),
    "extension": (chunked(b"1;" + b"x" * 70_000), 413),
    "chunk size": (chunked(b"0" * 70_000), 413),
    "name in trailers": (chunked(b"0\r\n" + b"x" * 70_000), 413),
    "trailers": (chunked(b"0\r\n" + b"X: y\r\n" * 9000), 413),
}


@pytest.mark.parametrize("size", [10_000_000, 10], ids=["whole", "in tens"])
@pytest.mark.parametrize("case", ENDLESS)
def test_endless_pieces_are_refused_before_they_end(memory: Memory, case: str, size: int) -> None:
    stream, status = ENDLESS[case]
    (reply,) = replies(memory.talk(*cut(stream, size), finish=False))
    assert (reply.status, reply.closes) == (status, True)


@pytest.mark.parametrize("length", [8193, 8300, 20_000])
@pytest.mark.parametrize("size", [10_000_000, 10], ids=["whole", "in tens"])
def test_head_gets_no_body_with_414_either(memory: Memory, length: int, size: int) -> None:
    request = get(b"7&".ljust(length - ASKED, b"x"), method=b"HEAD")
    (reply,) = replies(memory.talk(*cut(request, size), finish=False))
    assert (reply.status, reply.body) == (414, b"")


# Strictness (RFC 9112)

# Request lines (3); ends of line are CR LF, both and in that order (2.2)
LINES = words(
    r"GET  /a HTTP/1.1|GET /a  HTTP/1.1|GET\t/a HTTP/1.1|GET /a\tHTTP/1.1| GET /a HTTP/1.1|\tGET /a HTTP/1.1"
    r"|GET /a HTTP/1.1 |GET /a HTTP/1.1\t|\0GET /a HTTP/1.1|/a HTTP/1.1| /a HTTP/1.1|GET HTTP/1.1|GET  HTTP/1.1|GET"
    r"|GET |HTTP/1.1 200 OK|GET /a|GET /a |GET /a H|GET /a HTTP/|GET /a HTTP/1|GET /a HTTP/1.|GET /a HTTP/1.1x"
    r"|GET /a HTTP/1.11|GET /a HTTP/0.9|GET /a HTTP/2.0|GET /a HTTP/1.2|GET /a HTTP/1.9|GET /a HTTP/0.0|GET /a HTTP/3"
    r"|GET /a HTTP/1,1|GET /a HTTP/11|GET /a HTTP/01.1|GET /a HTTP/1.01|GET /a HTTP/1. 1|GET /a HTTP/+1.1"
    r"|GET /a HTTP/-1.1|GET /a HTTP/1.x|GET /a HTTP/x.1|GET /a http/1.1|GET /a Http/1.1|GET /a HTTP /1.1"
    r"|GET /a HTTPS/1.1|GET /a RTSP/1.0|GET /a ICE/1.0|GET /a HTTP/ 1.1|GET /a HTTP\\1.1|GET /a TTP/1.1"
    r"|GET /a HTTP/1.1 HTTP/1.1|GET /a HTTP//1.1|GET /a \0HTTP/1.1|G@T /a HTTP/1.1|GET( /a HTTP/1.1|G\xc9T /a HTTP/1.1"
    r"|GE\0T /a HTTP/1.1|GET: /a HTTP/1.1|G T /a HTTP/1.1|\x22GET\x22 /a HTTP/1.1|G\rT /a HTTP/1.1|GET\x7f /a HTTP/1.1"
    r"|GET api/verve/accept?id=7 HTTP/1.1|GET ?id=7 HTTP/1.1|GET a/b HTTP/1.1|GET a.b:80 HTTP/1.1|GET /a#b HTTP/1.1"
    r"|GET # HTTP/1.1|GET /a b HTTP/1.1|GET /\0 HTTP/1.1|GET /\x01 HTTP/1.1|GET /\x7f HTTP/1.1|GET /\x80 HTTP/1.1"
    r"|GET /\xff HTTP/1.1|GET /\xc3\xa9 HTTP/1.1|GET /a\rb HTTP/1.1|GET /a\nb HTTP/1.1|GET /a\x0bb HTTP/1.1"
    r"|GET /a\x0cb HTTP/1.1|PRI * HTTP/2.0|\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03|OPTIONS ** HTTP/1.1"
    r"|GET /a HTTP/1.1\nX: y|GET /a HTTP/1.1\rX: y|GET /a HTTP/1.1\r\r\nX: y|GET /a HTTP/1.1\n\rX: y"
    r"|\nGET /a HTTP/1.1|\rGET /a HTTP/1.1|\r\r\nGET /a HTTP/1.1|\r\n\nGET /a HTTP/1.1|\r\n GET /a HTTP/1.1"
    r"|GET *\r\nX:80 HTTP/1.1|GET a\r\nX:80 HTTP/1.1"
)
# Fields, of a request that is well-formed besides (5; Host: 3.2; lengths: RFC 9110, 8.6; codings: 6.1)
FIELD_LINES = words(
    r"X : y|X\t: y|X |X|: y|:| X: y|\tX: y|X y: z|X\0: y|X\x7f: y|X(: y|X@: y|X/: y|X[: y|\x22X\x22: y|X,: y|X;: y"
    r"|X{: y|\xe9: y|X\xff: y|X: a\0b|X: \0|X: a\x01b|X: a\x08b|X: a\x0bb|X: a\x0cb|X: a\x1fb|X: a\x7fb|\x1fX: y|X=y"
    r"|X: a\rb|X: a\nb|X: a\r|X: \r\r|X: a\r\n b|X: a\r\n\tb|X: a\r\n |X:\r\n b|X: a\r\n \r\nY: b|X: a\nY: b|X: a\rY: b"
    r"|X: y\n|X: y\r\n\n|X: y\n\n|X: y\r\n\rZ|X: y\r\r\n"
    r"|Transfer-Encoding : chunked|Content-Length : 5|Host: a|Host: b|hOST: a|Host:|X: y\r\nHost: a"
    r"|Content-Length: 5\r\nContent-Length: 6|Content-Length: 5\r\nContent-Length: 5"
    r"|Content-Length: 0\r\nX: y\r\ncontent-length: 0|Content-Length: 5\r\nTransfer-Encoding: chunked"
    r"|Transfer-Encoding: chunked\r\nContent-Length: 5|Transfer-Encoding: chunked\r\nContent-Length: 0"
    r"|Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked|Transfer-Encoding: chunked\r\nTransfer-Encoding: x"
    r"|Transfer-Encoding: identity\r\nTransfer-Encoding: chunked"
)
HOSTS = words(
    r"a b|a, b|a/b|a/|http://a|u@a|a:b|a:80:80|a:80x|a:+80|a:-1|[::1|::1|[zz]|[::1]x|[]|x[::1]|[::1]:x|a#b|a?b|\x22a\x22"
    r"|<a>|a\\b|\xe9|a\xff|a\x7cb|a^b|{a}|`a`|a%|a%4|a%zz|a\tb"
)
LENGTHS = words(
    r"| |+5|-5|-0|0x5|5x|x|5 5|5,5|5, 5|5,|,5|5;|5.0|1e1|5_0|\xb2|\xd9\xa5|'5'|\x225\x22|5\0|five|-9223372036854775808"
)
CODINGS = words(
    r"gzip|identity|gzip, chunked|chunked, gzip|chunked, chunked|chunked;q=1|xchunked|chunkedx|chunk|\x22chunked\x22|0"
    r"|chunked chunked|\x0bchunked|chunked\0|chun ked|chunked; x|x;chunked|cow|\xffchunked|deflate|trailers"
)
CHUNKS = words(  # 7.1
    r"5\nhello\r\n0\r\n\r\n|5\r\nhello\n0\r\n\r\n|5\r\nhello0\r\n\r\n|5\r\nhello\r0\r\n\r\n|5\rhello\r\n0\r\n\r\n"
    r"|4\r\nhello\r\n0\r\n\r\n|5\r\nhelloXX0\r\n\r\n|6\r\nhello\r\n0\r\n\r\n| 5\r\nhello\r\n0\r\n\r\n"
    r"|\t5\r\nhello\r\n0\r\n\r\n|\r\n5\r\nhello\r\n0\r\n\r\n|0x5\r\nhello\r\n0\r\n\r\n|+5\r\nhello\r\n0\r\n\r\n"
    r"|-5\r\nhello\r\n0\r\n\r\n|g\r\nx\r\n0\r\n\r\n|;x\r\n0\r\n\r\n|\r\n\r\n|5h\r\nhello\r\n0\r\n\r\n|5,\r\nhello\r\n"
    r"|\xb2\r\nhi\r\n|5;\0\r\nhello\r\n0\r\n\r\n|5;x\nhello\r\n0\r\n\r\n|5;x\rhello\r\n0\r\n\r\n|5_0\r\nhello\r\n"
    r"|5;x=\x01\r\nhello\r\n0\r\n\r\n|5.0\r\nhello\r\n|5 5\r\nhello\r\n|hello|0\n\n|0\r\n\n|0\r\r\n\r\n|0\r\n\r\r\n"
    r"|0 0\r\n\r\n|0\r\nX : y\r\n\r\n|0\r\nX\r\n\r\n|0\r\n: y\r\n\r\n|0\r\nX: a\0\r\n\r\n|0\r\nX: a\n\r\n"
    r"|0\r\nX: a\r\n b\r\n\r\n|0\r\n X: a\r\n\r\n|0\r\nX y: z\r\n\r\n|0\r\nX: a\rb\r\n\r\n"
)
CASES = [
    *map(line, LINES),
    *(get().replace(b"\r\n", end) for end in words(r"\n|\r|\n\r|\r\r\n")),
    *(line(START, HOST + field + b"\r\n") for field in FIELD_LINES),
    *(
        line(START, fields)
        for fields in words(r"|X-Host: a\r\nHosts: a\r\nX: Host: a\r\n|Host:\r\n a\r\n| Host: a\r\n")
    ),
    *(
        line(START, fields)
        for fields in words(r"\tHost: a\r\n| X: y\r\nHost: a\r\n|Host : a\r\n|Host: a\n|Host: a\r\r\n")
    ),
    *(line(START, b"Host: " + host + b"\r\n") for host in HOSTS),
    line(b"GET http://a" + START[4:], b""),
    *(
        get(7, fields, version=b"HTTP/1.0")
        for fields in (HOST * 2, b"Host: a/b\r\n", b"Transfer-Encoding: chunked\r\n")
    ),
    *(framed(b"Content-Length: " + length + b"\r\n", b"hello") for length in LENGTHS),
    *(framed(b"Transfer-Encoding: " + coding + b"\r\n", b"0\r\n\r\n") for coding in CODINGS),
    *map(chunked, CHUNKS),
]
MALFORMED = {repr(case)[2:-1].replace(repr(get())[2:-5], "GET 7"): case for case in CASES}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_is_400_and_nothing_behind_it_is_read(memory: Memory, case: str) -> None:
    stream = MALFORMED[case] + NEXT
    before = get(1)
    for pieces in ([stream], cut(stream, 1), [before + stream], [before, stream], cut(before + stream, 3)):
        memory.store.added.clear()
        *others, reply = replies(memory.talk(*pieces, finish=False))
        assert (reply.status, reply.body, reply.closes) == (400, b"failed", True)
        assert [other.status for other in others] == [200] * (b"".join(pieces) != stream)
        assert memory.store.added == [1] * len(others)


def test_malformed_over_a_socket() -> None:
    assert len(MALFORMED) == len(CASES) > 250
    with Socket() as wire:
        for case, request in MALFORMED.items():
            assert statuses(wire.talk(get(1) + request + NEXT, finish=False)) == [200, 400], case
        assert set(wire.store.added) == {1}


ODD: dict[str, tuple[bytes, int]] = {  # valid, and its status; the connection goes on
    "CRLF ahead": (b"\r\n" + get(), 200),
    "CRLFs ahead": (b"\r\n" * 5 + get(), 200),
    "empty value": (framed(b"X:\r\n"), 200),
    "empty value and space": (framed(b"X: \r\n"), 200),
    "empty value and tabs": (framed(b"X: \t \t\r\n"), 200),
    "no space": (get(7, b"Host:a\r\nX:y\r\n"), 200),
    "tabs around": (get(7, b"Host:\t a \t\r\nX:\ty\t\r\n"), 200),
    "tab within": (framed(b"X: a\tb\r\n"), 200),
    "obs-text": (framed(b"X: \x80\xe9\xff\r\n"), 200),
    "colons": (framed(b"X::\r\nY: : :\r\n"), 200),
    "all of a token": (framed(b"!#$%&'*+-.^_`|~09AZaz: y\r\n"), 200),
    "lower case": (get(7, b"host: a\r\ncontent-length: 2\r\n") + b"hi", 200),
    "upper case": (get(7, b"HOST: A\r\nTRANSFER-ENCODING: CHUNKED\r\n") + b"0\r\n\r\n", 200),
    "Host with port": (get(7, b"Host: a.b-c.example:8080\r\n"), 200),
    "Host with empty port": (get(7, b"Host: a:\r\n"), 200),
    "Host of IPv4": (get(7, b"Host: 127.0.0.1:80\r\n"), 200),
    "Host of IPv6": (get(7, b"Host: [::1]:80\r\n"), 200),
    "Host of IPv6 and IPv4": (get(7, b"Host: [::FFFF:127.0.0.1]\r\n"), 200),
    "Host of a container": (get(7, b"Host: verve_1\r\n"), 200),
    "Host of sub-delims": (get(7, b"Host: a!$&'()*+,;=~%41\r\n"), 200),
    "fields that only look like it": (framed(b"X-Host: b\r\nXContent-Length: 9\r\nTransfer-Encodings: x\r\n"), 200),
    "a value that only looks like it": (framed(b"X: Host: b\r\nY: Content-Length: 9\r\n"), 200),
    "underscores for dashes": (framed(b"Content_Length: 9\r\nTransfer_Encoding: chunked\r\n"), 200),
    "length 0": (framed(b"Content-Length: 0\r\n"), 200),
    "length with zeros": (framed(b"Content-Length: 005\r\n", b"hello"), 200),
    "length and spaces": (framed(b"Content-Length: \t5 \r\n", b"hello"), 200),
    "length and many spaces": (framed(b"Content-Length: %b5%b\r\n" % (b" " * 20, b" \t" * 20), b"hello"), 200),
    "body like a request": (framed(b"Content-Length: %d\r\n" % len(NEXT), NEXT), 200),
    "Chunked": (framed(b"Transfer-Encoding: Chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n"), 200),
    "chunked and spaces": (framed(b"Transfer-Encoding:chunked  \r\n", b"0\r\n\r\n"), 200),
    "chunk like a request": (chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(NEXT), NEXT)), 200),
    "chunk of blank lines": (chunked(b"A\r\n\r\n\r\n\r\n\r\n\r\n\r\n0\r\n\r\n"), 200),
    "chunk size in both cases": (chunked(b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n"), 200),
    "chunk size with zeros": (chunked(b"00000005\r\nhello\r\n000\r\n\r\n"), 200),
    "chunk extensions": (chunked(b'5;a;b=c;d="e f"\r\nhello\r\n0;x\r\n\r\n'), 200),
    "trailers": (chunked(b"0\r\nX: y\r\nY:\r\nZ: \xff\r\n\r\n"), 200),
    "Upgrade": (framed(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n"), 200),
    "Upgrade to websocket": (framed(b"Connection: upgrade\r\nUpgrade: websocket\r\n"), 200),
    "Upgrade not connected": (framed(b"Upgrade: h2c\r\nContent-Length: 5\r\n", b"hello"), 200),
    "Connection: Upgrade alone": (framed(b"Connection: Upgrade\r\n"), 200),
    "Connection: keep-alive": (framed(b"Connection: Keep-Alive\r\n"), 200),
    "Connection of others": (framed(b"Connection: x, closed, y\r\n"), 200),
    "HEAD": (get(method=b"HEAD"), 200),
    "HEAD with a body": (get(7, HOST + b"Content-Length: 5\r\n", b"HEAD") + b"hello", 200),
    "absolute-form": (line(b"GET http://a" + START[4:]), 200),
    "absolute-form, another Host": (line(b"GET http://b" + START[4:]), 200),
    "asterisk-form": (line(b"OPTIONS * HTTP/1.1"), 404),
    "POST": (get(7, HOST + b"Content-Length: 5\r\n", b"POST") + b"hello", 405),
    "1.0 kept": (get(7, b"Connection: keep-alive\r\n", version=b"HTTP/1.0"), 200),
    "1.0 kept, with Host and body": (
        get(7, HOST + b"connection: Keep-Alive\r\nContent-Length: 5\r\n", version=b"HTTP/1.0") + b"hello",
        200,
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_but_valid(memory: Memory, case: str) -> None:
    request, status = ODD[case]
    for before in (b"", get(1), request):
        stream = before + request + get(2, HOST + b"Connection: close\r\n") + NEXT
        for pieces in ([stream], cut(stream, 1), [before, request, get(2, HOST + b"Connection: close\r\n"), NEXT]):
            *others, reply, last = replies(memory.talk(*filter(None, pieces), finish=False))
            assert [other.status for other in others] == [[], [200], [status]][[b"", get(1), request].index(before)]
            assert (reply.status, last.status) == (status, 200)
            assert reply.fields.get("connection") == ("keep-alive" if "1.0" in case else None)
            assert last.closes


def test_odd_but_valid_over_a_socket() -> None:
    with Socket() as wire:
        for case, (request, status) in ODD.items():
            assert statuses(wire.talk(request + get(2))) == [status, 200], case


LAST = {  # valid requests behind which the connection is closed
    "close": framed(b"Connection: close\r\n"),
    "Close": framed(b"Connection: Close\r\n"),
    "close among others": framed(b"Connection: x, close,y\r\n"),
    "close of two": framed(b"Connection: keep-alive\r\nConnection: close\r\n"),
    "close and keep-alive": framed(b"Connection: close, keep-alive\r\n"),
    "close with a body": framed(b"Connection: close\r\nContent-Length: 5\r\n", b"hello"),
    "close with an announced body": framed(b"Connection: close\r\nContent-Length: 500\r\n"),
    "close and HEAD": get(7, HOST + b"Connection: close\r\n", b"HEAD"),
    "1.0": get(version=b"HTTP/1.0"),
    "1.0 without Host": get(7, b"", version=b"HTTP/1.0"),
    "1.0 and close": get(7, b"Connection: close\r\n", version=b"HTTP/1.0"),
    "1.0 and both": get(7, b"Connection: keep-alive, close\r\n", version=b"HTTP/1.0"),
    "1.0 and both apart": get(7, b"Connection: close\r\nConnection: keep-alive\r\n", version=b"HTTP/1.0"),
    "1.0 with a body": get(7, b"Content-Length: 5\r\n", version=b"HTTP/1.0") + b"hello",
    "1.0 HEAD": get(7, b"", b"HEAD", b"HTTP/1.0"),
}


@pytest.mark.parametrize("case", LAST)
def test_last_request(wire: Memory | Socket, case: str) -> None:
    for stream in (LAST[case] + NEXT, get(1) + LAST[case] + NEXT):
        *_, reply = replies(wire.talk(stream, finish=False))
        assert (reply.status, reply.closes) == (200, True)
    assert wire.store.added == [7, 1, 7]


@pytest.mark.parametrize("size", [10_000, 1])
def test_a_body_behind_an_upgrade_is_never_a_request(memory: Memory, size: int) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    for framing, body in (
        (b"Content-Length: %d\r\n" % len(NEXT), NEXT),
        (b"Content-Length: 5\r\n", b"hello"),
        (b"Transfer-Encoding: chunked\r\n", NEXT),
        (b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n"),
    ):
        (reply,) = replies(memory.talk(*cut(framed(upgrade + framing, body), size)))
        assert reply.status == (400 if body == NEXT and b"chunked" in framing else 200)
    assert memory.store.added == [7] * 3


@pytest.mark.parametrize("trailer", [b"Connection: close", b"connection: keep-alive", b"Proxy-Connection: close"])
@pytest.mark.parametrize("head", [b"", b"Connection: close\r\n"], ids=["kept", "last"])
def test_trailers_have_no_say_in_whether_the_connection_goes_on(
    wire: Memory | Socket, trailer: bytes, head: bytes
) -> None:
    request = framed(head + b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n0\r\nX: y\r\n%b\r\n\r\n" % trailer)
    first, *others = replies(wire.talk(get(1), request, get(2, HOST + b"X: z\r\n"), NEXT))[1:]
    assert (first.status, first.closes) == (200, bool(head))
    assert [reply.status for reply in others] == ([] if head else [200, 200])


@pytest.mark.parametrize("framing", [b"Content-Length: %d\r\nHost: a\r\n", b"Host: a\r\nContent-Length: %d\r\n"])
def test_a_head_that_resembles_the_last_one_is_judged_anew(memory: Memory, framing: bytes) -> None:
    """Only the Host is the same, or only the Host is missing."""
    post = get(1, framing % len(NEXT), b"POST") + NEXT
    for second, status in (
        (get(2, framing.replace(HOST, b"") % len(NEXT), b"POST") + NEXT, 400),
        (get(2, b"X: y\r\n"), 400),
        (get(2, HOST), 200),
        (get(2, framing % len(NEXT)) + NEXT, 200),
    ):
        for before in (post, get(1), post + get(1), get(1) + post):
            memory.store.added.clear()
            *_, last = replies(memory.talk(before, second))
            assert last.status == status
            assert 999 not in memory.store.added


def test_connect_is_never_a_tunnel(memory: Memory) -> None:
    (reply,) = replies(memory.talk(line(b"CONNECT a:80 HTTP/1.1") + NEXT, finish=False))
    assert reply.closes
    assert reply.status in (400, 404, 405)
    assert memory.store.added == []


# Byte splits

STREAMS = {
    "one": get(),
    "several": get(1) + get(22) + get(333) + get(b"x"),
    "good and bad": get(1)
    + line(b"GET / HTTP/1.1")
    + get(b"x")
    + get(5, b"X: y\r\nHost: b\r\n")
    + get(6, method=b"POST"),
    "to the end": get(1) + get(2) + get(3, HOST + b"Connection: close\r\n") + NEXT,
    "malformed": get(1) + get(2) + get(3, HOST + b"X : y\r\n") + NEXT,
    "no Host": get(1) + get(2, b"") + NEXT,
    "chunked, then GET": chunked(b"5;x=y\r\nhello\r\n1A\r\n%b\r\n0\r\nX: y\r\n\r\n" % (b"\r\n\r\n" * 6 + b"\r\n"))
    + get(2),
    "length, then GET": framed(b"Content-Length: 11\r\n", b"GET / HTTP/") + get(2),
    "HEAD, then GET": get(7, method=b"HEAD") + get(2) + get(b"x", method=b"HEAD"),
    "1.0": get(7, b"Connection: keep-alive\r\n", version=b"HTTP/1.0") + get(8, b"", version=b"HTTP/1.0") + NEXT,
    "CRLF ahead": b"\r\n\r\n" + get(1) + b"\r\n" + get(2),
    "unknown method": get(1) + get(2, method=b"BREW") + NEXT,
    "Upgrade": framed(b"Connection: Upgrade\r\nUpgrade: h2c\r\n") + get(2),
    "garbage": b"\x16\x03\x01\0\xa5\x01\0\0\xa1\x03\x03 HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("case", STREAMS)
def test_split_anywhere(memory: Memory, case: str) -> None:
    stream = STREAMS[case]
    whole = memory.talk(stream)
    added = memory.store.added.copy()
    assert replies(whole)
    for at in range(1, len(stream)):
        memory.store.added.clear()
        assert memory.talk(stream[:at], stream[at:]) == whole, stream[:at]
        assert memory.store.added == added
    for size in (1, 2, 3, 7):
        assert memory.talk(*cut(stream, size)) == whole


@pytest.mark.parametrize("case", STREAMS)
def test_byte_by_byte_over_a_socket(case: str) -> None:
    with Memory() as memory, Socket() as wire:
        assert wire.talk(*cut(STREAMS[case], 1)) == memory.talk(STREAMS[case])


# The shortcut: what was once read is not read again

FIELDS = [
    HOST,
    b"Host: b:80\r\nX: y\r\n",
    b"X: \xff\r\nhost:a\r\n",
    b"Host: a\r\nConnection: keep-alive\r\n",
    *(HOST + field for field in words(r"X: id=1\r\n|Content-Length: 0\r\n|Connection: Upgrade\r\nUpgrade: h2c\r\n")),
    *(HOST + field for field in words(r"Expect: 100-continue\r\n|Connection: close\r\n|Host: a\r\n")),
    *words(r"|Host: a/b\r\n"),
]
BODIES = [(HOST + b"Content-Length: 3\r\n", b"abc"), (HOST + b"Transfer-Encoding: chunked\r\n", b"1\r\nx\r\n0\r\n\r\n")]
IDS = st.sampled_from([b"1", b"2", b"5", b"05", b"-4", b"%37", b"x", b"", b"8&x=1", b"8&id=8", b"9" * 19, b"1" * 18])
REQUESTS = st.one_of(
    st.builds(get, IDS | st.integers(0, 10**6), st.sampled_from(FIELDS[:4])),
    st.builds(get, IDS | st.integers(0, 10**6), st.sampled_from(FIELDS[:4])),
    st.builds(
        get,
        IDS,
        st.sampled_from(FIELDS),
        st.sampled_from([b"GET", b"GET", b"HEAD", b"POST"]),
        st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]),
    ),
    st.builds(lambda id_, framing: get(id_, framing[0]) + framing[1], IDS, st.sampled_from(BODIES)),
)
CUTS = st.lists(st.integers(0, 10**6), max_size=6)


def cut_at(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    ends = sorted({at % len(stream) for at in cuts} | {0, len(stream)})
    return [stream[start:end] for start, end in itertools.pairwise(ends)]


relaxed = examples(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("store", [Telling, Mixed])
def test_a_request_means_on_a_used_connection_what_it_means_on_a_fresh_one(store: type[Telling]) -> None:
    with Memory(store()) as memory:
        fresh: dict[bytes, tuple[bytes, bool, list[int]]] = {}

        def ask(request: bytes) -> tuple[bytes, bool, list[int]]:
            if request not in fresh:
                memory.store.added.clear()
                answer = memory.talk(request)
                fresh[request] = answer, replies(answer)[-1].closes, memory.store.added.copy()
            return fresh[request]

        @relaxed
        @given(st.lists(REQUESTS, min_size=1, max_size=12), CUTS)
        def check(requests: list[bytes], cuts: list[int]) -> None:
            expected, ids = b"", []
            for request in requests:
                answer, closes, added = ask(request)
                expected += answer
                ids += added
                if closes:
                    break
            memory.store.added.clear()
            stream = b"".join(requests)
            assert memory.talk(*cut_at(stream, cuts)) == expected
            assert memory.store.added == ids

        check()


TAIL = b" HTTP/1.1\r\nHost: a\r\n\r\n"
PLAIN = b"GET /api/verve/accept?id="
PIECES = [TAIL, PLAIN] * 3 + words(
    r"1|22|x|| |\r\n|\r\n\r\n|?|&|&x=1|-|GET| HTTP/1.1| HTTP/1.1\r\nHost: a\r\n|Host: a\r\n\r\n| HTTP/1.1\r\n\r\n"
    r"| HTTP/1.0\r\n\r\n| HTTP/1.1\r\nHost: b\r\n\r\n| HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n"
)


@pytest.mark.parametrize("store", [Store, Telling, Mixed])
def test_the_shortcut_reads_whatever_comes_as_byte_by_byte(store: type[Store]) -> None:
    with Memory(store()) as memory:

        @relaxed
        @given(st.lists(st.sampled_from(PIECES), max_size=15), CUTS)
        @example([PLAIN, b"1", TAIL, PLAIN, b"2", TAIL], [])
        @example([b"1", TAIL, TAIL], [])
        @example([b"1", TAIL, PLAIN, TAIL, PLAIN, b"1", TAIL], [])
        @example([b"1", TAIL, b"1", TAIL, PLAIN, b"22", TAIL], [])
        def check(pieces: list[bytes], cuts: list[int]) -> None:
            stream = get(7) + b"".join(pieces)
            memory.store.added.clear()
            slow = memory.talk(*cut(stream, 1))
            added = memory.store.added.copy()
            for fast in ([stream], [get(7), stream[len(get(7)) :]], cut_at(stream, cuts)):
                memory.store.added.clear()
                assert memory.talk(*filter(None, fast)) == slow
                assert memory.store.added == added

        check()


def test_a_full_window_is_told_to_those_whose_ids_do_not_fit() -> None:
    with Memory(Store(10)) as memory:
        said = memory.talk(get(0), b"".join(map(get, range(1, 9))), b"".join(map(get, (9, 10, 8, 11, 9))))
        assert statuses(said) == [200] * 10 + [503, 200, 503, 200]
        assert memory.store.count == 10


# Answers that come later


@pytest.mark.parametrize("seed", range(5))
def test_answers_leave_in_request_order_whenever_they_come(later: tuple[Memory, Waiting], seed: int) -> None:
    memory, store = later
    chance = random.Random(seed)
    requests = [
        *((get(number), Telling.status(number)) for number in range(40)),
        *((get(number, method=b"HEAD"), Telling.status(number)) for number in range(5)),
        *((line(b"GET / HTTP/1.1"), 404), (get(b"x"), 400), (get(method=b"POST"), 405), (chunked(b"0\r\n\r\n"), 200)),
    ]
    chance.shuffle(requests)
    requests += [(get(1, HOST + HOST), 400), (NEXT, 0)]
    expected = [status for _, status in requests[:-1]]
    peer = memory.connect()
    peer.send(*cut(b"".join(request for request, _ in requests), chance.choice([1, 100, 10_000])))
    memory.settle()
    assert len(store.waiting) == 46
    while store.waiting:
        store.give(1, chance)
        said = statuses(peer.sent)
        assert said == expected[: len(said)]
        oldest = min((store.added.index(number) for number, _ in store.waiting), default=None)
        assert len(said) >= (len(expected) if oldest is None else oldest)  # nothing is held back
        assert peer.ended is (oldest is None)
    assert statuses(peer.sent) == expected


def test_reading_pauses_at_max_owed_and_goes_on(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    for number in range(http1.MAX_OWED - 1):
        peer.send(get(number))
    assert peer.reading
    peer.send(get(63) + get(64) + get(65), get(66))
    assert len(store.waiting) == http1.MAX_OWED == 64
    peer.send(get(67))
    memory.advance()
    assert not peer.reading
    assert store.added == list(range(64))
    store.give(64)
    memory.advance()
    assert peer.reading
    assert store.added == list(range(68))
    store.give(4)
    assert statuses(peer.sent) == [Telling.status(number) for number in range(68)]


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_10000_pipelined_in_one_write(later: tuple[Memory, Waiting], seed: int | None) -> None:
    memory, store = later
    with Memory(Telling()) as other:
        answers = {number % 3: other.talk(get(number)) for number in range(3)}
    peer = memory.connect()
    peer.send(b"".join(map(get, range(10_000))))
    while store.waiting:
        store.give(1, None if seed is None else random.Random(seed))
        assert len(peer.protocol.replies.slots) <= http1.MAX_OWED
        if not store.waiting:
            memory.advance()
    assert store.peak == http1.MAX_OWED
    assert store.added == list(range(10_000))
    assert peer.sent == b"".join(answers[number % 3] for number in range(10_000))


class Shuffled(Waiting):
    """Gives one answer, any of those that wait, in the loop's next turn."""

    chance = random.Random(1)

    def add(self, number: int, done: dedup.Done, counted: dedup.Counted | None = None) -> int | None:
        asyncio.get_running_loop().call_soon(self.give, 1, self.chance)
        return super().add(number, done, counted)


def test_10000_pipelined_over_a_socket() -> None:
    with Memory(Telling()) as other:
        answers = {number % 3: other.talk(get(number)) for number in range(3)}
    store = Shuffled()
    with Socket(store) as wire:
        said = wire.talk(b"".join(map(get, range(10_000))))
    expected = b"".join(answers[number % 3] for number in range(10_000))
    assert said.replace(b"\r\nConnection: close", b"") == expected  # the last may say so, having seen the peer's FIN
    assert store.peak <= http1.MAX_OWED


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
@pytest.mark.parametrize("tail", [b"", get(9)[:-1], b"\0", get(9) * 100])
def test_a_lost_connection_takes_no_answers(
    later: tuple[Memory, Waiting], tail: bytes, error: Exception | None
) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + get(2) + get(3) + tail)
    store.give(1)
    said = peer.sent
    peer.lose(error)
    store.give(len(store.waiting), random.Random(1))
    memory.advance(100)
    assert peer.sent == said
    assert store.waiting == []
    assert not memory.server.connections


def test_answers_after_an_abort_are_harmless(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + get(2))
    peer.protocol.abort()
    store.give(2)  # before connection_lost was called
    memory.advance()
    assert peer.lost


def test_a_half_closed_peer_gets_what_it_asked_for(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + get(3) + get(4)[:-1])
    peer.finish()
    memory.advance(1)
    assert not peer.closing
    store.give(2)
    memory.advance()
    first, last = replies(peer.sent)
    assert (first.closes, last.closes) == (False, True)
    assert peer.lost
    assert not peer.aborted


# Back-pressure


def test_a_peer_that_does_not_read_is_not_read_from(memory: Memory) -> None:
    peer = memory.connect()
    peer.taking = False
    count = 20_000
    peer.send(get() * count)
    memory.settle()
    once = len(memory.talk(get()))
    assert not peer.reading
    assert peer.choked
    bound = peer.HIGH + http1.QUANTUM * once  # at the mark, and then the answers of one turn
    while peer.choked:
        assert len(peer.buffer) <= bound
        assert not peer.reading
        left = len(peer.inbox) + len(peer.protocol._unread)
        memory.advance(1)
        assert left == len(peer.inbox) + len(peer.protocol._unread)
        peer.take()
        peer.taking = False
        memory.settle()
    peer.take()
    assert peer.reading
    assert memory.store.added == [7] * (count + 1)
    assert len(peer.sent) == count * once


def test_reading_goes_on_after_both_bounds_were_met(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.taking = False
    peer.send(*map(get, range(41)))
    store.give(1)
    while not peer.choked:
        peer.send(get())
        store.give(1)
    assert not peer.reading
    peer.take()  # while 40 answers wait: more than those at which reading goes on
    store.give(40)
    memory.advance()
    assert peer.reading
    peer.send(get(1000))
    assert store.added[-1] == 1000


@pytest.mark.parametrize("waiting", [1, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("unread", [0, 1, 100])
def test_reading_goes_on_whatever_was_put_by(later: tuple[Memory, Waiting], waiting: int, unread: int) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(0) * waiting)
    peer.protocol.pause_writing()  # as a transport may at any time
    peer.send(get(0) * unread)
    memory.advance()
    assert not peer.reading
    store.give(waiting // 2)
    peer.protocol.resume_writing()
    memory.advance()
    while store.waiting:
        store.give(1)
        memory.advance()
    assert len(store.added) == waiting + unread
    assert peer.reading
    peer.send(get(1))
    assert store.added[-1] == 1


class Watched(http1.Connection):
    """Notes how much it keeps for a peer at most."""

    peak = 0
    full = threading.Event()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if isinstance(self.transport, asyncio.WriteTransport):
            Watched.peak = max(Watched.peak, self.transport.get_write_buffer_size() + len(self._unread))

    def pause_writing(self) -> None:
        super().pause_writing()
        self.full.set()


def test_100000_pipelined_by_a_peer_that_does_not_read() -> None:
    requests = [get() if number % 1000 else line(b"GET /%d HTTP/1.1" % number) for number in range(100_000)]
    with Socket(connection=Watched) as wire:
        ok, not_found = wire.talk(get()), wire.talk(line(b"GET / HTTP/1.1"))
        with wire.connect() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            sender = threading.Thread(target=peer.sendall, args=(b"".join(requests),))
            sender.start()
            assert Watched.full.wait(GUARD)
            expected = b"".join(ok if number % 1000 else not_found for number in range(100_000))
            received = bytearray()
            while len(received) < len(expected):
                data = peer.recv(1 << 20)
                assert data
                received += data
            sender.join(GUARD)
            assert received == expected
            peer.sendall(get())
            assert peer.recv(65536) == ok
    # uvloop pauses at 64 KiB, and then the answers to one read of 256 KiB may still come, and the read be put by.
    assert Watched.peak <= 65536 + 262144 // len(get()) * len(ok) + 262144 < len(expected) // 8


# Deadlines

PARTS = {  # what comes first, and what then comes ten times a second without ever being enough
    "byte": (b"G", b""),
    "line": (START[:26], b"7"),
    "field": (get()[:-4], b"x"),
    "head": (get()[:-1], b""),
    "length": (framed(b"Content-Length: 500\r\n", b"hello"), b"x"),
    "chunked": (chunked(b"500\r\nhello"), b"x"),
    "trailers": (chunked(b"5\r\nhello\r\n0\r\nX: y"), b"y"),
    "second": (get(1) + get()[:-4], b"x"),
    "after an empty line": (b"\r\n" + get()[:-4], b"x"),
}


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "dripping"])
@pytest.mark.parametrize("part", PARTS)
def test_a_slow_request_is_408(memory: Memory, part: str, drip: bool) -> None:
    first, then = PARTS[part]
    peer = memory.connect()
    memory.advance(60.4)  # idle before; the request's first byte counts
    peer.send(first)
    before = peer.sent
    for _ in range(99):
        memory.advance(0.1)
        peer.send(then * drip)
    assert peer.sent == before  # 9.9 s: not early
    memory.advance(2.1)
    *others, reply = replies(peer.sent)
    assert others == replies(before)
    assert (reply.status, reply.body, reply.closes) == (408, b"failed", True)
    assert peer.ended
    assert set(memory.store.added) <= {1}


def test_head_and_body_have_one_deadline(memory: Memory) -> None:
    peer = memory.connect()
    request = framed(b"Content-Length: 9\r\n", b"hello")
    peer.send(request[:20])
    memory.advance(9)
    peer.send(request[20:])
    memory.advance(3)
    assert statuses(peer.sent) == [408]


def test_408_to_head_has_no_body(memory: Memory) -> None:
    peer = memory.connect()
    peer.send(get(method=b"HEAD")[:-2])
    memory.advance(12)
    (reply,) = replies(peer.sent)
    assert (reply.status, reply.body) == (408, b"")


def test_each_request_has_its_own_time(memory: Memory) -> None:
    peer = memory.connect()
    for number in range(20):
        peer.send(get(number)[:20])
        memory.advance(9.9)
        peer.send(get(number)[20:] + framed(b"Content-Length: 9\r\n", b"hello"))
        memory.advance(9.9)
        peer.send(b"1234")
    assert statuses(peer.sent) == [200] * 40


@pytest.mark.parametrize("pause", ["an answer before it comes", "the peer does not read for a while"])
def test_the_deadline_of_a_request_outlives(later: tuple[Memory, Waiting], pause: str) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + get(2)[:-1])
    memory.advance(1)
    if pause.startswith("an answer"):
        store.give(1)
    else:
        store.give(1)
        peer.protocol.pause_writing()
        memory.advance(1)
        peer.protocol.resume_writing()
    memory.advance(13)
    assert statuses(peer.sent) == [200, 408]


@pytest.mark.parametrize("size", [1000, 1])
@pytest.mark.parametrize("before", [b"", get(), get(b"x"), get() + b"\r\n"], ids=["new", "used", "failed", "CRLF"])
def test_an_idle_connection_is_closed_silently_and_never_early(memory: Memory, before: bytes, size: int) -> None:
    memory.advance(0.3)
    peer = memory.connect()
    memory.advance(50 if before else 0)
    peer.send(*cut(before, size))
    said = peer.sent
    memory.advance(75)
    assert not peer.ended
    memory.advance(3)
    assert peer.lost
    assert not peer.aborted
    assert peer.sent == said


def test_a_connection_that_answers_is_not_idle(memory: Memory) -> None:
    peers = [memory.connect() for _ in range(3)]
    for number in range(5):
        for peer, request in zip(peers, (get(number), get(b"x"), get(number, method=b"POST")), strict=True):
            peer.send(request)
        memory.advance(74)
        assert not any(peer.ended for peer in peers)


def test_a_connection_that_waits_for_an_answer_is_not_idle(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    for _ in range(10):
        memory.advance(74)
        peer.send(get(1))
        memory.advance(200)  # the store's time-out is the store's
        store.give(1)
    memory.advance(74)
    assert not peer.ended
    assert statuses(peer.sent) == [200] * 10


def test_a_peer_that_does_not_read_is_cut(memory: Memory) -> None:
    peer = memory.connect()
    peer.taking = False
    peer.send(get() * 1000)
    memory.advance(75)
    assert not peer.closing
    memory.advance(3)
    assert peer.aborted


def test_a_peer_that_reads_now_and_then_is_not_cut(memory: Memory) -> None:
    peer = memory.connect()
    peer.taking = False
    peer.send(get() * 50_000)
    memory.settle()
    while peer.choked:
        memory.advance(70)
        assert not peer.ended
        peer.take()
        peer.taking = False
        memory.settle()
    memory.advance(74)  # idle only now
    assert not peer.ended
    memory.advance(4)
    assert peer.ended


def test_after_an_error_the_peer_has_a_moment_to_read_it(memory: Memory) -> None:
    peer = memory.connect(polite=False)
    peer.send(get(1, b""), get(2))
    for _ in range(19):
        peer.send(get(3))
        memory.advance(0.1)
    assert peer.shut
    assert not peer.aborted
    memory.advance(2)
    assert peer.aborted
    assert statuses(peer.sent) == [400]
    assert memory.store.added == []


@pytest.mark.parametrize("count", [1000, 10])
def test_the_moment_begins_when_all_is_sent(memory: Memory, count: int) -> None:
    peer = memory.connect()
    peer.taking = False
    peer.send(get() * count + get(7, HOST + b"Connection: close\r\n"))
    memory.settle()
    assert peer.choked is (count == 1000)
    memory.advance(20)
    assert not peer.aborted
    peer.take()
    memory.settle()
    assert statuses(peer.sent) == [200] * (count + 1)
    assert peer.lost


def test_nothing_is_said_to_a_peer_that_has_shut_its_side_amid_a_request(memory: Memory) -> None:
    peer = memory.connect()
    peer.taking = False
    peer.send(get() + get()[:-1])
    peer.finish()
    memory.advance(20)
    assert peer.closing
    peer.take()
    memory.advance()
    assert statuses(peer.sent) == [200]


# The cap


def test_a_connection_past_the_cap() -> None:
    with Memory(max_connections=3) as memory:
        peers = [memory.connect() for _ in range(3)]
        for peer in peers:
            peer.send(get())
        more = memory.connect()
        more.send(get(8))
        memory.advance()
        (reply,) = replies(more.sent)
        assert (reply.status, reply.body, reply.closes, more.lost) == (503, b"failed", True, True)
        peers.pop().lose()
        peers.append(memory.connect())
        for peer in peers:
            peer.send(get(9))
            assert replies(peer.sent)[-1].status == 200
        assert 8 not in memory.store.added


def test_a_connection_past_the_cap_over_a_socket() -> None:
    with Socket(max_connections=3) as wire, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(wire.connect()) for _ in range(3)]
        for peer in peers:
            peer.sendall(get())
            assert statuses(peer.recv(65536)) == [200]
        (reply,) = replies(wire.talk(get(8), finish=False))
        assert (reply.status, reply.closes) == (503, True)
        peers[0].shutdown(socket.SHUT_WR)
        assert rest(peers.pop(0)) == b""  # it has left
        for peer in (*peers, stack.enter_context(wire.connect())):
            peer.sendall(get(9))
            assert statuses(peer.recv(65536)) == [200]
        assert 8 not in wire.store.added


def test_those_turned_away_take_no_place_of_those_served() -> None:
    with Memory(max_connections=3) as memory:
        peers = [memory.connect() for _ in range(3)]
        more = memory.connect(polite=False)  # has its 503, and stays for a moment
        memory.advance()
        peers.pop().lose()
        peer = memory.connect()
        peer.send(get())
        assert statuses(peer.sent) == [200]
        more.lose()


def test_far_past_the_cap_connections_are_just_closed() -> None:
    with Memory(max_connections=1) as memory:
        peers = [memory.connect() for _ in range(http1.OVERFLOW + 10)]
        assert {peer.sent[:12] for peer in peers[1 : http1.OVERFLOW]} == {b"HTTP/1.1 503"}
        assert peers[-1].sent == b""
        memory.advance()
        assert all(peer.lost for peer in peers[1:])
        peers[0].send(get())
        assert statuses(peers[0].sent) == [200]


# Drain


def drain(memory: Memory, timeout: float = 8) -> asyncio.Task[int]:
    task = memory.loop.create_task(memory.server.drain(timeout))
    memory.advance()
    return task


def test_drain_without_connections_is_over_at_once(memory: Memory) -> None:
    assert drain(memory).result() == 0


def test_drain_answers_what_waits_and_says_close(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peers = [memory.connect() for _ in range(3)]
    for count, peer in enumerate(peers):
        peer.send(get() * count + get(method=b"HEAD"))
    done = drain(memory)
    memory.advance(3)
    assert not any(peer.ended for peer in peers)
    store.give(6)
    memory.advance()
    for count, peer in enumerate(peers):
        said = [(reply.body, reply.closes) for reply in replies(peer.sent)]
        assert said == [(b"ok", False)] * count + [(b"", True)]
        assert peer.lost
        assert not peer.aborted
    assert done.result() == 0


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("before", [b"", get(0)], ids=["first", "second"])
def test_drain_has_the_one_answer_that_waits_say_close(
    later: tuple[Memory, Waiting], before: bytes, method: bytes
) -> None:
    memory, store = later
    peer = memory.connect()
    if before:
        peer.send(before)
        store.give(1)
        peer.taken.clear()
    peer.send(get(1, method=method))
    done = drain(memory)
    memory.advance(3)
    memory.server.give([cast(http1.Slot, give) for _, give in store.waiting], 1)
    memory.advance()
    (reply,) = replies(peer.sent)
    assert (reply.status, reply.closes) == (200, True)
    assert peer.lost
    assert done.result() == 0


@pytest.mark.parametrize("before", [b"", get(), get(b"x")], ids=["new", "used", "failed"])
def test_drain_gives_an_idle_connection_one_more_answer(memory: Memory, before: bytes) -> None:
    peers = [memory.connect() for _ in range(3)]
    for peer in peers:
        peer.send(before)
    done = drain(memory)
    requests = (get(1), get(2), get(2, method=b"HEAD")), [get(1), get(b"y"), get(2, method=b"POST")]
    for peer, request, last in zip(peers, *requests, strict=True):
        old = len(peer.sent)
        memory.advance(0.1)
        peer.send(request)
        (reply,) = replies(peer.sent[old:])
        assert (reply.closes, bool(reply.body)) == (True, not request.startswith(b"HEAD"))
        peer.send(last)
        memory.advance()
        assert replies(peer.sent)[-1] == reply
        assert peer.lost
    assert done.result() == 0


def test_drain_closes_an_idle_connection_after_a_quiet_time(memory: Memory) -> None:
    used, new = memory.connect(), memory.connect()
    used.send(get())
    said = bytes(used.sent)
    done = drain(memory)
    memory.advance(0.4)
    assert not used.ended
    assert not new.ended
    memory.advance(2)
    assert (used.lost, new.lost, used.aborted, new.aborted) == (True, True, False, False)
    assert (used.sent, new.sent) == (said, b"")
    assert done.result() == 0


@pytest.mark.parametrize("before", [b"", get(), get() + get()], ids=["new", "used", "used twice"])
@pytest.mark.parametrize("size", [10_000, 7, 1])
def test_a_batch_during_drain_is_answered_whole(memory: Memory, before: bytes, size: int) -> None:
    peer = memory.connect()
    peer.send(before)
    peer.taken.clear()
    done = drain(memory)
    if size == 10_000:
        peer.send(get(1) + get(2) + get(3))
    else:
        peer.send(get(1)[:-1])
        peer.send(get(1)[-1:] + get(2) + get(3)[:9])
        peer.send(*cut(get(3)[9:], size))
    memory.advance()
    assert [(reply.status, reply.closes) for reply in replies(peer.sent)] == [(200, False)] * 2 + [(200, True)]
    assert done.result() == 0


def test_drain_amid_a_long_batch(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(b"".join(map(get, range(200))))
    done = drain(memory)
    while store.waiting:
        store.give(1, random.Random(1))
        memory.advance(0.01)
    assert store.added == list(range(200))
    assert [reply.closes for reply in replies(peer.sent)] == [False] * 199 + [True]
    assert done.result() == 0


@pytest.mark.parametrize("part", ["byte", "head", "length", "chunked"])
def test_drain_waits_for_the_rest_of_a_request(memory: Memory, part: str) -> None:
    whole = {"byte": get(), "head": get(), "length": framed(b"Content-Length: 5\r\n", b"hello")}.get(part)
    whole = whole or chunked(b"5\r\nhello\r\n0\r\n\r\n")
    at = {"byte": 1, "head": len(whole) - 2}.get(part, len(whole) - 3)
    peer = memory.connect()
    peer.send(whole[:at])
    done = drain(memory)
    memory.advance(5)
    assert not done.done()
    peer.send(whole[at:])
    memory.advance()
    (reply,) = replies(peer.sent)
    assert (reply.status, reply.closes) == (200, True)
    assert done.result() == 0


def test_drain_cuts_what_is_left_after_its_time_and_counts_it(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peers = [memory.connect() for _ in range(4)]
    for peer, stream in zip(peers, (get(), get() * 100, get()[:-1], b""), strict=True):
        peer.send(stream)
    start = memory.loop.time()
    done = drain(memory, 3)
    memory.advance(2.9)
    assert not done.done()
    memory.advance(0.2)
    assert done.result() == 3
    assert [peer.aborted for peer in peers] == [True, True, True, False]
    assert memory.loop.time() - start == pytest.approx(3.1)
    store.give(len(store.waiting))
    assert not any(peer.sent for peer in peers)


@pytest.mark.parametrize("count", [600, 10])
def test_drain_gives_a_slow_reader_its_time(memory: Memory, count: int) -> None:
    readers = [memory.connect() for _ in range(2)]
    for peer in readers:
        peer.taking = False
        peer.send(get() * count)
        memory.settle()
        assert peer.choked is (count == 600)
    done = drain(memory)
    memory.advance(6)
    readers[0].take()
    memory.advance(1.9)
    assert statuses(readers[0].sent) == [200] * count
    memory.advance(0.2)
    assert done.result() == 1


def test_a_connection_that_the_kernel_held_gets_one_answer_during_drain(memory: Memory) -> None:
    first = memory.connect()
    done = drain(memory)
    peer, silent = memory.connect(), memory.connect()
    peer.send(get() + get(1))
    assert [reply.closes for reply in replies(peer.sent)] == [False, True]
    memory.advance(3)
    assert (first.lost, silent.lost, silent.sent) == (True, True, b"")
    assert done.result() == 0


def test_drain_over_a_socket() -> None:
    store = Waiting()
    with Socket(store) as wire, contextlib.ExitStack() as stack:
        idle, first, second = (stack.enter_context(wire.connect()) for _ in range(3))
        for peer in (idle, first, second):
            peer.sendall(get(b"x"))
            assert statuses(peer.recv(65536)) == [400]
        first.sendall(get(1) + get(b"x"))
        second.sendall(get(1) + get(4))
        idle.sendall(get(b"x"))
        assert statuses(idle.recv(65536)) == [400]  # so the others' requests are read too

        async def start() -> asyncio.Task[int]:
            task = asyncio.create_task(wire.server.drain(3 * GUARD))
            await asyncio.sleep(0)
            idle.sendall(get(b"x"))
            return task

        async def end(task: asyncio.Task[int]) -> int:
            store.give(3)
            return await task

        done = wire.run(start())
        assert [reply.closes for reply in replies(rest(idle))] == [True]
        idle.close()
        given = asyncio.run_coroutine_threadsafe(end(done), wire.loop)
        for peer in (first, second):
            assert [reply.closes for reply in replies(rest(peer))] == [False, True]
            peer.close()
        assert given.result(GUARD) == 0
        answered = wire.server.answered()
        assert (answered[200], answered[400]) == (3, 6)


# Expect: 100-continue (RFC 9110, 10.1.1)

EXPECT = b"Expect: 100-continue\r\n"
EXPECTING = framed(EXPECT + b"Content-Length: 5\r\n")


@pytest.mark.parametrize("size", [1000, 1])
@pytest.mark.parametrize(
    ("head", "body"),
    [
        (EXPECTING, b"hello"),
        (framed(b"expect:100-Continue \r\ncontent-length: 5\r\n"), b"hello"),
        (framed(EXPECT + b"Transfer-Encoding: chunked\r\n"), b"5\r\nhello\r\n0\r\n\r\n"),
        (get(7, HOST + EXPECT + b"Content-Length: 5\r\n", b"HEAD"), b"hello"),
    ],
)
def test_100_continue(memory: Memory, head: bytes, body: bytes, size: int) -> None:
    peer = memory.connect()
    for _ in range(3):
        peer.taken.clear()
        peer.send(*cut(head, size))
        assert statuses(peer.sent) == [100]
        peer.send(*cut(body, size))
        assert statuses(peer.sent) == [100, 200]
    assert statuses(memory.talk(head + body)) == [200]  # it came along
    assert memory.store.added == [7] * 4


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        (
            get(7, HOST + EXPECT + b"Content-Length: 5\r\nConnection: keep-alive\r\n", version=b"HTTP/1.0"),
            b"hello",
            200,
        ),
        (framed(EXPECT), b"", 200),
        (framed(EXPECT + b"Content-Length: 0\r\n"), b"", 200),
        (framed(b"Expect: 200-ok\r\nContent-Length: 5\r\n"), b"hello", 200),
        (framed(EXPECT + b"Content-Length: 65537\r\n"), b"", 413),
        (framed(EXPECT + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), b"", 400),
        (get(7, EXPECT + b"Content-Length: 5\r\n"), b"", 400),
    ],
)
def test_no_100_continue(memory: Memory, head: bytes, body: bytes, status: int) -> None:
    peer = memory.connect()
    peer.send(head)
    assert statuses(peer.sent) == [status] * (not body)
    peer.send(body)
    assert statuses(peer.sent) == [status]


def test_100_continue_waits_for_its_turn(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + get(3) + EXPECTING)
    assert peer.sent == b""
    store.give(1)
    assert statuses(peer.sent) == [200]
    store.give(1)
    assert statuses(peer.sent) == [200, 200, 100]
    peer.send(b"hello")
    store.give(1)
    assert statuses(peer.sent) == [200, 200, 100, 200]


def test_after_100_continue_drain_still_answers(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + EXPECTING)
    done = drain(memory)
    store.give(1)
    memory.advance()
    peer.send(b"hello")
    store.give(len(store.waiting))
    memory.advance(4)
    assert replies(peer.sent)[-1].closes
    assert done.result() == 0


# Whatever comes


SEEDS = [*(request for request, _ in ODD.values()), *MALFORMED.values(), *STREAMS.values(), *LAST.values(), EXPECTING]
CHANGES = st.tuples(
    st.sampled_from(["flip", "delete", "insert", "double", "swap"]),
    st.integers(0, 10**4),
    st.integers(1, 40),
    st.sampled_from(
        [b"\r\n", b"\r", b"\n", b"\0", b" ", b":", b"\r\n\r\n", b"0\r\n\r\n", HOST, START, get(), b"HEAD", b"\xff"]
    )
    | st.binary(min_size=1, max_size=3),
)


def change(stream: bytes, changes: Sequence[tuple[str, int, int, bytes]]) -> bytes:
    for how, at, size, new in changes:
        start = at % (len(stream) + 1)
        old = stream[start : start + size]
        put = {
            "flip": bytes([old[0] ^ (1 << size % 8)]) + old[1:] if old else b"",
            "delete": b"",
            "insert": new + old,
            "double": old + old,
            "swap": new,
        }[how]
        stream = stream[:start] + put + stream[start + len(old) :]
    return stream


@pytest.mark.parametrize("store", [Telling, Mixed])
def test_whatever_comes_is_answered_in_good_form(store: type[Telling]) -> None:
    with Memory(store()) as memory:

        @relaxed
        @given(st.lists(st.sampled_from(SEEDS), min_size=1, max_size=4), st.lists(CHANGES, max_size=6), CUTS)
        def check(parts: list[bytes], changes: list[tuple[str, int, int, bytes]], cuts: list[int]) -> None:
            stream = change(b"".join(parts), changes) or b"\0"
            memory.store.added.clear()
            answer = memory.talk(*cut_at(stream, cuts))
            found = [reply for reply in replies(answer) if reply.status != 100]
            assert len(found) <= stream.count(b"HTTP/1.") + 1
            assert all(reply.body for reply in found) or b"HEAD" in stream
            assert len(memory.store.added) <= len(found)
            assert statuses(memory.talk(get(3))) == [200]

        check()
