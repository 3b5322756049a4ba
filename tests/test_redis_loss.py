"""Redis loses its data, or a part of it: what was acknowledged and what was reported is brought back."""

import asyncio
import contextlib
import random
import time

import pytest
import servers
from stores import (
    NEVER,
    SLACK,
    TIMEOUT,
    Log,
    add,
    ask,
    at,
    back,
    first_engine,
    gone,
    ids,
    kinds,
    last_engine,
    let_settle,
    name_of,
    opened,
    play,
    seeds,
    start_of,
    stored,
    telling,
    until,
    up,
    window_with,
)

import dedup
import redis_store.replay

# Redis loses its data


@last_engine
def test_ids_are_stored_again_before_new_ones_are_taken(server: servers.Redis) -> None:
    async def test() -> None:
        many = range(30_000)
        async with opened(server.url) as store:
            for number in 0, 10_000, 20_000:
                await stored(store, *range(number, number + 10_000))
            server.kill()
            await gone(store)
            server.start()
            since = asyncio.get_running_loop().time()
            first = add(store, -1)
            while first.done():  # it is DOWN for as long as anything is missing
                await asyncio.sleep(0)
                first = add(store, -1)
            assert ids(server) >= {*many}
            assert await first == dedup.STORED
            await back(store, since)
            assert ids(server) == {*many, -1}

    play(test())


@last_engine
def test_a_count_survives_the_loss_of_all_data(server: servers.Redis) -> None:
    async def test() -> None:
        seconds = window_with(2)
        async with (
            opened(server.url, seconds=seconds) as one,
            opened(server.url, seconds=seconds) as other,
            telling(one) as told,
            telling(other) as told_by_other,
        ):
            window = one.window
            await stored(one, 1, 2, 3)
            await stored(other, 3, 4)
            await asyncio.to_thread(server.kill)
            await asyncio.gather(gone(one), gone(other))
            await asyncio.to_thread(server.start)
            await until(lambda: up(one) and up(other))
            await stored(other, 1, 5)
            await until(lambda: window in told and window in told_by_other)
            assert told[window] == told_by_other[window] == server.reports()[name_of(window)] == 5

    play(test())


@first_engine
def test_data_lost_over_the_end_of_a_window(server: servers.Redis) -> None:
    """What was answered `ok` is counted in its window, even if that is over when Redis comes back empty."""

    async def test() -> None:
        async with opened(server.url, seconds=window_with(1)) as store, telling(store) as told:
            window = store.window
            await stored(store, 1, 2, 3)
            await asyncio.to_thread(server.kill)
            await until(lambda: store.window > window)
            await asyncio.to_thread(server.start)
            await until(lambda: window in told)
            assert told[window] == server.reports()[name_of(window)] == 3

    play(test())


@last_engine
def test_a_restart_that_loses_nothing_changes_no_count(engine: str) -> None:
    async def test(server: servers.Redis) -> None:
        async with opened(server.url, seconds=window_with(1.5)) as store, telling(store) as told:
            window = store.window
            await stored(store, 1, 2, 3)
            await asyncio.to_thread(server.kill)
            await gone(store)
            await asyncio.to_thread(server.start)
            await until(lambda: up(store))
            await stored(store, 3, 4)
            await until(lambda: told)
            assert told == {window: 4}

    with servers.Redis(engine, persist=True) as server:
        play(test(server))


@first_engine
def test_a_count_is_not_shown_before_its_ids_are_brought_back(
    server: servers.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store.replay, "CHUNK", 1)

    async def test() -> None:
        shown: set[int] = set()
        async with opened(server.url, timeout=NEVER) as store:
            await stored(store, *range(200))
            await asyncio.to_thread(server.kill)
            await gone(store)
            assert await store.recent(1) is None
            starting = asyncio.create_task(asyncio.to_thread(server.start))
            while not up(store):
                shown |= {count for _, _, count in await store.recent(1) or ()}
                await asyncio.sleep(0)
            await starting
            assert shown <= {200}
            assert await store.recent(1) == [(store.window, store.seconds, 200)]

    play(test())


