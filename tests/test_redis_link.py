"""The link to Redis fails: it is cut at the place that matters, stalls, or loses what it carries, by a proxy."""

import asyncio
import random
import socket
import time

import pytest
import servers
from stores import (
    AWAY,
    EDGES,
    KNOWN,
    NEVER,
    SLACK,
    TIMEOUT,
    Log,
    add,
    ask,
    back,
    first_engine,
    ids,
    last_engine,
    long_window,
    opened,
    play,
    sets,
    start_of,
    stored,
    telling,
    until,
    up,
    window_with,
)

import dedup
import redis_store.scripts

# The link fails


def test_a_link_cut_before_the_command(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        async with opened(proxy.url) as store:
            await stored(store, 1)
            proxy.refuse = True
            proxy.set_plan("before_command")
            assert {*await asyncio.gather(add(store, 2), add(store, 3))} == {dedup.LOST}
            assert proxy.done.is_set()
            assert not up(store)
            assert add(store, 4).result() == dedup.DOWN
            seen = proxy.connections
            await until(lambda: proxy.connections > seen)
            assert add(store, 4).result() == dedup.DOWN
            proxy.refuse = False
            await back(store, asyncio.get_running_loop().time())
            await stored(store, 5)
            assert ids(server) == {1, 5}, "what was lost is not sent again"
            await stored(store, 2, 3)

    play(test())


@pytest.mark.parametrize("before", [0, 1])
def test_a_batch_under_way_over_the_end_of_its_window_is_brought_back(
    server: servers.Redis, proxy: servers.Proxy, before: int
) -> None:
    async def test() -> None:
        seconds = window_with(1)
        timeout = seconds - time.time() % seconds + TIMEOUT  # it is under way until the window is over
        async with opened(proxy.url, seconds=seconds, timeout=timeout) as store:
            await stored(store, *range(before))
            window = store.window
            proxy.stall()
            batch = [add(store, number) for number in (100, 101)]
            await until(lambda: len(ids(server)) == before + 2)
            await until(lambda: time.time() > window + store.seconds)
            async with telling(store) as told:
                await until(lambda: store.window > window)
                proxy.refuse = True
                proxy.flow()
                assert {*await asyncio.gather(*batch)} == {dedup.STORED}
                ask(server, "FLUSHALL")
                await asyncio.to_thread(proxy.cut)
                proxy.refuse = False
                await until(lambda: window in told)
                assert told[window] == before + 2

    play(test())


@pytest.mark.parametrize("plan", ["before_reply", "inside_reply"])
def test_a_link_cut_after_the_command(server: servers.Redis, proxy: servers.Proxy, plan: str) -> None:
    async def test() -> None:
        async with opened(proxy.url) as store:
            await stored(store, 1)
            proxy.stall()
            lost = [add(store, number) for number in (2, 3)]
            await until(lambda: ids(server) == {1, 2, 3})
            lost += [add(store, number) for number in (4, 5)]  # these wait for the link, or are on their way, too
            proxy.refuse = True
            proxy.set_plan(plan)
            proxy.flow()
            assert [*await asyncio.gather(*lost)] == [dedup.LOST] * 4
            assert proxy.done.is_set()
            assert add(store, 6).result() == dedup.DOWN
            proxy.refuse = False
            await back(store, asyncio.get_running_loop().time())
            await stored(store, 6)
            assert {1, 2, 3, 6} <= ids(server) <= {1, 2, 3, 4, 5, 6}, "stored, but not known to be"
            assert not add(store, 2).done(), "not known to be stored"

    play(test())


@first_engine
def test_a_batch_whose_reply_was_lost_is_not_sent_to_the_next_window(
    server: servers.Redis, proxy: servers.Proxy
) -> None:
    async def test() -> None:
        async with opened(proxy.url, seconds=window_with(1.5)) as store, telling(store) as told:
            window = store.window
            proxy.refuse = True
            proxy.set_plan("before_reply")
            assert await add(store, 1) == dedup.LOST
            await until(lambda: store.window > window)
            proxy.refuse = False
            await until(lambda: window in told)
            assert told[window] == 1
            await stored(store, 2)
            assert [*sets(server).values()] == [{2}]

    play(test())


@pytest.mark.parametrize("how", ["reset", "closed"])
def test_an_idle_link_cut(server: servers.Redis, proxy: servers.Proxy, how: str) -> None:
    async def test() -> None:
        async with opened(proxy.url if how == "reset" else server.url) as store:
            await stored(store, 1)
            for number in 2, 3:
                with Log() as log:
                    since = asyncio.get_running_loop().time()
                    if how == "reset":
                        await asyncio.to_thread(proxy.cut)
                    else:
                        await asyncio.to_thread(ask, server, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                    outcome = await add(store, number)
                    assert outcome in (*KNOWN, dedup.LOST, dedup.DOWN)
                    await log.wait_for("Redis is back")
                    await back(store, since)
                await stored(store, number)
            assert ids(server) == {1, 2, 3}

    play(test())


@first_engine
@pytest.mark.parametrize("how", ["reset", "closed"])
def test_an_idle_link_cut_and_nobody_asks(server: servers.Redis, proxy: servers.Proxy, how: str) -> None:
    async def test() -> None:
        async with opened(proxy.url if how == "reset" else server.url) as store:
            await stored(store, 1)
            with Log() as log:
                since = asyncio.get_running_loop().time()
                if how == "reset":
                    await asyncio.to_thread(proxy.cut)
                else:
                    await asyncio.to_thread(ask, server, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await log.wait_for("Redis is back")
                await back(store, since)
            await stored(store, 2)

    play(test())


@first_engine
def test_a_link_that_stalls(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        now = asyncio.get_running_loop().time
        with Log() as log:
            async with opened(proxy.url, timeout=0.5) as store:
                await stored(store, 1)
                proxy.stall()
                started = now()
                lost = [add(store, 2)]
                await until(lambda: ids(server) == {1, 2})
                lost.append(add(store, 3))
                assert {*await asyncio.gather(*lost)} == {dedup.LOST}
                assert 0.4 < now() - started < 0.5 + SLACK
                for number in range(100):
                    assert add(store, number).result() == dedup.DOWN
                seen = proxy.connections
                await until(lambda: proxy.connections >= seen + 2)  # an attempt has failed by then
                assert add(store, 4).result() == dedup.DOWN
                proxy.flow()
                await back(store, now())
                await stored(store, 5)
                assert {1, 2, 5} <= ids(server) <= {1, 2, 3, 5}, "the third may have been on its way, too"
        assert len(log.found("Redis is away")) == len(log.found("Redis is back")) == 1

    play(test())


@last_engine
def test_a_reply_that_came_while_the_process_was_busy_is_in_time(server: servers.Redis, proxy: servers.Proxy) -> None:
    timeout = 1.0

    class Busy(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            proxy.flow()
            time.sleep(1.5 * timeout)  # as thousands of requests take that come at once

    async def test() -> None:
        ear, mouth = socket.socketpair()
        with mouth:
            transport, _ = await asyncio.get_running_loop().create_connection(Busy, sock=ear)
            await held_up(mouth)
            transport.close()

    async def held_up(mouth: socket.socket) -> None:
        async with opened(proxy.url, timeout=timeout) as store:
            await stored(store, 1)
            links = proxy.connections
            proxy.stall()
            outcome = add(store, 2)
            await until(lambda: 2 in ids(server))
            mouth.send(b"x")
            assert await outcome in KNOWN
            assert (up(store), proxy.connections) == (True, links)

    play(test())


@last_engine
def test_nobody_waits_longer_than_the_time_out_behind_others(server: servers.Redis, proxy: servers.Proxy) -> None:
    """A batch that is answered slowly, then a roll that is not: what waits for both has one time-out."""
    timeout = 2.0

    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with opened(proxy.url, timeout=timeout) as store:
            await stored(store, 1)
            proxy.stall()
            slow = add(store, 2)
            slow.add_done_callback(lambda _: proxy.stall())
            await until(lambda: 2 in ids(server))
            waits = add(store, 3)
            started = loop.time()
            roll = asyncio.create_task(store.roll())
            loop.call_later(0.85 * timeout, proxy.flow)
            await asyncio.wait([slow])
            proxy.stall()
            outcome = await waits
            assert slow.result() == dedup.LOST or outcome != dedup.LOST or loop.time() - started < 1.5 * timeout
            proxy.flow()
            await roll

    play(test())


@last_engine
def test_an_id_that_finds_its_window_closed_waits_no_longer_than_the_time_out(
    server: servers.Redis, proxy: servers.Proxy
) -> None:
    """A slow answer that it is closed, then none to the question which one is open."""
    timeout = 2.0

    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with opened(proxy.url, timeout=timeout) as store:
            await stored(store, 1)
            key = f"verve:{{{store.window}}}:ids"
            ask(server, "DEL", key)
            ask(server, "SET", key, "closed")
            proxy.hold_at(redis_store.scripts.ROLL[-100:].encode())
            proxy.stall()
            loop.call_later(0.9 * timeout, proxy.flow)
            started = loop.time()
            assert await add(store, 2) == dedup.LOST
            assert loop.time() - started < 1.5 * timeout
            proxy.release()

    play(test())


@last_engine
def test_replies_that_come_byte_by_byte(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        proxy.drip = True
        async with opened(proxy.url, seconds=window_with(1)) as store, telling(store) as told:
            window = store.window
            await stored(store, *EDGES)
            await stored(store, 10, 11)
            await until(lambda: told)
            assert told[window] == len(EDGES) + 2 == server.reports()[store.keys.member(window).split()[0]]
            assert sum(told.values()) == told[window]
            await stored(store, 12)
            assert ids(server) == {12}

    play(test())


def test_connections_that_are_refused(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        proxy.refuse = True
        with Log() as log:
            store = redis_store.RedisStore(proxy.url, "verve", long_window(), 10**6, NEVER)
            await store.start(0.2)
            for number in range(100):
                assert add(store, number).result() == dedup.DOWN
            await until(lambda: proxy.connections > 3)
            assert add(store, 1).result() == dedup.DOWN
            assert len(log.found(AWAY)) == 1
            proxy.refuse = False
            await back(store, asyncio.get_running_loop().time())
            await stored(store, 1)
            await store.stop(0.5)

    play(test())


@last_engine
@pytest.mark.parametrize("direction", ["commands", "replies"])
def test_a_network_that_swallows_all_is_found_whole_within_two_seconds(
    server: servers.Redis, proxy: servers.Proxy, direction: str
) -> None:
    """Whatever the time-out of requests; it was away for so long that attempts have become rare."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with opened(proxy.url, timeout=30) as store:
            proxy.swallow = direction
            proxy.cut()
            await until(lambda: proxy.connections >= 5)  # of which three took a second each
            proxy.swallow = ""  # just missed by the latest
            await back(store, loop.time())
            await stored(store, 1)

    play(test())


@first_engine
def test_a_start_without_redis_is_told_in_one_line_and_its_coming_in_another(
    server: servers.Redis, proxy: servers.Proxy
) -> None:
    async def test() -> None:
        proxy.refuse = True
        with Log() as log:
            store = redis_store.RedisStore(proxy.url, "verve", long_window(), 10**6, NEVER)
            await until(lambda: proxy.connections > 3)
            assert len(log.found(AWAY)) == len(log.lines) == 1
            proxy.refuse = False
            await until(lambda: up(store))
            await store.stop(0.5)
        assert len(log.lines) == 2, log.lines

    play(test())


def test_a_store_that_is_down_can_be_stopped(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        for hang in False, True:
            proxy.refuse = not hang
            if hang:
                proxy.stall()
            store = redis_store.RedisStore(proxy.url, "verve", long_window(), 10**6, NEVER)
            await store.start(0.1)
            await store.stop(0.5)
        proxy.flow()

    play(test())


def test_a_store_settles_what_waits_when_it_is_stopped(server: servers.Redis) -> None:
    async def test() -> None:
        store = redis_store.RedisStore(server.url, "verve", long_window(), 10**6, NEVER)
        await store.start(servers.DEADLINE)
        told = [add(store, number) for number in range(30_000)]
        await store.stop(0.5)
        assert {future.result() for future in told} == {dedup.STORED}
        assert ids(server) == {*range(30_000)}

    play(test())


@last_engine
@pytest.mark.parametrize("seed", [1])
def test_links_cut_at_random(server: servers.Redis, seed: int) -> None:
    """Two instances, ids that come once each, links that break all the time: nothing told `ok` is missing."""
    dice = random.Random(seed)
    ok: list[int] = []
    lost: list[int] = []

    async def load(store: redis_store.RedisStore, first: int, stop: asyncio.Event) -> None:
        number = first
        while not stop.is_set():
            numbers = range(number, number := number + dice.randint(1, 50))
            outcomes = await asyncio.gather(*[add(store, each) for each in numbers])
            for each, outcome in zip(numbers, outcomes, strict=True):
                if outcome in KNOWN:
                    ok.append(each)
                elif outcome == dedup.LOST:
                    lost.append(each)
                else:
                    assert outcome == dedup.DOWN
            await asyncio.sleep(0.001)  # a pause for the machine

    async def test(*proxies: servers.Proxy) -> None:
        stop = asyncio.Event()
        async with (
            opened(proxies[0].url, seconds=1) as one,
            opened(proxies[1].url, seconds=1) as other,
            telling(one) as told,
            telling(other) as told_by_other,
        ):
            loads = [asyncio.create_task(load(store, n << 40, stop)) for n, store in enumerate((one, other))]
            for _ in range(15):
                proxy = dice.choice(proxies)
                plan = dice.choice(["cut", "before_command", "before_reply", "inside_reply"])
                if plan == "cut":
                    await asyncio.to_thread(proxy.cut)
                else:
                    proxy.set_plan(plan)
                    await asyncio.to_thread(proxy.done.wait, 5)
            stop.set()
            await asyncio.gather(*loads)
            await until(lambda: up(one) and up(other))
            last = max(one.window, other.window)
            await until(lambda: last in told and last in told_by_other)
        reports = {start_of(window): count for window, count in server.reports().items()}
        assert ok
        assert len(ok) <= sum(reports.values()) <= len(ok) + len(lost)
        for each in told, told_by_other:
            assert each == {start: count for start, count in reports.items() if start in each}
            assert [*each] == [*range(min(each), max(each) + 1)], "every instance tells every window"

    with servers.Proxy(server.port) as proxy, servers.Proxy(server.port) as another:
        play(test(proxy, another))


@last_engine
def test_a_queue_that_is_never_empty_is_not_taken_for_a_redis_that_hangs(
    server: servers.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store.batches, "MAX_BATCH", 50)

    async def test() -> None:
        timeout = SLACK / 2
        async with opened(server.url, timeout=timeout) as store:
            loop = asyncio.get_running_loop()
            end = loop.time() + 1.5 * timeout
            number = 0
            outcomes: list[int] = []
            while loop.time() < end:
                while store.queued < 200:
                    number += 1
                    assert store.add(number, outcomes.append) is None
                await asyncio.sleep(0)
            await until(lambda: len(outcomes) == number)
            assert set(outcomes) == {dedup.STORED}

    play(test())
