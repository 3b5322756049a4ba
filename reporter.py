"""Closes windows when they end, and sends their counts out: to the log, the webhook and the callbacks.

`roll_windows` sleeps until the open window ends, then has the store close it and reports the count. The end is
computed from the epoch. The store is asked for it again after each sleep of at most a second. So a clock that was set,
or a machine that was suspended, is noticed within a second, and errors do not add up. What follows from it is decided
by the store.

The log gets one line a window. When logrotate moves a log file, the next line opens it again. While that fails, lines
go to stderr.

The webhook gets one POST a window, in order, at least once. A report is sent again until the receiver answers 2xx,
after pauses that grow to a minute; the next report waits for it. Reports to be delivered are in an outbox. That is a
queue in memory, or with Redis the stream. From the stream one instance at a time delivers; if it dies, another goes on.

A callback is one request to the endpoint that a client named, with the count of that moment. Nobody waits for it, and
it is sent once. How many may wait is bounded, in all and for each origin. An origin that gives no answer several times
in a row gets none for a few seconds, and then a few to try it. Its other callbacks are dropped meanwhile, so that an
origin that is down costs almost nothing.
"""

import asyncio
import base64
import contextlib
import hmac
import json
import logging
import logging.handlers
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Protocol

import outbound

NAP = 1.0  # seconds: the longest sleep before the clock is read again
BURST = 200  # windows reported before other work gets a turn; after a long suspension there may be thousands

SPREAD = 1.0  # seconds over which a fleet's reports of the same moment are spread
BACKOFF = (1.0, 60.0)  # seconds between attempts to deliver a report, doubling from the first to the second
MAX_RETRY_AFTER = 600.0  # seconds: a Retry-After that asks for more is taken for this
HURRY = 0.5  # seconds between attempts of a process that stops
MAX_REPORTS = 10_080  # reports kept in memory for a receiver that is away: a week of minutes
MAX_CALLBACKS = 50_000  # callbacks that wait or are under way: some 40 MB, 300 with the longest URLs
MAX_ORIGIN = 20_000  # the same for one origin
FAILURES = 5  # exchanges in a row without an answer, after which an origin gets no callbacks
PAUSE = 5.0  # seconds for which it gets none
MAX_FAILING = 1000  # origins whose failures are remembered
LINES = 3  # log lines a second about callbacks that failed

log = logging.getLogger("verve.reporter")


def iso(start: int) -> str:
    """Return the name of the window that starts at `start` (Unix seconds), as RFC 3339 writes it in UTC."""
    return datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def log_count(start: int, count: int, *, final: bool = True) -> None:
    """Log the count of a window; it is not `final` if the process stops before the window ends."""
    window = iso(start)
    note = "" if final else " (not final: stopped before the window's end)"
    log.info("unique ids in %s: %d%s", window, count, note, extra={"window": window, "count": count, "final": final})


async def roll_windows(
    remaining: Callable[[], float],
    roll: Callable[[], Awaitable[Iterable[tuple[int, int]]]],
    report: Callable[[int, int], None],
) -> None:
    """Close each window at its end and report its count, for ever.

    `remaining()` says how many seconds there are until `roll()` has something to close; that returns the start
    and the count of each window it closed, oldest first.
    """
    while True:
        await asyncio.sleep(min(remaining(), NAP))
        closed = iter(await roll())
        try:
            for number, (start, count) in enumerate(closed, 1):
                report(start, count)
                if number % BURST == 0:
                    await asyncio.sleep(0)
        finally:
            for start, count in closed:  # stopped in the middle of a long list
                report(start, count)


@dataclass(frozen=True)
class Report:
    """The count of a window, as the webhook sends it."""

    window: str  # its start, RFC 3339
    seconds: int
    count: int
    final: bool = True  # the window is closed


class Outbox(Protocol):
    """The reports that are still to be delivered, oldest first."""

    async def next(self) -> tuple[str, int, int, bool]:
        """Return the fields of the report to deliver next; wait until this process has one."""

    async def keep(self) -> bool:
        """Return whether this process may still deliver it."""

    async def done(self) -> None:
        """Note that it is delivered."""

    async def delivered(self) -> Callable[[int], bool | None] | None:
        """Return a function that says of a window's start whether its report is delivered, or None if it will not be.

        Return None instead of a function if that is unknown.
        """

    async def settle(self) -> None:
        """Wait until everything is delivered that no other process would deliver."""

    async def close(self) -> None:
        """Let another process deliver what is left."""


