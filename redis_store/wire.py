"""One connection to a Redis server: commands out, and their replies back in the same order (RESP2).

`connect` opens it: TCP, TLS or a unix socket, then AUTH and CLIENT SETNAME. From then on a *trip* is some commands that
are sent together, and the replies to them. Several trips can be under way: Redis answers in order, so
the oldest trip has the next reply. Nothing here knows of windows or ids.

A trip ends with its replies, errors among them as they stand, or with the loss of the connection. When one is not
answered by its deadline, or what comes is not RESP, or the connection breaks, all trips under way fail, and the
connection is never used again: replies may be on their way that nobody waits for. A trip that failed may have been
carried out, or not.

A trip of 30 ids costs 38 us of CPU, most of it the kernel's; redis-py's own reader and writer took 72.
"""

import asyncio
import itertools
import os
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import redis

LATE = 0.05  # seconds past a deadline in which a reply is read that came while this process did other things
MAX_DEPTH = 8  # arrays in arrays of one reply; XINFO and XRANGE have 4
MAX_REPLY = 64 * 2**20  # bytes of one reply; none that is asked for here has more than some 1 MiB
DOUBT = 0.3  # seconds to find out whether a port expects TLS, when there was no connection with it or without it

_integers = re.compile(rb"(?::[0-9]+\r\n)+").fullmatch

Command = Sequence[str | bytes]
Outcome = list[Any] | Exception  # of a trip: its replies, or why there are none
Done = Callable[[Outcome], None]


@dataclass(frozen=True)
class Address:
    """How to connect to a server."""

    host: str = "localhost"
    port: int = 6379
    path: str = ""  # of a unix socket; then host and port don't count
    database: int = 0
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    tls: bool = False
    ca_certs: str | None = None  # file, PEM, of the authorities that are trusted; without, the system's
    certfile: str | None = None  # file, PEM: a certificate of this client, for servers that ask for one
    keyfile: str | None = None  # file, PEM: its key; without, it is in `certfile`
    check_hostname: bool = True  # whether the server's certificate must be for `host`


class ShortError(Exception):
    """A reply is not whole yet."""


class Trip:
    """Commands that were sent together, and whom to tell what came of them."""

    __slots__ = ("awaited", "done", "replies", "timer")

    def __init__(self, awaited: int, done: Done) -> None:
        self.awaited = awaited  # how many replies there will be
        self.replies: list[Any] = []
        self.done = done
        self.timer: asyncio.TimerHandle


