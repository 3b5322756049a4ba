"""The store in Redis when nothing fails: what is counted, what is told, and where Redis is found.

Most tests drive a `RedisStore` in an event loop of their own, against a real server; the others run the whole program.
What becomes of it all when something fails is in the other files, test_redis_*.py.
"""

import asyncio
import re
import time
from typing import Any

import servers
import support
from stores import (
    EDGES,
    SLACK,
    add,
    ask,
    calls,
    first_engine,
    ids,
    kinds,
    more,
    name_of,
    opened,
    play,
    sets,
    start_of,
    stored,
    telling,
    until,
)

import dedup
import redis_store.batches

# What is counted


def test_ids_are_stored_once(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url) as one, opened(server.url) as other:
            for store in one, other, one:
                await stored(store, *EDGES)
            assert ids(server) == {*EDGES}
            await stored(other, 5, 5, 5)
            assert ids(server) == {*EDGES, 5}

    play(test())


def test_the_count_of_a_process_is_of_distinct_ids(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url) as store:
            await stored(store, 5, 5, 6, 5)
            assert store.count == 2

    play(test())


def test_all_ids_of_a_turn_make_one_trip(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        async with opened(proxy.url) as store:
            await stored(store, *range(3000))
            assert calls(server, "sadd") == 1
            scripts = calls(server, "eval")
            proxy.stall()
            first = add(store, -1)
            await until(lambda: -1 in ids(server))
            rest = [add(store, number) for number in range(-1000, -1)]  # while the link is taken
            proxy.flow()
            assert {*await asyncio.gather(first, *rest)} == {dedup.STORED}
            assert calls(server, "sadd") == 3
            assert calls(server, "eval") == scripts, "a window is opened once"
            assert ids(server) == {*range(-1000, 3000)}

    play(test())


def test_a_known_id_makes_no_trip(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url) as store:
            await stored(store, *EDGES)
            for number in EDGES * 10:
                assert store.add(number, never) == dedup.DUPLICATE
            await stored(store, 5)
            assert calls(server, "sadd") == 2

    def never(outcome: int) -> None:
        raise AssertionError(outcome)

    play(test())


def test_as_many_ids_may_wait_as_allowed_and_no_more(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        async with opened(proxy.url) as store:
            proxy.stall()
            first = add(store, -1)
            await until(lambda: ids(server) == {-1})
            waiting = [add(store, number) for number in range(redis_store.batches.MAX_WAITING)]
            assert not any(told.done() for told in waiting)
            for _ in range(3):
                assert add(store, -2).result() == dedup.BUSY
            proxy.flow()
            assert {*await asyncio.gather(first, *waiting)} == {dedup.STORED}
            assert ids(server) == {*range(-1, redis_store.batches.MAX_WAITING)}
            assert calls(server, "sadd") == 1 + redis_store.batches.MAX_WAITING / redis_store.batches.MAX_BATCH

    play(test())


def test_beyond_max_ids_ids_are_only_in_redis(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url, max_ids=2) as store:
            for number in 1, 2, 3, 4:
                await stored(store, number)
            assert [add(store, number).done() for number in (1, 2, 3, 4)] == [True, True, False, False]
            await stored(store, 5)
            assert store.count == 2
            assert ids(server) == {1, 2, 3, 4, 5}

    play(test())


# What is told


def after_now() -> str:
    """Return the name of the next window of a second."""
    return name_of(int(time.time()) + 1)


@first_engine
def test_windows_are_told_by_every_instance_and_once_in_the_stream(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--window", "1"
    with support.verve(*flags) as one, support.verve(*flags) as other:
        first = other.log.wait_for("^(.{19})[0-9.]*Z .* listening")[1] + "Z"  # from here on, both live
        one.log.wait_for(r"unique ids in \S+: 0$")
        with support.Client(one.address) as client, support.Client(other.address) as another:
            for number in 7, 8, 7:
                assert client.ask(support.accept(number)).status == 200
                assert another.ask(support.accept(number)).status == 200
            assert another.ask(support.accept(9)).status == 200
        quiet = after_now()
        for program in one, other:
            program.log.wait_for(f"unique ids in {quiet}: 0$")
        with support.Client(one.address) as client:  # so that an open window is among the keys
            assert client.ask(support.accept(7)).status == 200
        over = server.reports()
        keys = kinds(server)
        lifetimes = {key: ask(server, "TTL", key) for key in keys}
        last = after_now()
        for program in one, other:
            program.log.wait_for(f"unique ids in {last}: 0$")
        assert {one.stop(), other.stop()} == {0}

        entries: Any = ask(server, "XRANGE", "verve:reports", "-", "+")
        for entry, fields in entries:
            start = start_of(fields["window"])
            assert entry == f"{start}000-0"
            assert fields == {"window": name_of(start), "seconds": "1", "count": fields["count"]}
        reports = server.reports()
        starts = [*map(start_of, reports)]
        assert starts == [*range(starts[0], starts[-1] + 1)], "a window is missing"
        wanted = {window: count for window, count in reports.items() if first <= window <= last}
        assert 4 <= sum(wanted.values()) <= 8, "3 distinct ids, unless an edge came between, and one later"
        assert 0 in wanted.values()
        for program in one, other:
            lines = [re.search(r"INFO verve\.reporter: unique ids in (\S+): (\d+)$", line) for line in program.log.all]
            told = [(line[1], int(line[2])) for line in lines if line]
            assert [(window, count) for window, count in told if first <= window <= last] == [*wanted.items()]

        closed = [key for key in keys if any(str(start_of(window)) in key for window in over)]
        assert closed
        assert {keys[key] for key in closed} == {"string"}, "the ids of closed windows are gone"
        assert all(key.startswith("verve:") for key in keys)
        assert {key for key, lifetime in lifetimes.items() if lifetime == -1} == {"verve:reports"}, "all others expire"


@first_engine
def test_redis_does_not_grow_from_window_to_window(server: servers.Redis) -> None:
    async def test() -> None:
        ask(server, "CONFIG", "SET", "lazyfree-lazy-server-del", "no")  # else Redis would do it by itself
        used: list[int] = []
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            for turn in range(3):
                await stored(store, *range(turn << 40, (turn << 40) + 9000))
                closed = len(told)
                await more(told, closed)
                await until(lambda: ask(server, "INFO", "memory")["lazyfree_pending_objects"] == 0)
                await until(lambda: not sets(server))
                used.append(ask(server, "INFO", "memory")["used_memory"])
                freed = ask(server, "INFO", "memory")["lazyfreed_objects"]
                assert freed > turn, "a set is freed in the background, where nobody waits for it"
        assert used[-1] < used[0] + 100_000, f"{used}; the ids of one window take some 500,000 bytes"
        assert sum(told.values()) == 3 * 9000

    play(test())


@first_engine
def test_the_stream_is_kept_short(server: servers.Redis) -> None:
    async def test() -> None:
        with server.client() as client, client.pipeline() as pipe:
            for number in range(1, 10_500):
                fields = {"window": name_of(number), "seconds": "1", "count": "0"}
                pipe.xadd("verve:reports", fields, id=f"{number}000-0")
            pipe.execute()
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            await until(lambda: told)
            length = ask(server, "XLEN", "verve:reports")
            assert 10_080 <= length <= 10_080 + 200, "trimmed by whole nodes of 100 entries"
            assert max(map(start_of, server.reports())) == max(told)
            assert time.time() - max(told) - 1 < 2 + SLACK, "told at most 2 s after the window's end"

    play(test())
