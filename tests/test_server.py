"""What an operator and a client see of the program itself: starting, counting for real, logging, stopping.

Every test runs the real thing in a process of its own and talks to it over real sockets.
"""

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import servers
import support
from support import PATH, Client, Program, accept, get, verve

import settings

# A window in the log, as text and, after `stopped`, one that went on without the process.
COUNT = re.compile(r"unique ids in (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ): (\d+)( \(not final\b.*\))?$")
TEXT_LINE = re.compile(r"\S+ (?:DEBUG|INFO|WARNING|ERROR) [a-z.]+: [ -~]+")

DAY = ("--window", "86400")  # for tests that send an id twice, lest a window end between

QUIET = 0.3  # seconds; after a pause this long a stopping server may well have closed an idle connection


def epoch(window: str) -> int:
    return int(datetime.strptime(window, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())


def counts(lines: list[str]) -> list[tuple[int, int]]:
    """Start and count of every window in the log, the last one included that was not final."""
    return [(epoch(match[1]), int(match[2])) for line in lines if (match := COUNT.search(line))]


def assert_contiguous(windows: list[tuple[int, int]], seconds: int) -> None:
    starts = [start for start, _ in windows]
    assert starts
    assert starts == list(range(starts[0], starts[-1] + 1, seconds))
    assert starts[0] % seconds == 0


def assert_partial(program: Program, count: int | None = None) -> None:
    """The log ends in the count of the window that the process did not live to see closed, and only there."""
    matches = [match for line in program.log.all if (match := COUNT.search(line))]
    assert COUNT.search(program.log.all[-1]), program.log.all[-1]
    assert [bool(match[3]) for match in matches] == [False] * (len(matches) - 1) + [True]
    if count is not None:
        assert sum(int(match[2]) for match in matches) == count


def windows_seen(program: Program, number: int) -> None:
    """Wait until `number` windows stand in the log."""
    program.log.wait_until(lambda lines: True if len(counts(lines)) >= number else None, f"{number} windows")


def failed_to_start(result: subprocess.CompletedProcess[str], status: int) -> str:
    """The one line that says why nothing was started."""
    assert result.returncode == status
    assert result.stdout == ""
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("verve_server.py: ")
    return result.stderr.removeprefix("verve_server.py: ").strip()


def refused(address: support.Address) -> bool:
    """Whether a connection is turned away, rather than taken or reset."""
    try:
        socket.create_connection(address, support.DEADLINE).close()
    except ConnectionRefusedError:
        return True
    return False


# Starting


def test_the_first_line_tells_address_store_window_and_sinks() -> None:
    with verve("--window", "90") as program:
        line = program.log.all[0]
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9][0-9]*", program.url)
        assert TEXT_LINE.fullmatch(line)
        for word in (program.url, "memory", "90 s", "log"):
            assert word in line
        assert len(program.log.all) == 1


def test_requests_are_answered_as_the_contract_says() -> None:
    curl = ("User-Agent: curl/8.5.0", "Accept: */*")
    with verve(*DAY) as program, Client(program.address) as client:
        answer = client.ask(accept(7, *curl))
        assert (answer.status, answer.body) == (200, b"ok")
        assert answer.fields["content-type"] == "text/plain; charset=utf-8"
        assert answer.fields["content-length"] == "2"
        assert "date" in answer.fields
        assert "connection" not in answer.fields
        for target, status in (
            (f"{PATH}?id=007", 200),
            (f"{PATH}?id=%37", 200),
            (f"{PATH}?id=-5", 200),
            (f"{PATH}?id={2**63 - 1}&other=1", 200),
            (f"{PATH}?id={-(2**63)}", 200),
            (f"{PATH}?id={2**63}", 400),
            (f"{PATH}?id={-(2**63) - 1}", 400),
            (f"{PATH}?id=1&id=1", 400),
            (f"{PATH}?id=", 400),
            (f"{PATH}?id=+5", 400),
            (f"{PATH}?id=1.0", 400),
            (f"{PATH}?id=1_000", 400),
            (f"{PATH}?id=%207", 400),
            (f"{PATH}?id=%D9%A1", 400),
            (PATH, 400),
            ("/", 404),
        ):
            answer = client.ask(get(target, *curl))
            assert (answer.status, answer.body) == (status, b"ok" if status == 200 else b"failed"), target
            assert ("verve-error" in answer.fields) == (status != 200)
        answer = client.ask(accept(8).replace(b"GET", b"POST", 1))
        assert (answer.status, answer.body) == (405, b"failed")
        assert "GET" in answer.fields["allow"]
        assert client.ask(accept(9).replace(b"GET", b"HEAD", 1), head=True).status == 200
        assert client.ask(accept(9)).status == 200
        client.close()
        program.stop()
        assert_partial(program, 5)  # 7, -5, 9 and the ends of 64 bits


