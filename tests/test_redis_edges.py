"""Moments at the edge of a window, and of what the scripts decide there, that no other test comes upon by itself."""

import asyncio
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
    first_engine,
    ids,
    last_engine,
    let_settle,
    name_of,
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
import redis_store.batches
import redis_store.outbox
from redis_store.scripts import ARRIVE, ROLL, Keys


def test_a_first_batch_that_comes_after_the_end(server: servers.Redis, proxy: servers.Proxy) -> None:
    """The window is told empty meanwhile; what comes late counts in the next, and not nowhere."""

    async def test() -> None:
        seconds = window_with(1)
        async with (
            opened(proxy.url, seconds=seconds, timeout=NEVER) as late,
            opened(server.url, seconds=seconds, timeout=NEVER) as punctual,
        ):
            let_settle(server)
            window = late.window
            proxy.hold_at(b"MULTI")
            outcome = add(late, 1)
            async with telling(punctual) as told:
                await until(lambda: told)
                proxy.release()
                assert await outcome == dedup.STORED
            assert told == {window: 0}
            assert sets(server) == {late.keys.ids(window + seconds): {1}}
            assert server.reports() == {name_of(window): 0}

    play(test())


@last_engine
def test_a_late_batch_of_a_window_whose_set_was_deleted(server: servers.Redis, proxy: servers.Proxy) -> None:
    """It does not begin the set anew, which nobody would count: the window is closed though it holds nothing."""

    async def test() -> None:
        seconds = window_with(1)
        async with (
            opened(proxy.url, seconds=seconds, timeout=NEVER) as late,
            opened(server.url, seconds=seconds, timeout=NEVER) as punctual,
        ):
            let_settle(server)
            window = late.window
            await stored(late, 1)
            ask(server, "DEL", late.keys.ids(window))
            proxy.hold_at(b"SADD")
            outcome = add(late, 2)
            async with telling(punctual) as told:
                await until(lambda: window in told)
                proxy.release()
                assert await outcome == dedup.STORED
            assert sets(server) == {late.keys.ids(window + seconds): {2}}

    play(test())


@first_engine
def test_a_successor_tells_the_empty_windows_since_its_predecessor(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url, seconds=1):
            let_settle(server)
        first = int(time.time()) - 7
        async with opened(server.url, seconds=1, resume=first) as store, telling(store) as told:
            await until(lambda: max(told, default=0) > first + 7)
        assert [*told] == [*range(first, max(told) + 1)]
        assert [*map(start_of, server.reports())] == [*told]

    play(test())


@last_engine
def test_ids_with_an_endpoint_do_not_make_those_before_wait_longer(
    server: servers.Redis, proxy: servers.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store.batches, "MAX_TRIPS", 1)
    timeout = 2.0

    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with opened(proxy.url, timeout=timeout) as store:
            await stored(store, 1)
            proxy.stall()
            slow = add(store, 2)
            await until(lambda: 2 in ids(server))
            waits = add(store, 3)
            for number in range(4, 20):
                store.add(number, lambda _: None, lambda *_: None)
                newest = loop.time()
                await asyncio.sleep(0.045 * timeout)
            proxy.hold_at(b"EVAL")  # the batch of them all
            proxy.flow()
            assert await slow == dedup.STORED
            assert await waits == dedup.LOST
            assert loop.time() < newest + timeout, "the time-out is that of the oldest"
            proxy.release()

    play(test())


# The lease of the webhook, and where it begins


def test_the_lease_is_kept_by_who_holds_it_and_given_up_by_nobody_else(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url) as one, opened(server.url) as other:
            first, second = redis_store.outbox.StreamOutbox(one), redis_store.outbox.StreamOutbox(other)
            assert await first.keep()
            ask(server, "PEXPIRE", "verve:webhook", 300)
            assert await first.keep()
            assert ask(server, "PTTL", "verve:webhook") > 1000 * redis_store.outbox.LEASE / 2, "renewed"
            assert not await second.keep(), "taken from a living holder"
            await second.close()
            assert not await second.keep(), "given up by one who does not hold it"
            await first.close()
            assert await second.keep()

    play(test())


