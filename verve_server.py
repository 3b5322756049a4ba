"""The front door: settings in, parts wired, the one endpoint, listening, signals, drain.

    GET /api/verve/accept?id=INT[&endpoint=URL]

A request comes from `http1` as a method and a target, becomes an id here, goes to the store in `dedup`, and what
became of it selects an answer that was prepared beforehand. `reporter` rolls the windows and tells their counts, and
the count with an id that is new to the endpoint that its request named.

The life of the process: the settings are read, or refused with exit status 2; the port is opened, or the process
ends with status 1 and a line that says why; it serves until SIGTERM or SIGINT; then it takes no new connection,
answers what was taken, tells what it has counted so far, and exits with status 0. A second signal ends it at once.
"""

import signal

if __name__ == "__main__":
    # Until there is something to stop, Ctrl-C ends the process as SIGTERM does, not with a traceback of the imports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import asyncio
import contextlib
import ctypes
import gc
import logging
import mmap
import os
import re
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any
from urllib.parse import unquote_to_bytes

import uvloop

import admin
import dedup
import http1
import outbound
import reporter
import settings

PATH = b"/api/verve/accept"
STORE_WAIT = 1.0  # seconds that an instance waits for its store before it takes requests
UNUSABLE = 1  # exit status of a process that can't work with what it was told
CRASHED = 70  # exit status of a worker after an error of ours (EX_SOFTWARE of sysexits.h)
HANDSHAKE = 0.05  # seconds that a TCP handshake under way is given to end when the door closes
MAX_KNOWN = 1000  # endpoints that are remembered
OTHER_FILES = http1.OVERFLOW + outbound.ALL_CONNECTIONS + admin.CONNECTIONS + 64  # besides those that are served
BACKLOG = 4096  # connections the kernel keeps while the loop is busy; it takes net.core.somaxconn if that is less

log = logging.getLogger("verve")

_integer = re.compile(rb"(-?)0*([0-9]{1,19})").fullmatch
_absolute = re.compile(rb"https?://%b(?=[/?]|\Z)" % http1.HOST, re.IGNORECASE).match  # RFC 9112, 3.2.2


class Unusable(Exception):  # noqa: N818 - what it is that can't be done, not an error in doing it
    """The program can't do what it is told to."""


class Endpoint:
    """The one endpoint: reads the request's target, has its id counted, chooses the answer."""

    plain = PATH + b"?id="

    def __init__(self, store: dedup.Store, answers: http1.Answers, callbacks: reporter.Callbacks) -> None:
        self.add, self.add_all = store.add, store.add_all
        self._callbacks = callbacks
        # An endpoint as it stands in a query: most requests repeat them.
        self._read = lru_cache(MAX_KNOWN)(lambda endpoint: callbacks.parse(unquote_to_bytes(endpoint)))
        ok = answers.add(200, "OK", b"ok")
        self.outcomes = dict.fromkeys((dedup.NEW, dedup.DUPLICATE, dedup.STORED), ok) | {
            outcome: answers.refuse(503, "Service Unavailable", why, Retry_After="1")
            for outcome, why in (
                (dedup.FULL, "the window holds as many ids as allowed"),
                (dedup.BUSY, "too many requests wait for the store"),
                (dedup.DOWN, "the store can't be reached"),
                (dedup.LOST, "the store did not answer in time"),
                (dedup.REFUSED, "the store refused the id"),
            )
        }
        self._not_found = answers.refuse(404, "Not Found", f"expected the path {PATH.decode()}")
        self._not_allowed = answers.refuse(405, "Method Not Allowed", "expected GET or HEAD", Allow="GET, HEAD")
        self._bad_id = answers.refuse(400, "Bad Request", "expected one id, an integer of signed 64 bits")
        self._bad_endpoint = answers.refuse(
            400, "Bad Request", "expected one endpoint, an absolute http or https URL that callbacks may reach"
        )
        self._no_callback = answers.refuse(503, "Service Unavailable", "too many callbacks wait", Retry_After="1")

    def handle(self, method: bytes, target: bytes, slot: http1.Slot) -> http1.Answer | None:
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


def bind(opened: contextlib.ExitStack, host: str, port: int, workers: int) -> list[socket.socket]:
    """Return as many sockets for `opened` to close, bound to one port that nobody listens on yet. Raises OSError."""
    if workers > 1:  # a port that is shared is never taken, so try first without sharing
        with contextlib.ExitStack() as probing:
            (probe,) = bind(probing, host, port, 1)
            port = probe.getsockname()[1]
    family, kind, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    )[0]
    socks = [opened.enter_context(socket.socket(family, kind, proto)) for _ in range(workers)]
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if workers > 1:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    return socks


