"""The front door: settings in, parts wired, the one endpoint, listening, signals, drain.

    GET /api/verve/accept?id=INT

A request comes from `http1` as a method and a target, becomes an id here, goes to the store in `dedup`, and what
became of it selects an answer that was prepared beforehand. `reporter` rolls the windows and tells their counts.

The life of the process: the settings are read, or refused with exit status 2; the port is opened, or the process
ends with status 1 and a line that says why; it serves until SIGTERM or SIGINT; then it takes no new connection,
answers what was taken, tells what it has counted so far, and exits with status 0. A second signal ends it at once.
"""

import asyncio
import contextlib
import ctypes
import gc
import logging
import mmap
import os
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import uvloop

import dedup
import http1
import reporter
import settings

PATH = b"/api/verve/accept"
STORE_WAIT = 1.0  # seconds that the store is waited for before the first request is taken
UNUSABLE = 1  # exit status of a process that can't work with what it was told
CRASHED = 70  # exit status of a worker after an error of ours (EX_SOFTWARE of sysexits.h)
HANDSHAKE = 0.05  # seconds that a TCP handshake under way is given to end when the door closes
BACKLOG = 4096  # connections the kernel keeps while the loop is busy; it takes net.core.somaxconn if that is less

log = logging.getLogger("verve")

_integer = re.compile(rb"(-?)0*([0-9]{1,19})").fullmatch
_absolute = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://[^/?#]*").match  # RFC 9112, 3.2.2


class Endpoint:
    """The one endpoint: reads the request's target, has its id counted, chooses the answer."""

    plain = PATH + b"?id="

    def __init__(self, store: dedup.Store, answers: http1.Answers) -> None:
        self.add = store.add
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
            400, "Bad Request", "endpoint is not available: callbacks are not built yet"
        )

    def handle(self, method: bytes, target: bytes, connection: http1.Connection) -> http1.Answer | None:
        """Answer any request: find the id, count it."""
        digits = target.removeprefix(self.plain)
        if method == b"GET" and digits.isdigit() and len(digits) <= http1.MAX_DIGITS:
            outcome = self.add(int(digits), connection.later)
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
            name = unquote_to_bytes(name)
            if name == b"id":
                ids.append(unquote_to_bytes(value))
            elif name == b"endpoint":
                endpoints.append(unquote_to_bytes(value))
        number = integer(ids[0]) if len(ids) == 1 else None
        if number is None:
            return self._bad_id
        if endpoints:
            return self._bad_endpoint
        outcome = self.add(number, connection.later)
        return None if outcome is None else self.outcomes[outcome]


def integer(text: bytes) -> int | None:
    """Return the integer of signed 64 bits that `text` writes in ASCII digits, or None if it doesn't."""
    match = _integer(text)
    if match is None:
        return None
    number = int(match[1] + match[2])
    return number if -(2**63) <= number < 2**63 else None


def listen(host: str, port: int, workers: int) -> list[socket.socket]:
    """Return as many sockets that listen on one port. Raises OSError."""
    family, kind, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
    )[0]
    socks: list[socket.socket] = []
    with contextlib.ExitStack() as on_error:
        if workers > 1:  # a port that is shared is never taken, so try first without sharing
            with listen(host, port, 1)[0] as probe:
                address = probe.getsockname()
        for _ in range(workers):
            sock = on_error.enter_context(socket.socket(family, kind, proto))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if workers > 1:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
            socks.append(sock)
        on_error.pop_all()
    return socks


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


def take_queued(sock: socket.socket) -> list[socket.socket]:
    """Return the connections that the kernel holds for a listening socket."""
    queued = []
    with contextlib.suppress(OSError):
        while True:
            queued.append(sock.accept()[0])
    return queued


