"""The operators' listener: what it answers, that its numbers are right, and that the page shows them in a browser.

The program runs as a user runs it, with Redis where that matters. What it says it did is held against what the clients
saw: each answer is tallied here too. What an operator waits for (a state, a number) is asked for again and again, since
nobody is told; a guard ends that only if it never comes.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import browser
import pytest
import servers
import support
from prometheus_client.parser import text_string_to_metric_families
from receivers import Answer, Receiver
from test_workers import at_work, long_window, wait_until, workers

import admin

NEVER = ("--request-timeout", "30")  # no request fails because the machine is busy


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


class Operators:
    """What an operator does: asks one thing at a time, each on a connection of its own."""

    def __init__(self, address: support.Address) -> None:
        self.address = address

    def ask(self, path: str, method: str = "GET") -> support.Response:
        request = support.get(path).replace(b"GET", method.encode(), 1)
        return self.send(request, head=method == "HEAD")

    def send(self, request: bytes, *, head: bool = False) -> support.Response:
        with support.Client(self.address) as client:
            answer = client.ask(request, head=head)
            assert client.rest() == b""
            assert answer.closes
            return answer

    def ready(self) -> tuple[int, list[str]]:
        answer = self.ask("/readyz")
        return answer.status, answer.body.decode().splitlines()

    def windows(self) -> list[dict[str, Any]]:
        found = json.loads(self.ask("/windows").body)
        assert isinstance(found, list)
        return found

    def numbers(self) -> dict[str, float]:
        """Return all samples, by name and labels as they are written."""
        answer = self.ask("/metrics")
        assert answer.status == 200
        lines = answer.body.decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def statuses(self) -> dict[int, int]:
        """Return how many requests were answered, by status, of those that were."""
        found = {name: value for name, value in self.numbers().items() if name.startswith("verve_requests_total")}
        return {int(name[-5:-2]): int(value) for name, value in found.items() if value}

    def wait_for(self, *names: str, true: Callable[..., object]) -> None:
        """Wait until something is true of numbers."""
        wait_until(lambda: (now := self.numbers()) and true(*(now[name] for name in names)))


def operators_of(program: support.Program) -> Operators:
    port = program.log.wait_for(r"for operators: http://127\.0\.0\.1:([0-9]+)$")[1]
    return Operators(("127.0.0.1", int(port)))


@contextlib.contextmanager
def watched(*flags: str, prefix: tuple[str, ...] = (), at: int = 0) -> Iterator[tuple[support.Program, Operators]]:
    """Run the program with its operators' listener."""
    with support.verve("--admin", f"127.0.0.1:{at}", *flags, prefix=prefix) as program:
        yield program, operators_of(program)


def patched(statements: str) -> tuple[str, ...]:
    return support.patched(f"import admin; {statements}")


def feed(program: support.Program, *numbers: int) -> None:
    with support.Client(program.address) as client:
        for number in numbers:
            assert client.ask(support.accept(number)).status == 200


# The listener


