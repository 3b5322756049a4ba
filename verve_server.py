"""The front door: settings in, parts wired, the one endpoint, serving, signals, drain.

    GET /api/verve/accept?id=INT[&endpoint=URL]

A request comes from `http1` as a method and a target, becomes an id here, goes to the store in `dedup`, and what
became of it selects an answer that was prepared beforehand. `reporter` rolls the windows and tells their counts, and
the count with an id that is new to the endpoint that its request named.

The life of the process: the settings are read, or refused with exit status 2; the port is opened, or the process
ends with status 1 and a line that says why; it serves until SIGTERM or SIGINT; then it takes no new connection,
answers what was taken, tells what it has counted so far, and exits with status 0; or with status 3, and a line that
says how many, if Redis has lost ids that were answered `ok` and they could not be brought back. A second signal ends
it at once.
"""

import signal

if __name__ == "__main__":
    # Until there is something to stop, Ctrl-C ends the process as SIGTERM does, not with a traceback of the imports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import asyncio
import contextlib
import gc
import logging
import os
import re
import resource
import socket
import sys
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any
from urllib.parse import unquote_to_bytes

import uvloop

import admin
import dedup
import fixed_answers
import http1
import outbound
import redis_store
import reporter
import request_reader
import settings
import workers

PATH = b"/api/verve/accept"
STORE_WAIT = 1.0  # seconds that an instance waits for its store before it takes requests
MAX_KNOWN = 1000  # endpoints that are remembered
OTHER_FILES = http1.OVERFLOW + outbound.ALL_CONNECTIONS + admin.CONNECTIONS + 64  # besides those that are served

FAILURES = {  # what can become of an id: the word for it in the metrics, and the sentence in Verve-Error
    dedup.FULL: ("full", "the window holds as many ids as allowed"),
    dedup.BUSY: ("busy", "too many requests wait for the store"),
    dedup.DOWN: ("away", "the store can't be reached"),
    dedup.LOST: ("late", "the store did not answer in time"),
    dedup.REFUSED: ("refused", "the store refused the id"),
}

log = logging.getLogger("verve")

_integer = re.compile(rb"(-?)0*([0-9]{1,19})").fullmatch
_absolute = re.compile(rb"https?://%b(?=[/?]|\Z)" % request_reader.HOST, re.IGNORECASE).match  # RFC 9112, 3.2.2


class Endpoint:
    """The one endpoint: reads the request's target, has its id counted, chooses the answer."""

    plain = PATH + b"?id="

    def __init__(self, store: dedup.Store, answers: fixed_answers.FixedAnswers, callbacks: reporter.Callbacks) -> None:
        self.add = store.add
        self._callbacks = callbacks
        # An endpoint as it stands in a query: most requests repeat them.
        self._read = lru_cache(MAX_KNOWN)(lambda endpoint: callbacks.parse(unquote_to_bytes(endpoint)))
        ok = answers.add(200, "OK", b"ok")
        self.outcomes = dict.fromkeys((dedup.NEW, dedup.DUPLICATE, dedup.STORED), ok) | {
            outcome: answers.refuse(503, "Service Unavailable", why, Retry_After="1")
            for outcome, (_, why) in FAILURES.items()
        }
        self._not_found = answers.refuse(404, "Not Found", f"expected the path {PATH.decode()}")
        self._not_allowed = answers.refuse(405, "Method Not Allowed", "expected GET or HEAD", Allow="GET, HEAD")
        self._bad_id = answers.refuse(400, "Bad Request", "expected one id, an integer of signed 64 bits")
        self._bad_endpoint = answers.refuse(
            400, "Bad Request", "expected one endpoint, an absolute http or https URL that callbacks may reach"
        )
        self._no_callback = answers.refuse(503, "Service Unavailable", "too many callbacks wait", Retry_After="1")

    def failures(self, server: http1.Server) -> dict[str, int]:
        """Return how many requests `server` has answered 503, by reason."""
        counts = server.outcomes.counts
        found = {reason: self.outcomes[outcome].count + counts[outcome] for outcome, (reason, _) in FAILURES.items()}
        return found | {"callbacks": self._no_callback.count, "connections": server.crowded.count}

    def handle(self, method: bytes, target: bytes, slot: http1.Slot) -> fixed_answers.FixedAnswer | None:
        """Answer any request: find the id, count it."""
        digits = target.removeprefix(self.plain)
        if method == b"GET" and digits.isdigit() and len(digits) <= http1.MAX_DIGITS:
            outcome = self.add(int(digits), slot)
            return None if outcome is None else self.outcomes[outcome]
        absolute = _absolute(target)
        if absolute:
            target = target[absolute.end() :]
        path, _, query = target.partition(b"?")
        if path != PATH and unquote_to_bytes(path) != PATH:
            return self._not_found
        if method not in (b"GET", b"HEAD"):
            return self._not_allowed
        ids: list[bytes] = []
        endpoints: list[bytes] = []
        for pair in query.split(b"&"):
            name, _, value = pair.partition(b"=")
            if b"%" in name:
                name = unquote_to_bytes(name)
            if name == b"id":
                ids.append(unquote_to_bytes(value))
            elif name == b"endpoint":
                endpoints.append(value)
        number = integer(ids[0]) if len(ids) == 1 else None
        if number is None:
            return self._bad_id
        counted = None
        if endpoints:
            try:
                (endpoint,) = endpoints
                url = self._read(endpoint)
            except ValueError:
                return self._bad_endpoint
            if self._callbacks.full(url):
                return self._no_callback
            counted = partial(self._callbacks.send, url)
        outcome = self.add(number, slot, counted)
        return None if outcome is None else self.outcomes[outcome]


