"""One client connection: bytes in, requests out; answers in, bytes out.

The life of a request. A head (request line and fields) is looked at once, whole. What has come of it so far is
kept in `head`, at most 40 KiB, and is fed to httptools as it comes, so that malformed bytes are refused at once
and not at a time-out. When the blank line is in, llhttp has vouched for the syntax and the framing; what it lets
pass and RFC 9112 does not (versions but 1.0 and 1.1, two spaces, codings but `chunked`, a Host that is missing,
doubled or malformed) is refused here, by searches over the raw fields rather than by a callback for each. A body
is drained, and only then is the request handed to `handle`, which returns an `Answer`, or keeps the `Slot` that it
gets and fills it later.

A message ends only behind a blank line or at the length it announced, so the parser is never fed past such a
place in one piece: whatever follows is always the beginning of the next request, and never read twice.

Clients that are programs repeat themselves. So what followed the target in a connection's last GET without a
body (` HTTP/1.1`, fields, blank line) is kept as `known`: the same bytes mean again what they meant then. Where a
read has only `plain` and digits between them, as in nearly all requests, these are taken without parsing them
again, since neither can change how the rest is read. Anything else takes the way above.

Answers leave in the order of the requests. While nothing waits they are written straight away, those of one
read in one write; behind a slot that waits they queue in slots of their own. An error takes its place in that
order too; then nothing more is read, the sending side is shut, and what the peer still sends is thrown away for
a moment (LINGER), since a close with unread bytes would reset the connection and destroy the answer under way.

Everything is bounded: the head, the body, the answers that wait (then the rest of the read is put by in
`unread`, and reading pauses until they are given), the bytes that a client does not take (the transport says so,
and reading pauses), and what is done for a client at a time: one read may bring ten thousand requests, 0.1 s of work,
so after TURN of them the rest is put by too, and those who wait for another turn have it one after the other, for a
millisecond in each turn of the loop. As long as somebody waits for one, others have only the first request of what
they send (of plain ones, four) taken at once, and what is longer than a turn waits whole: a thousand who send without
end would take half a second for each to have the first. Deadlines are a time in each connection and one sweep a second
over all of them: never early, late by a second at most. The same tick renders every answer with the new Date.
"""

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from email.utils import formatdate
from math import inf
from typing import Protocol as Interface
from typing import cast

import httptools

# What one request may hold, in bytes and fields. Each is refused at one more.
MAX_TARGET = 8 * 1024  # 414 (RFC 9110, 15.5.15). Apache 8190, nginx 8 KiB
MAX_FIELDS_SIZE = 32 * 1024  # 431 (RFC 6585, 5), field lines with their CRLF. nginx 4 times 8 KiB, Go 1 MiB
MAX_FIELDS = 100  # 431. Apache 100
MAX_BODY = 64 * 1024  # 413 (RFC 9110, 15.5.14), content without framing: nothing here has a use for one
MAX_LINE = MAX_TARGET + 64  # a request line: the target, the longest method of llhttp, the version
MAX_CHUNK_FRAMING = 6  # raw bytes for each byte of content: a body in chunks of one byte ("1\r\nx\r\n")

MAX_DIGITS = 18  # of a number that fits 64 bits whatever they are
MAX_WAITING = 64  # answers one connection may have waiting before reading pauses
TURN = 32  # requests taken of what one connection sent, before others have their turn; of plain requests four times
TURN_BYTES = 16 * 1024  # of its bytes, likewise: 2,700 chunks of one byte take 1.7 ms
TURNS = 0.001  # seconds of one turn of the loop in which connections go on with what was put by
MAX_KNOWN = 4 * 1024  # bytes of `known`, which an idle connection keeps twice
LINGER = 2.0  # seconds a peer's bytes are thrown away after the last answer. nginx 5 s
QUIET = 1.0  # seconds without a request after which a draining server closes a connection
OVERFLOW = 1024  # connections past the cap that are told so politely; more are just closed
SAY_AGAIN = 60.0  # seconds until the log says again that connections are refused

# Which rendering of an answer a request gets; HEAD's are these plus HEAD.
KEEP, KEEP_1_0, CLOSE, HEAD = 0, 1, 2, 3