@pytest.mark.parametrize("seconds", [7, 60, 86400])
def test_windows_are_named_by_their_aligned_start(seconds: int) -> None:
    before = time.time()
    with verve("--window", str(seconds)) as program:
        program.stop()
        after = time.time()
        start, count = counts(program.log.all)[-1]
        assert count == 0
        assert start % seconds == 0
        assert before - seconds < start <= after
        assert_partial(program, 0)


def test_ipv6() -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
    with verve("--host", "::1") as program:
        assert program.url == f"http://[::1]:{program.address[1]}"
        with Client(program.address) as client:
            assert client.ask(accept(1)).body == b"ok"


def test_a_variable_is_read_and_a_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = support.environment()
    monkeypatch.setattr(support, "environment", lambda: {**kept, "VERVE_WINDOW": "86400", "VERVE_LOG_FORMAT": "json"})
    with verve("--log-format", "text") as program:
        assert "86400 s" in program.log.all[0]
        assert TEXT_LINE.fullmatch(program.log.all[0])


# Not starting


def test_help() -> None:
    result = support.run("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "--max-connections" in result.stdout


def test_version() -> None:
    result = support.run("--version", "--no-such-flag")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"verve {settings.VERSION}\n", "")


@pytest.mark.parametrize("flags", [("--windows", "60"), ("--window", "0"), ("--workers", "2")])
def test_a_bad_flag_is_named_in_one_line(flags: tuple[str, ...]) -> None:
    assert flags[0] in failed_to_start(support.run(*flags), 2)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "in use" in failed_to_start(support.run("--port", port, "--log-format", "json"), 1)
        # The same when the log goes to a file: whoever started it looks at the terminal.
        assert "in use" in failed_to_start(support.run("--port", port, "--log-file", str(tmp_path / "log")), 1)


def test_two_servers_do_not_share_a_port() -> None:
    with verve() as program, Client(program.address) as client:
        failed_to_start(support.run("--port", str(program.address[1])), 1)
        assert client.ask(accept(1)).status == 200


def test_a_port_that_may_not_be_had() -> None:
    """One below 1024, for who is not root; root is taken the right to it."""
    prefix = ["setpriv", "--bounding-set=-net_bind_service"] if os.geteuid() == 0 else []
    line = failed_to_start(support.run("--port", "1", prefix=prefix), 1)
    assert line == "can't listen on 127.0.0.1 port 1: Permission denied"


@pytest.mark.parametrize("host", ["fe80::1%nosuchif", "192.0.2.1"])
def test_a_host_that_is_none_of_ours(host: str) -> None:
    """A name that no name server is asked for, so that nothing leaves this machine; and an address of others."""
    failed_to_start(support.run("--host", host), 1)


def test_a_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "verve.log"
    assert str(missing) in failed_to_start(support.run("--log-file", str(missing)), 1)
    assert str(tmp_path) in failed_to_start(support.run("--log-file", str(tmp_path)), 1)
    assert list(tmp_path.iterdir()) == []


# Counting for real


def test_windows_of_a_second() -> None:
    with verve("--window", "1") as program, Client(program.address) as client:
        sent = 0
        while len(counts(program.log.all)) < 2:  # over the edges, one request after the other
            assert client.ask(accept(-1000 + sent)).body == b"ok"
            sent += 1
        program.log.wait_for(r"unique ids in \S+: 0$", start=len(program.log.all))
        # What comes in one piece is counted in one window, and there once.
        seen = len(program.log.all)
        client.send(*[accept(7, "X-Twice: yes")] * 5)
        assert [answer.body for answer in client.receive(5)] == [b"ok"] * 5
        program.log.wait_for(r"unique ids in \S+: 1$", start=seen)
        # An id that was seen in another window is new.
        assert client.ask(accept(7)).body == b"ok"
        client.close()
        program.stop()
        assert_contiguous(counts(program.log.all), 1)
        assert_partial(program, sent + 2)
        for line in program.log.all:
            assert TEXT_LINE.fullmatch(line)
            if COUNT.search(line):
                assert re.search(r" INFO verve\.reporter: unique ids in ", line)