def listen(config: settings.Settings, socks: list[socket.socket]) -> None:
    """Have the kernel take connections. Raises Unusable if another program does by now."""
    try:
        for sock in socks:
            sock.listen(BACKLOG)
    except OSError as error:
        raise Unusable(f"can't listen on {config.host} port {config.port}: {error.strerror}") from None


def refuse_new(sock: socket.socket) -> None:
    """Have the kernel drop the SYNs that come to a listening socket, so that no new connection begins.

    A listening socket that is closed resets the connections it has not handed over, whose clients may have sent a
    request. With this before it, a short wait for the handshakes under way, and the queue emptied, none is left to
    be reset. A client whose SYN is dropped tries again after a second, and is refused. Where there are no socket
    filters, as there are in Linux, nothing is done.
    """
    program = ctypes.create_string_buffer(
        struct.pack("HBBI", 0x30, 0, 0, 13)  # load the byte of the TCP header that has the flags
        + struct.pack("HBBI", 0x45, 0, 1, 0x02)  # is SYN set?
        + struct.pack("HBBI", 0x06, 0, 0, 0)  # yes: keep nothing of the packet
        + struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF)  # no: keep all of it
    )
    so_attach_filter = 26  # Linux, asm-generic/socket.h; not in Python's socket module
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, so_attach_filter, struct.pack("HP", 4, ctypes.addressof(program)))


def url_of(sock: socket.socket) -> str:
    """Return the URL under which a listening socket is reached."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@dataclass(frozen=True)
class Worker:
    """What a process knows of the instance that it is a part of."""

    board: admin.Board  # shared memory: what all workers have done
    untold: memoryview  # shared memory: start of the first window whose count is not told yet, 0 if there was none
    operators: socket.socket | None = None  # the listener for them, of the first
    number: int = 0  # the first tells the windows' counts, once for the instance
    parent: int = -1  # end of a pipe that closes when the parent dies
    patience: float = STORE_WAIT  # seconds that the store is waited for before the first request is taken


async def serve(config: settings.Settings, sock: socket.socket, worker: Worker) -> None:
    """Serve on `sock` until a signal, then drain. Raises dedup.StoreError if the store can't be used."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number, stop)
    if worker.parent >= 0:
        loop.add_reader(worker.parent, on_orphaned, worker.parent, sock, stop)

    store = open_store(config, worker.untold[0])
    answers = http1.Answers()
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
    store.tell = server.give
    webhook = open_webhook(config, store) if worker.number == 0 else None
    row = admin.Row(worker.board, worker.number, partial(samples, store, server, callbacks, client, webhook))
    work = []
    if worker.operators is not None:
        operators = admin.Admin(
            settings.VERSION,
            store.place,
            row,
            trouble=lambda: "stopping" if stop.done() else store.obstacle,
            warnings=lambda: [store.warning] if store.warning else [],
            recent=partial(recent, store, webhook),
            webhook=None if webhook is None else lambda: webhook.why,
        )
        work.append(asyncio.create_task(operators.serve(worker.operators)))
    await store.start(worker.patience)
    work.append(asyncio.create_task(row.keep()))  # not before: it would say for a second that the store is away
    listen(config, [sock])
    listener = await loop.create_server(server, sock=sock, backlog=BACKLOG)
    tell = teller(config, worker, webhook)
    timer = asyncio.create_task(reporter.roll_windows(store.remaining, store.roll, tell))
    if config.workers == 1:
        announce(config, sock, worker.operators)
    worker.untold[0] = worker.untold[0] or store.window

    work += [timer, asyncio.create_task(store.failure())]
    if webhook:
        work.append(asyncio.create_task(webhook.run()))
    await asyncio.wait([stop, *work], return_when=asyncio.FIRST_COMPLETED)
    for task in work:
        if task.done():
            task.result()  # raises what is wrong: a process that can't count or can't report ends

    if worker.number == 0:
        log.info("stopping: answering what was taken, for at most %g s", config.drain_timeout)
    until = loop.time() + config.drain_timeout
    if webhook:
        webhook.hurry()
    server.start_drain()
    if worker.parent < 0:  # else the parent does, if all workers are to stop
        refuse_new(sock)
    await close_door(server, listener, sock)
    patience = config.drain_timeout - min(2.0, config.drain_timeout / 3)  # the rest is for the reports
    cut = await server.drain(patience)
    if cut:
        log.warning("connections still open after %g s, and cut: %d", patience, cut)
    timer.cancel()
    try:
        async with asyncio.timeout_at(max(until, loop.time() + 0.1)):
            for start, count in await store.roll():
                tell(start, count)
            if config.redis_url is None:
                tell(store.window, store.count, final=False)
            if webhook:
                await webhook.settle()
            await client.settle()
    except TimeoutError:
        log.warning("not everything that waited was told within %g s", config.drain_timeout)
    for task in work:
        task.cancel()
    callbacks.close()
    try:
        async with asyncio.timeout_at(max(until, loop.time() + 0.1)):
            if webhook:
                await webhook.close()
            await store.stop()
    except TimeoutError:
        log.warning("the store did not settle in time")