log = logging.getLogger("verve.http")

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, 5.6.2
_VISIBLE = rb'[!-"$-~]'  # what a target is made of: visible ASCII, and no fragment
_TARGET = rb"(?:/%b*+|[A-Za-z][A-Za-z0-9+.-]*+://%b++|\*|[][0-9A-Za-z:._~-]+:[0-9]+)" % (
    _VISIBLE,
    _VISIBLE,
)  # RFC 9112, 3.2
_line_so_far = re.compile(rb"%b(?: (?:%b+(?: [HTP/1.0]*\r?)?)?)?" % (_TOKEN, _VISIBLE)).fullmatch
_line = re.compile(rb"(%b) (%b) HTTP/1\.([01])\r\n" % (_TOKEN, _TARGET)).match
_fields_that_matter = re.compile(
    rb"\n(host|content-length|transfer-encoding|expect):[ \t]*([^\r]*)"  # of a section that llhttp has accepted
).findall
_close_too = re.compile(rb"\nconnection:(?:[^\r]*[ \t,])?close[ \t]*[,\r]").search
HOST = rb"(?:(?:[0-9a-z._~!$&'()*+,;=-]|%[0-9a-f]{2})+|\[[0-9a-f:.]+\])(?::[0-9]*)?"  # RFC 3986, 3.2.2, lower case
_host = re.compile(HOST).fullmatch


class Answer:
    """A response that never changes but for its Date, ready to be written.

    `wire[form]` is the whole response for a form: KEEP, KEEP_1_0 or CLOSE, plus HEAD for one without its body.
    """

    __slots__ = ("_body", "_fields", "_line", "given", "status", "wire")

    def __init__(self, status: int, reason: str, body: bytes, fields: dict[str, str]) -> None:
        self.status = status
        self.given = 0  # how often, besides those that Server.direct counts
        self._line = f"HTTP/1.1 {status} {reason}\r\n".encode("ascii")
        fields = {
            "Content-Type": "text/plain; charset=utf-8",
            "Content-Length": str(len(body)),
            **fields,
        }
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode("ascii")
        self._body = body
        self.wire: tuple[bytes, ...] = ()

    def render(self, date: bytes) -> None:
        """Make the wire forms anew with `date`, a line ready to be sent."""
        start = self._line + date + self._fields
        heads = (
            start + b"\r\n",
            start + b"Connection: keep-alive\r\n\r\n",
            start + b"Connection: close\r\n\r\n",
        )
        self.wire = (*(head + self._body for head in heads), *heads)


class Answers:
    """All answers of a server, rendered together."""

    def __init__(self) -> None:
        self.all: list[Answer] = []
        self._date = b""

    def add(self, status: int, reason: str, body: bytes, **fields: str) -> Answer:
        """Prepare an answer. `fields` are its own header fields, `_` in their names standing for `-`."""
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        answer = Answer(status, reason, body, named)
        answer.render(self._date)
        self.all.append(answer)
        return answer

    def refuse(self, status: int, reason: str, error: str, **fields: str) -> Answer:
        """Prepare a `failed`, with the plain sentence that says why."""
        return self.add(status, reason, b"failed", Verve_Error=error, **fields)

    def render(self, now: float) -> None:
        """Render all with the Date of `now` (Unix seconds; RFC 9110, 6.6.1)."""
        self._date = f"Date: {formatdate(now, usegmt=True)}\r\n".encode("ascii")
        for answer in self.all:
            answer.render(self._date)


class Slot:
    """A place in a connection's order of answers, and the callable that fills it, once, at any later time."""

    __slots__ = ("answer", "connection", "form")

    def __init__(self, connection: "Connection", form: int, answer: Answer | None = None) -> None:
        self.connection = connection
        self.form = form
        self.answer = answer

    def __call__(self, outcome: int) -> None:
        """Give the answer: the server's `outcomes[outcome]`. Never called from within `handle`."""
        self.answer = self.connection.server.outcomes[outcome]
        self.answer.given += 1
        self.connection.flush()


