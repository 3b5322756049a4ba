"""Several processes on one port: the listening sockets, the parent, and what a worker knows of its place.

The parent opens the sockets, forks a worker for each, and serves nobody itself. It watches: a worker that ends is
replaced, and so is one that hangs; signals are passed on. What the workers do, and what must be done before the
first of them is started, comes in as callables. With `--workers 1` there is no parent: the process that was started
serves, on a socket that is opened here too.

The sockets. Each worker has one of its own on the port (SO_REUSEPORT), so that the kernel spreads the connections: of
64 opened at once, 29 to 35 for each of two, where one inherited socket gave 64 and 0, or 50 and 14. The parent keeps
all of them open. So connections that the kernel holds for a worker that dies wait for its successor, which has the
same socket: none was lost in 60,000 connections while workers were killed.

Death. A worker that ends is replaced at once the first time, then after 0.1 s, doubling up to 5 s, until one has lived
for 10 s. A worker that ends with UNUSABLE has found that none can work: then all end. If the parent is killed, each
worker sees the parent's pipe close, and stops.

Hanging. Each worker raises a number in shared memory as long as its event loop turns. The parent compares it once a
tick. A worker whose number has not changed for `timeout` seconds of ticks is killed, then replaced. The parent counts
ticks that it went through, and not the time between two of them: after the machine was suspended, or the parent was
stopped, a single tick has passed, whatever the clock says.
"""

import asyncio
import contextlib
import ctypes
import logging
import math
import mmap
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

UNUSABLE = 1  # exit status of a process that can't work with what it was told; none of its siblings can
UNSETTLED = 3  # exit status of a process that was stopped, and can't vouch for all that it took
CRASHED = 70  # exit status of a worker after an error of ours (EX_SOFTWARE of sysexits.h)
BACKLOG = 4096  # connections the kernel keeps while the loop is busy; it takes net.core.somaxconn if that is less
HANDSHAKE = 0.05  # seconds that a TCP handshake under way is given to end when the door closes
RESTARTS = (0.1, 5.0)  # seconds before a worker is replaced, from the second time on: the first pause, the longest
SETTLED = 10.0  # seconds after which a worker counts as one that works: its successor starts at once
TICK = 1.0  # seconds between two signs of life, and between two looks at them; a tenth of a shorter timeout

log = logging.getLogger("verve")


class Unusable(Exception):  # noqa: N818 - what it is that can't be done, not an error in doing it
    """The program can't do what it is told to."""


# The listening sockets


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


def refuse_new(sock: socket.socket) -> None:
    """Have the kernel drop the SYNs that come to a listening socket, so that no new connection begins.

    A listening socket that is closed resets the connections it has not handed over, whose clients may have sent a
    request. With this before it, a short wait for the handshakes under way, and the queue emptied, none is left to
    be reset. A client whose SYN is dropped tries again after a second, and is refused. Socket filters are of Linux;
    elsewhere nothing is done.
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


async def close_door(
    protocol: Callable[[], asyncio.Protocol], listener: asyncio.Server, sock: socket.socket, *, alone: bool
) -> None:
    """Take every connection that was made, and no new one.

    `alone`: nobody else has refused the new ones. Of a worker that is stopped by itself, the others come to its
    successor, which has the same socket.
    """
    if alone:
        refuse_new(sock)
    await asyncio.sleep(HANDSHAKE)
    with contextlib.suppress(OSError):  # the kernel holds no more
        for _ in range(BACKLOG):  # at most: to a worker that stops by itself, more may come without end
            queued, _ = sock.accept()
            await asyncio.get_running_loop().connect_accepted_socket(protocol, queued)
    listener.close()


def url_of(sock: socket.socket) -> str:
    """Return the URL under which a listening socket is reached."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# The service manager


def notify(address: str, state: str) -> None:
    """Tell systemd, or whoever listens at NOTIFY_SOCKET, a state of the service (sd_notify(3)); "" is nobody."""
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)  # it may be busy: the next state is told all the same
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.send(state.encode("ascii"))


# One worker