def test_windows_as_json() -> None:
    with verve("--window", "1", "--log-format", "json") as program, Client(program.address) as client:
        program.log.wait_for('"count"')  # just after an edge
        client.send(accept(1), accept(2), accept(1))
        client.receive(3)
        program.log.wait_for('"count": 2')
        client.close()
        program.stop()
        lines = [json.loads(line) for line in program.log.all]
    windows = []
    for line in lines:
        assert {"time", "level", "logger", "message"} <= line.keys()
        assert line["level"] == "info"
        logged = datetime.fromisoformat(line["time"])
        assert logged.utcoffset() is not None
        if "window" not in line:
            assert "count" not in line
            continue
        # `final` is the one field that section 6 does not name: it tells a partial count from a whole one.
        assert line.keys() - {"final"} == {"time", "level", "logger", "message", "window", "count"}
        assert line["logger"] == "verve.reporter"
        assert isinstance(line["count"], int)
        assert line["message"].startswith(f"unique ids in {line['window']}: {line['count']}")
        assert COUNT.search(line["message"])
        assert logged.timestamp() >= epoch(line["window"]) + (1 if line["final"] else 0)
        assert line["final"] == ("not final" not in line["message"])
        windows.append((epoch(line["window"]), line["count"]))
    assert_contiguous(windows, 1)
    assert sum(count for _, count in windows) == 2
    assert [line["final"] for line in lines if "window" in line] == [True] * (len(windows) - 1) + [False]


def test_at_most_max_ids_in_a_window() -> None:
    with verve("--window", "1", "--max-ids", "3") as program, Client(program.address) as client:
        windows_seen(program, 1)
        client.send(*map(accept, [1, 2, 3, 4, 1, 5]))  # one piece, one window
        answers = client.receive(6)
        assert [answer.status for answer in answers] == [200, 200, 200, 503, 200, 503]
        for answer in answers:
            if answer.status == 503:
                assert answer.body == b"failed"
                assert re.fullmatch("[1-9][0-9]*", answer.fields["retry-after"])
                assert not answer.closes
        program.log.wait_for(r": 3$")
        client.send(*map(accept, [4, 5, 1, 6]))
        assert [answer.status for answer in client.receive(4)] == [200, 200, 200, 503]
        client.close()
        program.stop()
        assert_partial(program, 6)


# Connections


def test_max_connections() -> None:
    with verve("--max-connections", "2") as program, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(Client(program.address)) for _ in range(2))
        assert first.ask(accept(1)).status == 200
        assert second.ask(accept(2)).status == 200
        for _ in range(3):
            with Client(program.address) as third:
                answer = third.ask(accept(3))
                assert (answer.status, answer.body, answer.closes) == (503, b"failed", True)
                assert "retry-after" in answer.fields
                assert third.rest() == b""
        assert first.ask(accept(4)).status == 200
        assert second.ask(accept(5)).status == 200
        first.send(accept(6, "Connection: close"))
        assert first.receive()[0].closes
        assert first.rest() == b""
        first.close()
        # The server learns of it at some time soon; until then a place is not free.
        deadline = time.monotonic() + support.DEADLINE
        status = 503
        while status == 503 and time.monotonic() < deadline:
            with Client(program.address) as third:
                status = third.ask(accept(7)).status
        assert status == 200
        second.close()
        program.stop()
        assert_partial(program, 6)


def test_keep_alive_of_http_1_0_as_ab_asks_for_it() -> None:
    fields = ("User-Agent: ApacheBench/2.3", "Accept: */*")
    with verve() as program, Client(program.address) as client:
        for number in range(100):
            answer = client.ask(accept(number, "Connection: Keep-Alive", *fields, version="1.0"))
            assert (answer.status, answer.body) == (200, b"ok")
            assert answer.fields["connection"].lower() == "keep-alive"
            assert answer.fields["content-length"] == "2"
        client.send(accept(100, *fields, version="1.0"))
        assert client.receive()[0].body == b"ok"
        assert client.rest() == b""
        client.close()
        program.stop()
        assert_partial(program, 101)


