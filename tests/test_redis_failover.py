"""Another Redis is found where one was: a replica that lagged, a server that lived on by itself, another database.

What it holds is not what was acknowledged, and nothing on it need say so. Two instances come to it at different
moments, around the end of the window; its count holds what both had acknowledged all the same.
"""

import asyncio
import contextlib
import random
from collections.abc import Iterator, Sequence

import pytest
import servers
from stores import (
    BACK,
    KNOWN,
    Log,
    add,
    ask,
    at,
    back,
    gone,
    ids,
    let_settle,
    name_of,
    opened,
    play,
    seeds,
    stored,
    telling,
    until,
    window_with,
)

import dedup
import redis_store


@contextlib.contextmanager
def proxies_to(server: servers.Redis) -> Iterator[list[servers.Proxy]]:
    with servers.Proxy(server.port) as one, servers.Proxy(server.port) as other:
        yield [one, other]


async def moved(stores: Sequence[redis_store.RedisStore], proxies: Sequence[servers.Proxy], port: int) -> None:
    """Lead instances to another server, and wait until they take ids there."""
    since = asyncio.get_running_loop().time()
    with Log() as log:
        for proxy in proxies:
            proxy.lead_to(port)
            await asyncio.to_thread(proxy.cut)
        await until(lambda: len(log.found("Redis is back")) == len(stores))
    for store in stores:
        await back(store, since)


@seeds
def test_a_failback_to_a_server_that_lived_on(engine: str, seed: int) -> None:
    """It finds its own mark there, and its own part of the window's ids."""
    dice = random.Random(f"{seed} {engine}")

    async def test(first: servers.Redis, second: servers.Redis, proxies: list[servers.Proxy]) -> None:
        seconds = window_with(dice.uniform(3, 4))
        async with (
            opened(proxies[0].url, seconds=seconds) as one,
            opened(proxies[1].url, seconds=seconds) as other,
            telling(one) as told,
            telling(other) as told_by_other,
        ):
            window = one.window
            await asyncio.gather(stored(one, *range(40)), stored(other, *range(30, 100)))
            await moved((one, other), proxies, second.port)
            await asyncio.gather(stored(one, *range(100, 170)), stored(other, *range(160, 200)))
            await at(window + seconds - dice.uniform(0.1, 0.4))
            for proxy in proxies:
                proxy.refuse = True
            await asyncio.to_thread(second.kill)
            await asyncio.gather(gone(one), gone(other))
            for proxy in dice.sample(proxies, 2):
                proxy.lead_to(first.port)
                proxy.refuse = False
                await asyncio.sleep(dice.uniform(0.3, 0.9))
            await until(lambda: window in told and window in told_by_other)
            assert told[window] == told_by_other[window] == first.reports()[name_of(window)] == 200
            await asyncio.gather(stored(one, 1), stored(other, 2))

    with (
        servers.Redis(engine) as first,
        servers.Redis(engine) as second,
        proxies_to(first) as proxies,
    ):
        play(test(first, second, proxies))


@seeds
def test_two_databases_that_change_places_and_back(server: servers.Redis, seed: int) -> None:
    """All links stand meanwhile, but one instance takes longer than the other to see to it."""
    dice = random.Random(f"{seed} {server.engine}")

    async def test(proxies: list[servers.Proxy]) -> None:
        seconds = window_with(4)
        async with (
            opened(proxies[0].url, seconds=seconds) as one,
            opened(proxies[1].url, seconds=seconds) as other,
            telling(one) as told,
            telling(other) as told_by_other,
        ):
            window = one.window
            await asyncio.gather(stored(one, *range(40)), stored(other, *range(30, 100)))
            since = asyncio.get_running_loop().time()
            with Log() as log:
                ask(server, "SWAPDB", 0, 1)
                await until(lambda: len(log.found("Redis is back")) == 2)
            await asyncio.gather(back(one, since), back(other, since))
            await asyncio.gather(stored(one, *range(100, 170)), stored(other, *range(160, 200)))
            await at(window + seconds - dice.uniform(0, 0.4))
            late = dice.choice(proxies)
            late.refuse = True
            ask(server, "SWAPDB", 0, 1)
            await asyncio.to_thread(late.cut)
            await at(window + seconds + dice.uniform(0.3, 0.9))
            late.refuse = False
            await until(lambda: window in told and window in told_by_other)
            assert told[window] == told_by_other[window] == server.reports()[name_of(window)] == 200

    with proxies_to(server) as proxies:
        play(test(proxies))


