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
import os
import re
import signal
import socket
import struct
import sys
from urllib.parse import unquote_to_bytes

import uvloop

import dedup
import http1
import reporter
import settings

PATH = b"/api/verve/accept"
HANDSHAKE = 0.05  # seconds that a TCP handshake under way is given to end when the door closes
BACKLOG = 4096  # connections the kernel keeps while the loop is busy; it takes net.core.somaxconn if that is less

log = logging.getLogger("verve")

_integer = re.compile(rb"(-?)0*([0-9]{1,19})").fullmatch
_absolute = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://[^/?#]*").match  # RFC 9112, 3.2.2


class Endpoint:
    """The one endpoint: reads the request's target, has its id counted, chooses the answer."""

    plain = PATH + b"?id="

    def __init__(self, store: dedup.Store, answers: http1.Answers) -> None:
        self._add = store.add
        ok = answers.add(200, "OK", b"ok")
        full = answers.refuse(503, "Service Unavailable", "the window holds as many ids as allowed", Retry_After="1")
        # What became of an id selects the answer.
        self.outcomes = {dedup.NEW: ok, dedup.DUPLICATE: ok, dedup.FULL: full}
        self._not_found = answers.refuse(404, "Not Found", f"expected the path {PATH.decode()}")
        self._not_allowed = answers.refuse(405, "Method Not Allowed", "expected GET or HEAD", Allow="GET, HEAD")
        self._bad_id = answers.refuse(400, "Bad Request", "expected one id, an integer of signed 64 bits")
        self._bad_endpoint = answers.refuse(
            400, "Bad Request", "endpoint is not available: callbacks are not built yet"
        )

    def accept(self, digits: bytes, connection: http1.Connection) -> http1.Answer | None:
        """Count the id that `digits` write."""
        if len(digits) > 18:  # maybe more than 64 bits, and more than int() should be asked to read
            return self.handle(b"GET", self.plain + digits, connection)
        outcome = self._add(int(digits), connection.later)
        return None if outcome is None else self.outcomes[outcome]

    def handle(self, method: bytes, target: bytes, connection: http1.Connection) -> http1.Answer | None:
        """Answer any request: find the id, count it."""
        if method == b"GET" and target.startswith(self.plain):
            digits = target[len(self.plain) :]
            if digits.isdigit() and len(digits) <= 18:
                return self.accept(digits, connection)
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
        outcome = self._add(number, connection.later)
        return None if outcome is None else self.outcomes[outcome]


def integer(text: bytes) -> int | None:
    """Return the integer of signed 64 bits that `text` writes in ASCII digits, or None if it doesn't."""
    match = _integer(text)
    if match is None:
        return None
    number = int(match[1] + match[2])
    return number if -(2**63) <= number < 2**63 else None


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError."""
    family, kind, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
    )[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


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


async def serve(config: settings.Settings, sock: socket.socket) -> None:
    """Serve on `sock` until a signal, then drain."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number, stop)

    store = dedup.MemoryStore(config.window, config.max_ids)
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
    timer = asyncio.create_task(reporter.roll_windows(store.remaining, store.roll))
    log.info("listening on %s, counting in memory, windows of %d s, told to the log", url_of(door), config.window)

    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait([waiting, timer], return_when=asyncio.FIRST_COMPLETED)
    if timer.done():
        timer.result()  # an error of ours; it ends the process rather than leave it counting without reports

    log.info("stopping: answering what was taken, for at most %g s", config.drain_timeout)
    server.start_drain()
    refuse_new(door)
    await asyncio.sleep(HANDSHAKE)
    for queued in take_queued(door):
        await loop.connect_accepted_socket(server, queued)
    listener.close()
    door.close()
    cut = await server.drain(config.drain_timeout)
    if cut:
        log.warning("cut %d connections that were still open after %g s", cut, config.drain_timeout)
    timer.cancel()
    for start, count in store.roll():
        reporter.tell(start, count)
    reporter.tell(store.window, store.count, final=False)
    await store.stop()


def on_signal(number: int, stop: asyncio.Event) -> None:
    """Ask the process to stop; the second time, end it."""
    if stop.is_set():
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    stop.set()


def open_standard_streams() -> None:
    """Open the standard streams that the process was started without, lest a socket take their place."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def main() -> int:
    """Run the program; return its exit status."""
    open_standard_streams()
    config = settings.load()
    try:
        reporter.log_to(config.log_file, config.log_format, config.log_level)
        sock = listen(config.host, config.port)
    except OSError as error:
        print(f"verve_server.py: {error}", file=sys.stderr)
        return 1
    gc.freeze()
    uvloop.run(serve(config, sock))
    return 0


if __name__ == "__main__":
    sys.exit(main())