class Wire(asyncio.Protocol):
    """A connection, and the trips that are under way on it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[Exception] = self._loop.create_future()  # why it can't be used any more
        self._transport: asyncio.Transport
        self._received = b""  # what came of a reply that is not whole yet
        self._trips: deque[Trip] = deque()  # oldest first

    def send(self, packed: bytes, count: int, deadline: float, done: Done) -> None:
        """Begin a trip of `count` commands; `done` is told once what came of it, by `deadline` (loop time)."""
        if self.closed.done():
            self._loop.call_soon(done, self.closed.result())
            return
        trip = Trip(count, done)
        trip.timer = self._loop.call_at(deadline, self._expire, trip)
        self._trips.append(trip)
        try:
            self._transport.write(packed)
        except RuntimeError:  # uvloop's, for a transport that was reset and has not said so yet
            self.abort(redis.ConnectionError("the connection was reset"))

    async def ask(self, commands: Sequence[Command], deadline: float) -> list[Any]:
        """Return the replies to commands, errors among them. Raises TimeoutError, redis.ConnectionError."""
        result: asyncio.Future[Outcome] = self._loop.create_future()

        def done(outcome: Outcome) -> None:
            if not result.done():  # else the caller was cancelled
                result.set_result(outcome)

        self.send(b"".join(pack(*command) for command in commands), len(commands), deadline, done)
        outcome = await result
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def abort(self, why: Exception) -> None:
        """Give the connection up, and all trips that are under way."""
        if self.closed.done():
            return
        self.closed.set_result(why)
        self._transport.abort()
        trips, self._trips = self._trips, deque()
        for trip in trips:
            trip.timer.cancel()
            trip.done(why)

    def _expire(self, trip: Trip) -> None:
        """Give up in a moment: timers run before what came meanwhile is read, and it may be the reply."""
        trip.timer = self._loop.call_later(LATE, self.abort, TimeoutError())

    # Protocol interface

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        data = self._received + data
        pos = 0
        try:
            if self._trips and self._trips[0].awaited > 1 and _integers(data):  # the replies to SADDs, read at once
                replies = list(map(int, data[1:-2].split(b"\r\n:")))
                if len(replies) == self._trips[0].awaited and not self._trips[0].replies:
                    pos = len(data)
                    self._end(replies)
            while pos < len(data) and not self.closed.done():
                reply, pos = parse(data, pos)
                if not self._trips:
                    self.abort(redis.ConnectionError("a reply came that nobody waits for"))
                    return
                trip = self._trips[0]
                trip.replies.append(reply)
                if len(trip.replies) == trip.awaited:
                    self._end(trip.replies)
        except ShortError:
            if len(data) - pos > MAX_REPLY:
                self.abort(redis.ConnectionError(f"expected replies of at most {MAX_REPLY} bytes"))
        except ValueError:
            self.abort(redis.ConnectionError("what came is not Redis's protocol"))
        self._received = data[pos:]

    def _end(self, replies: list[Any]) -> None:
        """End the oldest trip."""
        trip = self._trips.popleft()
        trip.timer.cancel()
        trip.done(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        words = f": {exc}" if isinstance(exc, ssl.SSLError) else ""
        self.abort(redis.ConnectionError(f"the connection was closed{words}"))


async def connect(address: Address, timeout: float) -> Wire:
    """Return a new connection, named verve-HOST-PID in CLIENT LIST.

    It takes up to `timeout` seconds to connect, and as many to the first answer.

    Raises TimeoutError, redis.ConnectionError, redis.ResponseError.

    uvloop forgets the error of an attempt that fails in the same turn in which it is cancelled, and logs it with a
    traceback. So an attempt that nobody waits for any more goes on for a moment.
    """
    loop = asyncio.get_running_loop()
    attempt = loop.create_task(_attempt(address, timeout))
    try:
        return await asyncio.shield(attempt)
    except asyncio.CancelledError:
        attempt.add_done_callback(_discard)
        loop.call_later(DOUBT, attempt.cancel)
        raise


def _discard(attempt: asyncio.Task[Wire]) -> None:
    """End a connection that nobody waits for any more, if it was made."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().abort(redis.ConnectionError("closed"))


async def _attempt(address: Address, timeout: float) -> Wire:
    """Return a new connection, as `connect` does."""
    try:
        return await _greet(await _open(address, timeout), address, timeout)
    except (TimeoutError, redis.ConnectionError) as error:
        if not await _expects_other(address, error):
            raise
        words = "is not what this port expects, as a second try showed"
        raise redis.ConnectionError(f"{'TLS' if address.tls else 'a connection without TLS'} {words}") from error


async def _open(address: Address, timeout: float) -> Wire:
    """Return a new connection on which nothing was said yet."""
    loop = asyncio.get_running_loop()
    tls = _context(address) if address.tls else None
    async with asyncio.timeout(timeout):
        try:
            if address.path:
                _, wire = await loop.create_unix_connection(Wire, address.path)
            else:
                _, wire = await loop.create_connection(Wire, address.host, address.port, ssl=tls)
        except OSError as error:
            raise redis.ConnectionError(_reason(address, error)) from error
    return wire


async def _greet(wire: Wire, address: Address, timeout: float) -> Wire:
    """Say who we are; return the connection, or end it."""
    name = f"verve-{socket.gethostname()}-{os.getpid()}"
    commands = [("AUTH", *filter(None, [address.username]), address.password)] if address.password else []
    try:
        deadline = asyncio.get_running_loop().time() + timeout
        *replies, _ = await wire.ask([*commands, ("CLIENT", "SETNAME", name)], deadline)
        good(replies)  # that the server keeps no names matters to nobody
    except BaseException as error:
        wire.abort(redis.ConnectionError(str(error)))
        raise
    return wire


def _context(address: Address) -> ssl.SSLContext:
    """Return what TLS needs. Raises redis.ConnectionError if a file can't be used."""
    named = f"ssl_ca_certs={address.ca_certs}"
    try:
        context = ssl.create_default_context(cafile=address.ca_certs)
        if address.certfile:
            named = f"ssl_certfile={address.certfile}" + (f", ssl_keyfile={address.keyfile}" if address.keyfile else "")
            context.load_cert_chain(address.certfile, address.keyfile, password="")  # or OpenSSL asks the terminal
    except OSError as error:
        raise redis.ConnectionError(f"can't use {named}: {_words(error)}") from error
    context.check_hostname = address.check_hostname
    return context