# Redis loses a part of its data, or all, while links stand or some instances take long to be back


@first_engine
def test_an_instance_that_brings_many_ids_back_is_waited_for(
    server: servers.Redis, proxy: servers.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store.replay, "CHUNK", 1)

    async def test() -> None:
        seconds = window_with(2)
        async with (
            opened(server.url, seconds=seconds) as quick,
            opened(proxy.url, seconds=seconds) as slow,
            telling(slow) as told,
            telling(quick),
        ):
            window = slow.window
            await stored(quick, 0)
            await stored(slow, *range(1, 201))
            proxy.pause = 0.03  # so they take 6 s, for which none of them has to be waited for
            await asyncio.to_thread(server.kill)
            await asyncio.gather(gone(quick), gone(slow))
            await asyncio.to_thread(server.start)
            await until(lambda: window in told)
            assert told[window] == server.reports()[name_of(window)] == 201

    play(test())


@last_engine
def test_a_redis_that_comes_back_with_old_data_waits_for_all(server: servers.Redis) -> None:
    """As after a failover to a replica that lagged behind, or a restart from a snapshot."""

    async def test(proxy: servers.Proxy) -> None:
        seconds = window_with(2)
        async with (
            opened(server.url, seconds=seconds, timeout=2 * TIMEOUT) as one,
            opened(proxy.url, seconds=seconds, timeout=2 * TIMEOUT) as other,
            telling(one) as told,
            telling(other),
        ):
            window = one.window
            await stored(one, 1, 2)
            with server.client() as client:
                client.save()
            await stored(one, 3)
            await stored(other, 4)
            proxy.refuse = True
            await at(window + seconds - 0.5)  # so that little of what Redis waits for has passed when that is over
            await asyncio.to_thread(server.kill)
            await asyncio.gather(gone(one), gone(other))
            await asyncio.to_thread(server.start)
            await until(lambda: up(one) and one.window > window)
            proxy.refuse = False
            await until(lambda: window in told)
            assert told[window] == server.reports()[name_of(window)] == 4

    with servers.Proxy(server.port) as proxy:
        play(test(proxy))


@first_engine
def test_data_deleted_while_all_links_stand(server: servers.Redis) -> None:
    async def test() -> None:
        seconds = window_with(1)
        async with (
            opened(server.url, seconds=seconds) as one,
            opened(server.url, seconds=seconds) as other,
            telling(one) as told,
            telling(other),
        ):
            window = one.window
            await stored(one, 1, 2)
            await stored(other, 3)
            with server.client() as client:
                client.flushall()
            await stored(one, 2, 4)
            with Log() as log:
                await until(lambda: window in told)
                assert log.found("Redis is away, requests fail: it has lost its data")
            assert told[window] == server.reports()[name_of(window)] == 4

    play(test())


