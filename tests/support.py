r"""The real program, started for a test, and a plain HTTP client over a raw socket.

    with support.verve("--window", "1") as program, support.Client(program.address) as client:
        assert client.ask(support.accept(7)).status == 200
        program.log.wait_for(r"unique ids in \S+: 1$")

The program runs as a user runs it: a process of its own, on a free port, with its log on a pipe that a thread reads
line by line. Whatever a test waits for (a line, bytes of a socket, the end of the process) comes as an event, and
DEADLINE only guards against what never comes: nothing here measures time. A process is ended by the pid that was
started, and a log that holds a traceback or a warning fails the test that made it.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import IO, NamedTuple, Self, TypeVar

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / "verve_server.py"
PATH = "/api/verve/accept"
DEADLINE = 30.0  # seconds; far beyond what even a busy machine needs

Address = tuple[str, int]
Found = TypeVar("Found")

UNWANTED = re.compile(r"Traceback|Exception ignored|Task was destroyed|\w+Warning:")


class Lines:
    """The lines of a pipe as they come; `all` grows while the other end writes."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self.all: list[str] = []
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def _read(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                with self._changed:
                    self.all.append(line.decode("utf-8", "backslashreplace").removesuffix("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait_until(self, find: Callable[[list[str]], Found | None], what: str) -> Found:
        """Return what `find` finds in the lines, as soon as it does."""
        with self._changed:
            self._changed.wait_for(lambda: find(self.all) is not None or self._over, DEADLINE)
            found = find(self.all)
        assert found is not None, f"{'ended' if self._over else 'waited'} without {what}"
        return found

    def wait_for(self, pattern: str, start: int = 0) -> re.Match[str]:
        """Return the first match of a regular expression in a line, of those from number `start` on."""
        return self.wait_until(
            lambda lines: next(filter(None, (re.search(pattern, line) for line in lines[start:])), None),
            f"a line that matches {pattern!r}",
        )

    def join(self) -> list[str]:
        """Return all lines; to be called when the other end is closed, or about to be."""
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "the pipe is still open"
        return self.all


class Program:
    """A running verve_server.py."""

    def __init__(self, flags: Sequence[str], prefix: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [*prefix, *command(*flags)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.pid = self.process.pid
        self.out = Lines(self.process.stdout)
        self.log = Lines(self.process.stderr)
        self.url = ""
        self.address: Address = ("", 0)

    def listening(self, line: str) -> None:
        """Take the address from the line that tells it."""
        match = re.search(r"listening on (http://\[?([^\s\]]+)\]?:([0-9]+))(?=[,\s])", line)
        assert match, line
        self.url = match[1]
        self.address = match[2], int(match[3])

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def freeze(self) -> None:
        """Stop the process in its tracks, until `thaw`; the kernel goes on taking connections and bytes for it."""
        self.send(signal.SIGSTOP)
        pid, status = os.waitpid(self.pid, os.WUNTRACED)
        assert pid == self.pid
        assert os.WIFSTOPPED(status)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def wait(self) -> int:
        """Return the exit status, negative for a signal, when the process has ended."""
        status = self.process.wait(DEADLINE)
        self.log.join()
        self.out.join()
        return status

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.send(number)
        return self.wait()

    def end(self) -> None:
        """End the process, if it still runs, without asking."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


def need(tool: str, package: str) -> None:
    """Fail, and say what to install, where a tool is missing: a test that is skipped hides what was not tried."""
    if shutil.which(tool) is None:
        pytest.fail(f"{tool} is not installed: apt-get install {package}", pytrace=False)


def command(*flags: str) -> list[str]:
    """Return the command line that starts the program on a free port, without the operators' listener."""
    return [sys.executable, str(SERVER), "--port", "0", "--admin", "off", *flags]


def environment() -> dict[str, str]:
    """Return the environment of the tests, less what would be settings, with Python's warnings on."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VERVE_", "REDIS_"))}
    return {**kept, "PYTHONWARNINGS": "default", "PYTHONDONTWRITEBYTECODE": "1"}


def patched(statements: str) -> tuple[str, ...]:
    """Return the words before the command line with which the program begins by carrying out `statements`.

    They see all its modules, and are for constants that would make a test long, or a resolver that must not be asked.
    """
    start = f"import sys, runpy; sys.argv = sys.argv[2:]; sys.path.insert(0, {str(ROOT)!r})"
    modules = "import dedup, outbound, redis_store, reporter"
    return (
        sys.executable,
        "-c",
        f"{start}; {modules}\n{statements}\nrunpy.run_path({str(SERVER)!r}, run_name='__main__')",
    )


@contextlib.contextmanager
def verve(*flags: str, prefix: Sequence[str] = (), log_file: Path | None = None) -> Iterator[Program]:
    """Run the program while the block runs, then stop it with SIGTERM, unless the block has ended it.

    `prefix` are words before the command line. With `log_file` the program logs there and not to stderr.
    """
    program = Program([*flags, "--log-file", str(log_file)] if log_file else flags, prefix)
    try:
        if log_file:
            program.listening(wait_in(log_file, "listening on .*"))
        else:
            program.listening(program.log.wait_for("listening on .*")[0])
        yield program
        if program.process.poll() is None:
            assert program.stop() == 0
        program.wait()
        for line in program.log.all + (log_file.read_text().splitlines() if log_file else []):
            assert not UNWANTED.search(line), line
        assert program.out.all == []
    except BaseException as error:
        program.end()
        error.add_note("\n".join(["the program's stderr:", *program.log.all]))
        raise
    finally:
        program.end()


def run(*flags: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run the program until it ends by itself."""
    return subprocess.run(
        [*prefix, *command(*flags)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=environment(),
        check=False,
    )


def wait_in(file: Path, pattern: str) -> str:
    """Return the first match of a regular expression in a file that another process appends whole lines to.

    A file tells nobody that it grows. `tail` is told by the kernel, where that can be had, and looks again and again
    where not; and it follows the name.
    """
    tail = subprocess.Popen(
        ["tail", "-n", "+1", "-s", "0.1", "-F", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert tail.stdout is not None
    lines = Lines(tail.stdout)
    try:
        return lines.wait_for(pattern)[0]
    finally:
        tail.kill()
        tail.wait()
        lines.join()


def wait_for_port(port: int) -> None:
    """Wait until somebody listens on a port; who does tells nobody."""
    until = time.monotonic() + DEADLINE
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        assert time.monotonic() < until, f"nobody listens on port {port}"
        time.sleep(0.005)


class Response(NamedTuple):
    """One response, as read from the wire. Field names are in lower case."""

    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def closes(self) -> bool:
        """Whether it says that it is the connection's last."""
        return self.fields.get("connection") == "close"


class Client:
    """One connection, blocking. Reads answers by their framing and never more than was asked for."""

    def __init__(self, address: Address) -> None:
        self.socket = socket.create_connection(address, DEADLINE)
        self._read: BufferedReader = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._read.close()
        self.socket.close()

    def send(self, *requests: bytes | memoryview) -> None:
        """Send bytes, all in one piece."""
        self.socket.sendall(b"".join(requests))

    def receive(self, count: int = 1, *, head: bool = False) -> list[Response]:
        """Read exactly `count` responses; `head` if they answer HEAD and so have no body."""
        return [self._receive(head) for _ in range(count)]

    def ask(self, request: bytes, *, head: bool = False) -> Response:
        """Send one request and read its response."""
        self.send(request)
        return self._receive(head)

    def receive_all(self) -> list[Response]:
        """Read responses until the peer shuts its side."""
        found = []
        while self._read.peek(1):
            found.append(self._receive(head=False))
        return found

    def rest(self) -> bytes:
        """Read until the peer shuts its side. Raises ConnectionResetError if it does so by force."""
        return self._read.read()

    def _receive(self, head: bool) -> Response:
        start, *lines = self._head().decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 ([1-5][0-9][0-9]) [ -~]+", start)
        assert match, start
        fields: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(": ")
            assert colon, line
            assert name.lower() not in fields, line
            fields[name.lower()] = value
        status = int(match[1])
        length = 0 if head or status < 200 else int(fields["content-length"])
        body = self._read.read(length)
        assert len(body) == length, "closed amid a body"
        return Response(status, fields, body)

    def _head(self) -> bytes:
        head = bytearray()
        while not head.endswith(b"\r\n\r\n"):
            line = self._read.readline()
            assert line, f"closed after {bytes(head)!r}, expected a whole response head"
            head += line
        return bytes(head[:-4])


def get(target: str, *fields: str, version: str = "1.1") -> bytes:
    """Return a GET request with a Host and `fields`."""
    return "\r\n".join([f"GET {target} HTTP/{version}", "Host: verve.test", *fields, "", ""]).encode("latin-1")


def accept(number: int, *fields: str, version: str = "1.1") -> bytes:
    """Return the request that has an id counted."""
    return get(f"{PATH}?id={number}", *fields, version=version)
