"""The operators' listener: what it answers, and whether the instance is ready.

The program runs as a user runs it, with Redis where that matters. What it says it did is held against what the clients
saw: each answer is tallied here too. What an operator waits for (a state, a number) is asked for again and again, since
nobody is told; a guard ends that only if it never comes.
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator

import pytest
import servers
import support
from operators import Operators, feed, history_of, lose, patched, rows_of, served, watched
from processes import at_work, kill, long_window, wait_until, workers

import admin


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


# The listener


def test_what_is_answered() -> None:
    with watched() as (program, operators):
        kinds = {
            "/": "text/html; charset=utf-8",
            "/healthz": "text/plain; charset=utf-8",
            "/readyz": "text/plain; charset=utf-8",
            "/metrics": "text/plain; version=0.0.4; charset=utf-8",
            "/windows": "application/json",
            "/windows.csv": "text/csv; charset=utf-8",
            "/state": "application/json",
        }
        for path, kind in kinds.items():
            for target in (path, f"{path}?a=b"):
                answer = operators.ask(target)
                assert (answer.status, answer.fields["content-type"]) == (200, kind)
                assert answer.fields["x-content-type-options"] == "nosniff"
                assert answer.fields["cache-control"] == "no-store"
                assert not [name for name in answer.fields if name.startswith("access-control")]
                assert answer.body
        assert operators.ready() == (200, ["ready"])
        assert (
            operators.send(support.get("/healthz", version="1.0").replace(b"Host: verve.test\r\n", b"")).status == 200
        )
        with support.Client(program.address) as client:
            assert [client.ask(support.get(path)).status for path in kinds] == [404] * len(kinds)


def test_head_has_the_length_but_not_the_body() -> None:
    with watched() as (_, operators):
        got, told = operators.ask("/healthz"), operators.ask("/healthz", "HEAD")
        assert told == got._replace(body=b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "get", "PRI"])
def test_only_get_and_head(method: str) -> None:
    with watched() as (_, operators):
        answer = operators.ask("/metrics", method)
        assert (answer.status, answer.fields["allow"]) == (405, "GET, HEAD")
        assert operators.ask("/nope", method).status == 404


GOOD = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
BAD = {
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two hosts": GOOD + b"Host: a\r\n\r\n",
    "no version": b"GET /healthz\r\nHost: a\r\n\r\n",
    "another version": b"GET /healthz HTTP/2.0\r\nHost: a\r\n\r\n",
    "no target": b"GET  HTTP/1.1\r\nHost: a\r\n\r\n",
    "a whole URL": b"GET http://a/healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    "two spaces": b"GET  /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    "an obsolete fold": GOOD + b"A: b\r\n c\r\n\r\n",
    "a space before the colon": GOOD + b"A : b\r\n\r\n",
    "a bare LF": GOOD + b"A: b\nC: d\r\n\r\n",
    "a bare CR": GOOD + b"A: b\rC: d\r\n\r\n",
    "a NUL": GOOD + b"A: \0\r\n\r\n",
    "bytes in the target": b"GET /healthz\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n",
    "a field without a colon": GOOD + b"A\r\n\r\n",
    "an empty name": GOOD + b": b\r\n\r\n",
    "no request": b"\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
}


@pytest.fixture(scope="module")
def listening() -> Iterator[Operators]:
    with watched() as (_, operators):
        yield operators


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_well_formed(listening: Operators, what: str) -> None:
    assert listening.send(BAD[what]).status == 400
    assert listening.ready() == (200, ["ready"])


@pytest.mark.parametrize(("over", "status"), [(0, 200), (1, 431), (50_000, 431)])
def test_the_length_of_a_head(listening: Operators, over: int, status: int) -> None:
    head = GOOD + b"A: "
    head += b"b" * (admin.MAX_HEAD + over - len(head) - 4) + b"\r\n\r\n"
    assert len(head) == admin.MAX_HEAD + over
    assert listening.send(head).status == status


def test_who_is_too_slow_is_cut_and_harms_nobody() -> None:
    with watched(prefix=patched("admin.PATIENCE = 0.2")) as (_, operators):
        with support.Client(operators.address) as slow, support.Client(operators.address) as silent:
            slow.send(GOOD)
            for client in (slow, silent):
                with contextlib.suppress(ConnectionResetError):
                    assert client.rest() == b""
        assert operators.ready() == (200, ["ready"])


def test_only_so_many_at_a_time() -> None:
    with watched() as (_, operators), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(support.Client(operators.address)) for _ in range(admin.CONNECTIONS)]
        for client in clients:
            client.send(GOOD)
        with pytest.raises((ConnectionResetError, BrokenPipeError, AssertionError)):
            operators.ready()
        for client in clients:
            assert client.ask(b"\r\n").body == b"alive\n"
            client.close()
        wait_until(lambda: served(operators))


@pytest.mark.parametrize("count", [1, 2])
def test_a_port_that_is_taken_is_said_in_one_line(server: servers.Redis, count: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = support.run("--admin", f"127.0.0.1:{port}", "--redis-url", server.url, "--workers", str(count))
        assert ended.returncode == 1
        assert ended.stderr == (
            f"verve_server.py: can't listen on 127.0.0.1 port {port} (--admin): Address already in use\n"
        )


def test_one_port_is_not_for_both() -> None:
    ended = support.run("--port", "8081", "--admin", "127.0.0.1:8081")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "verve_server.py: --admin: expected another address than --host and --port have, got 8081 for both\n"
    )


def test_off_is_off() -> None:
    with support.verve() as program:
        assert not [line for line in program.log.all if "operators" in line]


# Is it ready?


def test_it_is_ready_while_redis_is_there(server: servers.Redis) -> None:
    with watched("--redis-url", server.url) as (_, operators):
        for _ in range(2):
            assert operators.ready() == (200, ["ready"])
            assert operators.numbers()["verve_store_up"] == 1
            server.kill()
            wait_until(lambda: operators.ready()[0] == 503)
            status, lines = operators.ready()
            assert (status, lines[0]) == (503, "not ready")
            assert lines[1].startswith("Redis is away: ")
            assert operators.ask("/healthz").status == 200
            assert operators.numbers()["verve_store_up"] == 0
            server.start()
            wait_until(lambda: operators.ready()[0] == 200)


def test_it_is_alive_but_not_ready_before_redis_was_there() -> None:
    with watched("--redis-url", f"redis://127.0.0.1:{servers.free_port()}") as (_, operators):
        assert operators.ask("/healthz").status == 200
        assert operators.ready()[0] == 503
        answer = operators.ask("/windows")
        assert (answer.status, answer.body) == (503, b"[]\n")
        assert "verve_window_ids" not in operators.numbers()


def test_a_redis_that_may_evict_is_warned_of(server: servers.Redis) -> None:
    with server.client() as client:
        client.config_set("maxmemory", "1gb")
        client.config_set("maxmemory-policy", "allkeys-lru")
    with watched("--redis-url", server.url) as (_, operators):
        status, lines = operators.ready()
        assert (status, lines[0]) == (200, "ready")
        assert re.match("warning: Redis may evict ids unseen.*allkeys-lru", lines[1])


def test_a_redis_that_refuses_ids_is_not_one_to_send_requests_to(server: servers.Redis) -> None:
    with watched("--redis-url", server.url, prefix=support.patched("redis_store.batches.REFUSING = 1.0")) as (
        program,
        operators,
    ):
        feed(program, 1)
        with server.client() as redis, support.Client(program.address) as client:
            redis.config_set("maxmemory", "1")
            wait_until(lambda: client.ask(support.accept(time.monotonic_ns())).status == 503 and not_ready(operators))
            redis.config_set("maxmemory", "0")
            wait_until(lambda: operators.ready()[0] == 200)  # nobody sends a request that could tell it
            assert client.ask(support.accept(2)).status == 200
            assert operators.ready() == (200, ["ready"])


def test_a_redis_that_refuses_again_at_once_is_told_of(server: servers.Redis) -> None:
    with watched("--redis-url", server.url) as (program, operators), support.Client(program.address) as client:
        for number, (memory, status) in enumerate([(1, 503), (0, 200), (1, 503)]):  # the log is hushed by the third
            server.client().config_set("maxmemory", memory)
            assert client.ask(support.accept(number)).status == status
            assert operators.ready()[0] == status
        assert operators.numbers()["verve_store_up"] == 0


def test_connections_that_are_open_at_the_stop_leave_no_trace() -> None:
    with watched() as (program, operators):
        with support.Client(operators.address), support.Client(operators.address) as asking:
            assert asking.ask(support.get("/healthz")).status == 200  # the other one was taken before it
            assert program.stop() == 0
        assert not [line for line in program.log.join() if "ERROR" in line or "Traceback" in line]


def test_who_resets_the_connection_harms_nobody(server: servers.Redis) -> None:
    with watched("--redis-url", server.url) as (program, operators):
        server.freeze()  # so that the answer is not there yet
        peers = [socket.create_connection(operators.address) for _ in range(10)]
        for peer in peers:
            peer.sendall(b"GET /windows HTTP/1.1\r\nHost: a\r\n\r\n")
        assert operators.ask("/healthz").status == 200  # so those were read
        for peer in peers:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            peer.close()
        server.thaw()
        wait_until(lambda: operators.ready()[0] == 200)
        assert program.stop() == 0  # and a traceback in the log fails the test


def not_ready(operators: Operators) -> bool:
    status, lines = operators.ready()
    assert status == 200 or lines[1].startswith("Redis refuses ids: Redis is out of memory")
    return status == 503


def test_a_full_memory_is_warned_of() -> None:
    with watched("--max-ids", "2", "--window", long_window()) as (program, operators):
        feed(program, 1, 2)
        assert operators.ready() == (200, ["ready", "warning: the window holds as many ids as --max-ids allows"])


@pytest.mark.parametrize(
    ("trouble", "up", "missing", "expected"),
    [
        ("", 1, False, []),
        ("", 0, False, ["a worker can't reach the store"]),
        ("", 1, True, ["worker 2 of 2 is missing"]),
        ("", 0, True, ["worker 2 of 2 is missing"]),
        ("stopping", 1, False, ["stopping"]),
        ("Redis is away", 0, False, ["Redis is away"]),
        ("Redis is away", 0, True, ["Redis is away", "worker 2 of 2 is missing"]),
    ],
)
def test_why_it_is_not_ready(trouble: str, up: float, missing: bool, expected: list[str]) -> None:
    """Of two workers, the first is asked; `up` is whether the second can store ids."""
    one, other = rows_of({"verve_store_up": 1}, {"verve_store_up": up})
    if missing:
        lose(other)
    page = admin.Admin("1", "here", one, lambda: trouble, list, lambda: 0, history_of(one, never), None)
    answer = asyncio.run(page.readyz())
    assert answer.body.decode().splitlines() == ["not ready" if expected else "ready", *expected]
    assert answer.status[:3] == ("503" if expected else "200")


async def never(most: int) -> None:
    raise AssertionError


def test_it_is_not_ready_while_it_stops() -> None:
    with watched() as (program, operators), support.Client(program.address) as client:
        client.send(b"GET ")
        wait_until(lambda: operators.numbers()["verve_connections"] == 1)
        program.send(signal.SIGTERM)
        wait_until(lambda: operators.ready() == (503, ["not ready", "stopping"]))
        assert operators.ask("/healthz").status == 200
        client.send(support.accept(1)[4:])
        assert client.receive()[0].status == 200
        assert program.wait() == 0


def test_a_worker_that_is_stuck_is_missing(server: servers.Redis) -> None:
    with watched("--redis-url", server.url, "--workers", "2") as (program, operators):
        wait_until(lambda: operators.ready() == (200, ["ready"]))
        numbers = operators.numbers()
        assert (numbers["verve_workers"], numbers["verve_store_up"]) == (2, 1)
        os.kill(workers(program)[1], signal.SIGSTOP)
        wait_until(lambda: operators.ready() == (503, ["not ready", "worker 2 of 2 is missing"]))
        assert operators.numbers()["verve_workers"] == 1
        os.kill(workers(program)[1], signal.SIGCONT)
        wait_until(lambda: operators.ready() == (200, ["ready"]))


def test_a_worker_that_is_replaced_at_once_is_not_missed(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--workers", "2"
    with watched(*flags, prefix=patched("admin.MISSING = 30.0")) as (program, operators):
        wait_until(lambda: operators.ready() == (200, ["ready"]))
        _, second = workers(program)
        kill(second)
        wait_until(lambda: len(workers(program)) == 2)
        at_work(program, server, 2)
        assert operators.ready() == (200, ["ready"])