def test_ab() -> None:
    support.need("ab", "apache2-utils")
    with verve(*DAY) as program:
        for flags in (["-k"], []):
            result = subprocess.run(
                ["ab", *flags, "-q", "-c", "8", "-n", "2000", f"{program.url}{PATH}?id=1"],
                capture_output=True,
                text=True,
                timeout=support.DEADLINE,
                check=True,
            )
            report = dict(re.findall(r"^([A-Z][^:\n]+):\s+(\S+)", result.stdout, re.MULTILINE))
            assert report["Complete requests"] == "2000", result.stdout
            assert report["Failed requests"] == "0", result.stdout
            assert "Non-2xx responses" not in report, result.stdout
            assert report.get("Keep-Alive requests") == ("2000" if flags else None), result.stdout
        program.stop()
        assert_partial(program, 1)


# Stopping


class Load:
    """Many clients at once, each sending one request after the other as fast as they are answered.

    Every id is sent once. What an answer tells is kept: `counted` are the ids that were answered `ok`.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.counted: set[int] = set()
        self.lost: list[str] = []
        self.refused = 0
        self.enough = asyncio.Event()
        self.stop_after = 0
        self.stopped = float("inf")  # loop time at which the signal was sent
        self._ids = itertools.count()

    async def keep_alive(self, batch: int) -> None:
        """Send requests on one connection, `batch` at a time in one piece, until an answer says that it closes."""
        reader, writer = await asyncio.open_connection(*self.program.address)
        with contextlib.closing(writer):
            while await self._exchange(reader, writer, batch):
                pass
            assert await reader.read() == b""

    async def anew(self) -> None:
        """Send each request on a connection of its own, until one is refused."""
        for flags in itertools.cycle([("Connection: close",), ()]):
            try:
                reader, writer = await asyncio.open_connection(*self.program.address)
            except ConnectionRefusedError:
                self.refused += 1
                return
            with contextlib.closing(writer):
                await self._exchange(reader, writer, 1, *flags)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, batch: int, *fields: str
    ) -> bool:
        """Send `batch` requests and take their answers; return whether the connection goes on."""
        numbers = list(itertools.islice(self._ids, batch))
        sent = asyncio.get_running_loop().time()
        writer.write(b"".join(accept(number, *fields) for number in numbers))
        for number in numbers:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                body = await reader.readexactly(2)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                # A connection that was idle until after the quiet time is rightly closed.
                if sent < self.stopped + QUIET:
                    self.lost.append(f"{number} of {numbers}: {error!r}")
                return False
            assert head.startswith("HTTP/1.1 200 ")
            assert body == b"ok"
            self.counted.add(number)
            if len(self.counted) >= self.stop_after:
                self.enough.set()
            if "Connection: close" in head:
                # The requests behind it were sent before it came, in one piece with it.
                assert number == numbers[-1]
                return False
        return True

    async def run(self, number: signal.Signals, stop_after: int, idle: int) -> None:
        """Load the program; send it the signal after `stop_after` answers; return when every client has ended."""
        self.stop_after = stop_after
        loop = asyncio.get_running_loop()
        quiet = [await asyncio.open_connection(*self.program.address) for _ in range(idle)]
        async with asyncio.timeout(support.DEADLINE), asyncio.TaskGroup() as group:
            for batch in [1] * 24 + [2, 5, 16, 50]:
                group.create_task(self.keep_alive(batch))
            for _ in range(8):
                group.create_task(self.anew())
            await self.enough.wait()
            self.stopped = loop.time()
            self.program.send(number)
            for reader, _ in quiet:  # those that never sent anything are closed, not reset
                assert await reader.read() == b""
        for _, writer in quiet:
            writer.close()
            await writer.wait_closed()


@pytest.mark.parametrize(
    ("number", "stop_after", "window", "idle"),
    [
        (signal.SIGTERM, 400, 60, 0),
        (signal.SIGTERM, 1200, 60, 4),
        (signal.SIGTERM, 2500, 1, 0),
        (signal.SIGTERM, 3300, 1, 0),
        (signal.SIGTERM, 4100, 1, 4),
        (signal.SIGINT, 3000, 1, 0),
    ],
)
def test_stopping_under_load_loses_nothing(number: signal.Signals, stop_after: int, window: int, idle: int) -> None:
    with verve("--window", str(window), "--drain-timeout", "20") as program:
        load = Load(program)
        asyncio.run(load.run(number, stop_after, idle))
        assert program.wait() == 0
        assert load.lost == []
        assert load.refused == 8
        assert len(load.counted) >= stop_after
        assert_partial(program, len(load.counted))
        assert_contiguous(counts(program.log.all), window)
        assert not [line for line in program.log.all if "WARNING" in line]


def test_connections_that_the_kernel_holds_are_answered() -> None:
    """A frozen process is a busy one: connections and requests that come meanwhile wait in the kernel."""
    with verve() as program, contextlib.ExitStack() as stack:
        old = [stack.enter_context(Client(program.address)) for _ in range(10)]
        for number, client in enumerate(old):
            assert client.ask(accept(number)).status == 200
        program.freeze()
        new = [stack.enter_context(Client(program.address)) for _ in range(40)]
        for number, client in enumerate(old + new):
            client.send(accept(100 + number))
        program.send(signal.SIGTERM)
        program.thaw()
        for client in old + new:
            assert client.receive()[0].body == b"ok"
            assert client.rest() == b""
            client.close()
        assert program.wait() == 0
        assert_partial(program, 60)


@pytest.mark.parametrize("fields", [(), ("Connection: close",)])
def test_a_lone_connection_that_the_kernel_holds_is_answered(fields: tuple[str, ...]) -> None:
    with verve() as program:
        program.freeze()
        with Client(program.address) as client:
            client.send(accept(1, *fields))
            program.send(signal.SIGTERM)
            program.thaw()
            assert client.receive()[0].body == b"ok"
            assert client.rest() == b""
        assert program.wait() == 0
        assert_partial(program, 1)


@pytest.mark.skipif(not hasattr(socket, "TCP_DEFER_ACCEPT"), reason="needs a way to hold back a handshake's end")
def test_a_handshake_under_way_is_not_reset() -> None:
    """To a client far away it is a connection as soon as the SYN-ACK is there; its own ACK arrives later.

    A Linux client that asks for it sends that ACK with the request, so here it can be sent as late as over a network.
    """
    trip = 0.01  # seconds
    lost: list[str] = []
    counted: set[int] = set()

    async def ask(number: int, address: support.Address) -> bool:
        """Send a request a while after the connection is there; return whether it was refused."""
        loop = asyncio.get_running_loop()
        with socket.socket() as far:
            far.setblocking(False)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
            try:
                await loop.sock_connect(far, address)
            except ConnectionRefusedError:
                return True
            connected = loop.time()
            await asyncio.sleep(trip)
            took = loop.time() - connected
            try:
                await loop.sock_sendall(far, accept(number))
                if (await loop.sock_recv(far, 1000)).startswith(b"HTTP/1.1 200 "):
                    counted.add(number)
                    return False
                lost.append("closed")
            except ConnectionError as error:
                lost.append(repr(error))
            if took > 4 * trip:
                lost.pop()  # this machine was too busy, and the server may have given up waiting
        return False

    async def main(program: Program) -> None:
        asking: list[asyncio.Task[bool]] = []
        async with asyncio.timeout(support.DEADLINE):
            while not any(task.done() and task.result() for task in asking):
                asking.append(asyncio.create_task(ask(len(asking), program.address)))
                if len(asking) == 50:
                    program.send(signal.SIGTERM)
                await asyncio.sleep(trip / 5)
            await asyncio.gather(*asking)

    with verve() as program:
        asyncio.run(main(program))
        assert program.wait() == 0
        assert lost == []
        assert len(counted) >= 40
        assert_partial(program, len(counted))


def test_an_open_request_may_end_and_no_new_connection_begins() -> None:
    request = accept(5)
    with verve(*DAY, "--drain-timeout", "20") as program, Client(program.address) as client:
        client.send(accept(4), request[:30])
        client.receive()
        program.send(signal.SIGTERM)
        program.log.wait_for("stopping")
        # One that is established as the door closes is still answered; the next is refused.
        for _ in range(3):
            try:
                with Client(program.address) as late:
                    assert late.ask(accept(4)).body == b"ok"
            except ConnectionRefusedError:
                break
        assert refused(program.address)
        client.send(request[30:])
        answer = client.receive()[0]
        assert (answer.body, answer.closes) == (b"ok", True)
        assert client.rest() == b""
        client.close()
        assert program.wait() == 0
        assert_partial(program, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_connection_gets_one_more_answer(number: signal.Signals) -> None:
    for _ in range(5):
        with verve() as program, Client(program.address) as client:
            assert client.ask(accept(1)).status == 200
            sent = time.monotonic()
            program.send(number)
            program.log.wait_for("stopping")
            with contextlib.suppress(BrokenPipeError):
                client.send(accept(2))
            if time.monotonic() - sent > QUIET:
                continue  # this machine was too busy: the connection may have been closed by now
            answer = client.receive()[0]
            assert (answer.status, answer.body) == (200, b"ok")
            assert answer.closes
            assert client.rest() == b""
            client.close()
            assert program.wait() == 0
            assert_partial(program, 2)
            return
    pytest.fail("this machine is too busy to tell")


def test_idle_connections_are_closed_and_not_cut() -> None:
    with verve(*DAY, "--drain-timeout", "20") as program, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(program.address)) for _ in range(6)]
        for client in clients[:3]:
            assert client.ask(accept(1)).status == 200
        program.send(signal.SIGTERM)
        for client in clients:
            assert client.rest() == b""
            client.close()
        assert program.wait() == 0
        assert not [line for line in program.log.all if "WARNING" in line]
        assert_partial(program, 1)


def test_a_client_that_reads_late_gets_an_answer_for_what_was_counted() -> None:
    """It has sent as much as the kernel holds; what is not taken any more is not answered, and not counted."""
    requests = [accept(number) for number in range(100_000, 112_000)]
    size = len(requests[0])
    data = memoryview(b"".join(requests))
    with verve("--drain-timeout", "20") as program, Client(program.address) as client:
        program.freeze()
        client.socket.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < len(data):
                sent += client.socket.send(data[sent:])
        client.socket.settimeout(support.DEADLINE)
        program.send(signal.SIGTERM)
        program.thaw()
        program.log.wait_for("stopping")
        client.send(data[sent : sent + -sent % size])  # the end of the last request
        answers = client.receive_all()
        client.close()
        assert {answer.body for answer in answers} == {b"ok"}
        assert not any(answer.closes for answer in answers[:-1])
        assert answers[-1].closes or len(answers) == -(-sent // size)
        assert program.wait() == 0
        assert_partial(program, len(answers))


def test_a_half_sent_request_does_not_hold_up_the_stop() -> None:
    with verve("--drain-timeout", "0.5", "--header-timeout", "3600") as program, Client(program.address) as client:
        client.send(accept(1), accept(2)[:30])
        client.receive()
        assert program.stop() == 0
        assert_partial(program, 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)],
)
def test_a_second_signal_ends_it_at_once(first: signal.Signals, second: signal.Signals) -> None:
    with (
        verve("--drain-timeout", "3600", "--header-timeout", "3600") as program,
        Client(program.address) as client,
    ):
        client.send(accept(1), accept(2)[:30])
        client.receive()
        program.send(first)
        program.log.wait_for("stopping")
        assert program.stop(second) == -second


def test_a_second_signal_ends_the_first_process_of_a_container() -> None:
    """The kernel keeps signals that are not caught from process 1 of a PID namespace, its own ones too."""
    with (
        verve(
            *("--drain-timeout", "3600", "--header-timeout", "3600"),
            prefix=support.patched("import signal; signal.raise_signal = lambda number: None"),
        ) as program,
        Client(program.address) as client,
    ):
        client.send(accept(1), accept(2)[:30])
        client.receive()
        program.send(signal.SIGTERM)
        program.log.wait_for("stopping")
        assert program.stop() == 128 + signal.SIGTERM


def test_ctrl_c_amid_the_imports_ends_it_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "import sys, time\nprint('importing', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
    (tmp_path / "uvloop.py").write_text(slow)
    kept = support.environment()
    monkeypatch.setattr(support, "environment", lambda: {**kept, "PYTHONPATH": str(tmp_path)})
    program = Program([], [])
    program.log.wait_for("importing")
    assert program.stop(signal.SIGINT) == -signal.SIGINT
    assert program.log.all == ["importing"]


# Streams and the log


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_closed_streams(closed: str) -> None:
    with verve(prefix=["sh", "-c", f'exec "$@" {closed}', "sh"]) as program, Client(program.address) as client:
        assert client.ask(accept(1)).body == b"ok"
        client.close()
        assert program.stop() == 0
        assert_partial(program, 1)


def test_nobody_reads_the_log() -> None:
    """As when it is piped into `head`, or into a collector that died."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        support.command("--window", "1"), stdin=subprocess.DEVNULL, stderr=writer, env=support.environment()
    )
    try:
        os.close(writer)
        with open(reader, "rb") as log:
            match = re.search(rb"listening on http://127\.0\.0\.1:([0-9]+)", log.readline())
            assert match
        with Client(("127.0.0.1", int(match[1]))) as client:
            deadline = time.monotonic() + 1.5  # at least one window is told to nobody
            while time.monotonic() < deadline:
                assert client.ask(accept(1)).body == b"ok"
        process.terminate()
        assert process.wait(support.DEADLINE) == 0
    finally:
        process.kill()
        process.wait()