def _reason(address: Address, error: OSError) -> str:
    """Return why there is no connection, in words."""
    return f"can't connect to {address.path or f'{address.host}:{address.port}'}: {_words(error)}"


def _words(error: OSError) -> str:
    known = error.errno is not None and not isinstance(error, ssl.SSLError | socket.gaierror)
    return os.strerror(cast(int, error.errno)) if known else error.strerror or str(error)


async def _expects_other(address: Address, error: Exception) -> bool:
    """Whether a port that could not be spoken to with TLS answers without it, or the other way round.

    A server that waits for TLS closes a connection without it, or resets it; one that does not may wait for the end of
    a line. So only to try it tells for certain. Nothing is sent but PING.
    """
    cause = error.__cause__
    failed = isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLCertVerificationError)
    if address.path or not (isinstance(error, TimeoutError) or failed if address.tls else cause is None):
        return False
    context = None if address.tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if context is not None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(DOUBT):
            reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
            try:
                writer.write(b"PING\r\n")
                return not address.tls or await reader.read(1) in (b"+", b"-")
            finally:
                writer.transport.abort()
    except ssl.SSLError as refused:
        return "ALERT" in (refused.reason or "")
    except OSError:  # TimeoutError is one
        return False


def good(replies: list[Any]) -> list[Any]:
    """Return replies; raise the first that is an error."""
    for reply in replies:
        if isinstance(reply, redis.ResponseError):
            raise reply
    return replies


def parse(data: bytes, pos: int, depth: int = 0) -> tuple[Any, int]:
    """Read a reply (RESP2) at `pos`; return it and where the next begins. Errors are returned too, as they stand.

    Raises ShortError if there is more to come, ValueError if it is none.
    """
    end = data.find(b"\r\n", pos)
    if end < 0:
        raise ShortError
    kind, line = data[pos : pos + 1], data[pos + 1 : end]
    pos = end + 2
    if kind == b":":
        return int(line), pos
    if kind == b"+":
        return line, pos
    if kind == b"-":
        return redis.ResponseError(line.decode("utf-8", "replace")), pos
    if kind not in (b"$", b"*"):
        raise ValueError("a reply of an unknown kind")
    size = int(line)
    if size < 0:
        return None, pos
    if kind == b"$":
        if len(data) < pos + size + 2:
            raise ShortError
        return data[pos : pos + size], pos + size + 2
    if depth == MAX_DEPTH:
        raise ValueError(f"arrays are nested more than {MAX_DEPTH} deep")
    items = []
    for _ in range(size):
        item, pos = parse(data, pos, depth + 1)
        items.append(item)
    return items, pos


def pack(*words: str | bytes) -> bytes:
    """Return a command as it is sent."""
    parts = [f"*{len(words)}\r\n".encode()]
    for word in words:
        text = word.encode() if isinstance(word, str) else word
        parts.append(b"$%d\r\n%b\r\n" % (len(text), text))
    return b"".join(parts)


def packed_words(words: Sequence[str]) -> tuple[int, str]:
    """Return how many words of ASCII there are, and how they are sent, for `pack_numbers`."""
    return len(words), "".join(f"\r\n${len(word)}\r\n{word}" for word in words)


def pack_numbers(words: tuple[int, str], numbers: list[int]) -> bytes:
    """Return a command as it is sent: what `packed_words` returned, then integers, in any order."""
    count, head = words
    texts = sorted(map(str, numbers), key=len)
    parts = [f"*{count + len(texts)}", head]
    for size, equal in itertools.groupby(texts, len):
        start = f"\r\n${size}\r\n"
        parts += [start, start.join(equal)]
    return ("".join(parts) + "\r\n").encode("ascii")


def pack_few(commands: Iterable[tuple[tuple[int, str], list[int]]]) -> bytes:
    """Return commands as they are sent, each as for `pack_numbers`: faster where each has few integers."""
    parts = []
    for (count, head), numbers in commands:
        if len(numbers) == 1:
            text = str(numbers[0])
            parts.append(f"*{count + 1}{head}\r\n${len(text)}\r\n{text}\r\n")
        else:
            tail = "".join([f"\r\n${len(text)}\r\n{text}" for text in map(str, numbers)])
            parts.append(f"*{count + len(numbers)}{head}{tail}\r\n")
    return "".join(parts).encode("ascii")
