"""Broken days of the whole program: clocks that jump, a process that is suspended, receivers that attack.

What single parts make of such things is tested with each of them; here it is the service as a user runs it, looked at
from outside, and what its log may hold. Days on which Redis or the network break are in `soak.py` and `fleet.py`.
"""

import base64
import contextlib
import itertools
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import fleet
import pytest
import servers
import support
import trustme
from receivers import Answer, Receiver

ENGINE = next(iter(servers.ENGINES))


# Clocks that are set


def libfaketime() -> Path:
    support.need("faketime", "faketime")
    places = Path("/usr").glob("lib*/faketime/libfaketime.so.1"), Path("/usr").glob("lib/*/faketime/libfaketime.so.1")
    return next(itertools.chain(*places))


def forget_killed() -> None:
    """Remove what libfaketime shared in programs that were killed: one that gets such a program's pid can't start."""
    for file in Path("/dev/shm").glob("*faketime_*_*"):
        if not Path("/proc", file.name.rpartition("_")[2]).exists():
            file.unlink(missing_ok=True)


class SetClock:
    """The wall clock of a program: right, until it is set wrong by some seconds."""

    def __init__(self, folder: Path) -> None:
        forget_killed()
        self._file = folder / "clock"
        self.set(0)
        self.prefix = (
            "env",
            f"LD_PRELOAD={libfaketime()}",
            f"FAKETIME_TIMESTAMP_FILE={self._file}",
            "FAKETIME_NO_CACHE=1",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
        )

    def set(self, wrong_by: int) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(f"{wrong_by:+d}\n")
        new.rename(self._file)


def windows(lines: list[str]) -> list[tuple[int, int]]:
    """Return start and count of every window in a log."""
    found = [match.groups() for line in lines if (match := re.search(r"unique ids in (\S+): ([0-9]+)", line))]
    return [(fleet.start_of(window), int(count)) for window, count in found]


def assert_follow(told: list[tuple[int, int]], seconds: int) -> None:
    starts = [start for start, _ in told]
    assert starts == [*range(starts[0], starts[-1] + 1, seconds)]