def test_no_stderr_at_all(tmp_path: Path) -> None:
    file = tmp_path / "verve.log"
    prefix = ["sh", "-c", 'exec "$@" 2>&-', "sh"]
    with verve("--window", "1", prefix=prefix, log_file=file) as program, Client(program.address) as client:
        assert client.ask(accept(1)).body == b"ok"
        client.close()
        assert program.stop() == 0
        assert sum(count for _, count in counts(file.read_text().splitlines())) == 1


def test_a_log_file_survives_logrotate(tmp_path: Path) -> None:
    file, old = tmp_path / "verve.log", tmp_path / "verve.log.1"
    with verve("--window", "1", log_file=file) as program, Client(program.address) as client:
        assert client.ask(accept(1)).status == 200
        support.wait_in(file, r"unique ids in \S+: 1$")
        file.rename(old)
        assert client.ask(accept(2)).status == 200
        support.wait_in(file, r"unique ids in \S+: 1$")
        moved = old.read_text().splitlines()
        client.close()
        assert program.stop() == 0
        assert old.read_text().splitlines() == moved
        lines = file.read_text().splitlines()
        assert "listening on" in moved[0]
        assert COUNT.search(lines[0])
        windows = counts(moved + lines)
        assert_contiguous(windows, 1)
        assert sum(count for _, count in windows) == 2
        assert program.log.all == []


