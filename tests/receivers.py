"""A small HTTP/1.1 server that callbacks and reports are sent to: keeps what came, and answers as it is told.

    with receivers.Receiver() as receiver:
        ...  # a URL: f"{receiver.url}/seen"
        (request,) = receiver.wait_for(1)

It has a thread for each connection, and can be stopped and started again on the same port.
"""

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BufferedReader
from typing import NamedTuple, Self

import servers

DEADLINE = 30.0  # seconds; a guard, never a measure
RESET = -1  # in place of a status: no answer, but a reset
HANG = -2  # no answer until `release`, then 200


@dataclass
class Answer:
    """What a request is answered with."""

    status: int = 200
    fields: tuple[str, ...] = ()
    raw: bytes = b""  # instead of all that


class Request(NamedTuple):
    """A request, as read from the wire. Field names are in lower case."""

    head: str
    method: str
    target: str
    fields: dict[str, str]
    body: bytes
    time: float  # monotonic


@dataclass
class Receiver:
    """The server. `answers` are for the next requests, `default` is for all others."""

    host: str = "127.0.0.1"
    default: Answer = field(default_factory=Answer)
    answers: deque[Answer] = field(default_factory=deque)
    requests: list[Request] = field(default_factory=list)
    connections: int = 0  # accepted so far
    port: int = 0

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._released = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self.stop()

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self.port = self.port or servers.free_port()  # not one of the system's choice: while it is away, others take it
        self._listener = socket.create_server((self.host, self.port), family=family, backlog=256)
        self._run(self._accept, self._listener)

    def stop(self) -> None:
        """Close the port, and all connections as soon as what came is answered."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._changed:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RD)
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.join(DEADLINE)

    def release(self) -> None:
        """Answer what hangs."""
        self._released.set()

    def wait_until(self, true: Callable[[list[Request]], object], what: str) -> list[Request]:
        """Return the requests as soon as something is true of them."""
        with self._changed:
            there = self._changed.wait_for(lambda: true(self.requests), DEADLINE)
            found = list(self.requests)
        assert there, f"waited for {what}, got {[(request.method, request.target, request.body) for request in found]}"
        return found

    def wait_for(self, count: int) -> list[Request]:
        """Return the requests as soon as there are `count`."""
        return self.wait_until(lambda requests: len(requests) >= count, f"{count} requests")

    def _run(self, work: Callable[[socket.socket], None], sock: socket.socket) -> None:
        thread = threading.Thread(target=work, args=(sock,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.settimeout(DEADLINE)
            with self._changed:
                self.connections += 1
                self._open.add(sock)
            self._run(self._serve, sock)
            if self._listener is not listener:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RD)

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock.makefile("rb") as lines:
            while request := _read(lines):
                with self._changed:
                    self.requests.append(request)
                    answer = self.answers.popleft() if self.answers else self.default
                    self._changed.notify_all()
                if answer.status == RESET:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    break
                if answer.status == HANG:
                    self._released.wait(DEADLINE)
                fields = "".join(f"{line}\r\n" for line in answer.fields)
                status = 200 if answer.status == HANG else answer.status
                length = "" if status == 204 else "Content-Length: 0\r\n"
                sock.sendall(answer.raw or f"HTTP/1.1 {status} Told\r\n{length}{fields}\r\n".encode())
                if answer.raw:
                    break
        with self._changed:
            self._open.discard(sock)
        sock.close()


def _read(lines: BufferedReader) -> Request | None:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = lines.readline()
        if not line:
            return None
        head += line
    start, *rest = head[:-4].decode("latin-1").split("\r\n")
    method, target, version = start.split(" ")
    assert version == "HTTP/1.1", start
    fields: dict[str, str] = {}
    for text in rest:
        name, _, value = text.partition(": ")
        assert name.lower() not in fields, text
        fields[name.lower()] = value
    body = lines.read(int(fields.get("content-length", "0")))
    return Request(head.decode("latin-1"), method, target, fields, body, time.monotonic())