def url_of(sock: socket.socket) -> str:
    """Return the URL under which a listening socket is reached."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@dataclass(frozen=True)
class Worker:
    """What a process knows of the instance that it is a part of."""

    number: int = 0  # the first tells the windows' counts, once for the instance
    parent: int = -1  # end of a pipe that closes when the parent dies
    told: mmap.mmap | None = None  # from which window on the first's successor is to tell


async def serve(config: settings.Settings, sock: socket.socket, worker: Worker) -> None:
    """Serve on `sock` until a signal, then drain. Raises dedup.StoreError if the store can't be used."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number, stop)
    if worker.parent >= 0:
        loop.add_reader(worker.parent, on_orphaned, worker.parent, stop)

    store = open_store(config, worker)
    await store.start(STORE_WAIT)
    answers = http1.Answers()
    endpoint = Endpoint(store, answers)
    server = http1.Server(
        endpoint,
        answers,
        endpoint.outcomes,
        idle_timeout=config.idle_timeout,
        header_timeout=config.header_timeout,
        max_connections=config.max_connections,
    )
    door = sock.dup()
    listener = await loop.create_server(server, sock=sock, backlog=BACKLOG)
    tell = teller(worker)
    timer = asyncio.create_task(reporter.roll_windows(store.remaining, store.roll, tell))
    if config.workers == 1:
        announce(config, store.place, door)
    if worker.told is not None and not any(worker.told[:]):
        note_told(worker, store.window)

    failure = asyncio.create_task(store.failure())
    await asyncio.wait([stop, failure, timer], return_when=asyncio.FIRST_COMPLETED)
    for task in (failure, timer):
        if task.done():
            task.result()  # raises what is wrong: a process that can't count or can't report ends

    if worker.number == 0:
        log.info("stopping: answering what was taken, for at most %g s", config.drain_timeout)
    until = loop.time() + config.drain_timeout
    server.start_drain()
    refuse_new(door)
    await asyncio.sleep(HANDSHAKE)
    for queued in take_queued(door):
        await loop.connect_accepted_socket(server, queued)
    listener.close()
    door.close()
    cut = await server.drain(config.drain_timeout)
    if cut:
        log.warning("connections still open after %g s, and cut: %d", config.drain_timeout, cut)
    timer.cancel()
    try:
        async with asyncio.timeout_at(max(until, loop.time() + 0.1)):
            for start, count in await store.roll():
                tell(start, count)
            await store.stop()
    except TimeoutError:
        log.warning("the store did not settle in time")
    if config.redis_url is None:
        reporter.tell(store.window, store.count, final=False)


async def try_store(config: settings.Settings) -> None:
    """Raise dedup.StoreError if the store can't be used: said once, before there are workers to say it."""
    store = open_store(config, Worker())
    await store.start(STORE_WAIT)
    await store.stop()


def open_store(config: settings.Settings, worker: Worker) -> dedup.Store:
    """Return the store that the settings name."""
    if config.redis_url is None:
        return dedup.MemoryStore(config.window, config.max_ids)
    resume = int.from_bytes(worker.told[:], "little") if worker.told else 0
    return dedup.RedisStore(
        config.redis_url, config.key_prefix, config.window, config.max_ids, config.request_timeout, resume
    )


def teller(worker: Worker) -> Callable[[int, int], None]:
    """Return what tells a window's count: to the log, if this worker speaks for the instance."""

    def tell(start: int, count: int) -> None:
        if worker.number == 0:
            reporter.tell(start, count)
            note_told(worker, start + 1)

    return tell


def note_told(worker: Worker, start: int) -> None:
    """Leave word for a successor that the windows which start at `start` or later are to be told."""
    if worker.told is not None:
        worker.told[:] = start.to_bytes(len(worker.told), "little")


def announce(config: settings.Settings, place: str, sock: socket.socket) -> None:
    """Say where the instance listens, where it counts, and whom it tells."""
    sinks = "the log" if config.redis_url is None else f"the log and the stream {config.key_prefix}:reports"
    workers = f" with {config.workers} workers" if config.workers > 1 else ""
    log.info(
        "listening on %s%s, counting in %s, windows of %d s, told to %s",
        url_of(sock),
        workers,
        place,
        config.window,
        sinks,
    )


