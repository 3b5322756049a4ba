"""The stream of reports: put back when Redis has lost it, in order and by all who know them, and nobody's else.

An entry of somebody else with a later id makes every report impossible that is older. It is said, with what to do;
no count is lost over it.
"""

import asyncio
import contextlib
import random
import re
import time
from functools import partial

import pytest
import servers
import support
from stores import (
    Log,
    add,
    ask,
    gone,
    ids,
    let_settle,
    more,
    name_of,
    opened,
    play,
    seeds,
    start_of,
    stored,
    telling,
    until,
    up,
    wait_until,
    window_with,
)

import dedup
import redis_store.windows


def stream(server: servers.Redis) -> dict[int, int]:
    """Return start and count of the windows in the stream, in its order."""
    return {start_of(window): count for window, count in server.reports().items()}


# Redis has lost the stream


@seeds
def test_reports_are_put_back_by_all_who_know_them(server: servers.Redis, seed: int) -> None:
    """Whoever comes first, and though the one who was started last knows the fewest."""
    dice = random.Random(f"{seed} {server.engine}")

    async def test(*proxies: servers.Proxy) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stores, all_told = [], []
            for proxy in proxies:
                stores.append(await stack.enter_async_context(opened(proxy.url, seconds=1)))
                let_settle(server)
                all_told.append(await stack.enter_async_context(telling(stores[-1])))
                await stored(stores[-1], *range(len(stores)))
                await more(all_told[-1], dice.randint(0, 1))
            await asyncio.to_thread(server.kill)
            for proxy in proxies:
                proxy.refuse = True
            await asyncio.gather(*map(gone, stores))
            await asyncio.to_thread(server.start)
            order = [*reversed(proxies)] if seed % 2 else dice.sample(proxies, len(proxies))
            for proxy in order:
                proxy.refuse = False
                await asyncio.sleep(dice.uniform(0, 0.4))
            now = int(time.time())
            await until(lambda: all(max(told) > now for told in all_told))
            reports = stream(server)
            known = {start: count for told in all_told for start, count in told.items()}
            assert {start: reports.get(start) for start in known} == known
            assert [*reports] == [*range(min(reports), max(reports) + 1)], "all, and in order"

    with servers.Proxy(server.port) as one, servers.Proxy(server.port) as other, servers.Proxy(server.port) as third:
        play(test(one, other, third))


def test_reports_are_put_back_into_an_empty_redis(server: servers.Redis) -> None:
    """And no window is told otherwise than it was."""

    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            let_settle(server)
            await stored(store, 1, 2, 3)
            await until(lambda: len(told) >= 3)
            await asyncio.to_thread(server.kill)
            await gone(store)
            with Log() as log:
                await asyncio.to_thread(server.start)
                count = len(told)
                await until(lambda: len(told) > count)
                assert len(log.found("WARNING .*put back")) == 1
            reports = stream(server)
            assert {start: reports[start] for start in told} == told
            assert [*reports] == [*range(min(reports), max(reports) + 1)]

    play(test())


