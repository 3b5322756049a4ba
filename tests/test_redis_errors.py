"""Redis answers with an error: it is told in one line, and ids are taken again when it is over."""

import asyncio
import re
import shutil
import tempfile

import pytest
import servers
from stores import (
    AT_RUN_TIME,
    BACK,
    KNOWN,
    NEVER,
    Log,
    add,
    ask,
    back,
    gone,
    ids,
    last_engine,
    long_window,
    opened,
    play,
    sets,
    stored,
    until,
)

import dedup
import redis_store


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", AT_RUN_TIME)
def test_an_error_of_redis(server: servers.Redis, name: str, warm: bool) -> None:
    trouble = AT_RUN_TIME[name]

    async def test() -> None:
        with Log() as log:
            async with opened(server.url) as store:
                if warm:
                    await stored(store, 1)
                trouble.cause(server)
                outcomes = [await add(store, number) for number in range(2, 50)]
                assert {*outcomes} <= {dedup.REFUSED, dedup.LOST, dedup.DOWN}
                assert len(log.lines) == 1, log.lines
                assert re.search(trouble.advice, log.lines[0])
                await asyncio.gather(*[add(store, number) for number in range(2, 50)])
                assert len(log.lines) == 1, log.lines
                trouble.cure(server)
                since = asyncio.get_running_loop().time()
                while await add(store, 100) not in KNOWN:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
                assert asyncio.get_running_loop().time() - since < BACK
                await back(store, since)
                assert ids(server) >= {100}
            assert len(log.lines) == 2, "one line a change"

    play(test())


@pytest.mark.parametrize("key", ["reports", "open", "window"])
def test_a_foreign_key_in_the_way(server: servers.Redis, key: str) -> None:
    async def test() -> None:
        ask(server, "LPUSH", f"verve:{key}", "foreign")
        with Log() as log:
            store = redis_store.RedisStore(server.url, "verve", long_window(), 10**6, NEVER)
            while not log.found("key-prefix"):
                assert await add(store, 1) in (dedup.DOWN, dedup.REFUSED)
                await asyncio.sleep(0.01)
            ask(server, "DEL", f"verve:{key}")
            await back(store, asyncio.get_running_loop().time())
            await stored(store, 1)
            await store.stop(0.5)
        assert len(log.found("key-prefix")) == 1
        assert len(log.lines) <= 2

    play(test())


def test_a_foreign_key_in_place_of_a_window(server: servers.Redis) -> None:
    async def test() -> None:
        with Log() as log:
            async with opened(server.url) as store:
                key = f"verve:{{{store.window}}}:ids"
                ask(server, "SET", key, "foreign")
                for number in range(30):
                    assert await add(store, number) == dedup.REFUSED
                assert len(log.lines) == 1
                assert "key-prefix" in log.lines[0]
                ask(server, "DEL", key)
                await stored(store, 1)
                assert sets(server) == {key: {1}}

    play(test())


def test_redis_that_cannot_save(engine: str) -> None:
    async def test(server: servers.Redis) -> None:
        with Log() as log:
            async with opened(server.url) as store:
                await stored(store, 1)
                shutil.rmtree(folder)
                ask(server, "BGSAVE")
                await until(lambda: ask(server, "INFO", "persistence")["rdb_last_bgsave_status"] != "ok")
                for number in range(2, 30):
                    assert await add(store, number) == dedup.REFUSED
                assert len(log.lines) == 1
                assert "can't save" in log.lines[0]
                ask(server, "CONFIG", "SET", "stop-writes-on-bgsave-error", "no")
                await stored(store, 2)
                assert ids(server) == {1, 2}

    folder = tempfile.mkdtemp(prefix="verve-redis-")
    with servers.Redis(engine, "--save", "3600 1", "--dir", folder) as server:
        play(test(server))


@last_engine
def test_redis_that_loads_its_data(engine: str) -> None:
    async def test(server: servers.Redis) -> None:
        with server.client() as client, client.pipeline() as pipe:
            for number in range(200):
                pipe.set(f"other:{number}", "x" * 1100)
            pipe.execute()
        with Log() as log:
            async with opened(server.url) as store:
                await stored(store, 1)
                ask(server, "SAVE")
                await asyncio.to_thread(server.kill)
                await gone(store)
                start = asyncio.create_task(asyncio.to_thread(server.start))
                await log.wait_for("loading")
                assert add(store, 2).result() == dedup.DOWN
                await start
                await back(store, asyncio.get_running_loop().time())
                await stored(store, 2)
                assert ids(server) == {1, 2}
        assert len(log.found("loading")) == 1

    options = "--key-load-delay", "5000", "--loading-process-events-interval-bytes", "1024", "--rdbcompression", "no"
    with servers.Redis(engine, *options) as server:
        play(test(server))


def test_redis_that_may_evict_ids_is_warned_of(server: servers.Redis) -> None:
    async def test() -> None:
        for policy, memory, warned in (
            ("allkeys-lru", 10**9, True),
            ("volatile-ttl", 10**9, True),
            ("allkeys-lru", 0, False),
            ("noeviction", 10**9, False),
        ):
            ask(server, "CONFIG", "SET", "maxmemory-policy", policy)
            ask(server, "CONFIG", "SET", "maxmemory", memory)
            with Log() as log:
                async with opened(server.url) as store:
                    await stored(store, 1)
            assert len(log.found(f"WARNING .*noeviction.*{policy}")) == warned
            assert len(log.lines) == warned

    play(test())