async def close_door(server: http1.Server, listener: asyncio.Server, sock: socket.socket) -> None:
    """Take no new connection, but every one that was made; of a worker that stops alone, the parent keeps the rest."""
    await asyncio.sleep(HANDSHAKE)
    with contextlib.suppress(OSError):  # the kernel holds no more
        for _ in range(BACKLOG):  # at most: of a worker that stops alone, more may come without end
            queued, _ = sock.accept()
            await asyncio.get_running_loop().connect_accepted_socket(server, queued)
    listener.close()


def samples(
    store: dedup.Store,
    server: http1.Server,
    callbacks: reporter.Callbacks,
    client: outbound.Client,
    webhook: reporter.Webhook | None,
) -> dict[str, float]:
    """Return this process's numbers under the names of `admin.METRICS`, always the same ones in the same order."""
    answered = server.answered()
    at_once = sum(answered.values()) - sum(store.waits.counts)
    deliveries = webhook.outcomes if webhook else {}
    return {
        **{f'verve_requests_total{{status="{status}"}}': count for status, count in answered.items()},
        **histogram("verve_request_duration_seconds", store.waits, at_once),
        "verve_waiting_requests": store.queued,
        "verve_connections": server.served,
        'verve_ids_total{result="new"}': store.new,
        'verve_ids_total{result="duplicate"}': answered[200] - store.new,
        **histogram("verve_batch_ids", store.sizes),
        **histogram("verve_batch_duration_seconds", store.trips),
        **{
            f'verve_callbacks_total{{outcome="{outcome}"}}': callbacks.outcomes[outcome]
            for outcome in ("delivered", "failed", "refused", "dropped")
        },
        "verve_waiting_callbacks": client.pending,
        **{
            f'verve_webhook_deliveries_total{{outcome="{outcome}"}}': deliveries.get(outcome, 0)
            for outcome in ("delivered", "failed")
        },
        "verve_store_up": not store.obstacle,
    }


def histogram(name: str, of: dedup.Histogram, zeros: int = 0) -> dict[str, float]:
    """Return a histogram, and `zeros` more, as Prometheus has it: each bucket holds what is in those below it, too."""
    bounds = [*(f"{bound:g}" for bound in of.bounds), "+Inf"]
    sums = [zeros + sum_ for sum_ in accumulate(of.counts)]
    buckets = {f'{name}_bucket{{le="{bound}"}}': sum_ for bound, sum_ in zip(bounds, sums, strict=True)}
    return {**buckets, f"{name}_sum": of.sum, f"{name}_count": sums[-1]}


async def recent(store: dedup.Store, webhook: reporter.Webhook | None) -> list[dict[str, Any]] | None:
    """Return the last windows, newest first, and whether the webhook has each; None if the store can't be asked."""
    windows = await store.recent(admin.WINDOWS)
    delivered = await webhook.outbox.delivered() if webhook else lambda start: None
    if windows is None or delivered is None:
        return None
    open_window = windows[0][0]
    return [
        {
            "window": reporter.iso(start),
            "seconds": seconds,
            "count": count,
            "final": start != open_window,
            "delivered": delivered(start) if start != open_window or webhook is None else False,
        }
        for start, seconds, count in windows
    ]


def open_store(config: settings.Settings, resume: int = 0) -> dedup.Store:
    """Return the store that the settings name; `resume` is the start of the first window to tell, if one was left."""
    if config.redis_url is None:
        return dedup.MemoryStore(config.window, config.max_ids)
    return dedup.RedisStore(
        config.redis_url, config.key_prefix, config.window, config.max_ids, config.request_timeout, resume
    )


