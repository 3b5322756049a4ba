"""The numbers on /metrics and the windows on /windows: what it says it did is held against what the clients saw."""

import asyncio
import contextlib
import csv
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import servers
import support
from operators import NEVER, feed, history_of, lose, patched, rows_of, served, state_of, told, watched
from processes import at_work, kill, long_window, one_of_each, wait_until, workers
from prometheus_client.parser import text_string_to_metric_families
from receivers import Answer, Receiver

import admin
import settings


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


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
            assert re.fullmatch("(verve|process)(_[a-z]+)+", name)
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


def test_a_request_waits_as_long_as_its_trip_to_redis_at_least(server: servers.Redis) -> None:
    """Times well below a millisecond are told: the lowest bucket is not where all of them end."""
    with watched("--redis-url", server.url, "--window", long_window(), *NEVER) as (program, operators):
        feed(program, *range(50))  # one after the other, so each is a batch
        numbers = operators.numbers()
        waits, trips = "verve_request_duration_seconds", "verve_batch_duration_seconds"
        assert numbers[f"{waits}_count"] == numbers[f"{trips}_count"] == 50
        assert numbers[f"{waits}_sum"] >= numbers[f"{trips}_sum"] > 0
        bounds = [name for name in numbers if name.startswith(f"{waits}_bucket")]
        assert all(numbers[bound] <= numbers[bound.replace(waits, trips)] for bound in bounds)