class MemoryOutbox:
    """An outbox in memory: its reports are lost with the process."""

    def __init__(self) -> None:
        self._reports: deque[Report] = deque()
        self._some, self._none = asyncio.Event(), asyncio.Event()
        self._none.set()

    def put(self, report: Report) -> None:
        """Add a report. When there are MAX_REPORTS the second is dropped: the first may be on its way."""
        if len(self._reports) >= MAX_REPORTS:
            log.error("the webhook takes no reports: that of %s is lost", self._reports[1].window)
            del self._reports[1]
        self._reports.append(report)
        self._some.set()
        self._none.clear()

    async def next(self) -> tuple[str, int, int, bool]:
        await self._some.wait()
        return astuple(self._reports[0])

    async def keep(self) -> bool:
        return True

    async def done(self) -> None:
        self._reports.popleft()
        if not self._reports:
            self._some.clear()
            self._none.set()

    async def delivered(self) -> Callable[[int], bool | None]:
        waiting = {report.window for report in self._reports}
        return lambda start: iso(start) not in waiting

    async def settle(self) -> None:
        await self._none.wait()

    async def close(self) -> None:
        if self._reports:
            log.error("reports that the webhook did not take, and are lost: %d", len(self._reports))


class Webhook:
    """Delivers reports to one URL (Standard Webhooks 1.0.0)."""

    def __init__(self, url: outbound.Url, secret: bytes | None, prefix: str, outbox: Outbox) -> None:
        """`secret` signs the reports; without it they are not signed."""
        self.url = url
        self.secret = secret
        self.prefix = prefix
        self.outbox = outbox
        self.outcomes: Counter[str] = Counter()  # of attempts: "delivered", "failed"
        self.why = ""  # why the last attempt failed, or empty
        self._client = outbound.Client(outbound.Guard(everything=True))
        self._hurry = asyncio.Event()  # set when the process stops: pauses are short from then on
        self._attempt = asyncio.Lock()  # held while one is under way

    async def run(self) -> None:
        """Deliver for ever."""
        while True:
            report = Report(*await self.outbox.next())
            ended = datetime.fromisoformat(report.window).timestamp() + report.seconds
            if time.time() - ended < 2 * SPREAD and not self._hurry.is_set():
                await self._wait(random.uniform(0, SPREAD))  # noqa: S311
            await self._deliver(report)

    async def _deliver(self, report: Report) -> None:
        """Send a report until the receiver takes it, or until another instance has the right to deliver."""
        wait, delay, failed = 0.0, BACKOFF[0], ""
        while await self.outbox.keep():  # called after every sleep, which renews the lease
            if wait > 0:
                await self._wait(min(wait, NAP))
                wait = 0.0 if self._hurry.is_set() else wait - NAP
                continue
            async with self._attempt:
                self.why, wait = await self._send(report)
                self.outcomes["failed" if self.why else "delivered"] += 1
                if not self.why:
                    await self.outbox.done()
            if not self.why:
                log.debug("the webhook took the report of %s", report.window)
                if failed:
                    log.warning("the webhook takes reports again, from that of %s on", report.window)
                return
            if self.why != failed:
                failed = self.why
                log.warning("the webhook did not take the report of %s, and is tried again: %s", report.window, failed)
            wait = max(wait, delay * random.uniform(0.5, 1))  # noqa: S311
            delay = min(2 * delay, BACKOFF[1])
        self.why = ""  # another instance delivers now, and has its own reason

    async def _send(self, report: Report) -> tuple[str, float]:
        """Send a report once; return why it failed, if it did, and the seconds that the receiver asks to wait."""
        body = json.dumps(asdict(report)).encode("ascii")
        name, timestamp = f"{self.prefix}/{report.window}", int(time.time())
        fields = f"webhook-id: {name}\r\nwebhook-timestamp: {timestamp}\r\n"
        if self.secret:
            signature = hmac.digest(self.secret, f"{name}.{timestamp}.".encode("ascii") + body, "sha256")
            fields += f"webhook-signature: v1,{base64.b64encode(signature).decode('ascii')}\r\n"
        request = outbound.request(self.url, "POST", self.url.target, fields, body)
        try:
            response = await self._client.exchange(self.url, request)
        except outbound.OutboundError as error:
            return str(error), 0.0
        if 200 <= response.status < 300:
            return "", 0.0
        return f"status {response.status}", retry_after(response.retry_after)

    async def _wait(self, seconds: float) -> None:
        """Wait, or for HURRY if the process stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
                await asyncio.sleep(HURRY)

    def hurry(self) -> None:
        """Make only short pauses from now on: the process stops."""
        self._hurry.set()

    async def settle(self) -> None:
        """Wait for the reports that only this process has and for the attempt under way; begin no more attempts."""
        await self.outbox.settle()
        await self._attempt.acquire()

    async def close(self) -> None:
        """Close the connections and the outbox."""
        self._client.close()
        await self.outbox.close()


def retry_after(value: str) -> float:
    """Return the seconds that a Retry-After asks to wait (RFC 9110, 10.2.3), at most MAX_RETRY_AFTER; 0 if none."""
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), MAX_RETRY_AFTER)
    try:
        date = parsedate_to_datetime(value)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)  # asctime's, or one with -0000
        return max(0.0, min(date.timestamp() - time.time(), MAX_RETRY_AFTER))
    except (ValueError, TypeError, OverflowError):
        return 0.0


class Callbacks:
    """Sends the counts to the endpoints that requests name."""

    def __init__(self, client: outbound.Client, method: str) -> None:
        """`method` is GET or POST."""
        self.method = method
        self.outcomes: Counter[str] = Counter()  # by outcome: "delivered", "failed", "refused", "dropped"
        self._client = client
        self._failing: dict[tuple[bool, str, int], tuple[int, float]] = {}  # failures in a row, time of the last
        self._lines = 0  # log lines about failed callbacks in this second, written or not

    def parse(self, text: bytes) -> outbound.Url:
        """Read an endpoint. Raises ValueError if it is not one that may be called."""
        url = outbound.parse(text)
        if url.authorization or not self._client.guard.allows_url(url):
            raise ValueError("expected no user and password, and an address that may be reached")
        return url

    def full(self, url: outbound.Url) -> bool:
        """Return whether no further callback to the URL's origin can be taken."""
        client = self._client
        return client.pending >= MAX_CALLBACKS or client.waiting(url) >= MAX_ORIGIN

    def send(self, url: outbound.Url, window: int, count: int) -> None:
        """Send a count; -1 is none."""
        if count < 0:
            self._done(url, "dropped", "the count is not known: a part of the ids is away")
            return
        if url.origin in self._failing and self._left_alone(url):
            self._done(url, "dropped", "left alone for a while, since it keeps failing")
            return
        if self.method == "GET":
            joint = "&" if len(url.query) > 1 else "" if url.query else "?"
            request = outbound.request(url, "GET", f"{url.target}{joint}count={count}")
        else:
            body = json.dumps({"count": count, "window": iso(window)}).encode("ascii")
            request = outbound.request(url, "POST", url.target, body=body)
        self._client.send(url, request, partial(self._end, url), repeatable=self.method == "GET")

    def _left_alone(self, url: outbound.Url) -> bool:
        """Return whether a failing origin gets no callback now: after the pause it gets a few at a time."""
        failures, since = self._failing[url.origin]
        return failures >= FAILURES and (time.monotonic() - since < PAUSE or self._client.waiting(url) >= FAILURES)

    def _end(self, url: outbound.Url, result: outbound.Response | outbound.OutboundError) -> None:
        if isinstance(result, outbound.Response):
            self._failing.pop(url.origin, None)
            self._done(url, "delivered" if 200 <= result.status < 300 else "failed", f"status {result.status}")
        elif isinstance(result, outbound.ForbiddenError):
            self._done(url, "refused", str(result))
        elif isinstance(result, outbound.DroppedError):
            self._done(url, "dropped", str(result))
        else:
            failures = self._failing.pop(url.origin, (0, 0.0))[0] + 1
            if len(self._failing) >= MAX_FAILING:
                del self._failing[next(iter(self._failing))]
            self._failing[url.origin] = failures, time.monotonic()
            self._done(url, "failed", str(result))
            if failures == FAILURES:
                self._client.drop(url, outbound.DroppedError("left alone for a while, since it keeps failing"))

    def _done(self, url: outbound.Url, outcome: str, what: str) -> None:
        """Count the outcome of a callback, and log it unless this second has had LINES already."""
        self.outcomes[outcome] += 1
        if outcome == "delivered":
            if log.isEnabledFor(logging.DEBUG):
                log.debug("callback to %s: %s", url.place, what)
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(1, self._sum_up)
        self._lines += 1
        if self._lines <= LINES:
            log.warning("callback to %s %s: %s", url.place, outcome, what)

    def close(self) -> None:
        """End the callbacks that wait; their number is logged."""
        self._client.close()
        self._sum_up()

    def _sum_up(self) -> None:
        if self._lines > LINES:
            log.warning("callbacks not delivered, besides those named, in the last second: %d", self._lines - LINES)
        self._lines = 0


class TextFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER: MESSAGE`; the message stays one line, as it may hold text that others sent."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line, with what can't be printed escaped."""
        if not record.message.isprintable():
            record.message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`, and a report's `window`, `count`, `final`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: record.__dict__[name] for name in ("window", "count", "final") if name in record.__dict__}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class FileHandler(logging.handlers.WatchedFileHandler):
    """A log file that may be moved away. While it can't be written, lines go to stderr, the reason once."""

    before = trouble = ""  # why the last line could not be written, and why this one

    def emit(self, record: logging.LogRecord) -> None:
        self.before, self.trouble = self.trouble, ""
        try:
            super().emit(record)  # it calls handleError if the file can't be written, but not if it can't be opened
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Write a line to stderr instead, and drop what the file's buffer has of it, or it would be written twice."""
        error = sys.exc_info()[1]
        self.trouble = getattr(error, "strerror", None) or repr(error)
        with contextlib.suppress(OSError, ValueError):
            if self.trouble != self.before:
                print(f"can't log to {self.baseFilename}: {self.trouble}", file=sys.stderr)
            print(self.format(record), file=sys.stderr, flush=True)
        stream, self.stream = self.stream, None  # the next line opens the file again
        if stream is not None:
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())  # there may be room by now for what its buffer holds
                stream.close()


def log_to(file: str | None, style: str, level: str) -> None:
    """Send the log to `file`, or to stderr, as `text` or `json`. Raises OSError if the file can't be opened."""
    handler = FileHandler(file, encoding="utf-8") if file else logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
