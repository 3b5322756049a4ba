"""The program's streams and its log: closed, full, moved away; and what never stands in it."""

import contextlib
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
import servers
import support
from counted import COUNT, TEXT_LINE, assert_contiguous, assert_partial, counts
from support import PATH, Client, Program, accept, get, verve

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