@first_engine
def test_reports_taken_out_on_purpose_are_not_put_back(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        async with opened(proxy.url, seconds=1) as store, telling(store) as told:
            let_settle(server)
            await until(lambda: len(told) >= 2)
            with server.client() as client, Log() as log:
                client.xtrim("verve:reports", maxlen=0)
                await asyncio.to_thread(proxy.cut)
                await log.wait_for("Redis is back")
                assert not log.found("put back")
            count = len(told)
            await until(lambda: len(told) > count)
            assert len(server.reports()) < len(told), "they stay out"

    play(test())


@last_engine
def test_reports_that_redis_has_lost_are_put_back(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            let_settle(server)
            await until(lambda: len(told) >= 1)
            with server.client() as client:
                client.save()
            await stored(store, 1, 2, 3)
            count = len(told)
            await until(lambda: len(told) >= count + 3)
            await asyncio.to_thread(server.kill)
            await gone(store)
            with Log() as log:
                await asyncio.to_thread(server.start)
                await log.wait_for("Redis has lost reports; those that were put back: [3-9]")
            count = len(told)
            await until(lambda: len(told) >= count + 1)
            reports = {start_of(window): count for window, count in server.reports().items()}
            assert {start: reports[start] for start in told} == told
            assert [*reports] == [*range(min(reports), max(reports) + 1)]

    play(test())


# Redis loses the open window alone


@seeds
@pytest.mark.parametrize("by", ["nobody", "one of them", "a newcomer"])
def test_the_set_of_the_open_window_deleted_by_hand(server: servers.Redis, seed: int, by: str) -> None:
    """Whoever begins it anew, if anybody does: it is noticed at the window's end, before that is closed."""
    dice = random.Random(f"{seed} {server.engine}")

    async def test() -> None:
        seconds = window_with(1)
        async with (
            contextlib.AsyncExitStack() as stack,
            opened(server.url, seconds=seconds) as one,
            opened(server.url, seconds=seconds) as other,
            telling(one) as told,
            telling(other) as told_by_other,
        ):
            window = one.window
            await stored(one, *range(900))
            await stored(other, *range(600, 1500))
            await at(window + seconds - dice.uniform(0.2, 0.6))
            ask(server, "DEL", f"verve:{{{window}}}:ids")
            if by == "one of them":
                await stored(dice.choice([one, other]), 1500)
            elif by == "a newcomer":  # it opens the window properly, so only the number of ids shows what is missing
                newcomer = await stack.enter_async_context(opened(server.url, seconds=seconds))
                await stored(newcomer, 1500)
            await until(lambda: window in told and window in told_by_other)
            assert told[window] == server.reports()[name_of(window)] == 1500 + (by != "nobody")
            await asyncio.gather(stored(one, -1), stored(other, -2))
            assert ids(server) == {-1, -2}

    play(test())


# What is brought back


@first_engine
def test_several_windows_that_wait_are_all_brought_back(server: servers.Redis) -> None:
    """Redis is emptied again before it has settled: more than one window is over and not closed."""

    async def test() -> None:
        async with (
            opened(server.url, seconds=1) as one,
            opened(server.url, seconds=1) as other,
            telling(one) as told,
            telling(other),
        ):
            ask(server, "FLUSHALL")
            await until(lambda: not (up(one) and up(other)))
            sent: dict[int, int] = {}
            for number in range(3):
                await until(lambda: up(one) and up(other) and one.window not in sent and time.time() % 1 < 0.6)
                await stored(one, *range(10 * number, 10 * number + 4))
                await stored(other, *range(10 * number + 2, 10 * number + 5 + number))
                sent[one.window] = 5 + number
                if number:
                    ask(server, "FLUSHALL")
                    await until(lambda: not (up(one) and up(other)))
            await until(lambda: max(told, default=0) >= max(sent))
            assert {start: told[start] for start in sent} == sent
            assert {start_of(window): count for window, count in server.reports().items()}.items() >= told.items()

    play(test())


@last_engine
def test_all_that_is_brought_back_expires(server: servers.Redis) -> None:
    """But for the stream."""

    async def test() -> None:
        async with opened(server.url) as store:
            await stored(store, *range(3000))
            with Log() as log:
                ask(server, "FLUSHALL")
                await until(lambda: not up(store))
                await log.wait_for("Redis is back")
            assert ids(server) == {*range(3000)}
            lasting = {key for key in kinds(server) if ask(server, "TTL", key) == -1}
            assert lasting <= {"verve:reports"}

    play(test())


@last_engine
def test_redis_emptied_again_and_again_does_not_end_the_telling(server: servers.Redis) -> None:
    """Each loss has it wait for all, but not for ever."""

    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            let_settle(server)
            await until(lambda: told)
            for number in range(3):
                await stored(store, number)
                ask(server, "FLUSHALL")
                await until(lambda: not up(store))
                await until(lambda: up(store))
            count, since = len(told), time.time()
            await until(lambda: len(told) > count)
            assert time.time() - since < 3.5 + SLACK
            assert sum(told.values()) <= 3
            await until(lambda: max(told) > since)
            assert sum(told.values()) == 3

    play(test())
