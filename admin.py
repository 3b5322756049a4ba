"""The operators' listener: is it alive, can it take requests, what has it done, and a page that shows it.

It has a port of its own, so that the public one has nothing that a client should not see, and so that it answers while
the other drains. Whoever asks is a scraper, a load balancer or a person: a handful of requests a second. So it is a
small HTTP/1.1 server on asyncio's streams, strict and bounded, that answers one GET or HEAD and closes the connection;
the reading in `http1`, which is built for speed, is not shared.

The numbers. Each worker counts in plain integers of its own, where it happens; nothing here is called for a request.
Once a second (BEAT) it writes all of them into its row of the `Board`, memory that the workers of an instance share.
The first worker, which answers, adds up the rows when it is asked. No lock is needed: each row has one writer,
and each number is eight bytes, aligned, so that it is seen before or after a change, but never amid one. Numbers of
different times may stand beside each other, a second apart. A worker that replaces another goes on from the counters
in its row, so a counter never goes back while the instance lives; at most its last second is lost with a process that
died. A row that was not written for MISSING seconds is a worker that is gone or hangs: the instance is not ready then,
since the kernel goes on handing it connections. All workers have the listening socket. If the first is missing, the
next one answers in its place until it is back, so that an operator can ask what is wrong while it hangs.

What is shown comes as plain values and callables. The windows are asked of the store at most once a second,
however many look on. If it gives no answer in time, the last that was known is shown, and said to be that. The
worker that answers looks when it is started and after each window, too, so that who looks first amid an outage sees
what was before it. Closed counts never change, so a day of them is read once, and then only what is new.

Once a second that worker also notes how many requests of the instance have failed, and in which window (`Failed`).
What the workers write is up to a second old, so a failure at a window's edge may be noted in the next one.

The page, `admin.html`, is one document. It asks for `/state`, the JSON of all that it shows now, and for the counts of
a day, `/windows.csv`. Its Content-Security-Policy names its own style and script by their hashes and allows nothing
else; all text goes in as text, never as HTML.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import mmap
import os
import re
import resource
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

MAX_HEAD: Final = 8 * 1024  # bytes of a request's head: 431 beyond
CONNECTIONS: Final = 32  # at a time; more are closed unanswered
PATIENCE: Final = 5.0  # seconds for a request to arrive, and again for its answer to be taken
LINGER: Final = 1.0  # seconds after the answer for the peer to close; a close with unread bytes would destroy it
BEAT: Final = 1.0  # seconds between two writings of a worker's numbers, and between two looks at the windows
MISSING: Final = 3.0  # seconds without one after which a worker is missing
ROW: Final = 512  # numbers that a worker can write
WINDOWS: Final = 60  # that /windows has, with the open one
HISTORY: Final = 1440  # that are remembered, and that /windows.csv has: a day of minutes
LATE: Final = 3  # more reports than this that the webhook does not have are a failure, as in deploy/alerts.yaml
STALE: Final = "Verve-Error: the store can't be asked, these windows are the last that were known\r\n"

# A metric's name: its type, and what it says.
METRICS: Final = {
    "verve_requests_total": ("counter", "Requests answered, by status."),
    "verve_request_duration_seconds": (
        "histogram",
        "Seconds that requests waited for the store: 0 for those answered without it, the wait of the first of the "
        "batch for the others. So their number is exact, and the time an upper bound while at most 10,000 wait.",
    ),
    "verve_failures_total": (
        "counter",
        "Requests answered 503, by reason: the window is full, too many requests wait (busy), the store is away, was "
        "late or refused the id, too many callbacks wait, too many connections are open.",
    ),
    "verve_waiting_requests": ("gauge", "Requests that wait for the store now."),
    "verve_connections": ("gauge", "Open client connections."),
    "verve_connections_limit": ("gauge", "Client connections that may be open, in all workers at work."),
    "verve_ids_total": ("counter", "Ids answered ok: new in their window over the fleet, or duplicates."),
    "verve_ids_held": (
        "gauge",
        "Ids in the memory of the workers at work: of the open window, and of those over and not yet reported.",
    ),
    "verve_ids_limit": ("gauge", "Ids of a window that may be kept in memory (--max-ids), in all workers at work."),
    "verve_batch_ids": ("histogram", "Ids in one round trip to Redis."),
    "verve_batch_duration_seconds": ("histogram", "Seconds that a round trip to Redis took, for one batch of ids."),
    "verve_callbacks_total": ("counter", "Callbacks to endpoints that requests named, by outcome."),
    "verve_waiting_callbacks": ("gauge", "Callbacks that wait or are under way."),
    "verve_webhook_deliveries_total": ("counter", "Attempts of this instance to deliver a report, by outcome."),
    "verve_store_up": ("gauge", "1 if every worker at work can store ids, 0 if one can't."),
    "verve_store_nodes": (
        "gauge",
        "Servers that keep ids, by whether they are in reach; the worker that sees most.",
    ),
    "verve_store_parts_away": (
        "gauge",
        "Parts of all ids, 64 in a cluster and 1 elsewhere, that can't be stored now; of the worker that sees most.",
    ),
    "verve_windows_waiting": ("gauge", "Windows that are over and could not be closed yet."),
    "verve_workers": ("gauge", "Workers that are alive and at work."),
    "process_cpu_seconds_total": ("counter", "User and system time of the workers in seconds."),
    "process_resident_memory_bytes": (
        "gauge",
        "Resident memory of the workers at work, in bytes; what they share counts in each.",
    ),
    "process_open_fds": ("gauge", "Open files of the workers at work."),
    "process_max_fds": ("gauge", "Files that the workers at work may have open."),
    "verve_worker_restarts_total": ("counter", "Workers that ended or hung, and were replaced."),
    "verve_webhook_waiting_reports": ("gauge", "Closed windows, of those shown, that the webhook does not have yet."),
    "verve_window_ids": ("gauge", "Distinct ids in the open window so far, over the fleet."),
    "verve_last_window_ids": ("gauge", "Distinct ids in the newest closed window, over the fleet."),
    "verve_last_window_end_timestamp_seconds": ("gauge", "Unix time at which the newest closed window ended."),
    "process_start_time_seconds": ("gauge", "The same as verve_start_time_seconds, under the usual name."),
    "verve_start_time_seconds": ("gauge", "Unix time at which the instance was started."),
    "verve_build_info": ("gauge", "Always 1; the version stands in the label."),
}
STATE: Final = (  # those that the page shows as they are
    *("verve_connections", "verve_connections_limit", "verve_waiting_requests", "verve_waiting_callbacks"),
    *("verve_ids_held", "verve_ids_limit", "process_resident_memory_bytes"),
)
ALIKE: Final = ("verve_store_nodes", "verve_store_parts_away", "verve_windows_waiting")  # of the fleet, not of a worker
GAUGES: Final = {name for name, (kind, _) in METRICS.items() if kind == "gauge"}

_line = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (/[!-~]*) HTTP/1\.([01])\r\n").match  # RFC 9112, 3
_fields = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*\r\n").fullmatch
_hosts = re.compile(rb"^host:[ \t]*[!-~]+[ \t]*\r$", re.IGNORECASE | re.MULTILINE).findall


def is_gauge(name: str) -> bool:
    """Return whether a number, named with its labels, is one that goes up and down."""
    return name.partition("{")[0] in GAUGES


class Board:
    """The numbers of all workers of an instance, in memory that they share if it is made before they are forked."""

    def __init__(self, workers: int) -> None:
        self.started = time.time()
        self.failed = Failed()
        self.rows = [memoryview(mmap.mmap(-1, ROW * 8)).cast("d") for _ in range(workers)]

    def missing(self) -> list[int]:
        """Return the numbers of the workers that are not at work."""
        now = time.monotonic()  # of the machine, the same in all processes
        return [number for number, row in enumerate(self.rows) if now - row[0] > MISSING]


class Failed:
    """How many requests of an instance failed in each of the last windows, in memory that its workers share.

    Only the worker that answers operators writes.
    """

    def __init__(self) -> None:
        self._seen = memoryview(mmap.mmap(-1, 8)).cast("d")  # failures since the instance was started
        self._cells = memoryview(mmap.mmap(-1, HISTORY * 16)).cast("d")  # start of a window, failures in it

    def note(self, start: int, seconds: int, total: float) -> None:
        """Note the failures so far; those that are new count in the window that starts at `start`."""
        new, self._seen[0] = total - self._seen[0], total
        if new > 0:
            at = 2 * (start // seconds % HISTORY)
            before = self._cells[at + 1] if self._cells[at] == start else 0.0
            self._cells[at], self._cells[at + 1] = start, before + new

    def counts(self) -> dict[int, int]:
        """Return the failures by the start of the window, of those windows that have some."""
        cells = [*map(int, self._cells)]
        return {start: count for start, count in zip(cells[::2], cells[1::2], strict=True) if count}


class Row:
    """What one worker writes on a board: when it last did, and its numbers. Counters go on from its predecessor's."""

    def __init__(self, board: Board, number: int, samples: Callable[[], dict[str, float]]) -> None:
        """`samples` returns the worker's numbers by name, the same ROW - 1 at most in the same order every time."""
        self.board = board
        self.number = number
        self._samples = samples
        self._cells = board.rows[number]
        self._before = self._cells.tolist()

    async def keep(self) -> None:
        """Keep the row up to date, for ever."""
        while True:
            self.write()
            await asyncio.sleep(BEAT)

    def write(self) -> list[str]:
        """Write the numbers as they are now; return their names."""
        samples = self._samples()
        for at, (name, value) in enumerate(samples.items(), 1):
            self._cells[at] = value if is_gauge(name) else self._before[at] + value
        self._cells[0] = time.monotonic()
        return [*samples]

    def leads(self) -> bool:
        """Return whether no worker before this one is at work."""
        return self.board.missing()[: self.number] == [*range(self.number)]

    def total(self) -> dict[str, float]:
        """Return the numbers over all workers, this one's as they are now; of those missing only what they counted."""
        names = self.write()
        rows, missing = self.board.rows, self.board.missing()
        total = dict.fromkeys(names, 0.0)
        for number, row in enumerate(rows):
            for at, name in enumerate(names, 1):
                if name.startswith(ALIKE):
                    total[name] = max(total[name], row[at] if number not in missing else 0.0)
                elif number not in missing or not is_gauge(name):
                    total[name] += row[at]
        present = len(rows) - len(missing)
        total["verve_store_up"] = float(total["verve_store_up"] == present)  # who is missing says nothing of the store
        return total | {"verve_workers": present}