def test_a_log_file_survives_being_truncated(tmp_path: Path) -> None:
    """What logrotate calls copytruncate."""
    file = tmp_path / "verve.log"
    file.write_text("what stood there before\n")
    with verve("--window", "1", log_file=file) as program:
        assert file.read_text().startswith("what stood there before\n")
        support.wait_in(file, r"unique ids in \S+: 0$")
        file.write_text("")
        support.wait_in(file, r"unique ids in \S+: 0$")
        program.stop()
        lines = file.read_text().splitlines()
        assert COUNT.search(lines[0])
        assert_contiguous(counts(lines), 1)


MARK = "Zq7zQ"
GARBAGE = [
    get(f"/{MARK}\x01\x1b[31m"),
    get(f"/{MARK}\n"),
    get(f"/{MARK}\nHost: x\n\nERROR verve: {MARK}"),
    get(f"/{MARK}\r\nX: y"),
    get(f"/{MARK}%0aERROR%20verve:%20{MARK}"),
    get(f"{PATH}?id={MARK}%0a1"),
    get(f"{PATH}?id=1%0d%0a{MARK}"),
    get(f"{PATH}?id=1&{MARK}=%0a%00%1b"),
    get(f"{PATH}?id=1&endpoint=http://{MARK}.invalid/%0a"),
    get(f"{PATH}?id=" + 4000 * MARK),
    get("/" + 4000 * MARK),
    get("/" + 1000 * MARK),
    get(f"/{MARK}\xff\x80"),
    get("/", f"X-{MARK}: " + 4000 * MARK),
    get("/", *[f"{MARK}: {MARK}"] * 101),
    get("/", f"Host: {MARK}"),
    get("/", f"Content-Length: {MARK}"),
    get("/", f"Transfer-Encoding: {MARK}"),
    get("/", f"{MARK} : {MARK}"),
    get("/", f"Content-Length: 5\r\n\r\n{MARK}"),
    get("/", f"Transfer-Encoding: chunked\r\n\r\n{MARK}"),
    f"{MARK} / HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    f"GET / {MARK}/1.1\r\nHost: x\r\n\r\n".encode(),
    MARK.encode() * 10_000,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + MARK.encode(),
    b"\x00" * 100 + MARK.encode() + b"\n" * 100,
]