@seeds
def test_two_databases_that_change_places_as_a_window_is_closed(server: servers.Redis, seed: int) -> None:
    """Who closes it there misses nothing, but another instance stored ids while the places were changed."""
    dice = random.Random(f"{seed} {server.engine}")

    async def test(proxies: list[servers.Proxy]) -> None:
        seconds = window_with(3)
        async with (
            opened(proxies[0].url, seconds=seconds) as punctual,
            opened(proxies[1].url, seconds=seconds) as late,
            telling(punctual) as told,
            telling(late) as told_by_late,
        ):
            window = punctual.window
            await asyncio.gather(stored(punctual, *range(40)), stored(late, *range(30, 100)))
            with Log() as log:
                ask(server, "SWAPDB", 0, 1)
                await until(lambda: len(log.found("Redis is back")) == 2)
            await stored(late, *range(100, 200))
            proxies[1].refuse = True
            await asyncio.to_thread(proxies[1].cut)
            proxies[0].hold_at(b"XADD")  # which is in ROLL
            await until(lambda: punctual.window > window)
            ask(server, "SWAPDB", 0, 1)
            proxies[0].release()
            await at(window + seconds + dice.uniform(0.3, 0.9))
            proxies[1].refuse = False
            await until(lambda: window in told and window in told_by_late)
            assert told[window] == told_by_late[window] == server.reports()[name_of(window)] == 200

    with proxies_to(server) as proxies:
        play(test(proxies))


def test_databases_that_change_places_within_one_window(server: servers.Redis) -> None:
    """Each has a mark by then, and is told from the other by that before the window's end."""

    async def test() -> None:
        async with opened(server.url) as store:
            await stored(store, 0)
            for number in range(1, 4):
                with Log() as log:
                    ask(server, "SWAPDB", 0, 1)
                    await log.wait_for("Redis is back")
                assert ids(server) == {*range(number)}
                await stored(store, number)
            assert ids(server) == {*range(4)}

    play(test())


@seeds
@pytest.mark.parametrize("timeouts", [(1.0, 1.0), (1.0, 2.5), (2.5, 1.0)])
def test_a_silent_link_beside_one_that_was_reset(engine: str, seed: int, timeouts: tuple[float, float]) -> None:
    """A replica that lagged is promoted, and one instance hears of it later than the other."""
    dice = random.Random(f"{seed} {engine}")

    async def test(primary: servers.Redis, replica: servers.Redis, proxies: list[servers.Proxy]) -> None:
        await asyncio.to_thread(replica.follow, primary)
        async with (
            opened(proxies[0].url, seconds=2, timeout=timeouts[0]) as one,
            opened(proxies[1].url, seconds=2, timeout=timeouts[1]) as other,
            telling(one) as told,
            telling(other) as told_by_other,
        ):
            let_settle(primary)
            await until(lambda: told and told_by_other)  # both have just heard of Redis, and need not for a second
            window = one.window
            await asyncio.gather(stored(one, *range(50)), stored(other, *range(50, 100)))
            assert ask(primary, "WAIT", 1, 1000) == 1
            replica.lag(primary)
            await asyncio.gather(stored(one, *range(100, 150)), stored(other, *range(150, 752)))
            last = max(one.window, other.window)
            await asyncio.sleep(dice.uniform(0, 0.2))
            proxies[1].silence()
            await asyncio.to_thread(primary.kill)
            await asyncio.to_thread(replica.lead)
            for proxy in proxies:
                proxy.lead_to(replica.port)
            await asyncio.to_thread(proxies[0].cut)
            asked = add(other, 10**6) if dice.random() < 0.5 else None
            await until(lambda: last in told and last in told_by_other)
            assert asked is None or await asked in (dedup.LOST, dedup.DOWN)
            for each in told, told_by_other:
                assert sum(count for start, count in each.items() if start >= window) == 752
            await until(lambda: name_of(last) in replica.reports())
            assert sum(count for name, count in replica.reports().items() if name >= name_of(window)) == 752

    with (
        servers.Redis(engine) as primary,
        servers.Redis(engine) as replica,
        proxies_to(primary) as proxies,
    ):
        play(test(primary, replica, proxies))


def test_a_link_that_falls_silent_is_noticed_though_nobody_asks(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        async with opened(proxy.url, timeout=1.0) as store:
            await stored(store, 1)
            with Log() as log:
                since = asyncio.get_running_loop().time()
                await asyncio.to_thread(proxy.silence)
                await log.wait_for("Redis is away, requests fail: no answer within 1 s")
                await log.wait_for("Redis is back")
                assert asyncio.get_running_loop().time() - since < 1 + BACK
            await stored(store, 2)
            assert ids(server) == {1, 2}

    play(test())


def test_a_primary_that_was_demoted_is_left_for_the_new_one(engine: str) -> None:
    """Its links stand, and it answers: that it is a replica. The address leads to another by then."""

    async def test(old: servers.Redis, new: servers.Redis, proxies: list[servers.Proxy]) -> None:
        await asyncio.to_thread(new.follow, old)
        async with opened(proxies[0].url) as store:
            await stored(store, 1, 2)
            assert ask(old, "WAIT", 1, 1000) == 1
            new.lead()
            ask(old, "REPLICAOF", "127.0.0.1", new.port)
            for proxy in proxies:
                proxy.lead_to(new.port)
            since = asyncio.get_running_loop().time()
            while await add(store, 3) not in KNOWN:
                assert asyncio.get_running_loop().time() - since < BACK
                await asyncio.sleep(0.01)
            assert ids(new) == {1, 2, 3}

    with servers.Redis(engine) as old, servers.Redis(engine) as new, proxies_to(old) as proxies:
        play(test(old, new, proxies))