def test_the_ids_in_memory_are_those_of_all_workers(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--workers", "2", "--window", long_window(), *NEVER
    with watched(*flags) as (program, operators):
        at_work(program, server, 2)
        with one_of_each(program) as clients:
            for client in clients.values():
                client.send(*map(support.accept, range(3)))
                assert [answer.status for answer in client.receive(3)] == [200] * 3
        operators.wait_for("verve_ids_held", true=lambda held: held == 6)
        assert operators.numbers()["verve_ids_limit"] == 2 * settings.load([], {}).max_ids


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


def reasons(numbers: dict[str, float]) -> dict[str, float]:
    """Return how many requests failed, by the reasons that there were."""
    start = 'verve_failures_total{reason="'
    return {name[len(start) : -2]: value for name, value in numbers.items() if name.startswith(start) and value}


def test_failures_are_told_by_reason(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--window", long_window(), "--request-timeout", "0.3", "--max-connections", "1"
    with watched(*flags) as (program, operators), support.Client(program.address) as client:
        assert client.ask(support.accept(1)).status == 200
        assert reasons(operators.numbers()) == {}
        with support.Client(program.address) as another:
            assert another.receive()[0].status == 503
        with server.client() as redis:
            redis.config_set("maxmemory", "1")
            assert client.ask(support.accept(2)).status == 503
            redis.config_set("maxmemory", "0")
        server.freeze()
        client.send(support.accept(3), support.accept(4))
        assert [answer.status for answer in client.receive(2)] == [503, 503]
        server.thaw()
        server.kill()
        wait_until(lambda: client.ask(support.accept(5)).fields.get("verve-error") == "the store can't be reached")
        found = reasons(operators.numbers())
        assert found["connections"] == found["refused"] == 1
        assert found["late"] >= 1
        assert found["away"] >= 1
        assert sum(found.values()) == operators.statuses()[503]


def test_failures_of_a_full_memory() -> None:
    with watched("--window", long_window(), "--max-ids", "2", "--max-connections", "9") as (program, operators):
        with support.Client(program.address) as client:
            client.send(*map(support.accept, range(5)))
            assert [answer.status for answer in client.receive(5)] == [200, 200, 503, 503, 503]
        numbers = operators.numbers()
        assert reasons(numbers) == {"full": 3}
        assert numbers["verve_ids_held"] == numbers["verve_ids_limit"] == 2
        assert numbers["verve_connections_limit"] == 9


def test_what_the_system_knows_of_the_workers(server: servers.Redis) -> None:
    with watched("--redis-url", server.url, "--workers", "2", "--window", long_window()) as (program, operators):
        at_work(program, server, 2)
        wait_until(lambda: operators.ready() == (200, ["ready"]))
        before = operators.numbers()
        with one_of_each(program) as clients:
            operators.wait_for("process_open_fds", true=lambda count: count >= before["process_open_fds"] + 2)
            for number, client in enumerate([*clients.values()] * 500):
                assert client.ask(support.accept(number)).status == 200
        operators.wait_for("process_cpu_seconds_total", true=lambda used: used > before["process_cpu_seconds_total"])
        assert before["process_resident_memory_bytes"] > 2 * 10e6
        assert before["process_max_fds"] >= before["process_open_fds"] > 20
        assert before["process_start_time_seconds"] == before["verve_start_time_seconds"]
        assert before["process_start_time_seconds"] <= time.time()
        assert before["verve_worker_restarts_total"] == 0
        kill(workers(program)[1])
        operators.wait_for("verve_worker_restarts_total", true=lambda count: count == 1)
        wait_until(lambda: operators.ready() == (200, ["ready"]))
        assert operators.numbers()["verve_start_time_seconds"] == before["verve_start_time_seconds"]


def test_new_ids_are_those_of_the_fleet(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--window", long_window(), *NEVER
    with watched(*flags) as (one, at_one), watched(*flags) as (other, at_other):
        feed(one, *range(100))
        feed(other, *range(50, 200))
        new, duplicate = 'verve_ids_total{result="new"}', 'verve_ids_total{result="duplicate"}'
        numbers = at_one.numbers(), at_other.numbers()
        assert [each[new] for each in numbers] == [100, 100]
        assert [each[duplicate] for each in numbers] == [0, 50]
        assert [each["verve_ids_held"] for each in numbers] == [100, 150]  # those that it stored, new or not
        wait_until(lambda: at_one.numbers()["verve_window_ids"] == 200)  # the count may be a second old
        wait_until(lambda: at_other.numbers()["verve_window_ids"] == 200)


def test_of_a_missing_worker_only_what_it_counted_is_added() -> None:
    one, other = rows_of(
        {'verve_requests_total{status="200"}': 1, "verve_connections": 10, "verve_store_up": 1},
        {'verve_requests_total{status="200"}': 2, "verve_connections": 20, "verve_store_up": 1},
    )
    everything = {'verve_requests_total{status="200"}': 3, "verve_connections": 30, "verve_store_up": 1}
    assert one.total() == other.total() == everything | {"verve_workers": 2}
    lose(other)
    assert one.total() == everything | {"verve_connections": 10, "verve_workers": 1}
    assert other.total()["verve_workers"] == 2  # it writes its row, and so is back


@pytest.mark.parametrize(
    ("up", "missing", "expected"),
    [
        ((1, 1), False, 1),
        ((1, 0), False, 0),
        ((0, 1), False, 0),
        ((0, 0), False, 0),
        ((1, 0), True, 1),
        ((0, 1), True, 0),
    ],
)
def test_the_store_is_up_if_each_worker_at_work_can_store(up: tuple[int, int], missing: bool, expected: int) -> None:
    one, other = rows_of(*({"verve_store_up": float(each)} for each in up))
    if missing:
        lose(other)
    assert one.total()["verve_store_up"] == expected


def test_a_successor_goes_on_from_its_predecessors_counters() -> None:
    numbers = {'verve_requests_total{status="200"}': 5.0, "verve_connections": 7.0, "verve_store_up": 1.0}
    (row,) = rows_of(numbers)
    successor = admin.Row(row.board, 0, lambda: numbers)
    assert successor.total() == numbers | {'verve_requests_total{status="200"}': 10, "verve_workers": 1}


def test_the_first_worker_answers_and_the_next_one_while_those_before_it_are_missing() -> None:
    rows = rows_of({}, {}, {})
    assert [row.leads() for row in rows] == [True, False, False]
    lose(rows[1])
    assert [row.leads() for row in rows] == [True, False, False]
    lose(rows[0])
    assert [row.leads() for row in rows] == [True, True, True]
    rows[1].write()
    assert [row.leads() for row in rows] == [True, True, False]


@pytest.mark.parametrize("known", [[(60, 60, 7), (0, 60, 3)], None])
def test_the_store_is_asked_once_a_second_however_many_look_on(known: list[tuple[int, int, int]] | None) -> None:
    asked = []

    async def recent(most: int) -> list[tuple[int, int, int]] | None:
        asked.append(most)
        await asyncio.sleep(0)
        return known

    async def test() -> None:
        (row,) = rows_of({"verve_store_up": 1, "verve_connections": 0})
        page = admin.Admin("1", "here", row, lambda: "", list, lambda: 0, history_of(row, recent), None)
        pages = [page.windows, page.metrics, page.state] * 5
        answers = await asyncio.gather(*(each() for each in pages))
        assert asked == [admin.HISTORY]
        assert {answer.status[:3] for answer in answers[::3]} == {"200" if known else "503"}
        assert {b"verve_window_ids 7" in answer.body for answer in answers[1::3]} == {known is not None}

    asyncio.run(test())


def test_a_store_that_gives_no_answer_holds_up_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "BEAT", 0.05)

    async def recent(most: int) -> list[tuple[int, int, int]] | None:
        await asyncio.get_running_loop().create_future()
        return None

    async def test() -> None:
        (row,) = rows_of({"verve_store_up": 1})
        page = admin.Admin("1", "here", row, lambda: "", list, lambda: 0, history_of(row, recent), None)
        async with asyncio.timeout(support.DEADLINE):
            assert (await page.windows()).status[:3] == "503"
            assert b"verve_store_up 1" in (await page.metrics()).body

    asyncio.run(test())


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
        assert numbers["verve_ids_held"] == 0  # their window is reported


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
            assert re.match("[0-9]+ reports to deliver, last attempt: status 500", state_of(operators)["webhook"])
            receiver.default = Answer(200)
            wait_until(lambda: all(window["delivered"] for window in ours()[3:]))
            wait_until(lambda: state_of(operators)["webhook"] == "has every report")
            assert ours()[0]["delivered"] is False
            known = [window["delivered"] for window in operators.windows() if window["window"] in before]
            assert known == [None] * len(known)


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_the_counts_of_closed_windows_as_csv(server: servers.Redis, store: str) -> None:
    where = ["--redis-url", server.url] if store == "redis" else []
    with Receiver(default=Answer(500)) as receiver:
        flags = "--window", "1", "--report-url", receiver.url, "--max-ids", "2", "--drain-timeout", "1", *where
        with watched(*flags) as (program, operators):
            with support.Client(program.address) as client:
                client.send(*map(support.accept, range(5)))
                failed = sum(answer.status == 503 for answer in client.receive(5))
            wait_until(lambda: len(operators.windows()) > 3)
            answer = operators.ask("/windows.csv")
            assert answer.status == 200
            assert answer.fields["content-disposition"] == 'attachment; filename="windows.csv"'
            head, *rows = csv.reader(answer.body.decode("ascii").splitlines())
            assert head == ["window", "seconds", "count", "failed", "delivered"]
            closed = [window for window in operators.windows() if window["final"]]
            assert rows[::-1] == [
                [window["window"], "1", str(window["count"]), str(window["failed"]), "false"]
                for window in closed[::-1][: len(rows)]
            ]
            assert sum(int(row[3]) for row in rows) == failed == (3 if store == "memory" else 0)
            assert sum(int(row[2]) for row in rows) == 5 - failed


def test_a_day_of_counts_is_read_once_and_kept(server: servers.Redis) -> None:
    with server.client() as client, client.pipeline() as pipe:
        now = int(time.time())
        for start in range(now - 2000, now - 5):
            name = f"{datetime.fromtimestamp(start, UTC):%Y-%m-%dT%H:%M:%SZ}"
            pipe.xadd("verve:reports", {"window": name, "seconds": 1, "count": start % 7}, id=f"{start}000-0")
        pipe.execute()
    with watched("--window", "1", "--redis-url", server.url) as (_, operators):
        wait_until(lambda: operators.ask("/windows.csv").body.count(b"\n") > 1000)
        before = operators.windows()[0]
        wait_until(lambda: start_of(operators.windows()[0]) > start_of(before) + 1)
        _, *rows = csv.reader(operators.ask("/windows.csv").body.decode("ascii").splitlines())
        starts = [start_of({"window": row[0]}) for row in rows]
        assert starts == sorted(set(starts), reverse=True)
        assert len(starts) == admin.HISTORY - 1
        assert all(int(row[2]) == start % 7 for start, row in zip(starts, rows, strict=True) if start < now - 5)
        assert {row[3] for start, row in zip(starts, rows, strict=True) if start < now - 5} == {""}, "it did not live"


def test_windows_of_a_long_absence_are_not_left_out() -> None:
    """More were closed since the last look than are asked for."""
    stream = [(start, 60, start // 60) for start in range(0, 6000, 60)]

    async def recent(most: int) -> list[tuple[int, int, int]] | None:
        return stream[::-1][:most]

    async def test() -> None:
        (row,) = rows_of({})
        history = history_of(row, recent)
        await history.note(0)
        stream.extend((start, 60, start // 60) for start in range(6000, 18_000, 60))
        await history.look()
        assert [window.start for window in history.windows] == [*range(17_940, -1, -60)]
        assert [window.final for window in history.windows] == [False] + [True] * 299
        assert all(window.ids == window.start // 60 for window in history.windows)

    asyncio.run(test())


def test_failures_are_noted_in_their_window_whichever_worker_answers() -> None:
    one, other = rows_of({}, {})
    opened = [(60, 60, 0)]

    async def recent(most: int) -> list[tuple[int, int, int]] | None:
        return [*opened, (0, 60, 9)]

    async def test() -> None:
        first, second = (admin.History(row.board, lambda: opened[0], recent) for row in (one, other))
        await first.note(5)
        await first.note(5)
        await second.note(7)
        opened[0] = (120, 60, 0)
        await second.note(7)
        await first.note(8)
        one.board.started = 60
        assert one.board.failed.counts() == {60: 7, 120: 1}
        assert [(each["window"][14:16], each["failed"]) for each in first.shown(9)] == [("02", 1), ("00", None)]
        opened[0] = (60 + 60 * admin.HISTORY, 60, 0)
        await first.note(11)
        assert one.board.failed.counts() == {60 + 60 * admin.HISTORY: 3, 120: 1}

    asyncio.run(test())


def test_who_looks_first_amid_an_outage_sees_what_was_before_it(server: servers.Redis) -> None:
    with watched("--redis-url", server.url, "--window", "2") as (program, operators):
        feed(program, 1, 2, 3)
        window, *_ = told(program, 3, 0, 0)  # so the instance has looked since the first of them
        server.kill()
        wait_until(lambda: operators.ready()[0] == 503)
        answer = operators.ask("/windows")
        assert answer.status == 503
        found = json.loads(answer.body)
        assert [each["window"] for each in found if each["final"] and each["count"] == 3] == [window]
        assert found[0]["final"] is False
        answer = operators.ask("/windows.csv")
        assert answer.status == 200
        assert "last that were known" in answer.fields["verve-error"]
        assert b",2,3,0,\r\n" in answer.body


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
        assert state_of(operators)["fresh"] is False
        assert "verve_window_ids" not in operators.numbers()
        (server.start if how == "killed" else server.thaw)()
        wait_until(lambda: operators.ask("/windows").status == 200)
        assert operators.windows() == known