def test_the_log_never_repeats_what_a_client_sent() -> None:
    with verve("--log-level", "debug") as program:
        for request in GARBAGE:
            with Client(program.address) as client:
                client.send(request)
                with contextlib.suppress(ConnectionError):
                    client.socket.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    answers = client.rest()
                    assert answers.startswith(b"HTTP/1.1 "), request
                    assert MARK.encode() not in answers
                    assert b"\nX: y" not in answers
        with Client(program.address) as client:
            assert client.ask(accept(2)).body == b"ok"
        program.stop()
        assert len(program.log.all) < 10
        for line in program.log.all:
            assert MARK.lower() not in line.lower()
            assert TEXT_LINE.fullmatch(line), line
        assert_partial(program, 2)


def test_a_log_file_that_can_no_longer_be_written(tmp_path: Path) -> None:
    """Its folder is gone, for a while: lines go to stderr, and counting goes on."""
    folder, away = tmp_path / "log", tmp_path / "away"
    folder.mkdir()
    file = folder / "verve.log"
    with verve("--window", "1", log_file=file) as program, Client(program.address) as client:
        folder.rename(away)
        assert client.ask(accept(1)).status == 200
        program.log.wait_for(r"unique ids in \S+: 1$")
        folder.mkdir()
        support.wait_in(file, "unique ids in")
        client.close()
        assert program.stop() == 0
        assert len([line for line in program.log.all if "can't log to" in line]) == 1
        lines = (away / "verve.log").read_text().splitlines() + program.log.all + file.read_text().splitlines()
        assert_contiguous(counts(lines), 1)