def of_process() -> dict[str, float]:
    """Return what the system knows of this process; 0 for what it does not tell."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    pages = files = 0
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
        files = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))  # the first since Linux 6.2
    return {
        "process_cpu_seconds_total": usage.ru_utime + usage.ru_stime,
        "process_resident_memory_bytes": pages * resource.getpagesize(),
        "process_open_fds": files,
        "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


class Histogram(Protocol):
    """A histogram as it is counted."""

    bounds: Sequence[float]  # the largest value of each bucket but the last, which has none
    counts: list[int]  # of each bucket
    sum: float  # of all values


def histogram(name: str, of: Histogram, zeros: int = 0) -> dict[str, float]:
    """Return a histogram, and `zeros` more, as Prometheus has it: each bucket holds what is in those below it, too."""
    bounds = [*(f"{bound:g}" for bound in of.bounds), "+Inf"]
    sums = [zeros + sum_ for sum_ in accumulate(of.counts)]
    buckets = {f'{name}_bucket{{le="{bound}"}}': sum_ for bound, sum_ in zip(bounds, sums, strict=True)}
    return {**buckets, f"{name}_sum": of.sum, f"{name}_count": sums[-1]}


def render(samples: Mapping[str, float]) -> bytes:
    """Return numbers as Prometheus's text format has them; those of one metric stand together."""
    lines = []
    last = ""
    for name, value in samples.items():
        metric = name.partition("{")[0]
        if metric not in METRICS:
            metric = metric.rpartition("_")[0]  # _bucket, _sum or _count of a histogram
        if metric != last:
            kind, text = METRICS[metric]
            lines += [f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"]
            last = metric
        lines.append(f"{name} {value:.15g}")
    return "\n".join([*lines, ""]).encode("ascii")


def labelled(samples: Mapping[str, float], metric: str) -> dict[str, float]:
    """Return the numbers of a metric by the value of its only label."""
    return {name.split('"')[1]: value for name, value in samples.items() if name.startswith(f"{metric}{{")}


def name_of(start: int) -> str:
    """Return the name of the window that starts at `start`, as RFC 3339 has it."""
    return f"{datetime.fromtimestamp(start, UTC).isoformat()[:19]}Z"  # a day of them takes strftime 3 ms


class Answer(NamedTuple):
    """A response."""

    status: str
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    fields: str = ""  # further header lines


Window = tuple[int, int, int]  # its start in Unix seconds, its length in seconds, its count


class Known(NamedTuple):
    """What is known of a window."""

    start: int
    seconds: int
    ids: int  # its count
    final: bool  # it is closed
    delivered: bool | None  # the webhook has its report; None if it is not to have it


# The open window, then the newest closed ones, so many in all; None if they can't be had. What tells whether a window's
# report is delivered, by its start (None: it is not to be); None if that is unknown.
Recent = Callable[[int], Awaitable[list[Window] | None]]
Delivered = Callable[[], Awaitable[Callable[[int], bool | None] | None]]


class History:
    """The last windows, as far as this worker knows them."""

    def __init__(
        self, board: Board, opened: Callable[[], Window], recent: Recent, delivered: Delivered | None = None
    ) -> None:
        """`opened` returns the open window as this worker knows it; it starts at 0 before the store has told its time.

        Without a webhook there is no `delivered`.
        """
        self.board = board
        self.opened = opened
        self.recent = recent
        self.delivered = delivered
        self.windows: list[Known] = []  # as they were when last seen, newest first; HISTORY at most
        self.fresh = False  # the last look succeeded
        self._looked = 0.0  # when that was, monotonic
        self._looking = asyncio.Lock()

    async def look(self) -> None:
        """Bring the windows up to date, unless that was done within the last second."""
        async with self._looking:
            if time.monotonic() - self._looked >= BEAT:
                await self._refresh()
                self._looked = time.monotonic()

    async def _refresh(self) -> None:
        found = None
        with contextlib.suppress(OSError):  # of these, TimeoutError is one
            async with asyncio.timeout(BEAT):
                found = await self._ask()
        self.fresh = found is not None
        if found is not None:
            self.windows = found

    async def _ask(self) -> list[Known] | None:
        """Return the last windows, newest first; None if the store can't be asked."""
        windows = await self.recent(WINDOWS if self.windows else HISTORY)
        if windows and self.windows and windows[-1][0] > self.windows[0].start:
            windows = await self.recent(HISTORY)  # many were closed since the last look
        delivered = await self.delivered() if self.delivered else lambda start: None
        if windows is None or delivered is None:
            return None
        older = [known for known in self.windows if known.start < windows[-1][0] and known.final]
        found = [
            self._opened(*windows[0]),
            *(Known(*window, True, delivered(window[0])) for window in windows[1:]),
            *(known if known.delivered else known._replace(delivered=delivered(known.start)) for known in older),
        ]
        return found[:HISTORY]

    def _opened(self, start: int, seconds: int, count: int) -> Known:
        return Known(start, seconds, count, False, None if self.delivered is None else False)

    def now(self) -> int:
        """Return the start of the open window, by this machine's clock if the store has not told its time yet."""
        start, seconds, _ = self.opened()
        return start or int(time.time()) // seconds * seconds

    def shown(self, most: int) -> list[dict[str, Any]]:
        """Return the newest windows as they are shown: with the requests of this instance that failed in them."""
        windows, (start, seconds, count) = self.windows, self.opened()
        if not self.fresh and start:  # of the open window this worker may know more by now
            opened = self._opened(start, seconds, count)
            if not windows or windows[0].start < start:
                windows = [opened, *windows]
            elif windows[0].start == start and windows[0].ids < count:
                windows = [opened, *windows[1:]]
        failed, since = self.board.failed.counts(), self.board.started
        return [
            {
                "window": name_of(window.start),
                "seconds": window.seconds,
                "count": window.ids,
                "final": window.final,
                "delivered": window.delivered,
                "failed": failed.get(window.start, 0) if window.start + window.seconds > since else None,
            }
            for window in windows[:most]
        ]

    async def note(self, failures: float) -> None:
        """Note the requests that have failed by now, and look if a window was closed that is not known."""
        now, (_, seconds, _) = self.now(), self.opened()
        self.board.failed.note(now, seconds, failures)
        if not any(window.final and window.start + window.seconds >= now for window in self.windows[:2]):
            async with self._looking:
                await self._refresh()

    def waiting(self) -> int:
        """Return how many of the last closed windows have a report that the webhook does not have yet."""
        return sum(window.final and window.delivered is False for window in self.windows[:WINDOWS])


@dataclass
class Admin:
    """Answers what operators ask of an instance, in one of its workers."""

    version: str
    place: str  # where the ids are, in words
    row: Row  # of this worker
    trouble: Callable[[], str]  # why it can't take requests, in words; "" if it can
    warnings: Callable[[], list[str]]  # what is to be mended although it can
    restarts: Callable[[], int]  # workers that were replaced
    history: History
    webhook: Callable[[], str] | None  # why it did not take the last report, as far as is known; None if there is none

    def __post_init__(self) -> None:
        self.pages: dict[str, Callable[[], Awaitable[Answer]]] = {
            "/": self.page,
            "/healthz": self.healthz,
            "/readyz": self.readyz,
            "/metrics": self.metrics,
            "/windows": self.windows,
            "/windows.csv": self.csv,
            "/state": self.state,
        }
        self._connections = 0

    # The pages

    async def page(self) -> Answer:
        return Answer("200 OK", PAGE, "text/html; charset=utf-8", f"Content-Security-Policy: {POLICY}\r\n")

    async def healthz(self) -> Answer:
        return Answer("200 OK", b"alive\n")

    async def readyz(self) -> Answer:
        troubles = self.troubles()
        lines = ["not ready" if troubles else "ready", *troubles]
        lines += [f"warning: {warning}" for warning in self.warnings()]
        return Answer("503 Service Unavailable" if troubles else "200 OK", "\n".join([*lines, ""]).encode("utf-8"))

    async def metrics(self) -> Answer:
        samples = self.row.total()
        await self.history.look()
        samples["verve_worker_restarts_total"] = self.restarts()
        if self.history.windows:
            samples["verve_webhook_waiting_reports"] = self.history.waiting()
        if self.history.fresh:  # what is not known to be so now is left out
            samples["verve_window_ids"] = self.history.windows[0].ids
            for last in self.history.windows[1:2]:
                samples["verve_last_window_ids"] = last.ids
                samples["verve_last_window_end_timestamp_seconds"] = last.start + last.seconds
        samples["process_start_time_seconds"] = self.row.board.started
        samples["verve_start_time_seconds"] = self.row.board.started
        samples[f'verve_build_info{{version="{self.version}"}}'] = 1
        return Answer("200 OK", render(samples), "text/plain; version=0.0.4; charset=utf-8")

    async def windows(self) -> Answer:
        await self.history.look()
        body = json.dumps(self.history.shown(WINDOWS)).encode("ascii") + b"\n"
        if self.history.fresh:
            return Answer("200 OK", body, "application/json")
        return Answer("503 Service Unavailable", body, "application/json", STALE)

    async def csv(self) -> Answer:
        """Answer with the closed windows. Their counts never change, so they are good when the store is away."""
        await self.history.look()
        lines = ["window,seconds,count,failed,delivered"]
        for each in self.history.shown(HISTORY):
            if each["final"]:
                failed = "" if each["failed"] is None else each["failed"]
                delivered = "" if each["delivered"] is None else str(each["delivered"]).lower()
                lines.append(f"{each['window']},{each['seconds']},{each['count']},{failed},{delivered}")
        fields = 'Content-Disposition: attachment; filename="windows.csv"\r\n' + ("" if self.history.fresh else STALE)
        return Answer("200 OK", "\r\n".join([*lines, ""]).encode("ascii"), "text/csv; charset=utf-8", fields)

    async def state(self) -> Answer:
        await self.history.look()
        samples = self.row.total()
        answered = labelled(samples, "verve_requests_total")
        state = {
            "version": self.version,
            "place": self.place,
            "started": self.row.board.started,
            "time": time.time(),
            "troubles": self.troubles(),
            "warnings": self.warnings(),
            "store_up": bool(samples["verve_store_up"]),
            "webhook": self.deliveries(),
            "webhook_fails": self.history.waiting() > LATE or bool(self.webhook and self.webhook()),
            "requests": sum(answered.values()),
            "refused": sum(value for status, value in answered.items() if status < "500" and status != "200"),
            "failures": labelled(samples, "verve_failures_total"),
            "ids": labelled(samples, "verve_ids_total"),
            "waits": [*labelled(samples, "verve_request_duration_seconds_bucket").items()],
            "callbacks": labelled(samples, "verve_callbacks_total"),
            "workers": [samples["verve_workers"], len(self.row.board.rows)],
            "restarts": self.restarts(),
            **{name.removeprefix("verve_"): samples.get(name) for name in STATE},
            "fresh": self.history.fresh,
            "now": self.history.now(),
            "windows": self.history.shown(WINDOWS),
            "failed": [*self.row.board.failed.counts().items()],
        }
        return Answer("200 OK", json.dumps(state).encode("ascii"), "application/json")

    # What they are made of

    def troubles(self) -> list[str]:
        """Return why the instance can't take requests, in words."""
        up, board = self.row.total()["verve_store_up"], self.row.board
        missing = [f"worker {number + 1} of {len(board.rows)} is missing" for number in board.missing()]
        trouble = self.trouble()
        if not (trouble or up):
            trouble = "a worker can't reach the store"
        return [trouble, *missing] if trouble else missing

    def deliveries(self) -> str:
        """Return how the webhook does, in words."""
        if self.webhook is None:
            return "none"
        count, why = self.history.waiting(), self.webhook()
        if not count:
            told = any(window.delivered for window in self.history.windows)
            return "has every report" if told else "no report for it yet"
        return f"{count} report{'s' if count > 1 else ''} to deliver" + (f", last attempt: {why}" if why else "")

    # The server

    async def serve(self, sock: socket.socket) -> None:
        """Answer on a listening socket that all workers have, while those before this one are missing.

        Until cancelled; or, where others answer, until `sock` is closed.
        """
        if self.row.number:
            await asyncio.sleep(MISSING)  # those before may have just been started
        server: asyncio.Server | None = None
        try:
            while server or sock.fileno() >= 0:
                if self.row.leads() and server is None:
                    limit = MAX_HEAD - 4  # before its end
                    server = await asyncio.start_server(self._serve, sock=sock.dup(), limit=limit)
                elif server and not self.row.leads():
                    server.close()
                    server = None
                if server:
                    await self.history.note(sum(labelled(self.row.total(), "verve_failures_total").values()))
                await asyncio.sleep(BEAT)
        finally:
            if server:
                server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, unless too many are under way."""
        self._connections += 1
        try:
            if self._connections > CONNECTIONS:
                return
            # RuntimeError: uvloop's, for a peer that has reset the connection
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, RuntimeError):
                async with asyncio.timeout(PATIENCE):
                    try:
                        head = await reader.readuntil(b"\r\n\r\n")
                    except asyncio.LimitOverrunError:
                        head = b""
                answer = await self.answer(head) if head else Answer("431 Request Header Fields Too Large", b"")
                async with asyncio.timeout(PATIENCE):
                    writer.write(wire(answer, head.startswith(b"HEAD ")))
                    await writer.drain()
                    writer.write_eof()
                async with asyncio.timeout(LINGER):
                    while await reader.read(MAX_HEAD):
                        pass
        except asyncio.CancelledError:
            pass  # the process ends; Python 3.11 would log that nobody looked at the task's exception
        finally:
            self._connections -= 1
            writer.transport.abort()

    async def answer(self, head: bytes) -> Answer:
        """Return the answer to a request whose whole head is given."""
        line = _line(head)
        if line is None or not _fields(head, line.end()):
            return Answer("400 Bad Request", b"the request is not well-formed HTTP/1.1\n")
        if len(_hosts(head)) != 1 and line[3] == b"1":
            return Answer("400 Bad Request", b"expected exactly one Host\n")
        page = self.pages.get(line[2].partition(b"?")[0].decode("ascii"))
        if page is None:
            return Answer("404 Not Found", "expected one of {}\n".format(" ".join(self.pages)).encode("ascii"))
        if line[1] not in (b"GET", b"HEAD"):
            return Answer("405 Method Not Allowed", b"expected GET or HEAD\n", fields="Allow: GET, HEAD\r\n")
        return await page()


def wire(answer: Answer, head_only: bool) -> bytes:
    """Return a response as it is sent."""
    head = (
        f"HTTP/1.1 {answer.status}\r\n"
        f"Content-Type: {answer.kind}\r\n"
        f"Content-Length: {len(answer.body)}\r\n"
        f"{answer.fields}"
        "Cache-Control: no-store\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + (b"" if head_only else answer.body)


PAGE: Final = Path(__file__).with_name("admin.html").read_bytes()


def allowed(tag: str) -> str:
    """Return the hash by which a Content-Security-Policy names the text of the page's only element of a kind."""
    text = PAGE.partition(f"<{tag}>".encode())[2].partition(f"</{tag}>".encode())[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode('ascii')}'"


POLICY: Final = (
    f"default-src 'none'; connect-src 'self'; style-src {allowed('style')}; script-src {allowed('script')}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