def open_webhook(config: settings.Settings, store: dedup.Store) -> reporter.Webhook | None:
    """Return what delivers the reports, if that is wanted."""
    url = receiver(config)
    if url is None:
        return None
    outbox = dedup.Outbox(store) if isinstance(store, dedup.RedisStore) else reporter.MemoryOutbox()
    return reporter.Webhook(url, config.report_secret, config.key_prefix, outbox)


def receiver(config: settings.Settings) -> outbound.Url | None:
    """Return where reports are POSTed."""
    return None if config.report_url is None else outbound.parse(config.report_url.encode("ascii"))


def teller(config: settings.Settings, worker: Worker, webhook: reporter.Webhook | None) -> Callable[..., None]:
    """Return what tells a window's count, if this worker speaks for the instance."""

    def tell(start: int, count: int, *, final: bool = True) -> None:
        if worker.number == 0:
            reporter.tell(start, count, final=final)
            if webhook and isinstance(webhook.outbox, reporter.MemoryOutbox):
                webhook.outbox.put(reporter.Report(reporter.iso(start), config.window, count, final))
            worker.untold[0] = start + 1  # for a successor

    return tell


def announce(config: settings.Settings, sock: socket.socket, operators: socket.socket | None) -> None:
    """Say where the instance listens, where it counts, and whom it tells."""
    if operators is not None:
        log.info("for operators: %s", url_of(operators))
    place = dedup.MemoryStore.place
    sinks = ["the log"]
    if config.redis_url is not None:
        place = dedup.place(config.redis_url)
        sinks.append(f"the stream {config.key_prefix}:reports")
    url = receiver(config)
    if url is not None:
        sinks.append(f"the webhook at {url.place}")
    workers = f" with {config.workers} workers" if config.workers > 1 else ""
    log.info(
        "listening on %s%s, counting in %s, windows of %d s, told to %s",
        url_of(sock),
        workers,
        place,
        config.window,
        " and ".join(filter(None, [", ".join(sinks[:-1]), sinks[-1]])),
    )


def on_signal(number: int, stop: "asyncio.Future[None]") -> None:
    """Ask the process to stop; the second time, end it."""
    if stop.done():
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        os._exit(128 + number)  # a container's first process, which the kernel spares its default signals
    else:
        stop.set_result(None)


def on_orphaned(pipe: int, sock: socket.socket, stop: "asyncio.Future[None]") -> None:
    """Stop a worker whose parent died."""
    asyncio.get_running_loop().remove_reader(pipe)
    log.error("the parent process is gone")
    refuse_new(sock)
    if not stop.done():
        stop.set_result(None)


def run(config: settings.Settings, sock: socket.socket, worker: Worker) -> int:
    """Run a serving process; return its exit status."""
    gc.collect()
    gc.freeze()
    try:
        uvloop.run(serve(config, sock, worker))
    except (dedup.StoreError, Unusable) as error:
        log.error("%s", error)
        return UNUSABLE
    return 0