def shared(count: int) -> memoryview:
    """Return `count` integers, 0 at first, that a process shares with those that it forks."""
    return memoryview(mmap.mmap(-1, 8 * count)).cast("q")


@dataclass(frozen=True)
class Worker:
    """What a serving process knows of its place in the instance. The only one of an instance has no parent."""

    sock: socket.socket  # the public one, bound
    operators: socket.socket | None = None  # the operators' listener, which all workers have
    number: int = 0  # the first speaks for the instance
    parent: int = -1  # end of a pipe that closes when the parent dies; -1 without a parent
    patient: bool = True  # the store is worth waiting for before the first request is taken
    beats: memoryview = field(default_factory=lambda: shared(1))  # signs of life, by number
    beat: float = TICK  # seconds between two of them
    stopping: memoryview = field(default_factory=lambda: shared(1))  # 1 when the instance is about to stop
    restarts: memoryview = field(default_factory=lambda: shared(1))  # workers that were replaced so far
    manager: str = ""  # where the service manager listens; of a worker without a parent

    async def show_life(self) -> None:
        """Give signs of life, for ever: to the parent, or without one to the service manager."""
        while True:
            self.beats[self.number] += 1
            notify(self.manager, "WATCHDOG=1")
            await asyncio.sleep(self.beat)

    def name_lines(self) -> None:
        """Have what this process logs name it, but for a window's count, which is the instance's."""

        def name(record: logging.LogRecord) -> bool:
            if "window" not in record.__dict__:
                record.msg = f"worker {self.number + 1}: {record.msg}"
            return True

        for handler in logging.getLogger().handlers:
            handler.addFilter(name)


# The parent


class Watch:
    """Finds the workers that hang, by the signs of life that they gave between one tick and the next."""

    def __init__(self, beats: Sequence[int] | memoryview, timeout: float) -> None:
        """`beats` are the signs of life so far, by the worker's number; `timeout` is in seconds."""
        self.tick = min(TICK, timeout / 10)
        self._beats = beats
        self._most = math.ceil(timeout / self.tick)  # ticks without a sign of life, of which the first may be cut short
        self._seen = list(beats)
        self._silent = [0] * len(self._seen)  # ticks since there was one
        self._looked = -math.inf

    def start(self, number: int) -> None:
        """Begin anew with a worker: it was just started."""
        self._silent[number] = 0

    def hanging(self, now: float) -> list[int]:
        """Return the workers that hang by now, a monotonic time: none before a tick has passed."""
        if now - self._looked < self.tick:
            return []
        self._looked = now
        for number, beats in enumerate(self._beats):
            self._silent[number] = self._silent[number] + 1 if beats == self._seen[number] else 0
            self._seen[number] = beats
        return [number for number, silent in enumerate(self._silent) if silent > self._most]


@dataclass
class Child:
    """What the parent knows of a worker that runs."""

    number: int
    started: float  # monotonic
    killed: bool = False  # it was, since it hung