def on_signal(number: int, stop: "asyncio.Future[None]") -> None:
    """Ask the process to stop; the second time, end it."""
    if stop.done():
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    else:
        stop.set_result(None)


def on_orphaned(pipe: int, stop: "asyncio.Future[None]") -> None:
    """Stop a worker whose parent died."""
    asyncio.get_running_loop().remove_reader(pipe)
    log.error("the parent process is gone")
    if not stop.done():
        stop.set_result(None)


def run(config: settings.Settings, sock: socket.socket, worker: Worker) -> int:
    """Run a serving process; return its exit status."""
    gc.collect()
    gc.freeze()
    try:
        uvloop.run(serve(config, sock, worker))
    except dedup.StoreError as error:
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

    def __init__(self, config: settings.Settings, socks: list[socket.socket]) -> None:
        self.config = config
        self.socks = socks
        self.workers: dict[int, tuple[int, float]] = {}  # pid: number, start
        self.due: dict[int, float] = dict.fromkeys(range(config.workers), 0.0)  # number: when to start it
        self.delays: dict[int, float] = {}  # number: backoff
        self.told = mmap.mmap(-1, 8)
        self.pipe = os.pipe()
        self.status = 0

    def run(self) -> int:
        """Run until stopped; return the exit status."""
        signals = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        stopping = False
        while self.workers or not stopping:
            now = time.monotonic()
            for number in [] if stopping else [number for number, at in self.due.items() if at <= now]:
                del self.due[number]
                self.start(number)
            wait = max(0.0, min([3600.0, *(at - now for at in self.due.values())]))
            info = signal.sigtimedwait(signals, 3600.0 if stopping else wait)
            if info is not None and info.si_signo != signal.SIGCHLD:
                for pid in self.workers:
                    os.kill(pid, signal.SIGKILL if stopping else signal.SIGTERM)
                stopping = True
                for sock in self.socks:
                    sock.close()
            if self.reap(stopping) and not stopping:
                for pid in self.workers:
                    os.kill(pid, signal.SIGTERM)
                stopping = True
        return self.status

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
            for other, sock in enumerate(self.socks):
                if other != number:
                    sock.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            status = run(self.config, self.socks[number], Worker(number, self.pipe[0], self.told))
        except BaseException:
            log.exception("worker %d failed", number)
        finally:
            os._exit(status)

    def reap(self, stopping: bool) -> bool:
        """See which workers have ended; return whether one found that none can work."""
        unusable = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return unusable
            if not pid:
                return unusable
            number, since = self.workers.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code == UNUSABLE:
                self.status = code
                unusable = True
            elif not stopping:
                log.error("worker %d ended with status %d and is replaced", number, code)
                lived = time.monotonic() - since
                delay = 0.0 if lived > 10 else min(5.0, 2 * self.delays.get(number, 0.0) + 0.1)
                self.due[number] = time.monotonic() + (self.delays.get(number, 0.0) if lived <= 10 else 0.0)
                self.delays[number] = delay


def open_standard_streams() -> None:
    """Open the standard streams that the process was started without, lest a socket take their place."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:  # what Python makes of a closed one
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def main() -> int:
    """Run the program; return its exit status."""
    open_standard_streams()
    config = settings.load()
    try:
        what = f"log to {config.log_file}"
        reporter.log_to(config.log_file, config.log_format, config.log_level)
        what = f"listen on {config.host} port {config.port}"
        socks = listen(config.host, config.port, config.workers)
    except OSError as error:
        print(f"verve_server.py: can't {what}: {error.strerror}", file=sys.stderr)
        return UNUSABLE
    if config.workers == 1:
        return run(config, socks[0], Worker())
    try:
        asyncio.run(try_store(config))
    except dedup.StoreError as error:
        log.error("%s", error)
        return UNUSABLE
    announce(config, dedup.place(config.redis_url or ""), socks[0])
    return Parent(config, socks).run()


if __name__ == "__main__":
    status = main()
    try:
        sys.stderr.flush()
    except OSError:  # nobody reads the log any more: no reason to fail in the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(status)