class Parent:
    """Keeps `--workers` processes on one port.

    Each worker has a listening socket of its own on the port (SO_REUSEPORT), so that the kernel spreads the
    connections: of 64 opened at once, 29 to 35 for each of two, where one inherited socket gave 64 and 0, or 50 and 14.
    The parent made them all and keeps them open, so that what is queued for a worker that dies waits for its successor;
    none was lost in 60,000 connections while workers were killed, one way or the other. Workers that die are replaced,
    at once the first time, then after 0.1 s, doubling up to 5 s until one has lived for 10 s. Signals are passed on; if
    the parent is killed, the workers see their pipe close.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)

    def __init__(self, config: settings.Settings, socks: list[socket.socket], first: Worker) -> None:
        """`first` is what the first worker knows."""
        self.config = config
        self.socks = socks
        self.all = [*socks, first.operators] if first.operators is not None else socks
        self.pipe = os.pipe()
        self.first = replace(first, parent=self.pipe[0])
        self.workers: dict[int, tuple[int, float]] = {}  # pid: number, start
        self.due = dict.fromkeys(range(config.workers), 0.0)  # number: when to start it
        self.delays = dict.fromkeys(self.due, 0.0)  # number: seconds that its next successor has to wait
        self.stopping = False
        self.status = 0

    def run(self) -> int:
        """Run until stopped; return the exit status."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        try:
            asyncio.run(self.prepare())
        except (dedup.StoreError, Unusable) as error:
            log.error("%s", error)
            return UNUSABLE
        while self.workers or self.due:
            now = time.monotonic()
            for number in [number for number, at in self.due.items() if at <= now]:
                del self.due[number]
                self.start(number)
            wait = min((at - now for at in self.due.values()), default=3600.0)
            info = signal.sigtimedwait(self.signals, wait)
            if info is not None and info.si_signo != signal.SIGCHLD:
                self.stop()
            self.reap()
        return self.status

    async def prepare(self) -> None:
        """Wait for the store, see that it is of use, and open the port. Raises StoreError or Unusable, for them all."""
        store = open_store(self.config)
        if await store.start(STORE_WAIT):
            for start, count in await store.roll():  # windows that were left open: this has closed them
                reporter.tell(start, count)
        else:
            self.first = replace(self.first, patience=0.0)  # enough was waited
        await store.stop()
        listen(self.config, self.socks)
        announce(self.config, self.socks[0], self.first.operators)

    def stop(self) -> None:
        """Have the workers end and start no more; the second time, end them."""
        if not self.stopping:
            for sock in self.socks:  # and not each worker: if it is replaced, its successor has the same socket
                refuse_new(sock)
        for pid in self.workers:
            os.kill(pid, signal.SIGKILL if self.stopping else signal.SIGTERM)
        self.stopping = True
        self.due.clear()
        for sock in self.all:
            sock.close()

    def start(self, number: int) -> None:
        """Fork a worker."""
        pid = os.fork()
        if pid:
            self.workers[pid] = number, time.monotonic()
            return
        status = CRASHED
        try:
            os.setpgid(0, 0)  # Ctrl-C is for the parent, who passes it on
            os.close(self.pipe[1])
            worker = replace(self.first, number=number, operators=None if number else self.first.operators)
            for sock in self.all:
                if sock not in (self.socks[number], worker.operators):
                    sock.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            status = run(self.config, self.socks[number], worker)
        except BaseException:
            log.exception("worker %d failed", number)
        finally:
            os._exit(status)

    def reap(self) -> None:
        """See which workers have ended: they are replaced, but for one that found that none can work."""
        while self.workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            if pid not in self.workers:  # a child of whoever was this process before it ran Verve, or an orphan's
                continue
            number, since = self.workers.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code == UNUSABLE:
                self.status = code
                if not self.stopping:
                    self.stop()
            elif not self.stopping:
                log.error("worker %d ended with status %d and is replaced", number, code)
                now = time.monotonic()
                delay = 0.0 if now - since > 10 else self.delays[number]
                self.due[number] = now + delay
                self.delays[number] = min(5.0, 2 * delay + 0.1)
                self.first = replace(self.first, patience=STORE_WAIT)  # there may be a store by now


def open_standard_streams() -> None:
    """Open the standard streams that the process was started without, lest a socket take their place."""
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


def main() -> int:
    """Run the program; return its exit status."""
    open_standard_streams()
    config = settings.load(check_url=outbound.parse)
    limit = raise_file_limit()
    with contextlib.ExitStack() as opened:
        operators = None
        try:
            what = f"log to {config.log_file}"
            reporter.log_to(config.log_file, config.log_format, config.log_level)
            what = f"listen on {config.host} port {config.port}"
            socks = bind(opened, config.host, config.port, config.workers)
            if config.admin is not None:
                what = "listen on {} port {} (--admin)".format(*config.admin)
                (operators,) = bind(opened, *config.admin, 1)
                operators.listen(admin.CONNECTIONS)
        except OSError as error:
            print(f"verve_server.py: can't {what}: {error.strerror}", file=sys.stderr)
            return UNUSABLE
        most = max(1, limit // 2, limit - OTHER_FILES)
        if most <= config.max_connections // 2:
            log.warning("open files are limited to %d: at most %d connections are served", limit, most)
        config = replace(config, max_connections=min(most, config.max_connections))
        worker = Worker(admin.Board(config.workers), memoryview(mmap.mmap(-1, 8)).cast("q"), operators)
        return run(config, socks[0], worker) if config.workers == 1 else Parent(config, socks, worker).run()


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError):  # nobody reads the log any more: no reason to fail in the end
        sys.stderr.flush()
    os._exit(status)  # sys.exit would wait for the threads that look up names, and a resolver may hang