def test_reports_are_put_back_by_who_was_started_after_them(
    server: servers.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All who made them are gone."""
    monkeypatch.setattr(redis_store.windows, "RECALL_CHUNK", 2)

    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            let_settle(server)
            await stored(store, 1, 2, 3)
            await until(lambda: len(told) >= 5)
        before = stream(server)
        async with opened(server.url, seconds=1) as newcomer, telling(newcomer) as told:
            await stored(newcomer, 4)
            await until(lambda: len(told) >= 1)
            await asyncio.to_thread(server.kill)
            await gone(newcomer)
            await asyncio.to_thread(server.start)
            count = len(told)
            await until(lambda: len(told) > count)
            reports = stream(server)
            assert [*before.items()] == [*reports.items()][: len(before)]
            assert [*reports] == sorted(reports)

    play(test())


def test_a_window_is_not_reported_again_by_one_who_was_cut_off(server: servers.Redis, proxy: servers.Proxy) -> None:
    """Who reported it is dead, who lives was started later, and Redis has lost all: its count is not made anew."""

    async def test() -> None:
        seconds = window_with(1)
        async with opened(proxy.url, seconds=seconds) as cut_off, telling(cut_off) as told_late:
            let_settle(server)
            window = cut_off.window
            await stored(cut_off, *range(9))
            async with opened(server.url, seconds=seconds) as reporter:
                await stored(reporter, *range(12))
                proxy.refuse = True
                await asyncio.to_thread(proxy.cut)
                async with telling(reporter):
                    await until(lambda: server.reports().get(name_of(window)) == 12)
            async with opened(server.url, seconds=seconds) as newcomer, telling(newcomer) as told:
                ask(server, "FLUSHALL")
                with Log() as log:
                    await log.wait_for("Redis is back")
                proxy.refuse = False
                await until(lambda: told and told_late)
                assert server.reports().get(name_of(window), 12) == 12
                assert {told.get(window, 12), told_late.get(window, 12)} == {12}
                assert sum(count for start, count in stream(server).items() if start > window) == 0
                assert ids(server) == set()

    play(test())


def test_a_report_that_came_while_the_stream_was_rebuilt_is_not_lost(server: servers.Redis) -> None:
    """Windows that end while Redis settles are reported behind those that are put back."""

    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            let_settle(server)
            await until(lambda: len(told) >= 2)
            ask(server, "FLUSHALL")
            since = time.time()
            number = 0
            sent: dict[int, int] = {}
            while time.time() < since + 4:
                outcome = await add(store, number)
                if outcome in (dedup.NEW, dedup.STORED):
                    sent[number] = store.window
                number += 1
                await asyncio.sleep(0.01)
            await until(lambda: max(told, default=0) >= max(sent.values()))
            reports = stream(server)
            assert {start: reports[start] for start in told} == told
            assert [*reports] == [*range(min(reports), max(reports) + 1)]
            assert len(sent) <= sum(told.values()) <= number

    play(test())


# An entry of somebody else


def remedy(server: servers.Redis, text: str) -> None:
    """Do what a line of the log says."""
    commands = re.findall(COMMANDS, text)
    assert commands, text
    for command in commands:
        ask(server, *command.split())


COMMANDS = r"\b(?:RENAME verve:[a-z:]+ [a-z:]+|DEL verve:[a-z:]+)"
BARRED = rf"^ERROR verve\.store: .*{COMMANDS}"


@pytest.mark.parametrize(("first", "ahead"), [(False, 86_400), (True, 86_400), (False, 0)])
def test_an_entry_with_a_later_id_holds_the_reports_back(server: servers.Redis, first: bool, ahead: int) -> None:
    """The log says so once, and what to do; then all are told, in order, each with its own count."""

    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            if not first:
                let_settle(server)
                await until(lambda: told)
            with Log() as log:
                entry = f"{int(1000 * (time.time() + ahead))}-0"
                ask(server, "XADD", "verve:reports", entry, "hello", "world")
                before = set(told)
                sent: dict[int, int] = {}
                for number in range(3):
                    await until(lambda: store.window not in sent and time.time() % 1 < 0.5)
                    await stored(store, *range(10 * number, 11 * number + 1))
                    sent[store.window] = number + 1
                await log.wait_for(BARRED)
                await until(lambda: time.time() > max(sent) + 2)
                assert len(log.found("^ERROR")) == 1
                assert entry in log.found(BARRED)[0]
                assert re.search(COMMANDS, str(store.warnings))
                assert not store.unavailable
                late = [start for start in told if start > max(before, default=0)]
                assert late == [] or max(late) < min(sent), "nothing is told that can't be reported"
            async with opened(server.url, seconds=1) as newcomer, telling(newcomer):
                with Log() as log:
                    await until(lambda: re.search(COMMANDS, str(newcomer.warnings)))
                    await stored(newcomer, 10**6)
                    remedy(server, *newcomer.warnings)
                    await until(lambda: max(told, default=0) > max(sent) + 2)
                    await until(lambda: not store.warnings and not newcomer.warnings)
                    assert not log.found("^ERROR .*lacks")
            reports = stream(server)
            assert {start: reports.get(start) for start in sent} == sent
            assert [*reports] == [*range(min(reports), max(reports) + 1)]
            assert {start: reports[start] for start in told} == told
            assert sum(reports.values()) == sum(sent.values()) + 1

    play(test())


def test_another_such_entry_while_the_stream_is_built_anew(server: servers.Redis) -> None:
    """It is told of, too, and the reports that were brought back wait for it to be taken out."""

    def told_of(log: Log, times: int) -> bool:
        return len(log.found(BARRED)) == times

    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            let_settle(server)
            await until(lambda: len(told) > 1)
            with Log() as log:
                for times in (1, 2):
                    ask(server, "XADD", "verve:reports", f"{int(1000 * (time.time() + 5 * times))}-0", "hello", "world")
                    await until(partial(told_of, log, times))
                    remedy(server, *store.warnings)
                before = len(told)
                await until(lambda: len(told) > before + 1)
            assert {start: stream(server).get(start) for start in told} == told

    play(test())


def test_an_entry_with_a_later_id_is_told_on_readyz(server: servers.Redis) -> None:
    ask(server, "XADD", "verve:reports", f"{int(time.time() + 86_400)}000-0", "hello", "world")
    flags = "--redis-url", server.url, "--window", "1", "--admin", "127.0.0.1:0"
    with support.verve(*flags) as program:
        port = program.log.wait_for(r"for operators: http://127\.0\.0\.1:([0-9]+)$")[1]

        def ready() -> tuple[int, str]:
            with support.Client(("127.0.0.1", int(port))) as client:
                answer = client.ask(support.get("/readyz"))
                return answer.status, answer.body.decode()

        line = program.log.wait_for(rf" (ERROR verve\.store: .*{COMMANDS}.*)")[1]
        wait_until(lambda: re.search(COMMANDS, ready()[1]))
        assert ready()[0] == 200, "it takes ids"
        with support.Client(program.address) as client:
            assert client.ask(support.accept(1)).status == 200
        remedy(server, line)
        program.log.wait_for(r"unique ids in \S+: 1$")
        wait_until(lambda: not re.search(COMMANDS, ready()[1]))


def test_an_entry_between_two_reports_holds_none_back(server: servers.Redis) -> None:
    """Its id is that of a moment of a window that is reported already."""

    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            let_settle(server)
            await until(lambda: told)
            with Log() as log:
                ask(server, "XADD", "verve:reports", f"{max(told)}500-0", "hello", "world")
                window = store.window
                await until(lambda: max(told) > window)
                await stored(store, 1)
                assert log.lines == []

    play(test())


# A look at the windows


def test_an_operator_looks_while_another_instance_closes_the_window(
    server: servers.Redis, proxy: servers.Proxy
) -> None:
    async def test() -> None:
        seconds = window_with(1)
        async with (
            opened(proxy.url, seconds=seconds) as watched,
            opened(server.url, seconds=seconds) as other,
        ):
            let_settle(server)
            window = watched.window
            await stored(watched, 1, 2)
            await stored(other, 3)
            assert await watched.recent(60) == [(window, seconds, 3)]
            async with telling(other) as told:
                await until(lambda: told)
            assert watched.window == window, "it has not rolled"
            found = await watched.recent(60)
            assert found is not None
            assert found[:2] == [(window + seconds, seconds, 0), (window, seconds, 3)]
            await stored(other, 4)
            assert other.window == window + seconds

    play(test())


def test_a_window_that_was_opened_late_is_reported_though_redis_settles(server: servers.Redis) -> None:
    """An instance that takes it for over has not reported it: a loss must not have that taken for a report."""

    async def test() -> None:
        async with opened(server.url) as store:
            let_settle(server)
            await store.roll()
            late = store.window - 3 * store.seconds
            ask(server, "SADD", f"verve:{{{late}}}:ids", 1, 2, 3)
            ask(server, "EXPIRE", f"verve:{{{late}}}:ids", 1000)
            ask(server, "ZADD", "verve:open", late, f"{name_of(late)} {store.seconds}")
            ask(server, "DEL", "verve:mark")
            await until(lambda: not up(store))
            await until(lambda: up(store))
            let_settle(server)
            await store.roll()
            assert server.reports()[name_of(late)] == 3

    play(test())
