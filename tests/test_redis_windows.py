"""Windows in Redis: closed once over the fleet, in order, by Redis's clock; and all of one length."""

import asyncio
import contextlib
import itertools
import re
import subprocess
import time
from types import SimpleNamespace

import pytest
import servers
import support
from stores import (
    FIRST,
    LAST,
    NEVER,
    add,
    ask,
    first_engine,
    ids,
    kinds,
    last_engine,
    let_settle,
    more,
    name_of,
    opened,
    play,
    sets,
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

# Windows


@pytest.mark.parametrize(("engine", "warm"), [(FIRST, False), (LAST, True)])
def test_a_batch_that_comes_too_late_is_stored_in_the_open_window(
    server: servers.Redis, proxy: servers.Proxy, warm: bool
) -> None:
    async def test() -> None:
        seconds = window_with(1.5)
        async with (
            opened(server.url, seconds=seconds, timeout=NEVER) as punctual,
            opened(proxy.url, seconds=seconds, timeout=NEVER) as late,
        ):
            let_settle(server)
            window = late.window
            await stored(punctual, 1)
            if warm:
                await stored(late, 2)
            proxy.hold()
            outcome = add(late, 3)
            async with telling(punctual) as told:
                await until(lambda: told)
                assert told == {window: 2 if warm else 1}
                proxy.release()
                assert await outcome == dedup.STORED
                assert ids(server) == {3}
                closed = server.reports()
                await stored(punctual, 3)
                following = window + seconds
                assert [key for key in sets(server) if str(following) in key]
                assert late.window == following
                assert server.reports() == closed == {name_of(window): 2 if warm else 1}

    play(test())


@first_engine
def test_a_process_frozen_over_the_end_of_a_window(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--window", "1"
    with (
        support.verve(*flags) as one,
        support.verve(*flags) as other,
        support.Client(one.address) as client,
        support.Client(other.address) as another,
    ):
        assert client.ask(support.accept(1)).status == 200
        one.freeze()
        client.send(*map(support.accept, range(100, 150)))
        assert another.ask(support.accept(2)).status == 200
        wait_until(lambda: sum(server.reports().values()) == 2)
        closed = server.reports()
        one.thaw()
        assert {response.status for response in client.receive(50)} == {200}
        last = name_of(int(time.time()))
        for program in one, other:
            program.log.wait_for(f"unique ids in {last}: ")
        reports = server.reports()
        assert sum(reports.values()) == 52
        assert {window: reports[window] for window in closed} == closed
        windows = re.findall(r"unique ids in (\S+): ", "\n".join(one.log.all))
        assert windows == [window for window in reports if windows[0] <= window <= windows[-1]], (
            "it told what it missed"
        )
        assert last in windows


@last_engine
def test_windows_left_open_are_told_by_the_first_that_is_back(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        left: dict[int, int] = {}
        async with opened(proxy.url, seconds=1) as store:  # whose windows nobody rolls
            for count in 2, 3:
                await until(lambda: time.time() > store.window + 2.1 or not left)  # so one without ids lies between
                await stored(store, *range(10 * count, 11 * count))
                left[store.window] = count
            proxy.refuse = True  # so that it ends as one that is killed
            proxy.cut()
        first, second = left
        assert second > first + 1
        await until(lambda: time.time() > second + 1)
        assert server.reports() == {}
        async with (
            opened(server.url, seconds=1) as store,
            opened(server.url, seconds=1) as other,
            telling(store) as told,
            telling(other),
        ):
            await until(lambda: max(told, default=0) > second)
        reports = {start_of(window): count for window, count in server.reports().items()}
        assert {start: count for start, count in reports.items() if start <= second} == left
        assert [*reports] == sorted(reports)
        assert {start: count for start, count in told.items() if start <= second} == left

    play(test())


@first_engine
def test_an_empty_window_that_nobody_lived_through_is_not_told(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            let_settle(server)
            await until(lambda: told)
        left = store.window
        await until(lambda: time.time() > left + 1.1)
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            await until(lambda: told)
        assert min(told) > left
        assert name_of(left) not in server.reports()

    play(test())


def test_many_windows_left_open(server: servers.Redis) -> None:
    """As they would be found after hours: more than are closed by one script."""

    async def test() -> None:
        now = int(time.time()) // 60 * 60
        left = {
            start: start // 60 % 7 + 1 for start in range(now - 60 * 2 * redis_store.windows.ROLL_LIMIT - 600, now, 60)
        }
        with server.client() as client, client.pipeline() as pipe:
            for start, count in left.items():
                pipe.zadd("verve:open", {f"{name_of(start)} 60": start})
                pipe.sadd(f"verve:{{{start}}}:ids", *range(count))
            pipe.execute()
        async with opened(server.url, seconds=60) as store, telling(store) as told:
            await until(lambda: len(told) >= len(left))
            assert {start: told[start] for start in left} == left
            assert {start_of(window): count for window, count in server.reports().items()} == told
            assert [*map(start_of, server.reports())] == sorted(told)
            assert ids(server) == set()
            await stored(store, 1)

    play(test())


@first_engine
def test_a_closed_window_that_is_still_indexed_is_not_told_again(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            await stored(store, 1, 2)
            await until(lambda: sum(told.values()) == 2)
            reports = server.reports()
            for start in told:
                ask(server, "ZADD", "verve:open", start, f"{name_of(start)} 1")
            seen = len(told)
            await until(lambda: len(told) > seen)
            assert {window: server.reports()[window] for window in reports} == reports
            await stored(store, 3)
            assert len(ask(server, "ZRANGE", "verve:open", 0, -1)) <= 2

    play(test())


def test_a_clock_that_is_wrong(server: servers.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is Redis's: one process thinks that it is another hour, one that it is another year."""

    async def test() -> None:
        seconds = window_with(2)
        stores = []
        async with contextlib.AsyncExitStack() as stack:
            for error in 0.0, 3600.5, -3e7:
                with monkeypatch.context() as patch:
                    clock = SimpleNamespace(
                        time=lambda error=error: time.time() + error,
                        monotonic=lambda error=error: time.monotonic() + error,
                    )
                    patch.setattr(dedup, "time", clock)
                    stores.append(await stack.enter_async_context(opened(server.url, seconds=seconds)))
                    await stored(stores[-1], len(stores), 99)
            assert len({store.window for store in stores}) == 1
            assert len(sets(server)) == 1
            assert ids(server) == {1, 2, 3, 99}

    play(test())


# Redis's clock, plus the seconds that a test puts into the key `error`.
WITH_ERROR = """
import redis_store.alone, redis_store.windows
for module, name in (redis_store.windows, "ROLL"), (redis_store.windows, "BRING"), (redis_store.alone, "ARRIVE"):
    script = getattr(module, name)
    clock = "local clock = redis.call('TIME')"
    assert script.count(clock) == 1
    wrong = "\\nclock[1] = tostring(clock[1] + tonumber(redis.call('GET', 'error') or 0))"
    setattr(module, name, script.replace(clock, clock + wrong))
"""


@last_engine
def test_the_clock_of_redis_is_set(server: servers.Redis) -> None:
    """Forward: the windows slept through are reported. Back: the open one goes on until the clock has passed it."""
    with (
        support.verve("--redis-url", server.url, "--window", "1", prefix=support.patched(WITH_ERROR)) as program,
        support.Client(program.address) as client,
    ):
        numbers = itertools.count()

        def counted_until(name: str) -> None:
            """Have ids counted until the window of that name, or a newer one, is reported."""
            while max(server.reports(), default="") < name:
                assert client.ask(support.accept(next(numbers))).status == 200

        start = int(time.time())
        counted_until(name_of(start))
        for error, newest in ((100, 100), (60, 100), (120, 122)):
            ask(server, "SET", "error", error)
            for _ in range(200):
                assert client.ask(support.accept(next(numbers))).status == 200
            counted_until(name_of(start + newest))
        client.close()
        assert program.stop() == 0
    starts = [start_of(name) for name in server.reports()]
    assert starts == list(range(starts[0], starts[-1] + 1))
    assert sum(server.reports().values()) + len(ids(server)) == next(numbers)


@last_engine
@pytest.mark.parametrize("error", ["+1h", "-400d"])
def test_a_program_whose_clock_is_wrong(server: servers.Redis, error: str) -> None:
    flags = "--redis-url", server.url, "--window", "1"
    support.need("faketime", "faketime")
    # `faketime` itself stays between: it would get the signals. So its variables are set without it.
    environ = subprocess.run(["faketime", "-f", error, "env"], capture_output=True, text=True, check=True).stdout
    fake = "env", *re.findall("^(?:LD_PRELOAD|FAKETIME)=.*", environ, re.MULTILINE)
    with support.verve(*flags) as right, support.verve(*flags, prefix=fake) as wrong:
        with support.Client(right.address) as client, support.Client(wrong.address) as another:
            for number in range(10):
                assert client.ask(support.accept(number)).status == 200
                assert another.ask(support.accept(number)).status == 200
        right.log.wait_for(r"unique ids in \S+: [1-9]")
        window, count = wrong.log.wait_for(r"unique ids in (\S+): ([1-9]\d*)$").groups()
        right.log.wait_for(f"unique ids in {window}: {count}$")
        reports = server.reports()
        assert reports[window] == int(count)
        assert all(abs(start_of(window) - time.time()) < 60 for window in reports)


def test_a_window_taken_out_of_the_stream_by_a_consumer(server: servers.Redis) -> None:
    """One who deletes what he has read must not stop the fleet."""

    async def test() -> None:
        async with opened(server.url, seconds=1) as one, opened(server.url, seconds=1) as other:
            window = other.window
            await stored(one, 1)
            await stored(other, 2)
            async with telling(one):
                await until(lambda: server.reports().get(name_of(window)) == 2)
                assert ask(server, "XDEL", "verve:reports", f"{window}000-0") == 1
                async with telling(other) as told:
                    await until(lambda: not up(other) or max(told, default=0) > window)
                    assert up(other), other.unavailable
                    await stored(one, 3)
                    await stored(other, 4)
                    assert name_of(window) not in server.reports()

    play(test())


def test_an_empty_window_is_not_skipped_when_the_timer_is_early(server: servers.Redis, proxy: servers.Proxy) -> None:
    """Asked to roll just before the edge by its own clock, just after it by Redis's."""

    async def test() -> None:
        async with opened(proxy.url, seconds=window_with(0.5)) as store:
            window = store.window
            proxy.hold()
            roll = asyncio.create_task(store.roll())
            await asyncio.sleep(0)
            assert store.window == window
            await until(lambda: time.time() > window + store.seconds)
            proxy.release()
            told = dict(await roll)
            if not told:
                async with telling(store) as later:
                    await more(later, 0)
                    told = later
            assert min(told) == window
            assert server.reports()[name_of(window)] == 0

    play(test())


@first_engine
def test_no_window_is_skipped(server: servers.Redis) -> None:
    """Several instances with prefixes of their own, since a roll is only sometimes early."""

    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            all_told = []
            for number in range(20):
                store = await stack.enter_async_context(opened(server.url, seconds=1, prefix=f"prefix{number}"))
                all_told.append(await stack.enter_async_context(telling(store)))
            await until(lambda: min(map(len, all_told)) >= 4)
            for told in all_told:
                assert [*told] == [*range(min(told), max(told) + 1)]

    play(test())


# Another length of windows


@first_engine
def test_another_length_of_windows_is_refused(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url, seconds=3600) as store:
            await stored(store, 1)
            for _ in range(2):
                refused = await asyncio.to_thread(support.run, "--redis-url", server.url, "--window", "60")
                assert refused.returncode == 1
                (line,) = refused.stderr.splitlines()
                assert "3600" in line
                assert "60" in line
                assert "verve" in line
            await stored(store, 2)
            assert ids(server) == {1, 2}

    play(test())
    (key,) = [key for key in kinds(server) if (kinds(server)[key] == "string" and ask(server, "GET", key)) == "3600"]
    assert 3600 < ask(server, "TTL", key) <= 3 * 3600, "it outlives a window, and not by much"
    with (
        support.verve("--redis-url", server.url, "--window", "60", "--key-prefix", "other") as program,
        support.Client(program.address) as client,
    ):
        assert client.ask(support.accept(1)).status == 200
    ask(server, "PEXPIRE", key, 1)
    with (
        support.verve("--redis-url", server.url, "--window", "60") as program,
        support.Client(program.address) as client,
    ):
        assert client.ask(support.accept(1)).status == 200


@first_engine
def test_another_length_that_comes_first_after_a_loss_is_put_right_by_hand(
    server: servers.Redis, proxy: servers.Proxy
) -> None:
    """Nothing is closed meanwhile: the others go on asking to come back."""

    async def test() -> None:
        seconds = window_with(3)
        async with opened(proxy.url, seconds=seconds) as store, telling(store) as told:
            window = store.window
            await stored(store, *range(20))
            proxy.refuse = True
            await asyncio.to_thread(proxy.cut)
            await until(lambda: not up(store))
            ask(server, "FLUSHALL")
            async with opened(server.url, seconds=1) as other, telling(other) as told_otherwise:
                proxy.refuse = False
                await until(lambda: "count windows of 1 s" in store.unavailable)
                await until(lambda: time.time() > window + seconds + 1)
                assert "count windows of 1 s" in store.unavailable
            assert not told
            assert not told_otherwise
            ask(server, "DEL", "verve:window")
            await until(lambda: window in told)
            assert told[window] == server.reports()[name_of(window)] == 20
            await stored(store, 20)

    play(test())


def test_another_length_of_windows_is_refused_when_redis_comes_late(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url, seconds=3600):
            pass
        with servers.Proxy(server.port) as proxy:
            proxy.refuse = True
            store = redis_store.RedisStore(proxy.url, "verve", 60, 10**6, NEVER)
            await store.start(0.1)
            proxy.refuse = False
            with pytest.raises(dedup.StoreError, match="3600"):
                await store.failure()
            await store.stop(0.5)

    play(test())
