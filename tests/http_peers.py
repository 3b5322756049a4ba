"""What the tests of `http1` share: requests, answers read with care, and the two worlds in which both meet.

`Memory` drives the protocol through a transport that asserts what asyncio only assumes, in virtual time; `Socket` is
uvloop's server on a free port, and a blocking socket. `talk` on either returns everything the server says until it
ends the connection. Every answer read here goes through h11 and then through `replies`, which checks what all answers
have in common.
"""

import asyncio
import contextlib
import itertools
import random
import re
import socket
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import h11
import uvloop
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


# The worlds


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


def cut_at(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    ends = sorted({at % len(stream) for at in cuts} | {0, len(stream)})
    return [stream[start:end] for start, end in itertools.pairwise(ends)]


def drain(memory: Memory, timeout: float = 8) -> asyncio.Task[int]:
    task = memory.loop.create_task(memory.server.drain(timeout))
    memory.advance()
    return task
