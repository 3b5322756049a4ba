"""Redis has no memory left: the end of the window makes room, whatever became of the links meanwhile."""

import asyncio
import random
import re
import time

import pytest
import servers
from stores import (
    BACK,
    KNOWN,
    SLACK,
    Log,
    add,
    ask,
    at,
    cut_all,
    name_of,
    opened,
    play,
    seeds,
    stored,
    telling,
    until,
    up,
    used,
    window_with,
)

import dedup
import redis_store

MANY = 20_000  # ids, which take more than a million bytes
MARGIN = 300_000  # bytes; a link that ends gives some back


def fill(server: servers.Redis) -> None:
    """Let Redis have no memory for more."""
    ask(server, "CONFIG", "SET", "maxmemory", used(server) - MARGIN)


def missing(log: Log) -> list[str]:
    """Return the lines that say that ids are missing from a count."""
    return log.found(r"^ERROR .*the count of \S+ lacks")


async def taken_again(store: redis_store.RedisStore, number: int) -> None:
    """Wait until an id is taken, which it is soon."""
    loop = asyncio.get_running_loop()
    since = loop.time()
    while await add(store, number) not in KNOWN:
        assert loop.time() - since < BACK
        await asyncio.sleep(0.01)


def test_memory_that_is_full_is_freed_by_the_end_of_the_window(server: servers.Redis) -> None:
    """A window that fills the memory is closed and told like any other, which makes room for the next."""

    async def test() -> None:
        async with opened(server.url, seconds=window_with(1)) as store, telling(store) as told:
            await stored(store, 1, 2, 3)
            window = store.window
            ask(server, "CONFIG", "SET", "maxmemory", 1)
            assert await add(store, 4) in (dedup.REFUSED, dedup.LOST)
            await until(lambda: window in told)
            assert told[window] == 3
            assert time.time() - window - store.seconds < 2 + SLACK
            assert server.reports()[name_of(window)] == 3
            ask(server, "CONFIG", "SET", "maxmemory", 0)
            await until(lambda: up(store))
            await stored(store, 5)

    play(test())


@seeds
def test_full_memory_and_a_cut_of_all_links(server: servers.Redis, seed: int) -> None:
    """Nothing is lost: the set stands in Redis. So the window is told in time, whole, and makes room."""
    dice = random.Random(f"{seed} {server.engine}")

    async def test() -> None:
        seconds = window_with(1.5)
        async with (
            opened(server.url, seconds=seconds) as one,
            opened(server.url, seconds=seconds) as other,
            telling(one) as told,
            telling(other) as told_by_other,
        ):
            window = one.window
            await asyncio.gather(stored(one, *range(MANY // 2)), stored(other, *range(MANY // 3, MANY)))
            fill(server)
            await at(window + seconds - dice.uniform(0.05, 1.0))
            for _ in range(dice.randint(1, 3)):
                cut_all(server)
                await asyncio.sleep(dice.uniform(0, 0.3))
            with Log() as log:
                await until(lambda: window in told and window in told_by_other)
                assert time.time() - window - seconds < 2 + SLACK
                assert told[window] == told_by_other[window] == server.reports()[name_of(window)] == MANY
                await asyncio.gather(taken_again(one, -1), taken_again(other, -2))
                assert not missing(log)

    play(test())


@seeds
def test_an_instance_comes_up_though_its_ids_find_no_memory(server: servers.Redis, seed: int) -> None:
    """It refuses ids as Redis does, says so, and brings the others back when there is room."""
    dice = random.Random(f"{seed} {server.engine}")

    async def test() -> None:
        seconds = window_with(4)
        async with (
            opened(server.url, seconds=seconds) as one,
            opened(server.url, seconds=seconds) as other,
            telling(one) as told,
            telling(other),
        ):
            window = one.window
            await asyncio.gather(stored(one, *range(MANY // 2)), stored(other, *range(MANY // 3, MANY)))
            empty_and_full(server)
            with Log() as log:
                cut_all(server)
                for store in one, other:
                    while await add(store, 10**9) != dedup.REFUSED:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                    assert "out of memory" in store.unavailable
                    assert store.warnings
                await asyncio.sleep(dice.uniform(0, 1))
                assert window not in told
                ask(server, "DEL", "filler")
                await until(lambda: not one.warnings and not other.warnings)
                await asyncio.gather(stored(one, -1), stored(other, -2))
                await until(lambda: window in told)
                assert told[window] == server.reports()[name_of(window)] == MANY + 2
                assert not missing(log)

    play(test())


@seeds
def test_ids_that_never_find_memory_are_told_as_missing(server: servers.Redis, seed: int) -> None:
    """The window is closed all the same, and its count is not taken for a whole one without a word."""
    dice = random.Random(f"{seed} {server.engine}")

    async def test() -> None:
        seconds = window_with(dice.uniform(1.5, 4))
        async with opened(server.url, seconds=seconds) as store, telling(store) as told:
            window = store.window
            await stored(store, *range(MANY))
            empty_and_full(server)
            with Log() as log:
                cut_all(server)
                await until(lambda: window in told)
                assert time.time() - window - seconds < 2 + SLACK + 3.5, "a retry must not keep the settling alive"
                assert told[window] == server.reports()[name_of(window)] == 0
                (line,) = missing(log)
                assert re.search(rf"\b{MANY}\b", line)
                assert name_of(window) in line
                ask(server, "DEL", "filler")
                await taken_again(store, -1)
                await until(lambda: not store.warnings)
                assert len(missing(log)) == 1

    play(test())


def empty_and_full(server: servers.Redis) -> None:
    """Have Redis lose all that is ours, at a moment at which others fill its memory."""
    ask(server, "SET", "filler", "x" * 3_000_000)
    with server.client() as client, client.pipeline(transaction=True) as pipe:
        pipe.delete(*client.keys("verve:*"))
        pipe.config_set("maxmemory", 3_000_000)
        pipe.execute()


@pytest.mark.parametrize("before", [0, 1])
def test_full_memory_does_not_keep_a_new_instance_from_coming_up(server: servers.Redis, before: int) -> None:
    """It has nothing to bring back, and closes what is over like any other."""

    async def test() -> None:
        seconds = window_with(1.5)
        async with opened(server.url, seconds=seconds) as store:
            window = store.window
            await stored(store, *range(before))
        ask(server, "CONFIG", "SET", "maxmemory", 1)
        async with opened(server.url, seconds=seconds) as store, telling(store) as told:
            assert await add(store, 7) == dedup.REFUSED
            await until(lambda: window in told)
            assert told[window] == before

    play(test())