@first_engine
def test_the_webhook_begins_with_the_window_that_is_open_when_it_is_first_configured(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            let_settle(server)
            await until(lambda: told)
        async with opened(server.url, seconds=1) as store:
            window = store.window
            box = redis_store.outbox.StreamOutbox(store)
            async with telling(store):
                name, *_ = await box.next()
            assert window - 1 <= start_of(name) <= window, "the first that is closed from now on"

    play(test())


# What the scripts decide


def test_settling_ends_though_somebody_still_brings_ids_back(server: servers.Redis) -> None:
    """It is prolonged by whoever brings ids back, but not beyond a bound."""
    keys = Keys("verve", 60)

    def settling() -> float:
        return float(ask(server, "GET", "verve:settling"))

    def arrive(seen: str, patience: float, most: float) -> str:
        mark, settles, _ = ask(server, *keys.run(ARRIVE, "run", seen, str(patience), str(most)))
        assert settles
        return str(mark)

    mark = arrive("", 1.0, 60.0)
    before = settling()
    arrive(mark, 1.0, 60.0)
    assert settling() > before, "prolonged"
    before = settling()
    arrive(mark, 1.0, 0.0)
    assert settling() == before, "beyond the bound it is not"


def test_the_fleet_settles_for_as_long_as_its_slowest_instance_needs(server: servers.Redis) -> None:
    keys = Keys("verve", 60)
    for mine, agreed in ((1.5, "1.5"), (4.5, "4.5"), (2.5, "4.5")):
        *_, patience = ask(server, *keys.run(ARRIVE, f"run{mine}", "", str(mine), "60"))
        assert patience == agreed
        now = ask(server, "TIME")
        assert float(ask(server, "GET", "verve:settling")) > now[0] + now[1] / 1e6 + float(agreed) - SLACK


@pytest.mark.parametrize("settles", [True, False])
def test_another_mark_than_the_one_seen_last_is_a_loss(server: servers.Redis, settles: bool) -> None:
    """Unless the server settles just now, for the same reason: then its mark is joined."""
    keys = Keys("verve", 60)

    def arrive(seen: str) -> tuple[str, int]:
        mark, settling, _ = ask(server, *keys.run(ARRIVE, "run", seen, "5", "60"))
        return mark, settling

    mark, settling = arrive("")
    assert settling
    if not settles:
        let_settle(server)
    assert arrive(mark) == (mark, int(settles)), "its own mark is no loss"
    found, settling = arrive("other 1.0")
    assert settling
    assert (found == mark) == settles


@first_engine
def test_a_window_that_is_reported_is_not_opened_again(server: servers.Redis) -> None:
    """Its closing mark has been deleted, too: what is stored in it would be counted by nobody."""

    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            let_settle(server)
            await until(lambda: told)
            window = max(told)
            keys = store.keys
            ask(server, "DEL", keys.ids(window))
            (_, before), _ = keys.opening(window)
            ask(server, *before)
            assert ask(server, "GET", keys.ids(window)) == "closed"
            assert ask(server, "ZSCORE", "verve:open", keys.member(window)) is None

    play(test())


@last_engine
def test_a_set_without_a_time_to_live_is_no_loss_for_ever(server: servers.Redis) -> None:
    """Whoever began it anew is dead, and nobody stores it again: windows are closed later, and not never."""

    async def test() -> None:
        async with opened(server.url, seconds=1, timeout=TIMEOUT) as store, telling(store) as told:
            let_settle(server)
            await until(lambda: told and time.time() % 1 < 0.5)
            window = store.window
            with Log() as log:
                ask(server, "SADD", store.keys.ids(window), 1, 2)
                await log.wait_for("it has lost ids of a window")
                await until(lambda: window in told and up(store))
                assert told[window] == 2
                assert len(log.found("it has lost")) == 1

    play(test())


def test_nothing_is_closed_beyond_the_windows_that_are_named(server: servers.Redis) -> None:
    """More passed than one ROLL names: if a later one were closed, the empty ones between would be skipped for good."""

    async def test() -> None:
        async with opened(server.url, seconds=1) as store:
            let_settle(server)
            keys = store.keys
            first, last = store.window - 9, store.window - 2
            ask(server, "SADD", keys.ids(last), 1, 2)
            ask(server, "EXPIRE", keys.ids(last), 1000)
            ask(server, "ZADD", "verve:open", last, keys.member(last))
            mark = ask(server, "GET", "verve:mark")
            for start in range(first, last):
                named = (str(start), keys.member(start), "0")
                limits = ("100", "100", mark, "2", str(start) if start < last - 1 else "+inf")
                ask(server, *keys.run(ROLL, "verve", "1", *limits, *named))
            reports = {start_of(name): count for name, count in server.reports().items()}
            assert reports == dict.fromkeys(range(first, last), 0) | {last: 2}

    play(test())