def test_what_is_answered() -> None:
    with watched() as (program, operators):
        kinds = {
            "/": "text/html; charset=utf-8",
            "/healthz": "text/plain; charset=utf-8",
            "/readyz": "text/plain; charset=utf-8",
            "/metrics": "text/plain; version=0.0.4; charset=utf-8",
            "/windows": "application/json",
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


def served(operators: Operators) -> bool:
    with contextlib.suppress(OSError, AssertionError):
        return operators.ready()[0] == 200
    return False


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
    with watched("--redis-url", server.url, prefix=support.patched("dedup.REFUSING = 1.0")) as (program, operators):
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


# Its numbers


def test_the_metrics_are_as_prometheus_wants_them(server: servers.Redis) -> None:
    with (
        Receiver() as receiver,
        watched("--redis-url", server.url, "--report-url", receiver.url, "--window", "1") as (program, operators),
    ):
        feed(program, 1, 1, 2)
        wait_until(lambda: "verve_last_window_ids" in operators.numbers())  # it is not there before a window is closed
        text = operators.ask("/metrics").body.decode()
        families = list(text_string_to_metric_families(text))
        of_counters = {name.removesuffix("_total") for name in admin.METRICS}  # as the parser names them
        assert {family.name for family in families} == of_counters
        for family in families:
            name = family.name
            assert re.fullmatch("verve(_[a-z]+)+", name)
            assert family.documentation.endswith(".")
            assert not re.search("counter|gauge|histogram|summary|milli|minute|percent|_ms", name)
            names = {sample.name for sample in family.samples}
            if family.type == "counter":
                assert names == {f"{name}_total"}
            elif family.type == "histogram":
                assert names == {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
                counts = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
                assert counts == sorted(counts)
                assert family.samples[len(counts) - 1].labels == {"le": "+Inf"}
                assert counts[-1] == family.samples[-1].value
            else:
                assert family.type == "gauge"
                assert names == {name}
                assert not name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert text.count("# HELP ") == text.count("# TYPE ") == len(families)


def mix(chance: random.Random, count: int) -> list[tuple[bytes, int]]:
    """Return requests that come alone, and the statuses they should get in memory."""
    some = [
        (support.accept(chance.randrange(50)), 200),
        (support.accept(-1), 200),
        (support.accept(7, "X-One: 1"), 200),
        (support.get(f"{support.PATH}?id=x"), 400),
        (support.get("/nope"), 404),
        (support.get(f"{support.PATH}?id=1").replace(b"GET", b"PUT", 1), 405),
    ]
    return [chance.choice(some) for _ in range(count)]


LAST = [
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (support.get("/" + "a" * 9000), 414),
    (support.get("/", "A: " + "b" * 40_000), 431),
]


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_every_answer_is_counted_once(server: servers.Redis, store: str) -> None:
    """Sent one by one and pipelined, in pieces and at once, in the orders that a seed gives."""
    chance = random.Random(20261122)
    where = ["--redis-url", server.url, *NEVER] if store == "redis" else []
    tally: Counter[int] = Counter()
    ids: set[int] = set()
    accepted = 0
    with watched("--window", long_window(), *where) as (program, operators):
        for number in range(20):
            with support.Client(program.address) as client:  # each alone in its read, the way that most requests take
                assert [client.ask(support.accept(number + more)).status for more in range(3)] == [200] * 3
                client.send(*(support.accept(number + more) for more in range(5)))  # and together, nothing else
                assert [answer.status for answer in client.receive(5)] == [200] * 5
            tally[200] += 8
            accepted += 8
            ids |= {*range(number, number + 5)}
        for last in [*LAST, None] * 5:
            with support.Client(program.address) as client:
                for _ in range(5):
                    requests = mix(chance, chance.randrange(1, 40))
                    data = b"".join(request for request, _ in requests)
                    cut = chance.randrange(len(data))
                    client.send(data[:cut])
                    client.send(data[cut:])
                    for (request, status), answer in zip(requests, client.receive(len(requests)), strict=True):
                        assert answer.status == status
                        tally[answer.status] += 1
                        if status == 200:
                            accepted += 1
                            ids.add(int(re.search(rb"id=(-?[0-9]+)", request)[1]))  # type: ignore[index]
                if last:
                    assert client.ask(last[0]).status == last[1]
                    tally[last[1]] += 1
        assert operators.statuses() == tally
        numbers = operators.numbers()
        assert numbers['verve_ids_total{result="new"}'] == len(ids) == numbers["verve_window_ids"]
        assert numbers['verve_ids_total{result="duplicate"}'] == accepted - len(ids)
        assert numbers["verve_request_duration_seconds_count"] == sum(tally.values())
        assert numbers["verve_waiting_requests"] == 0
        batches = numbers["verve_batch_ids_count"]
        assert numbers["verve_batch_duration_seconds_count"] == batches
        assert (0 < batches <= numbers["verve_batch_ids_sum"] <= accepted) == (store == "redis")
        assert numbers["verve_batch_ids_sum"] >= len(ids) or store == "memory"
        assert (numbers["verve_request_duration_seconds_sum"] > 0) == (store == "redis")


def test_requests_that_wait_for_redis_are_seen_to(server: servers.Redis) -> None:
    with (
        servers.Proxy(server.port) as proxy,
        watched("--redis-url", proxy.url, "--window", long_window(), "--request-timeout", "0.6") as (
            program,
            operators,
        ),
        support.Client(program.address) as client,
    ):
        feed(program, 1)
        before = operators.numbers()
        proxy.stall()
        client.send(*(support.accept(number) for number in range(10, 20)))
        operators.wait_for("verve_waiting_requests", true=lambda waiting: waiting == 10)
        assert {answer.status for answer in client.receive(10)} == {503}
        after = operators.numbers()
        assert after["verve_waiting_requests"] == 0
        assert operators.statuses() == {200: 1, 503: 10}
        name = "verve_request_duration_seconds"
        assert after[f"{name}_count"] - before[f"{name}_count"] == 10
        assert after[f'{name}_bucket{{le="0.5"}}'] == before[f'{name}_bucket{{le="0.5"}}']  # all took longer
        proxy.flow()


def test_new_ids_are_those_of_the_fleet(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--window", long_window(), *NEVER
    with watched(*flags) as (one, at_one), watched(*flags) as (other, at_other):
        feed(one, *range(100))
        feed(other, *range(50, 200))
        new, duplicate = 'verve_ids_total{result="new"}', 'verve_ids_total{result="duplicate"}'
        numbers = at_one.numbers(), at_other.numbers()
        assert [each[new] for each in numbers] == [100, 100]
        assert [each[duplicate] for each in numbers] == [0, 50]
        wait_until(lambda: at_one.numbers()["verve_window_ids"] == 200)  # the count may be a second old
        wait_until(lambda: at_other.numbers()["verve_window_ids"] == 200)


def test_connections_are_counted_while_they_are_open() -> None:
    with watched() as (program, operators), contextlib.ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(support.Client(program.address))
            assert client.ask(support.accept(1)).status == 200
        assert operators.numbers()["verve_connections"] == 3
        stack.close()
        operators.wait_for("verve_connections", true=lambda count: count == 0)


def test_what_became_of_callbacks(server: servers.Redis) -> None:
    with Receiver() as receiver, watched("--callback-allow", "127.0.0.0/8") as (program, operators):
        receiver.answers.extend([Answer(200), Answer(204), Answer(500)])
        with support.Client(program.address) as client:
            for number in range(3):
                target = f"{support.PATH}?id={number}&endpoint={receiver.url}/"
                assert client.ask(support.get(target)).status == 200
        receiver.wait_for(3)
        delivered, failed = (f'verve_callbacks_total{{outcome="{name}"}}' for name in ("delivered", "failed"))
        operators.wait_for(delivered, failed, true=lambda *counts: counts == (2, 1))
        assert operators.numbers()["verve_waiting_callbacks"] == 0


def test_workers_are_added_up_and_counters_never_go_back(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--workers", "2", "--window", long_window(), *NEVER
    with watched(*flags) as (program, operators):
        wait_until(lambda: operators.ready()[0] == 200)
        sent = 0
        least: dict[str, float] = {}
        for _ in range(3):
            for number in range(20):  # on connections of their own, so that both get some
                feed(program, sent + number)
            sent += 20
            operators.wait_for('verve_requests_total{status="200"}', true=lambda count, sent=sent: count == sent)
            now = operators.numbers()
            went_back = [
                name for name, value in least.items() if name.partition("{")[0] in COUNTERS and now[name] < value
            ]
            assert not went_back
            least = now
            for pid in workers(program):
                kill(pid)
            wait_until(lambda: served(operators))
        assert operators.numbers()["verve_workers"] == 2


COUNTERS = {name for name, (kind, _) in admin.METRICS.items() if kind == "counter"} | {
    f"{name}{part}"
    for name, (kind, _) in admin.METRICS.items()
    if kind == "histogram"
    for part in ("_bucket", "_count")
}


def kill(pid: int) -> None:

    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))


def alive(pid: int) -> bool:

    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# The windows


def start_of(window: dict[str, Any]) -> int:
    return int(datetime.strptime(window["window"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_the_windows_are_those_that_were_told(server: servers.Redis, store: str) -> None:
    where = ["--redis-url", server.url] if store == "redis" else []
    with watched("--window", "1", *where) as (program, operators):
        feed(program, *range(5))
        wait_until(lambda: len(operators.windows()) > 3)
        windows = operators.windows()
        starts = [start_of(window) for window in windows]
        assert starts == [*range(starts[0], starts[0] - len(starts), -1)]
        assert [window["final"] for window in windows] == [False] + [True] * (len(windows) - 1)
        assert {window["seconds"] for window in windows} == {1}
        assert {window["delivered"] for window in windows} == {None}
        for window in windows[1:]:
            program.log.wait_for(rf"unique ids in {window['window']}: {window['count']}$")
        assert sum(window["count"] for window in windows) == 5
        numbers = operators.numbers()
        assert abs(numbers["verve_last_window_end_timestamp_seconds"] - time.time()) < 60
        assert numbers["verve_last_window_ids"] == 0


def test_there_are_sixty_at_most(server: servers.Redis) -> None:
    with server.client() as client:
        now = int(time.time())
        for start in range(now - 90, now - 5):
            name = f"{datetime.fromtimestamp(start, UTC):%Y-%m-%dT%H:%M:%SZ}"
            client.xadd("verve:reports", {"window": name, "seconds": 1, "count": start % 7}, id=f"{start}000-0")
        client.xadd("verve:reports", {"what": "somebody else's"}, id=f"{now - 5}000-0")
    with watched("--window", "1", "--redis-url", server.url) as (_, operators):
        wait_until(lambda: any(window["final"] for window in operators.windows()))
        windows = operators.windows()
        assert len(windows) in (59, 60)  # what is not a report leaves its place empty
        assert all(window["count"] == start_of(window) % 7 for window in windows if start_of(window) < now - 5)


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_what_the_webhook_has(server: servers.Redis, store: str) -> None:
    where = ["--redis-url", server.url] if store == "redis" else []
    quick = patched("reporter.BACKOFF = (0.02, 0.2); reporter.SPREAD = 0.05")
    with Receiver(default=Answer(500)) as receiver:
        if store == "redis":  # windows from before there was a webhook
            with watched("--window", "1", *where) as (program, _):
                program.log.wait_for("unique ids in")
        before = set(server.reports())
        flags = "--window", "1", "--report-url", receiver.url, *where
        with watched(*flags, prefix=quick) as (_, operators):

            def ours() -> list[dict[str, Any]]:
                return [window for window in operators.windows() if window["window"] not in before]

            wait_until(lambda: len(ours()) > 3)
            found = ours()
            assert [window["delivered"] for window in found] == [False] * len(found)
            waiting = 'verve_webhook_deliveries_total{outcome="failed"}', "verve_webhook_waiting_reports"
            operators.wait_for(*waiting, true=lambda failed, reports: failed > 1 and reports > 1)
            assert re.match("[0-9]+ reports to deliver, last attempt: status 500", state(operators)["webhook"])
            receiver.default = Answer(200)
            wait_until(lambda: all(window["delivered"] for window in ours()[3:]))
            wait_until(lambda: state(operators)["webhook"] == "has every report")
            assert ours()[0]["delivered"] is False
            known = [window["delivered"] for window in operators.windows() if window["window"] in before]
            assert known == [None] * len(known)


def state(operators: Operators) -> dict[str, Any]:
    found = json.loads(operators.ask("/state").body)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_windows_are_shown_as_last_known_when_redis_is_away(server: servers.Redis, how: str) -> None:
    with watched("--redis-url", server.url, "--window", long_window()) as (program, operators):
        feed(program, 1, 2, 3)
        wait_until(lambda: operators.windows()[0]["count"] == 3)
        known = operators.windows()
        (server.kill if how == "killed" else server.freeze)()
        wait_until(lambda: operators.ask("/windows").status == 503)
        answer = operators.ask("/windows")
        assert "last that were known" in answer.fields["verve-error"]
        assert json.loads(answer.body) == known
        assert state(operators)["fresh"] is False
        assert "verve_window_ids" not in operators.numbers()
        (server.start if how == "killed" else server.thaw)()
        wait_until(lambda: operators.ask("/windows").status == 200)
        assert operators.windows() == known


# The page


def url_of(operators: Operators) -> str:
    return "http://{}:{}/".format(*operators.address)


def counts(page: browser.Page) -> str:
    return page.text("#count").replace(",", "")


def test_the_page_shows_what_is_counted_as_it_grows() -> None:
    with watched("--window", long_window()) as (program, operators):
        url = url_of(operators)
        with browser.Page(url) as page:
            page.wait_for("document.querySelector('#status').innerText === 'Ready'")
            assert counts(page) == "0"
            feed(program, *range(1234))
            page.wait_for("document.querySelector('#count').innerText === '1,234'")
            page.wait_for("document.querySelector('#requests').innerText.endsWith('1,234 in all')")
            assert page.text("#store") == "memory"
            assert page.text("#webhook") == "none"
            assert page.evaluate("document.querySelectorAll('#chart rect').length") == 1
            assert set(page.requests) == {url, f"{url}state"}
            assert page.complaints == []


def test_the_page_has_a_bar_and_a_row_for_each_window() -> None:
    with (
        watched("--window", "1") as (program, operators),
        browser.Page(url_of(operators)) as page,
    ):
        feed(program, *range(100))
        page.wait_for("document.querySelectorAll('#chart rect').length > 4")
        page.wait_for("[...document.querySelectorAll('#rows .number')].some(cell => cell.textContent === '100')")
        bars = page.evaluate(
            "[...document.querySelectorAll('rect')].map(bar => [bar.className.baseVal, +bar.getAttribute('height')])"
        )
        assert [kind for kind, _ in bars].count("open") == 1
        assert max(height for _, height in bars) == 100
        assert re.fullmatch(
            r"[0-9]+ counts, from 0 to 100\. The table below has them all\.",
            page.evaluate("document.querySelector('#chart').getAttribute('aria-label')"),
        )
        assert page.text("#title") == "The last 60 windows of a second"
        assert page.complaints == []


def test_the_page_says_that_it_has_lost_touch_and_comes_back() -> None:
    port = servers.free_port()
    with contextlib.ExitStack() as stack:
        with watched("--window", long_window(), at=port) as (program, _):
            page = stack.enter_context(browser.Page(f"http://127.0.0.1:{port}/"))
            feed(program, 1, 2, 3)
            page.wait_for("document.querySelector('#count').innerText === '3'")
        page.wait_for("document.querySelector('#status').innerText.startsWith('No contact with the server since')")
        assert page.evaluate("document.title") == "No contact - Verve"
        assert counts(page) == "3"
        with watched("--window", long_window(), at=port) as (program, _):
            page.wait_for("document.querySelector('#status').innerText === 'Ready'")
            assert counts(page) == "0"
            feed(program, 1)
            page.wait_for("document.querySelector('#count').innerText === '1'")
            assert page.complaints == []


def test_the_page_says_why_it_is_not_ready(server: servers.Redis) -> None:
    with watched("--redis-url", server.url) as (_, operators), browser.Page(url_of(operators)) as page:
        page.wait_for("document.querySelector('#store').innerText.endsWith('in reach')")
        server.kill()
        page.wait_for("document.querySelector('#status').innerText === 'Not ready'")
        page.wait_for("document.querySelector('#notes').innerText.startsWith('Redis is away')")
        page.wait_for("document.querySelector('#notes').innerText.includes('the last that were known')")
        server.start()
        page.wait_for("document.querySelector('#status').innerText === 'Ready'")
        page.wait_for("document.querySelector('#notes').innerText === ''")


CONTRAST = """(() => {
  const light = text => { const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(n => n / 255)
    .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll('body *')].filter(e => e.innerText && !e.children.length);
  return Math.min(...texts.map(e => light(getComputedStyle(e).color))
    .map(text => (Math.max(text, page) + .05) / (Math.min(text, page) + .05)));
})()"""  # WCAG 2.2, 1.4.3


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_the_page_is_readable_on_a_phone_in_the_dark_and_by_keyboard(listening: Operators, width: int) -> None:
    with browser.Page(url_of(listening), width=width) as page:
        page.wait_for("document.querySelector('#status').innerText === 'Ready'")
        colours = []
        for scheme in ("light", "dark"):
            page.prefer(scheme)
            assert page.evaluate(CONTRAST) >= 4.5
            colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert colours[0] != colours[1]
        page.press("Tab", 9)
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        page.press("Enter", 13)
        page.wait_for("document.querySelector('details').open")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.complaints == []


def test_the_page_lets_nothing_in(listening: Operators) -> None:
    policy = listening.ask("/").fields["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; ")
    assert "unsafe" not in policy
    with browser.Page(url_of(listening)) as page:
        page.wait_for("document.querySelector('#status').innerText === 'Ready'")
        script = (
            "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s)"
        )
        page.evaluate(f"(() => {{ {script} }})()")
        page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x'}))")
        page.wait_for("1")
        assert page.evaluate("window.broken") is None
        assert any("Content Security Policy" in complaint for complaint in page.complaints)
