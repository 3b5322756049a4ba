"""What an operator and a client see of the program itself: starting, counting for real, connections.

Every test runs the real thing in a process of its own and talks to it over real sockets.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest
import support
from counted import COUNT, TEXT_LINE, assert_contiguous, assert_partial, counts, epoch, windows_seen
from support import PATH, Client, accept, get, verve

import settings

DAY = ("--window", "86400")  # for tests that send an id twice: no window ends between


def failed_to_start(result: subprocess.CompletedProcess[str], status: int) -> str:
    """The one line that says why nothing was started."""
    assert result.returncode == status
    assert result.stdout == ""
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("verve_server.py: ")
    return result.stderr.removeprefix("verve_server.py: ").strip()


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