def integer(text: bytes) -> int | None:
    """Return the integer of signed 64 bits that `text` writes in ASCII digits, or None if it doesn't."""
    if text.isdigit() and len(text) <= http1.MAX_DIGITS:
        return int(text)
    match = _integer(text)
    if match is None:
        return None
    number = int(match[1] + match[2])
    return number if -(2**63) <= number < 2**63 else None


@dataclass(frozen=True)
class Shared:
    """Memory that all processes of an instance share; it is made before they are forked."""

    board: admin.Board  # what all workers have done
    untold: memoryview  # start of the first window whose count is not told yet, 0 if there was none


@dataclass(frozen=True)
class Parts:
    """The parts of a serving process, wired."""

    config: settings.Settings
    shared: Shared
    worker: workers.Worker
    stop: "asyncio.Future[None]"  # done when the process is to stop
    store: dedup.Store
    client: outbound.Client
    callbacks: reporter.Callbacks
    endpoint: Endpoint
    server: http1.Server
    webhook: reporter.Webhook | None  # it delivers in the process that speaks
    tasks: list[asyncio.Task[None]] = field(default_factory=list)  # none ends before the stop, unless it fails

    @property
    def speaks(self) -> bool:
        """Whether this process tells the windows' counts, for the instance."""
        return self.worker.number == 0

    @property
    def stopping(self) -> bool:
        """Whether the process or the instance is about to stop: it should get no new work."""
        return self.stop.done() or bool(self.worker.stopping[0])

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have a task do what is to be done until the stop."""
        task = asyncio.create_task(work)
        self.tasks.append(task)
        return task

    def note_first(self) -> None:
        """Keep for a successor which window is the first to be told, once the store has told its time."""
        self.shared.untold[0] = self.shared.untold[0] or self.store.window

    async def roll(self) -> Iterable[tuple[int, int]]:
        """Close what is over; return start and count of each closed window."""
        closed = await self.store.roll()
        self.note_first()
        return closed

    def tell(self, start: int, count: int, *, final: bool = True) -> None:
        """Tell a window's count, if this process is the one that does."""
        if not self.speaks:
            return
        reporter.log_count(start, count, final=final)
        if self.webhook and isinstance(self.webhook.outbox, reporter.MemoryOutbox):
            self.webhook.outbox.put(reporter.Report(reporter.iso(start), self.config.window, count, final))
        self.shared.untold[0] = start + 1  # for a successor


async def serve(config: settings.Settings, shared: Shared, worker: workers.Worker) -> int:
    """Serve until a signal, then drain; return the exit status. Raises dedup.StoreError if the store can't be used."""
    parts = wire(config, shared, worker)
    life = asyncio.create_task(worker.show_life())  # to the end: a stop that hangs is ended, too
    listener, timer = await open_up(parts)
    await until_stop(parts)
    until = asyncio.get_running_loop().time() + config.drain_timeout
    await drain(parts, listener)
    timer.cancel()
    await tell_the_rest(parts, until)
    status = await let_go(parts, until)
    life.cancel()
    return status