def test_a_clock_set_forward_and_back_by_an_hour_in_memory(tmp_path: Path) -> None:
    clock = SetClock(tmp_path)
    seconds = 120
    with support.verve("--window", str(seconds), prefix=clock.prefix) as program:
        with support.Client(program.address) as client:
            assert client.ask(support.accept(1)).body == b"ok"
            clock.set(3600)
            program.log.wait_until(lambda lines: len(windows(lines)) >= 3600 // seconds or None, "an hour of windows")
            assert client.ask(support.accept(2)).body == b"ok"
            clock.set(-3600)
            for number in 2, 3, 2:
                assert client.ask(support.accept(number)).body == b"ok"
        assert program.stop() == 0
    told = windows(program.log.all)
    assert_follow(told, seconds)
    assert (told[0][1], told[-1][1]) == (1, 2), "the open window stays open until the clock has passed its end"
    assert sum(count for _, count in told) == 3


def test_a_clock_set_forward_and_back_by_an_hour_with_redis(tmp_path: Path) -> None:
    """It is not asked: the time is Redis's."""
    clock = SetClock(tmp_path)
    with servers.Redis(ENGINE) as server:
        with (
            support.verve("--redis-url", server.url, "--window", "1", prefix=clock.prefix) as program,
            support.Client(program.address) as client,
        ):
            numbers = itertools.count()
            for wrong_by in 0, 3600, -3600, 0:
                clock.set(wrong_by)
                seen = len(windows(program.log.all))
                while len(windows(program.log.all)) < seen + 2:
                    assert client.ask(support.accept(next(numbers))).body == b"ok"
            sent = next(numbers)
            program.log.wait_for("unique ids in", len(program.log.all))
        told = [(fleet.start_of(window), count) for window, count in server.reports().items()]
    assert_follow(told, 1)
    assert sum(count for _, count in told) == sent
    assert abs(told[-1][0] - time.time()) < 60


def test_a_process_suspended_over_the_ends_of_windows() -> None:
    """In memory; with Redis it is a scenario of fleet.py."""
    with support.verve("--window", "1") as program, support.Client(program.address) as client:
        assert client.ask(support.accept(1)).body == b"ok"
        program.freeze()
        client.send(support.accept(2))
        until = time.time() + 2.5
        while time.time() < until:
            time.sleep(until - time.time())
        program.thaw()
        assert client.receive()[0].body == b"ok"
        client.close()
        assert program.stop() == 0
    told = windows(program.log.all)
    assert_follow(told, 1)
    assert len(told) >= 3
    assert sum(count for _, count in told) == 2


# Receivers that attack


Attack = Callable[[socket.socket], None]
SHOT = b"\x1b[31mZq7zQ"  # what no log is to repeat


def endless(start: bytes, more: bytes, pause: float = 0.0) -> Attack:
    def attack(sock: socket.socket) -> None:
        sock.sendall(start)
        while True:
            sock.sendall(more)
            time.sleep(pause)

    return attack


def each(answer: bytes) -> Attack:
    """Answer every request so."""

    def attack(sock: socket.socket) -> None:
        sock.sendall(answer)
        while sock.recv(65536):
            sock.sendall(answer)

    return attack


def garbage(sock: socket.socket) -> None:
    sock.sendall(SHOT + os.urandom(1000))


def as_tls(sock: socket.socket) -> None:
    """With a certificate that nobody vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    context.wrap_socket(sock, server_side=True).recv(1000)


ATTACKS: dict[str, tuple[str, Attack, str]] = {  # scheme, what is done, what is said of it
    "fields without end": ("http", endless(b"HTTP/1.1 200 OK\r\n", b"X: " + 1000 * b"y" + b"\r\n"), "head is over"),
    "a line without end": ("http", endless(b"HTTP/1.1 200 ", 1000 * b"y"), "head is over"),
    "a body without end": ("http", endless(b"HTTP/1.1 500 Oh\r\n\r\n", 65536 * b"y"), "status 500"),
    "chunks without end": (
        "http",
        endless(b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\ny\r\n"),
        "status 500",
    ),
    "interim answers without end": ("http", endless(b"", 100 * b"HTTP/1.1 100 Continue\r\n\r\n"), "head is over"),
    "a drip": ("http", endless(b"HTTP/1.1 200 OK\r\nX: ", b"y", 0.05), "no response within"),
    "silence": ("http", each(b""), "no response within"),
    "garbage": ("http", garbage, "not HTTP/1.1"),
    "garbage for TLS": ("https", garbage, "TLS failed"),
    "a certificate of nobody": ("https", as_tls, "TLS failed: CERTIFICATE_VERIFY_FAILED"),
    "a line for the log": (
        "http",
        each(b"HTTP/1.1 500 Zq7zQ ERROR verve:\r\nRetry-After: Zq7zQ" + b"\r\nContent-Length: 0\r\n\r\n"),
        "status 500",
    ),
}


@contextlib.contextmanager
def attacker(attack: Attack) -> Iterator[int]:
    """Do an attack to all who come to a port, for as long as they stay and the block runs."""
    over = threading.Event()
    threads: list[threading.Thread] = []

    def fight(sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            sock.settimeout(support.DEADLINE)
            if attack is not as_tls:
                sock.recv(65536)
            attack(sock)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while not over.is_set():
                sock, _ = listener.accept()
                threads.append(threading.Thread(target=fight, args=(sock,), daemon=True))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads.append(threading.Thread(target=accept, daemon=True))
        threads[0].start()
        yield listener.getsockname()[1]
        over.set()
        listener.shutdown(socket.SHUT_RDWR)


def memory_of(pid: int) -> int:
    """Return the bytes that a process has in memory."""
    match = re.search(r"VmRSS:\s+([0-9]+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1]) * 1024


def ask_with(number: int, endpoint: str) -> bytes:
    return support.get(f"{support.PATH}?id={number}&endpoint={quote(endpoint, safe='')}")


EACH = 20  # callbacks for each attacker


@pytest.mark.parametrize("style", ["text", "json"])
def test_receivers_that_attack_harm_nobody_else(style: str) -> None:
    """All at once: answers come, the callbacks of a good receiver do, nothing grows, and the log repeats nothing."""
    password, secret = "hunter2", base64.b64encode(bytes(32)).decode()
    flags = ["--window", "86400", "--callback-allow", "127.0.0.0/8", "--drain-timeout", "3", "--report-secret", secret]
    flags += ["--log-level", "debug", "--log-format", style]
    with contextlib.ExitStack() as stack:
        good = stack.enter_context(Receiver())
        ports = {name: stack.enter_context(attacker(attack)) for name, (_, attack, _) in ATTACKS.items()}
        places = {name: f"{scheme}://127.0.0.1:{ports[name]}" for name, (scheme, _, _) in ATTACKS.items()}
        webhook = f"http://user:{password}@127.0.0.1:{ports['a line for the log']}/{password}"
        talkative = support.patched("reporter.LINES = 10**6; outbound.EXCHANGE_TIME = 2.0")
        program = stack.enter_context(support.verve(*flags, "--report-url", webhook, prefix=talkative))
        client = stack.enter_context(support.Client(program.address))
        assert client.ask(ask_with(-1, good.url)).body == b"ok"
        good.wait_for(1)
        before = memory_of(program.pid)
        numbers = itertools.count()
        for _ in range(EACH):
            for place in (*places.values(), good.url):
                assert client.ask(ask_with(next(numbers), f"{place}/{password}")).body == b"ok"
        good.wait_for(1 + EACH)
        for name, (_, _, said) in ATTACKS.items():
            program.log.wait_for(f"callback to {places[name]} failed: .*{said}")
        assert client.ask(support.accept(next(numbers))).body == b"ok"
        assert memory_of(program.pid) - before < 50_000_000
        client.close()
        assert program.stop() == 0
        lines = program.log.all
        assert all(line.isprintable() for line in lines)
        assert not any(word in line for word in ("Zq7zQ", password, secret) for line in lines)


def test_a_resolver_that_lies_leads_nowhere_else() -> None:
    """Rebinding: a name has an allowed address when it is looked up first, then a forbidden one, or both."""
    answers = [["127.0.0.2"], ["127.0.0.1"], ["127.0.0.1", "127.0.0.2"], ["::1"], ["127.0.0.2", "::ffff:127.0.0.1"]]
    resolver = "\n".join(
        [
            "import itertools",
            f"answers = itertools.cycle({answers})",
            "outbound.resolve = lambda host: [outbound.ip_address(text) for text in next(answers)]",
            "outbound.LOOKUP_TIME = -1.0",
            "reporter.LINES = 1000",
        ]
    )
    with contextlib.ExitStack() as stack:
        allowed = stack.enter_context(Receiver("127.0.0.2", default=Answer(200, ("Connection: close",))))
        inside = [stack.enter_context(Receiver(host, port=allowed.port)) for host in ("127.0.0.1", "::1")]
        flags = "--window", "86400", "--callback-allow", "127.0.0.2", "--log-level", "debug"
        program = stack.enter_context(support.verve(*flags, prefix=support.patched(resolver)))
        with support.Client(program.address) as client:
            for number in range(10):
                assert client.ask(ask_with(number, f"http://rebound.test:{allowed.port}/")).body == b"ok"
                program.log.wait_until(
                    lambda lines: sum("callback to" in line for line in lines) > number or None,  # noqa: B023
                    "what became of the callback",
                )
        assert program.stop() == 0
        outcomes = [re.sub(".*callback to [^ ]+ ?", "", line) for line in program.log.all if "callback to" in line]
        refused = "refused: the host has no address that may be reached"
        assert outcomes == ["status 200", refused, "status 200", refused, "status 200"] * 2, outcomes
        assert [receiver.connections for receiver in inside] == [0, 0]