class Handler(Interface):
    """What answers requests, at once or later: filling the slot that a request took gives its answer."""

    plain: bytes  # a target's beginning; most targets are this and digits

    def add(self, number: int, slot: "Slot") -> int | None:
        """Return the outcome of a `GET` of `plain` and the digits of `number`, or None if it will fill the slot."""

    def add_all(self, numbers: Sequence[int]) -> int | None:
        """Return the outcome of many such requests if it is the same for all; or None, with nothing done."""

    def handle(self, method: bytes, target: bytes, slot: "Slot") -> Answer | None:
        """Return the answer to any request, or None if it will fill the slot."""


class Server:
    """What the connections of one process share: the handler, the answers, the clock's ticks, the drain."""

    def __init__(
        self,
        handler: Handler,
        answers: Answers,
        outcomes: Mapping[int, Answer],
        *,
        idle_timeout: float = 75.0,
        header_timeout: float = 10.0,
        max_connections: int = 20_000,
        overflow: int = OVERFLOW,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`outcomes[i]` is the answer that filling a slot with i selects; times are in seconds."""
        self.handler = handler
        self.add, self.add_all = handler.add, handler.add_all
        self.plain = b"GET " + handler.plain
        self.plain_size = len(self.plain)
        self.answers = answers
        self.outcomes = outcomes
        self.kept: dict[int, bytes] = {}  # outcomes as written on a connection that is kept, as nearly all are
        self.direct = [0] * (max(outcomes) + 1)  # answers given without an Answer at hand, by outcome
        self.idle_timeout = idle_timeout
        self.header_timeout = header_timeout
        self.max_connections = max_connections
        self.overflow = overflow
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.served = 0  # connections within the cap
        self.draining = False
        self._clock = clock
        self.waiting: deque[Connection] = deque()  # those with requests put by for a turn to come
        self._turning = False  # there is one to come
        self._hushed = 0.0  # loop time until which no more is said of connections that are refused
        self._tick: asyncio.TimerHandle | None = None
        self._quiet: asyncio.TimerHandle | None = None
        self._empty: asyncio.Future[None] | None = None
        # The deadline of a connection that falls idle now. A tick's time is up to a second old, hence the second.
        self.idle_deadline = 0.0

        self.go_on = Answer(100, "Continue", b"", {})  # RFC 9110, 15.2.1: has neither a Date nor a length
        self.go_on.wire = (b"HTTP/1.1 100 Continue\r\n\r\n",) * (2 * HEAD)
        self.malformed = answers.refuse(400, "Bad Request", "the request is not well-formed HTTP/1.1")
        self.bad_host = answers.refuse(400, "Bad Request", "expected exactly one valid Host")
        self.bad_coding = answers.refuse(400, "Bad Request", "expected no transfer coding but chunked, on HTTP/1.1")
        self.too_slow = answers.refuse(408, "Request Timeout", "the request did not arrive in time")
        self.long_body = answers.refuse(413, "Content Too Large", f"expected a body of at most {MAX_BODY} bytes")
        self.long_target = answers.refuse(414, "URI Too Long", f"expected a target of at most {MAX_TARGET} bytes")
        self.long_fields = answers.refuse(
            431,
            "Request Header Fields Too Large",
            f"expected at most {MAX_FIELDS} header fields of {MAX_FIELDS_SIZE} bytes in all",
        )
        self.crowded = answers.refuse(503, "Service Unavailable", "too many connections are open", Retry_After="1")
        self.tick()

    def __call__(self) -> "Connection":
        return Connection(self)

    def tick(self) -> None:
        """Each second: render the Date, and end what is past its deadline."""
        wall = self._clock()
        self.answers.render(wall)
        self.kept = {outcome: answer.wire[KEEP] for outcome, answer in self.outcomes.items()}
        now = self.loop.time()
        self.idle_deadline = now + (QUIET if self.draining else self.idle_timeout + 1)
        self._expire(now)
        self._tick = self.loop.call_later(1 - wall % 1, self.tick)

    def answered(self) -> dict[int, int]:
        """Return how many requests were answered so far, by status: always the same ones, in order."""
        given = dict.fromkeys(sorted(answer.status for answer in self.answers.all), 0)
        for answer in self.answers.all:
            given[answer.status] += answer.given
        for outcome, answer in self.outcomes.items():
            given[answer.status] += self.direct[outcome]
        return given

    def give(self, slots: Sequence[Slot], outcome: int) -> None:
        """Fill many slots alike, and write what that lets each connection write, at once."""
        answer, wire = self.outcomes[outcome], self.kept[outcome]
        answer.given += len(slots)
        several: set[Connection] = set()
        for slot in slots:
            connection = slot.connection
            if len(connection.slots) == 1 and slot is connection.lone and slot.form == KEEP:
                connection.slots.clear()  # the way of nearly all: 0.4 us where flush() takes 1.1
                connection.transport.write(wire)  # type: ignore[union-attr] # a lost connection has no slots
            else:
                slot.answer = answer
                several.add(connection)
        for connection in several:
            connection.flush()

    def queue(self, connection: "Connection") -> None:
        """Have a connection whose turn is over go on in a later turn of the loop, behind those that wait for one."""
        self.waiting.append(connection)
        if not self._turning:
            self._turning = True
            self.loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = bool(self.waiting)
        if not self._turning:
            return
        self.loop.call_soon(self._turn)
        until = time.perf_counter() + TURNS
        for _ in range(len(self.waiting)):
            self.waiting.popleft().go_on()
            if time.perf_counter() > until:
                break

    def start_drain(self) -> None:
        """From now on have each connection's next answer be its last, and close those on which no request comes."""
        self.draining = True
        self._close_quiet()
        for connection in list(self.connections):
            connection.drain()

    async def drain(self, timeout: float) -> int:
        """Close every connection, its answers given, and return how many had to be cut after `timeout` seconds."""
        if not self.draining:
            self.start_drain()
        if self.connections:
            self._empty = self.loop.create_future()
            await asyncio.wait([self._empty], timeout=timeout)
        for timer in (self._tick, self._quiet):
            if timer is not None:
                timer.cancel()
        cut = list(self.connections)
        for connection in cut:
            connection.abort()
        return len(cut)

    def _close_quiet(self) -> None:
        now = self.loop.time()
        self.idle_deadline = now + QUIET
        self._expire(now)
        self._quiet = self.loop.call_later(QUIET / 4, self._close_quiet)

    def _expire(self, now: float) -> None:
        for connection in [c for c in self.connections if c.deadline < now]:
            connection.expire(now)

    def note_crowd(self) -> None:
        """Say that connections are refused, once in a while."""
        if self.loop.time() >= self._hushed:
            self._hushed = self.loop.time() + SAY_AGAIN
            log.warning("%d connections are open, as many as are allowed: more are refused", self.served)

    def forget(self, connection: "Connection") -> None:
        """Drop a connection that is lost."""
        self.connections.discard(connection)
        self.served -= connection.served
        if self._empty is not None and not self.connections and not self._empty.done():
            self._empty.set_result(None)


class Connection(asyncio.Protocol):
    """The protocol of one connection. asyncio calls the first part, httptools the last."""

    __slots__ = (
        "_around",
        "_between",
        "_body",
        "_complete",
        "_content",
        "_due",
        "_eof",
        "_form",
        "_head",
        "_host",
        "_known",
        "_method",
        "_out",
        "_parser",
        "_paused",
        "_persists",
        "_queued",
        "_raw",
        "_spared",
        "_target",
        "_unread",
        "blocked",
        "deadline",
        "ended",
        "lone",
        "served",
        "server",
        "slots",
        "transport",
    )

    def __init__(self, server: Server) -> None:
        # For the connection's life.
        self.server = server
        self.transport: asyncio.Transport | None = None
        self.deadline = server.idle_deadline  # loop time after which expire() is called
        self._eof = False  # the peer has shut its sending side
        self.served = False  # it is within the cap
        self.ended = False  # no further request is read; once the slots are given, the sending side is shut
        self._spared = False  # it was given more time to take the last answer
        self.blocked = False  # the peer does not take what is written
        self._paused = False  # reading is, until less waits
        self._queued = False  # its turn was over, and comes again
        self._parser: httptools.HttpRequestParser = httptools.HttpRequestParser(self)
        self._known = b""  # what followed the target of the last GET that had no body; empty while draining
        self._between = b""  # `known`, and the next plain request up to its digits
        self._around = 0  # bytes of a plain request that are not its digits
        self._host: tuple[bytes, bytes] | None = None  # the last Host that was found valid, as a match
        self.slots: deque[Slot] = deque()  # answers owed, oldest first; empty while all are given at once
        self.lone = Slot(self, KEEP)  # the one for a request that finds none owed
        self._out: list[bytes] = []  # what this read has to write
        self._unread = b""  # put by: for a turn to come, or while too many answers wait or the peer takes none
        # For one request.
        self._head = b""  # of a head that is not whole yet: the part that came, which the parser has
        self._body = 0  # bytes of the body to come if it has a length, -1 if it is chunked
        self._content = self._raw = 0  # bytes of a chunked body, without framing and with it
        self._method = self._target = b""
        self._form = KEEP
        self._persists = False  # the connection may go on after it (RFC 9112, 9.3)
        self._due = 0.0  # loop time by which it must have come
        self._complete = False  # the parser has seen the message's end

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        server = self.server
        server.connections.add(self)
        if server.served < server.max_connections:
            server.served += 1
            self.served = True
        else:
            server.note_crowd()
            if len(server.connections) > server.max_connections + server.overflow:
                self.abort()
            else:
                self._refuse(server.crowded)
                self._write()
        if server.draining:
            self.drain()

    def eof_received(self) -> bool:
        self._eof = True
        self._end()
        self._head = b""
        self._body = 0
        self._rearm()
        return bool(self.slots)  # False has the transport write what it has, and close

    def pause_writing(self) -> None:
        self.blocked = True
        self._rearm()
        self._pause()

    def resume_writing(self) -> None:
        self.blocked = False
        self._rearm()
        self._resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self.transport = None
        self.slots.clear()
        del self._parser, self.lone  # they hold this object: cycles, and the collector is kept from old objects
        self._unread = self._head = b""
        self.server.forget(self)

    # Reading

    def data_received(self, data: bytes) -> None:
        """Take every request that `data` completes, in order; write what can be answered at once."""
        if self.ended:
            return
        server = self.server
        slots = self.slots
        owed = len(slots)
        turn = TURN
        if self._unread:
            data = self._unread + data
            self._unread = b""
        elif server.waiting:
            if len(data) > TURN_BYTES:
                self._put_by(data)
                return
            turn = 1
        pos = 0
        if self._head or self._body:
            pos = self._read_on(data)
        else:
            self.deadline = server.idle_deadline
            known = self._known
            if known and data.endswith(known) and data.startswith(server.plain) and not (slots or self.blocked):
                digits = data[server.plain_size : -len(known)]
                if digits.isdigit() and len(digits) <= MAX_DIGITS:  # alone, as nearly all come: a third off the below
                    outcome = server.add(int(digits), self.lone)
                    if outcome is None:
                        slots.append(self.lone)
                    elif self.transport is not None:
                        server.direct[outcome] += 1
                        self.transport.write(server.kept[outcome])
                    return
        known = self._known
        if known and data.startswith(server.plain, pos) and not (self.ended or self.blocked):
            end = data.rfind(known, pos)
            if end > 0:
                start = pos + server.plain_size
                add, kept, out, around = server.add, server.kept, self._out, self._around
                several = data[start:end].split(self._between, 4 * turn)
                del several[4 * turn :]  # which is the rest, and not digits alone
                if len(several) > 1 and not slots and b"".join(several).isdigit():  # half of what one by one takes
                    sizes = set(map(len, several))
                    outcome = server.add_all([*map(int, several)]) if min(sizes) and max(sizes) <= MAX_DIGITS else None
                    if outcome is not None:
                        server.direct[outcome] += len(several)
                        out.extend([kept[outcome]] * len(several))  # one by one, for they are counted
                        pos += sum(map(len, several)) + around * len(several)
                        several = []
                for digits in several:
                    if not digits.isdigit() or len(digits) > MAX_DIGITS or len(slots) >= MAX_WAITING:
                        break
                    pos += len(digits) + around
                    slot = Slot(self, KEEP) if slots else self.lone
                    outcome = add(int(digits), slot)
                    if outcome is None:
                        slots.append(slot)
                    else:
                        server.direct[outcome] += 1
                        if slots:
                            slot.answer = server.outcomes[outcome]
                            slots.append(slot)
                        else:
                            out.append(kept[outcome])
        while pos < len(data) and not self.ended:
            over = len(self._out) + len(slots) - owed >= turn or pos >= TURN_BYTES
            if over or self.blocked or len(slots) >= MAX_WAITING:
                self._put_by(data[pos:], over)
                break
            pos = self._read_body(data, pos) if self._body else self._read_head(data, pos, 0)
        self._write()

    def _read_on(self, data: bytes) -> int:
        """Go on with the message that an earlier read began; return where the next one starts in `data`."""
        if self._body:
            return self._read_body(data, 0)
        before = len(self._head)
        fed = 0 if self._head == b"\r" else before
        return self._read_head(self._head + data, 0, fed) - before

    def _read_head(self, data: bytes, pos: int, fed: int) -> int:
        """Read a head from `pos` on, of which the parser has `fed` bytes; return where the rest of `data` starts."""
        server = self.server
        line = _line(data, pos, pos + MAX_LINE)
        if line is None and not fed:
            begin = pos
            while data.startswith(b"\r\n", pos):  # empty lines before a request are ignored (RFC 9112, 2.2)
                pos += 2
            if pos == len(data):
                self._head = b""
                self._rearm()
                return pos
            if data[pos:] == b"\r":  # half of one; not fed, since llhttp takes a CR for a whole one
                self._keep_head(b"\r", 0)
                return len(data)
            if pos > begin:
                line = _line(data, pos, pos + MAX_LINE)
        start = max(pos, pos + fed - 3) if line is None or fed else line.end() - 2
        stop = data.find(b"\r\n\r\n", start, pos + MAX_LINE + MAX_FIELDS_SIZE + 4)
        whole = stop >= 0
        stop = stop + 4 if whole else len(data)
        # What is past a limit is not looked at: it costs time, and would have a say in which error it is if it came in
        # one piece with the rest.
        stop = min(stop, pos + MAX_LINE if line is None else line.end() + MAX_FIELDS_SIZE + 3)
        head = data[pos:stop]
        if line is not None and head.count(b"\n") > MAX_FIELDS + 2:
            head = b"\n".join([*head.split(b"\n", MAX_FIELDS + 3)[:-1], b""])

        upgrade = unknown_method = False
        fault = ""
        try:
            self._parser.feed_data(head[fed:] if fed else head)
        except httptools.HttpParserUpgrade:
            upgrade = True
        except httptools.HttpParserInvalidMethodError:
            unknown_method = True  # or no method at all: the line will tell
        except httptools.HttpParserError as error:
            fault = str(error)
            unknown_method = fault.startswith("Invalid method for")  # one of RTSP's, which llhttp knows

        if line is None:
            self._method = b"HEAD" if head.startswith(b"HEAD ") else b""
            if b"\r\n" in head or (fault and not unknown_method) or (unknown_method and not _line_so_far(head)):
                self._refuse(server.malformed)
            elif len(head) >= MAX_LINE:
                self._refuse(server.long_target)
            else:
                self._keep_head(head, fed)
            return stop
        self._method, self._target, minor = line.groups()
        if len(self._target) > MAX_TARGET:
            self._refuse(server.long_target)
            return stop
        if unknown_method:
            self._form = CLOSE
            self._respond(last=True)
            return stop
        if fault:
            self._refuse(server.long_body if fault == "Content-Length overflow" else server.malformed)
            return stop
        section = head[line.end() - pos - 2 :]
        if len(section) - 4 > MAX_FIELDS_SIZE or section.count(b"\n") - 2 > MAX_FIELDS:
            self._refuse(server.long_fields)
            return stop
        if not whole:
            self._keep_head(head, fed)
            return stop

        first = not self._head
        self._head = b""
        self._body = 0
        expected = False
        matter = _fields_that_matter(section.lower())
        if len(matter) != 1 or matter[0] != self._host:
            hosts = [value for name, value in matter if name == b"host"]
            if len(hosts) > 1 or (minor == b"1" and not hosts) or (hosts and not _host(hosts[0].rstrip(b" \t"))):
                self._refuse(server.bad_host)
                return stop
            if len(matter) == len(hosts) == 1 and len(hosts[0]) <= MAX_KNOWN:
                self._host = matter[0]
            for name, value in matter:
                if name == b"transfer-encoding":
                    if minor == b"0" or value.rstrip(b" \t") != b"chunked":
                        self._refuse(server.bad_coding)
                        return stop
                    self._body = -1
                elif name == b"content-length":
                    length = value.rstrip(b" \t").lstrip(b"0")
                    self._body = int(length or b"0") if len(length) < 9 else MAX_BODY + 1
                    if self._body > MAX_BODY:
                        self._refuse(server.long_body)
                        return stop
                elif name == b"expect":
                    expected = minor == b"1" and value.rstrip(b" \t") == b"100-continue"

        if minor == b"0" and self._persists:  # llhttp takes `keep-alive, close` for the first
            self._persists = not _close_too(section.lower())
        if not self._persists or self._method == b"CONNECT" or (upgrade and self._body):
            # After an Upgrade that is not taken, llhttp leaves the body unread; so do we, and close.
            self._form = CLOSE
            self._body = 0
        else:
            self._form = KEEP if minor == b"1" else KEEP_1_0
        if self._method == b"HEAD":
            self._form += HEAD
        if self._body:
            if first:
                self._await_rest()
            self._content = self._raw = 0
            self._complete = False
            if expected and stop == len(data):
                self._give(server.go_on, KEEP)
            return self._read_body(data, stop) if stop < len(data) else stop
        if self._form == KEEP and self._method == b"GET" and len(section) <= MAX_KNOWN and not server.draining:
            self._known = head[line.end(2) - pos :]
            self._between = self._known + server.plain
            self._around = len(self._between)
        self._respond(last=stop == len(data))
        return stop

    def _read_body(self, data: bytes, pos: int) -> int:
        """Drain what a turn may of the body in `data` from `pos` on; return where what is left starts."""
        if self._body > 0:
            take = min(self._body, len(data) - pos)
            self._body -= take
            self._feed_body(data[pos : pos + take])
            if not self._body:
                self._respond(last=pos + take == len(data))
            return pos + take
        # The last chunk and the trailers end in a blank line. Its first bytes may have come with an earlier read,
        # so the first three are fed one by one.
        stop = pos
        end = min(len(data), pos + TURN_BYTES)
        while stop < end and not self.ended:
            if stop - pos < 3:
                cut = stop + 1
            else:
                cut = data.find(b"\r\n\r\n", stop - 3, end)
                cut = cut + 4 if cut >= 0 else end
            self._raw += cut - stop
            if not self._feed_body(data[stop:cut]):
                return len(data)
            stop = cut
            if self._complete:
                self._body = 0
                # llhttp reads Connection in trailers as in a head, and would refuse what follows. They are not merged
                # into the head (RFC 9112, 7.1.2): its parser ends with them.
                self._parser = httptools.HttpRequestParser(self)
                self._respond(last=stop == len(data))
                break
        return stop

    def _feed_body(self, data: bytes) -> bool:
        """Feed the parser a part of a body; refuse the request and return False if it is malformed or too long."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._body = 0
            self._refuse(self.server.malformed)
            return False
        if self._content > MAX_BODY or self._raw > MAX_FIELDS_SIZE + MAX_CHUNK_FRAMING * self._content:
            self._body = 0
            self._refuse(self.server.long_body)
            return False
        return True

    def _keep_head(self, head: bytes, fed: int) -> None:
        first = not self._head
        self._head = head
        if first:
            self._await_rest()

    def _await_rest(self) -> None:
        """Set the deadline by which the request whose first bytes are here must have come."""
        self._due = self.server.loop.time() + self.server.header_timeout
        self._rearm()

    def _rearm(self) -> None:
        """Set the deadline for what is waited for now."""
        server = self.server
        if self.blocked:
            self.deadline = inf if server.draining else server.idle_deadline
        elif self.ended and not self.slots and not self._eof:
            self.deadline = server.loop.time() + LINGER
        elif self._head or self._body:
            self.deadline = self._due
        else:
            self.deadline = server.idle_deadline

    # Answering

    def _respond(self, last: bool) -> None:
        """Hand the whole request over; `last` if nothing that was read follows it."""
        if last and self.server.draining and self._form % HEAD != CLOSE:
            self._form = CLOSE + (HEAD if self._form >= HEAD else 0)
        form = self._form
        slot = Slot(self, form)
        answer = self.server.handler.handle(self._method, self._target, slot)
        if answer is None:
            self.slots.append(slot)
        else:
            self._give(answer, form)
        self._form = KEEP
        self._method = self._target = b""
        if form % HEAD == CLOSE:
            self.ended = True
        self._rearm()

    def _refuse(self, answer: Answer) -> None:
        """Give the request that is being read an error for an answer, the connection's last."""
        self._give(answer, CLOSE + HEAD if self._method == b"HEAD" else CLOSE)
        self._head = b""
        self._body = 0
        self.ended = True

    def _give(self, answer: Answer, form: int) -> None:
        """Write an answer at the end of this read, or behind those that wait."""
        answer.given += 1
        if self.slots:
            self.slots.append(Slot(self, form, answer))
        else:
            self._out.append(answer.wire[form])

    def flush(self) -> None:
        """Write the answers given so far, up to the first that is still waited for."""
        slots = self.slots
        out = self._out
        while slots and (answer := slots[0].answer) is not None:
            slot = slots.popleft()
            out.append(answer.wire[slot.form])
            slot.answer = None  # it may be the lone one, to be used again
        if out:
            self._rearm()
            self._write()
            if self._paused:
                self._resume()

    def _write(self) -> None:
        out = self._out
        if self.transport is None:
            out.clear()
            return
        if out:
            self.transport.write(out[0] if len(out) == 1 else b"".join(out))
            out.clear()
        if self.ended and not self.slots:
            self._shut()

    # Pausing and ending

    def _pause(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def _put_by(self, rest: bytes, over: bool = True) -> None:
        """Leave the rest of a read for later: for another turn if this one is over, else until less waits."""
        self._unread = rest
        self._pause()
        if over and not self._queued:
            self._queued = True
            self.server.queue(self)

    def _resume(self) -> None:
        """Go on with what was put by, then with reading, unless too much waits again."""
        if self._queued or self.blocked or self.transport is None or len(self.slots) > MAX_WAITING // 2:
            return
        if self._unread:
            self.data_received(b"")
        if not self.blocked and not self._unread and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    def go_on(self) -> None:
        """Have another turn."""
        self._queued = False
        self._resume()

    def _end(self) -> None:
        """Read no further request; the last answer that waits says so."""
        self.ended = True
        self._unread = b""
        if self.slots:
            slot = self.slots[-1]
            slot.form = CLOSE + (HEAD if slot.form >= HEAD else 0)

    def _shut(self) -> None:
        """Shut the sending side once all is written; throw away what comes until the peer closes, or LINGER."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if self._eof:
            transport.close()
            return
        self._rearm()
        transport.write_eof()
        self._paused = False
        transport.resume_reading()

    def drain(self) -> None:
        """Have the next answer be the last, and close soon if no request comes."""
        self._known = b""
        if self.slots and not (self._unread or self._head or self._body):
            self._end()
        else:
            self._rearm()

    def expire(self, now: float) -> None:
        """End what the deadline was set for."""
        transport = self.transport
        if transport is None or transport.is_closing() or self.blocked:
            self.abort()
        elif self.ended and not self.slots:
            if transport.get_write_buffer_size() and not self._spared:
                self._spared = True  # the moment after the last answer begins when that is on its way
                self.deadline = inf if self.server.draining else self.server.idle_deadline
            else:
                self.abort()
        elif self.slots or self._queued:
            # The store has its own deadline, a turn comes; a request that is not whole yet keeps the one it has.
            self.deadline = self._due if self._head or self._body else now + self.server.idle_timeout
        elif self._head or self._body:
            self._refuse(self.server.too_slow)
            self._write()
        else:
            self._end()
            self._shut()

    def abort(self) -> None:
        """Close at once; what is not written is lost."""
        self._end()
        self.slots.clear()
        if self.transport is not None:
            self.transport.abort()

    # What httptools calls

    def on_headers_complete(self) -> None:
        self._persists = self._parser.should_keep_alive()  # llhttp forgets it at the message's end

    def on_body(self, body: bytes) -> None:
        self._content += len(body)

    def on_message_complete(self) -> None:
        self._complete = True