def test_a_disk_that_is_full_and_has_room_again(tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: the file takes a part of a line, then nothing, until truncated."""
    file = tmp_path / "verve.log"
    file.write_text(3700 * "x" + "\n")
    prefix = ["prlimit", "--fsize=4096"]
    with verve("--window", "1", prefix=prefix, log_file=file) as program, Client(program.address) as client:
        program.log.wait_for("can't log to .*: File too large")
        taken = file.read_text()[3701:]
        assert client.ask(accept(1)).body == b"ok"
        program.log.wait_for(r"unique ids in \S+: 1$")
        program.log.wait_for(r"unique ids in", len(program.log.all))
        file.write_text("")
        support.wait_in(file, "unique ids in")
        client.close()
        assert program.stop() == 0
        whole = taken.splitlines(keepends=True)
        if not whole[-1].endswith("\n"):
            whole.pop()  # it stands on stderr, whole
        after = file.read_text().splitlines()
        assert all(TEXT_LINE.fullmatch(line) for line in after), after
        told = counts([line.rstrip() for line in whole] + program.log.all + after)
        assert_contiguous(sorted(told), 1)
        assert sum(count for _, count in told) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_everywhere() -> None:
    """There is nowhere to complain: counting goes on."""
    prefix = ["sh", "-c", 'exec "$@" 2>/dev/full', "sh"]
    port = servers.free_port()
    program = Program(["--window", "1", "--log-file", "/dev/full", "--port", str(port)], prefix)
    try:
        support.wait_for_port(port)
        with Client(("127.0.0.1", port)) as client:
            assert client.ask(accept(1)).body == b"ok"
            wait = time.monotonic() + 1.2  # over the end of a window
            while time.monotonic() < wait:
                assert client.ask(accept(1)).body == b"ok"
        assert program.stop() == 0
    finally:
        program.end()


def test_few_open_files() -> None:
    prefix = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh"]
    with verve(prefix=prefix) as program:
        program.log.wait_for("open files are limited to 64: at most 32 connections are served")
        clients = [Client(program.address) for _ in range(32)]
        try:
            assert all(client.ask(accept(number)).status == 200 for number, client in enumerate(clients))
            with Client(program.address) as one_more:
                assert one_more.receive()[0].status == 503
        finally:
            for client in clients:
                client.close()
