"""Tells the count of each window, and keeps the time at which windows end.

`roll_windows` sleeps until the open window is over, has the store roll, and tells what was closed. The end comes
from the epoch and is asked of the store anew after every nap of at most a second, so a clock that was set, or a
machine that slept, is noticed within that second, and no error adds up. What to do about it is the store's
knowledge; see there.

The log gets one line a window. A file is watched: when logrotate moves it, the next line opens it anew; while
that fails, lines go to stderr.

The webhook gets one POST a window, in order, at least once: a report is tried again, after a while that grows to a
minute, until the receiver answers 2xx, and the next waits for it. What is to be delivered stands in an outbox: in
memory, or with Redis the stream itself, from which one instance at a time delivers and another goes on if it dies.

A callback is one request to the endpoint that a client named, with the count of that moment; nobody waits for it and
it is not repeated. What waits is bounded, in all and for each origin. An origin that gives no answer, again and again,
is left alone for a few seconds, then tried with a few; the rest of its callbacks are dropped, so that it costs nothing.
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

NAP = 1.0  # seconds after which the clock is looked at again
BURST = 200  # windows told in one go; after a long sleep there may be thousands

SPREAD = 1.0  # seconds over which a fleet's reports of the same moment are spread
BACKOFF = (1.0, 60.0)  # seconds between attempts to deliver a report, doubling from the first to the second
PATIENCE = 600.0  # seconds that a receiver's Retry-After is obeyed for at most
HURRY = 0.5  # seconds that a stopping process leaves between attempts
OUTBOX = 10_080  # reports kept in memory for a receiver that is away: a week of minutes
MAX_CALLBACKS = 50_000  # callbacks that wait or are under way: some 40 MB, 300 with the longest URLs
MAX_ORIGIN = 20_000  # of which to one origin
FAILURES = 5  # of an origin, one after the other, after which it is left alone
PAUSE = 5.0  # seconds that it is
MAX_FAILING = 1000  # origins that are known to fail
LINES = 3  # log lines a second about callbacks that failed

log = logging.getLogger("verve.reporter")


def iso(start: int) -> str:
    """Return the name of the window that starts at `start` (Unix seconds), as RFC 3339 writes it in UTC."""
    return datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def tell(start: int, count: int, *, final: bool = True) -> None:
    """Log the count of a window; `final` unless the window went on without this process."""
    window = iso(start)
    note = "" if final else " (not final: stopped before the window's end)"
    log.info("unique ids in %s: %d%s", window, count, note, extra={"window": window, "count": count, "final": final})


async def roll_windows(
    remaining: Callable[[], float],
    roll: Callable[[], Awaitable[Iterable[tuple[int, int]]]],
    tell: Callable[[int, int], None],
) -> None:
    """Close each window at its end and tell its count, for ever.

    `remaining()` says how many seconds there are until `roll()` has something to close; that returns the start
    and the count of each window it closed, oldest first.
    """
    while True:
        await asyncio.sleep(min(remaining(), NAP))
        closed = iter(await roll())
        try:
            for number, (start, count) in enumerate(closed, 1):
                tell(start, count)
                if number % BURST == 0:
                    await asyncio.sleep(0)
        finally:
            for start, count in closed:  # stopped amid a long list
                tell(start, count)


@dataclass(frozen=True)
class Report:
    """The count of a window, as it is told."""

    window: str  # its start, RFC 3339
    seconds: int
    count: int
    final: bool = True  # the window is closed


class Outbox(Protocol):
    """Reports to be delivered, one after the other."""

    async def next(self) -> tuple[str, int, int, bool]:
        """Return the fields of the report to deliver next, as soon as this process has one."""

    async def keep(self) -> bool:
        """Return whether it is still this process that delivers it."""

    async def done(self) -> None:
        """Note that it is delivered."""

    async def delivered(self) -> Callable[[int], bool | None] | None:
        """Return what tells whether a window's report is delivered (None: it is not to be); None if that is unknown."""

    async def settle(self) -> None:
        """Wait until all is delivered that nobody else would."""

    async def close(self) -> None:
        """Let another deliver what is left."""


class MemoryOutbox:
    """The reports of this process, which nobody else delivers."""

    def __init__(self) -> None:
        self._reports: deque[Report] = deque()
        self._some, self._none = asyncio.Event(), asyncio.Event()
        self._none.set()

    def put(self, report: Report) -> None:
        """Have a report delivered. Of more than OUTBOX the second is lost: the first may be on its way."""
        if len(self._reports) >= OUTBOX:
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
        self.why = ""  # the last one failed, if it did
        self._client = outbound.Client(outbound.Guard(everything=True))
        self._hurry = asyncio.Event()  # no time is left for long waits
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
        """Send a report until it is taken, or has become another's to deliver."""
        wait, delay, failed = 0.0, BACKOFF[0], ""
        while await self.outbox.keep():  # asked after every nap: it keeps the lease
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
        self.why = ""  # another delivers, and knows

    async def _send(self, report: Report) -> tuple[str, float]:
        """Send a report once; return why it was not taken, if so, and for how many seconds it is not to be tried."""
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
        """Wait, but shortly if there is no time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
                await asyncio.sleep(HURRY)

    def hurry(self) -> None:
        """Make no long pauses any more: the process stops."""
        self._hurry.set()

    async def settle(self) -> None:
        """Wait until the reports that only this process has are delivered, and for what is under way; begin no more."""
        await self.outbox.settle()
        await self._attempt.acquire()

    async def close(self) -> None:
        """Let go of the outbox and the connections."""
        self._client.close()
        await self.outbox.close()


def retry_after(value: str) -> float:
    """Return the seconds that a Retry-After asks to wait (RFC 9110, 10.2.3), at most PATIENCE; 0 if it asks nothing."""
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), PATIENCE)
    try:
        date = parsedate_to_datetime(value)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)  # asctime's, or one with -0000
        return max(0.0, min(date.timestamp() - time.time(), PATIENCE))
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
        self._lines = 0  # about callbacks that failed, within a second

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
        """Send a count."""
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
        """Return whether an origin is not to be sent this one: after a pause it is tried with a few."""
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
        """Count what became of a callback; log it, unless there is too much of it."""
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
        """End what waits, and say how much that was."""
        self._client.close()
        self._sum_up()

    def _sum_up(self) -> None:
        if self._lines > LINES:
            log.warning("callbacks not delivered, besides those named, in the last second: %d", self._lines - LINES)
        self._lines = 0


class TextFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER: MESSAGE`; the message is one line, whatever it says, as it may name what others sent."""

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
    """A file that may be moved away. While it can't be written, lines go to stderr, and once the reason."""

    before = trouble = ""  # why the last line could not be written, and why this one

    def emit(self, record: logging.LogRecord) -> None:
        self.before, self.trouble = self.trouble, ""
        try:
            super().emit(record)  # which handles that the file can't be written, but not that it can't be opened
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Write a line to stderr instead, and forget what the file did not take of it: it would be told twice."""
        error = sys.exc_info()[1]
        self.trouble = getattr(error, "strerror", None) or repr(error)
        with contextlib.suppress(OSError, ValueError):
            if self.trouble != self.before:
                print(f"can't log to {self.baseFilename}: {self.trouble}", file=sys.stderr)
            print(self.format(record), file=sys.stderr, flush=True)
        stream, self.stream = self.stream, None  # the next line opens it again
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
