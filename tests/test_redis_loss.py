"""Redis loses its data, or a part of it: what was acknowledged and what was reported is brought back."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import servers
from stores import (
    NEVER,
    Log,
    add,
    back,
    first_engine,
    gone,
    ids,
    last_engine,
    name_of,
    opened,
    play,
    start_of,
    stored,
    telling,
    until,
    window_with,
)

import dedup

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
            await until(lambda: one.up and other.up)
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
            await until(lambda: store.up)
            await stored(store, 3, 4)
            await until(lambda: told)
            assert told == {window: 4}

    with servers.Redis(engine, persist=True) as server:
        play(test(server))


# Redis loses a part of its data, or all, while links stand or some instances take long to be back


class Slow(dedup.RedisStore):
    """A store that needs long to bring its ids back."""

    async def _trip(self, commands: Sequence[Any], deadline: float = 0.0) -> list[Any]:
        if self.why and self._mark:
            await asyncio.sleep(0.02)
        return await super()._trip(commands, deadline)


@first_engine
def test_an_instance_that_brings_many_ids_back_is_waited_for(
    server: servers.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "REPLAY_CHUNK", 1)

    async def test() -> None:
        slow = Slow(server.url, "verve", window_with(2), 10**6, NEVER)
        try:
            await slow.start(servers.DEADLINE)
            async with opened(server.url, seconds=slow.seconds) as quick, telling(slow) as told, telling(quick):
                window = slow.window
                await stored(quick, 0)
                await stored(slow, *range(1, 201))  # at 20 ms each they take 4 s, SETTLE is less
                await asyncio.to_thread(server.kill)
                await asyncio.gather(gone(quick), gone(slow))
                await asyncio.to_thread(server.start)
                await until(lambda: window in told)
                assert told[window] == server.reports()[name_of(window)] == 201
        finally:
            await slow.stop()

    play(test())


@last_engine
def test_a_redis_that_comes_back_with_old_data_waits_for_all(
    server: servers.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a failover to a replica that lagged behind, or a restart from a snapshot."""
    monkeypatch.setattr(dedup, "ARRIVE", dedup.ARRIVE.replace(str(dedup.SETTLE), "5"))  # a busy machine's pauses

    async def test(proxy: servers.Proxy) -> None:
        seconds = window_with(2)
        async with (
            opened(server.url, seconds=seconds) as one,
            opened(proxy.url, seconds=seconds) as other,
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
            await asyncio.to_thread(server.kill)
            await asyncio.gather(gone(one), gone(other))
            await asyncio.to_thread(server.start)
            await until(lambda: one.up and one.window > window)
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
                await until(lambda: store.up)
                assert log.found("Redis has lost reports; those that were put back: [3-9]")
            count = len(told)
            await until(lambda: len(told) >= count + 1)
            reports = {start_of(window): count for window, count in server.reports().items()}
            assert {start: reports[start] for start in told} == told
            assert [*reports] == [*range(min(reports), max(reports) + 1)]

    play(test())