class Parent:
    """Keeps a worker at each of several sockets."""

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGALRM)

    def __init__(
        self,
        socks: list[socket.socket],
        operators: socket.socket | None,
        prepare: Callable[[], bool],
        serve: Callable[[Worker], int],
        *,
        timeout: float,
        delay: float,
        manager: str = "",
    ) -> None:
        """`prepare` is called before the first worker is started; it returns whether a worker is to be patient.

        `serve` is what a worker does; it returns the exit status. `timeout` are the seconds after which a worker that
        gives no sign of life is killed, `delay` those that all go on serving after a signal. `manager` is where the
        service manager listens.
        """
        self.socks = socks
        self.prepare = prepare
        self.serve = serve
        self.timeout = timeout
        self.delay = delay
        self.manager = manager
        self.pipe = os.pipe()
        beats = shared(len(socks))
        self.watch = Watch(beats, timeout)
        self.first = Worker(socks[0], operators, parent=self.pipe[0], beats=beats, beat=self.watch.tick)
        self.children: dict[int, Child] = {}  # by pid
        self.due = dict.fromkeys(range(len(socks)), 0.0)  # number: when to start it
        self.pauses = dict.fromkeys(self.due, 0.0)  # number: seconds that its next successor has to wait
        self.stops = math.inf  # when the workers are told to stop
        self.stopping = False
        self.status = 0

    def run(self) -> int:
        """Run until stopped; return the exit status."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        try:
            self.first = replace(self.first, patient=self.prepare())
        except Unusable as error:
            log.error("%s", error)
            return UNUSABLE
        notify(self.manager, "READY=1")
        while self.children or self.due:
            notify(self.manager, "WATCHDOG=1")
            now = time.monotonic()
            for number in [number for number, at in self.due.items() if at <= now]:
                del self.due[number]
                self.start(number)
            until = min([now + self.watch.tick, math.inf if self.stopping else self.stops, *self.due.values()])
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, until - now))
            # Not sigtimedwait: of a process that was stopped for longer than that, Python returns a signal at random.
            if signal.sigwait(self.signals) in (signal.SIGTERM, signal.SIGINT):
                self.on_signal()
            self.reap()
            self.kill_hanging()
            if not self.stopping and time.monotonic() >= self.stops:
                self.stop()
        return self.status

    def on_signal(self) -> None:
        """Stop after `delay`; the second time, end the workers at once."""
        if self.stopping or self.stops < math.inf:
            self.stop(signal.SIGKILL)
            return
        notify(self.manager, "STOPPING=1")
        self.stops = time.monotonic() + self.delay
        self.first.stopping[0] = 1
        if self.delay:
            log.info("stopping: connections are taken for %g s more", self.delay)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Have the workers end, and start no more."""
        if not self.stopping:
            for sock in self.socks:  # and not each worker: if it is replaced, its successor has the same socket
                refuse_new(sock)
        for pid in self.children:
            os.kill(pid, number)
        self.stopping = True
        self.due.clear()
        for sock in self.socks:
            sock.close()
        if self.first.operators is not None:
            self.first.operators.close()

    def start(self, number: int) -> None:
        """Fork a worker."""
        self.watch.start(number)
        pid = os.fork()
        if pid:
            self.children[pid] = Child(number, time.monotonic())
            return
        status = CRASHED
        try:
            os.setpgid(0, 0)  # Ctrl-C is for the parent, who passes it on
            os.close(self.pipe[1])
            worker = replace(self.first, number=number, sock=self.socks[number])
            for sock in self.socks:
                if sock is not worker.sock:
                    sock.close()
            worker.name_lines()
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            status = self.serve(worker)
        except BaseException:
            log.exception("failed")
        finally:
            os._exit(status)

    def kill_hanging(self) -> None:
        """Kill the workers that give no sign of life; `reap` will find that they have ended."""
        hanging = self.watch.hanging(time.monotonic())
        for pid, child in self.children.items():
            if child.number in hanging and not child.killed:
                child.killed = True
                what = "killed" if self.stopping else "killed and replaced"
                log.error("worker %d gave no sign of life for %g s: it is %s", child.number + 1, self.timeout, what)
                os.kill(pid, signal.SIGKILL)

    def reap(self) -> None:
        """See which workers have ended: they are replaced, but for one that found that none can work."""
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            child = self.children.pop(pid, None)
            if child is None:  # a child of whoever was this process before it ran Verve, or an orphan's
                continue
            code = os.waitstatus_to_exitcode(status)
            if code == UNSETTLED and self.stopping:
                self.status = code
            if code == UNUSABLE:
                self.status = code
                if not self.stopping:
                    self.stop()
            elif not self.stopping:
                if not child.killed:
                    log.error("worker %d ended with status %d and is replaced", child.number + 1, code)
                self.first.restarts[0] += 1
                self.schedule(child, time.monotonic())

    def schedule(self, child: Child, now: float) -> None:
        """Have the successor of a worker that has ended started, at once or after a pause."""
        pause = 0.0 if now - child.started > SETTLED else self.pauses[child.number]
        self.due[child.number] = now + pause
        first, longest = RESTARTS
        self.pauses[child.number] = min(longest, 2 * pause + first)
        self.first = replace(self.first, patient=True)  # there may be a store by now