def wire(config: settings.Settings, shared: Shared, worker: workers.Worker) -> Parts:
    """Make the parts of a process and connect them."""
    stop = stop_on_signals(worker)
    store = open_store(config, shared.untold[0])
    answers = fixed_answers.FixedAnswers()
    spare = raise_file_limit() - config.max_connections
    client = outbound.Client(
        outbound.Guard(config.callback_allow),
        max(1, outbound.CONNECTIONS // config.workers),
        max(1, min(outbound.ALL_CONNECTIONS, spare // 2)),
    )
    callbacks = reporter.Callbacks(client, config.callback_method)
    endpoint = Endpoint(store, answers, callbacks)
    server = http1.Server(
        endpoint,
        answers,
        endpoint.outcomes,
        idle_timeout=config.idle_timeout,
        header_timeout=config.header_timeout,
        max_connections=config.max_connections,
        overflow=min(http1.OVERFLOW, spare // 4),
    )
    webhook = open_webhook(config, store)
    return Parts(config, shared, worker, stop, store, client, callbacks, endpoint, server, webhook)


async def open_up(parts: Parts) -> tuple[asyncio.Server, asyncio.Task[None]]:
    """Wait for the store, then take connections; return the public listener and the task that rolls the windows."""
    store, webhook, worker = parts.store, parts.webhook, parts.worker
    row = admin.Row(parts.shared.board, worker.number, partial(samples, parts))
    if worker.operators is not None:
        operators = admin.Admin(
            settings.VERSION,
            store.place,
            row,
            trouble=lambda: "stopping" if parts.stopping else store.unavailable,
            warnings=lambda: store.warnings,
            restarts=lambda: worker.restarts[0],
            history=admin.History(
                parts.shared.board,
                lambda: (store.window, store.seconds, store.count),
                store.recent,
                webhook.outbox.delivered if webhook else None,
            ),
            webhook=(lambda: webhook.why) if webhook else None,
        )
        parts.begin(operators.serve(worker.operators))
    await store.start(STORE_WAIT if worker.patient else 0.0, parts.server.give)
    parts.begin(row.keep())  # not before: it would say for a second that the store is away
    listen(parts.config, [worker.sock])
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(parts.server, sock=worker.sock, backlog=workers.BACKLOG)
    timer = parts.begin(reporter.roll_windows(store.remaining, parts.roll, parts.tell))
    if parts.config.workers == 1:
        announce(parts.config, worker.sock, worker.operators)
        workers.notify(worker.manager, "READY=1")
    parts.note_first()
    parts.begin(store.failure())
    if webhook and parts.speaks:
        parts.begin(webhook.run())
    return listener, timer


async def until_stop(parts: Parts) -> None:
    """Serve until the process is to stop, and for --drain-delay more. Raises what makes it unable to count or report.

    Of several workers, the parent tells them to stop when that time is over.
    """
    tasks = parts.tasks
    await asyncio.wait([parts.stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
    workers.notify(parts.worker.manager, "STOPPING=1")
    delay = parts.config.drain_delay
    if delay and parts.stop.done() and parts.worker.parent < 0:
        log.info("stopping: connections are taken for %g s more", delay)
        await asyncio.wait(tasks, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            task.result()


async def drain(parts: Parts, listener: asyncio.Server) -> None:
    """Close the door and answer what was taken."""
    config, worker = parts.config, parts.worker
    log.info("stopping: answering what was taken, for at most %g s", config.drain_timeout)
    if worker.operators is not None and not parts.speaks:
        worker.operators.close()  # the kernel would keep connections that nobody takes when the first has ended
    if parts.webhook:
        parts.webhook.hurry()
    parts.server.start_drain()
    await workers.close_door(parts.server, listener, worker.sock, alone=worker.parent < 0)
    patience = config.drain_timeout - min(2.0, config.drain_timeout / 3)  # the rest is for the reports
    cut = await parts.server.drain(patience)
    if cut:
        log.warning("connections still open after %g s, and cut: %d", patience, cut)


async def tell_the_rest(parts: Parts, until: float) -> None:
    """Close the windows that are over, and wait until what only this process can tell is told, or `until`."""
    try:
        async with asyncio.timeout_at(max(until, asyncio.get_running_loop().time() + 0.1)):
            for start, count in await parts.store.roll():
                parts.tell(start, count)
            if parts.config.redis_url is None:
                parts.tell(parts.store.window, parts.store.count, final=False)
            if parts.webhook and parts.speaks:
                await parts.webhook.settle()
            await parts.client.settle()
    except TimeoutError:
        log.warning("not everything that waited was told within %g s", parts.config.drain_timeout)


async def let_go(parts: Parts, until: float) -> int:
    """End the tasks, the callbacks, and the link to the store, which settles first; return the exit status."""
    for task in parts.tasks:
        task.cancel()
    parts.callbacks.close()
    loop = asyncio.get_running_loop()
    until = max(until, loop.time() + 0.1)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(until):
            if parts.webhook and parts.speaks:
                await parts.webhook.close()
    lost = await parts.store.stop(max(0.1, until - loop.time()))
    if lost:
        log.error("ids that were answered ok, and that Redis was not seen to have at the end: %d", lost)
    return workers.UNSETTLED if lost else 0


def samples(parts: Parts) -> dict[str, float]:
    """Return this process's numbers under the names of `admin.METRICS`, always the same ones in the same order."""
    store, server, histogram = parts.store, parts.server, admin.histogram
    answered = server.answered()
    at_once = sum(answered.values()) - sum(store.meters.waits.counts)
    deliveries = parts.webhook.outcomes if parts.webhook else {}
    servers = store.servers
    return {
        **{f'verve_requests_total{{status="{status}"}}': count for status, count in answered.items()},
        **{
            f'verve_failures_total{{reason="{reason}"}}': count
            for reason, count in parts.endpoint.failures(server).items()
        },
        **histogram("verve_request_duration_seconds", store.meters.waits, at_once),
        "verve_waiting_requests": store.queued,
        "verve_connections": server.cap.served,
        "verve_connections_limit": server.cap.most,
        'verve_ids_total{result="new"}': store.new,
        'verve_ids_total{result="duplicate"}': answered[200] - store.new,
        "verve_ids_held": store.kept,
        "verve_ids_limit": store.max_ids,
        **histogram("verve_batch_ids", store.meters.sizes),
        **histogram("verve_batch_duration_seconds", store.meters.trips),
        **{
            f'verve_callbacks_total{{outcome="{outcome}"}}': parts.callbacks.outcomes[outcome]
            for outcome in ("delivered", "failed", "refused", "dropped")
        },
        "verve_waiting_callbacks": parts.client.pending,
        **{
            f'verve_webhook_deliveries_total{{outcome="{outcome}"}}': deliveries.get(outcome, 0)
            for outcome in ("delivered", "failed")
        },
        "verve_store_up": not store.unavailable,
        'verve_store_nodes{state="up"}': servers.up,
        'verve_store_nodes{state="down"}': servers.down,
        "verve_store_parts_away": servers.parts_away,
        "verve_windows_waiting": servers.windows_waiting,
        **admin.of_process(),
    }


def open_store(config: settings.Settings, resume: int = 0) -> dedup.Store:
    """Return the store that the settings name; `resume` is the start of the first window to tell, if one was left."""
    if config.redis_url is None:
        return dedup.MemoryStore(config.window, config.max_ids)
    return redis_store.RedisStore(
        config.redis_url,
        config.key_prefix,
        config.window,
        config.max_ids,
        config.request_timeout,
        resume,
        config.sentinel_password or "",
    )


def open_webhook(config: settings.Settings, store: dedup.Store) -> reporter.Webhook | None:
    """Return what delivers the reports, if that is wanted."""
    url = receiver(config)
    if url is None:
        return None
    outbox = redis_store.StreamOutbox(store) if isinstance(store, redis_store.RedisStore) else reporter.MemoryOutbox()
    return reporter.Webhook(url, config.report_secret, config.key_prefix, outbox)


def receiver(config: settings.Settings) -> outbound.Url | None:
    """Return where reports are POSTed."""
    return None if config.report_url is None else outbound.parse(config.report_url.encode("ascii"))


def announce(config: settings.Settings, sock: socket.socket, operators: socket.socket | None) -> None:
    """Say where the instance listens, where it counts, and whom it tells."""
    if operators is not None:
        log.info("for operators: %s", workers.url_of(operators))
    place = dedup.MemoryStore.place
    sinks = ["the log"]
    if config.redis_url is not None:
        place = redis_store.place(config.redis_url)
        sinks.append(f"the stream {config.key_prefix}:reports")
    url = receiver(config)
    if url is not None:
        sinks.append(f"the webhook at {url.place}")
    several = f" with {config.workers} workers" if config.workers > 1 else ""
    log.info(
        "listening on %s%s, counting in %s, windows of %d s, told to %s",
        workers.url_of(sock),
        several,
        place,
        config.window,
        " and ".join(filter(None, [", ".join(sinks[:-1]), sinks[-1]])),
    )


def stop_on_signals(worker: workers.Worker) -> "asyncio.Future[None]":
    """Return a future that is done when a signal asks the process to stop, or when its parent died."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number, stop)
    if worker.parent >= 0:
        loop.add_reader(worker.parent, on_orphaned, worker, stop)
    return stop


def on_signal(number: int, stop: "asyncio.Future[None]") -> None:
    """Ask the process to stop; the second time, end it."""
    if stop.done():
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        os._exit(128 + number)  # a container's first process, which the kernel spares its default signals
    else:
        stop.set_result(None)


def on_orphaned(worker: workers.Worker, stop: "asyncio.Future[None]") -> None:
    """Stop a worker whose parent died."""
    asyncio.get_running_loop().remove_reader(worker.parent)
    log.error("the parent process is gone")
    workers.refuse_new(worker.sock)
    if not stop.done():
        stop.set_result(None)


def listen(config: settings.Settings, socks: list[socket.socket]) -> None:
    """Have the kernel take connections. Raises workers.Unusable if another program does by now."""
    try:
        for sock in socks:
            sock.listen(workers.BACKLOG)
    except OSError as error:
        raise workers.Unusable(f"can't listen on {config.host} port {config.port}: {error.strerror}") from None


def run(config: settings.Settings, shared: Shared, worker: workers.Worker) -> int:
    """Run a serving process; return its exit status."""
    gc.collect()
    gc.freeze()
    try:
        return uvloop.run(serve(config, shared, worker))
    except (dedup.StoreError, workers.Unusable) as error:
        log.error("%s", error)
        return workers.UNUSABLE


async def prepare(
    config: settings.Settings, shared: Shared, socks: list[socket.socket], operators: socket.socket | None
) -> bool:
    """Before there are workers: wait for the store, see that it is of use, open the port; return whether it answered.

    The first worker tells the windows from this one's open one on: it may take a while to come so far. Raises
    workers.Unusable if no worker could work.
    """
    try:
        store = open_store(config)
        answered = await store.start(STORE_WAIT)
        if answered:
            for start, count in await store.roll():  # windows that were left open: this has closed them
                reporter.log_count(start, count)
        shared.untold[0] = store.window
        await store.stop(STORE_WAIT)
    except dedup.StoreError as error:
        raise workers.Unusable(str(error)) from None
    listen(config, socks)
    announce(config, socks[0], operators)
    return answered


def open_standard_streams() -> None:
    """Open the standard streams that the process was started without: a socket would take their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:  # what Python makes of a closed one
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def raise_file_limit() -> int:
    """Have as many files open as this user may; return how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def open_log(config: settings.Settings) -> None:
    """Log as the settings say. Raises workers.Unusable if that can't be."""
    try:
        reporter.log_to(config.log_file, config.log_format, config.log_level)
    except OSError as error:
        raise workers.Unusable(f"can't log to {config.log_file}: {error.strerror}") from None


def open_sockets(
    config: settings.Settings, opened: contextlib.ExitStack
) -> tuple[list[socket.socket], socket.socket | None]:
    """Return a socket for each worker, and the operators', which listens, if there is one. `opened` closes them.

    Raises workers.Unusable.
    """
    operators = None
    where = f"{config.host} port {config.port}"
    try:
        socks = workers.bind(opened, config.host, config.port, config.workers)
        if config.admin is not None:
            where = "{} port {} (--admin)".format(*config.admin)
            (operators,) = workers.bind(opened, *config.admin, 1)
            operators.listen(admin.CONNECTIONS)
    except OSError as error:
        raise workers.Unusable(f"can't listen on {where}: {error.strerror}") from None
    return socks, operators


def fit_to_files(config: settings.Settings) -> settings.Settings:
    """Return the settings with as many connections as the limit of open files allows; warn if those are few."""
    limit = raise_file_limit()
    most = max(1, limit // 2, limit - OTHER_FILES)
    if most <= config.max_connections // 2:
        log.warning("open files are limited to %d: at most %d connections are served", limit, most)
    return replace(config, max_connections=min(most, config.max_connections))


def main() -> int:
    """Run the program; return its exit status."""
    open_standard_streams()
    config = settings.load(check_url=outbound.parse)
    with contextlib.ExitStack() as opened:
        try:
            open_log(config)
            socks, operators = open_sockets(config, opened)
        except workers.Unusable as error:
            print(f"verve_server.py: {error}", file=sys.stderr)
            return workers.UNUSABLE
        if unknown := settings.unknown_variables():
            log.warning("%s", unknown)
        config = fit_to_files(config)
        shared = Shared(admin.Board(config.workers), workers.shared(1))
        work = partial(run, config, shared)
        if config.workers == 1:
            return work(workers.Worker(socks[0], operators, manager=settings.manager()))
        first = partial(prepare, config, shared, socks, operators)
        parent = workers.Parent(
            socks,
            operators,
            lambda: asyncio.run(first()),
            work,
            timeout=config.worker_timeout,
            delay=config.drain_delay,
            manager=settings.manager(),
        )
        return parent.run()


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError):  # nobody reads the log any more: no reason to fail in the end
        sys.stderr.flush()
    os._exit(status)  # sys.exit would wait for the threads that look up names, and a resolver may hang
