"""The store in Redis: what is counted, what is told, and what becomes of both when the link or Redis fails.

Most tests drive a `RedisStore` in an event loop of their own, against a real server and through a proxy that breaks
the link at the place that matters; the others run the whole program. Nothing is waited for but events and the ends
of windows: where a server tells nobody, it is asked again and again until a guard that only a fault can reach.
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
import servers
import support
import uvloop
from hypothesis import given
from hypothesis import strategies as st

import dedup
import reporter

NEVER = 60.0  # seconds; a time-out that no test lives to see
BACK = 6.0  # seconds until the store is back: 2 by the contract, and what a busy machine may add
SLACK = 4.0  # seconds that a busy machine may add to a time-out
QUIET = 0.4  # seconds after which a stopping process may close an idle connection; it waits a little longer
AWAY = r"WARNING verve\.store: Redis is away"
EDGES = [0, -1, 1, -7, 2**63 - 1, -(2**63)]
KNOWN = (dedup.STORED, dedup.DUPLICATE)


@pytest.fixture(params=servers.ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# For tests that take long and are about us rather than about Redis: one engine will do, but not always the same.
FIRST, *_, LAST = [*servers.ENGINES] * 2
first_engine = pytest.mark.parametrize("engine", [FIRST])
last_engine = pytest.mark.parametrize("engine", [LAST])


@pytest.fixture
def server(engine: str) -> Iterator[servers.Redis]:
    with servers.Redis(engine) as server:
        yield server


@pytest.fixture
def proxy(server: servers.Redis) -> Iterator[servers.Proxy]:
    with servers.Proxy(server.port) as proxy:
        yield proxy


# Redis, looked at from outside


def ask(server: servers.Redis, *words: str | int) -> Any:
    """Have Redis carry out a command."""
    with server.client() as client:
        return client.execute_command(*words)


def kinds(server: servers.Redis) -> dict[str, str]:
    """Return all keys and what kind each is."""
    return {key: ask(server, "TYPE", key) for key in ask(server, "KEYS", "*")}


def sets(server: servers.Redis) -> dict[str, set[int]]:
    """Return the ids that are in Redis, by key."""
    return {
        key: {int(member) for member in ask(server, "SMEMBERS", key)}
        for key, kind in kinds(server).items()
        if kind == "set"
    }


def ids(server: servers.Redis) -> set[int]:
    """Return the ids that are in Redis, of which no two windows may hold the same in these tests."""
    found = sets(server).values()
    union = set().union(*found)
    assert len(union) == sum(map(len, found))
    return union


def calls(server: servers.Redis, name: str) -> int:
    """Return how often a command has been carried out."""
    stats = ask(server, "INFO", "commandstats")
    return int(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"])


def name_of(start: int) -> str:
    return datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def start_of(name: str) -> int:
    return int(datetime.strptime(name, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())


def long_window() -> int:
    """Return the length of a window that does not end while a test runs."""
    now = time.time()
    return next(seconds for seconds in (86_400, 80_000, 70_000) if seconds - now % seconds > 600)


def window_with(least: float) -> int:
    """Return the length of a window that ends as soon as possible, but not before `least` seconds."""
    now = time.time()
    return min(
        (seconds for seconds in range(1, 100) if seconds - now % seconds >= least),
        key=lambda seconds: seconds - now % seconds,
    )


# A store in an event loop


def play(test: Coroutine[Any, Any, None]) -> None:
    """Run a test in the event loop that the program has; an error that nobody handled fails it."""

    async def guarded() -> None:
        unhandled: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        async with asyncio.timeout(servers.DEADLINE):
            await test
        gc.collect()
        assert unhandled == []

    uvloop.run(guarded())


class Log(logging.Handler):
    """What is logged while the block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._changed = asyncio.Event()
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
        self._changed.set()

    def __enter__(self) -> "Log":
        logging.getLogger("verve").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("verve").removeHandler(self)

    def found(self, pattern: str) -> list[str]:
        return [line for line in self.lines if re.search(pattern, line)]

    async def wait_for(self, pattern: str) -> None:
        """Wait until there is a line that matches."""
        while not self.found(pattern):
            self._changed.clear()
            await self._changed.wait()


@contextlib.asynccontextmanager
async def opened(
    url: str,
    *,
    seconds: int = 0,
    prefix: str = "verve",
    max_ids: int = 10**6,
    timeout: float = NEVER,
    resume: int = 0,
) -> AsyncIterator[dedup.RedisStore]:
    """Keep a store open while the block runs; without `seconds`, its window does not end meanwhile."""
    store = dedup.RedisStore(url, prefix, seconds or long_window(), max_ids, timeout, resume)
    try:
        await store.start(servers.DEADLINE)
        yield store
    finally:
        await store.stop()


def add(store: dedup.Store, number: int) -> "asyncio.Future[int]":
    """Add an id; return what will have become of it. To be told twice is an error."""
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    outcome = store.add(number, told.set_result)
    if outcome is not None:
        told.set_result(outcome)
    return told


async def stored(store: dedup.Store, *numbers: int) -> None:
    """Add ids in one turn of the loop, and see them stored."""
    outcomes = await asyncio.gather(*[add(store, number) for number in numbers])
    assert set(outcomes) <= {*KNOWN}, outcomes


async def until(true: Callable[[], object]) -> None:
    """Wait for what nobody tells."""
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def gone(store: dedup.RedisStore) -> None:
    """Have the store notice that Redis is gone: an idle link is looked at only once a second."""
    while store.up:
        assert await add(store, 10**9) in (dedup.LOST, dedup.DOWN)


async def back(store: dedup.RedisStore, since: float) -> None:
    """Wait until the store takes ids again, which `since` (loop time) it could have done."""
    await until(lambda: store.up)
    assert asyncio.get_running_loop().time() - since < BACK


@contextlib.asynccontextmanager
async def telling(store: dedup.RedisStore) -> AsyncIterator[dict[int, int]]:
    """Have the store's windows rolled in time while the block runs; gives what is told, as it comes."""
    told: dict[int, int] = {}

    def tell(start: int, count: int) -> None:
        assert start > max(told, default=0), "told twice, or out of order"
        told[start] = count

    timer = asyncio.create_task(reporter.roll_windows(store.remaining, store.roll, tell))
    try:
        yield told
        assert not timer.done()
    finally:
        timer.cancel()
        await asyncio.wait([timer])


async def more(told: dict[int, int], than: int) -> None:
    """Wait until more windows are told."""
    await until(lambda: len(told) > than)


# Replies

lines = st.binary(max_size=9).filter(lambda line: b"\r" not in line)
replies = st.recursive(
    st.one_of(st.none(), st.integers(), st.binary(max_size=9), lines.map(redis.ResponseError)),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=9,
)


def wire_form(reply: Any) -> bytes:
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if isinstance(reply, redis.ResponseError):
        return b"-%b\r\n" % reply.args[0]
    return b"*%d\r\n" % len(reply) + b"".join(map(wire_form, reply))


def as_read(reply: Any) -> Any:
    if isinstance(reply, redis.ResponseError):
        return str, reply.args[0].decode("utf-8", "replace") if isinstance(reply.args[0], bytes) else reply.args[0]
    return [as_read(item) for item in reply] if isinstance(reply, list) else reply


@given(replies)
def test_a_reply_is_read_when_it_is_whole(reply: Any) -> None:
    data = wire_form(reply)
    read, end = dedup.parse(b"before" + data + b"behind", 6)
    assert (as_read(read), end) == (as_read(reply), 6 + len(data))
    for cut in range(len(data)):
        with pytest.raises(dedup.ShortError):
            dedup.parse(data[:cut], 0)


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b":x\r\n", b"*1\r\n?\r\n", b":1\r\n:2\r\n:3\r\n"]
)
def test_what_is_no_reply_ends_the_link(said: bytes) -> None:
    class Peer(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.Transport, transport)

        def data_received(self, data: bytes) -> None:
            self.transport.write(said)

    async def test() -> None:
        peer = await asyncio.get_running_loop().create_server(Peer, "127.0.0.1")
        store = dedup.RedisStore(f"redis://127.0.0.1:{peer.sockets[0].getsockname()[1]}", "verve", 60, 9, 1.0)
        store._options.connection_kwargs["driver_info"] = None  # redis-py says nothing on its own
        await until(lambda: bool(store.why))
        assert store.why in ("what came is not Redis's protocol", "a reply came that nobody waits for"), store.why
        await store.stop()
        peer.close()

    play(test())


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
            waiting = [add(store, number) for number in range(dedup.MAX_WAITING)]
            assert not any(told.done() for told in waiting)
            for _ in range(3):
                assert add(store, -2).result() == dedup.BUSY
            proxy.flow()
            assert {*await asyncio.gather(first, *waiting)} == {dedup.STORED}
            assert ids(server) == {*range(-1, dedup.MAX_WAITING)}
            assert calls(server, "sadd") == 1 + dedup.MAX_WAITING / dedup.MAX_BATCH

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
        one.log.wait_for(r"unique ids in \S+: [1-9]")
        quiet = len(one.log.all)
        one.log.wait_for(r"unique ids in \S+: 0$", quiet)
        with support.Client(one.address) as client:  # so that an open window is among the keys
            assert client.ask(support.accept(7)).status == 200
        over = server.reports()
        keys = kinds(server)
        lifetimes = {key: ask(server, "TTL", key) for key in keys}
        last = other.log.wait_for(r"unique ids in (\S+): 0$", len(other.log.all))[1]
        one.log.wait_for(f"unique ids in {last}: ")
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
        used: list[int] = []
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            for turn in range(3):
                await stored(store, *range(turn << 40, (turn << 40) + 9000))
                closed = len(told)
                await more(told, closed)
                await until(lambda: ask(server, "INFO", "memory")["lazyfree_pending_objects"] == 0)
                await until(lambda: not sets(server))
                used.append(ask(server, "INFO", "memory")["used_memory"])
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


# The link fails


def test_a_link_cut_before_the_command(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        async with opened(proxy.url) as store:
            await stored(store, 1)
            proxy.refuse = True
            proxy.set_plan("before_command")
            assert {*await asyncio.gather(add(store, 2), add(store, 3))} == {dedup.LOST}
            assert proxy.done.is_set()
            assert not store.up
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
        async with opened(proxy.url, seconds=window_with(1)) as store:
            await stored(store, *range(before))
            window = store.window
            proxy.stall()
            batch = [add(store, number) for number in (100, 101)]
            await until(lambda: len(ids(server)) == before + 2)
            await until(lambda: store.now() > window + store.seconds)
            async with telling(store) as told:
                await until(lambda: store.window > window)
                proxy.refuse = True
                proxy.set_plan("before_command")  # the roll that comes after the batch
                proxy.flow()
                assert {*await asyncio.gather(*batch)} == {dedup.STORED}
                await until(proxy.done.is_set)
                ask(server, "FLUSHALL")
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
            lost += [add(store, number) for number in (4, 5)]  # these still wait for the link
            proxy.refuse = True
            proxy.set_plan(plan)
            proxy.flow()
            assert [*await asyncio.gather(*lost)] == [dedup.LOST] * 4
            assert proxy.done.is_set()
            assert add(store, 6).result() == dedup.DOWN
            proxy.refuse = False
            await back(store, asyncio.get_running_loop().time())
            await stored(store, 6)
            assert ids(server) == {1, 2, 3, 6}, "stored, but not known to be; what waited was never sent"
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
                assert ids(server) == {1, 2, 5}
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
            assert (store.up, proxy.connections) == (True, links)

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
    server: servers.Redis, proxy: servers.Proxy, monkeypatch: pytest.MonkeyPatch
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
            roll = store._roll

            async def stalled_roll(*arguments: float) -> None:
                proxy.stall()
                await roll(*arguments)

            monkeypatch.setattr(store, "_roll", stalled_roll)
            proxy.stall()
            loop.call_later(0.9 * timeout, proxy.flow)
            started = loop.time()
            assert await add(store, 2) == dedup.LOST
            assert loop.time() - started < 1.5 * timeout
            proxy.flow()

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
            assert told == {window: len(EDGES) + 2} == {start_of(k): v for k, v in server.reports().items()}
            await stored(store, 12)
            assert ids(server) == {12}

    play(test())


def test_connections_that_are_refused(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        proxy.refuse = True
        with Log() as log:
            store = dedup.RedisStore(proxy.url, "verve", long_window(), 10**6, NEVER)
            await store.start(0.2)
            for number in range(100):
                assert add(store, number).result() == dedup.DOWN
            await until(lambda: proxy.connections > 3)
            assert add(store, 1).result() == dedup.DOWN
            assert len(log.found(AWAY)) == 1
            proxy.refuse = False
            await back(store, asyncio.get_running_loop().time())
            await stored(store, 1)
            await store.stop()

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
            store = dedup.RedisStore(proxy.url, "verve", long_window(), 10**6, NEVER)
            await until(lambda: proxy.connections > 3)
            assert len(log.found(AWAY)) == len(log.lines) == 1
            proxy.refuse = False
            await until(lambda: store.up)
            await store.stop()
        assert len(log.lines) == 2, log.lines

    play(test())


def test_a_store_that_is_down_can_be_stopped(server: servers.Redis, proxy: servers.Proxy) -> None:
    async def test() -> None:
        for hang in False, True:
            proxy.refuse = not hang
            if hang:
                proxy.stall()
            store = dedup.RedisStore(proxy.url, "verve", long_window(), 10**6, NEVER)
            await store.start(0.1)
            await store.stop()
        proxy.flow()

    play(test())


def test_a_store_settles_what_waits_when_it_is_stopped(server: servers.Redis) -> None:
    async def test() -> None:
        store = dedup.RedisStore(server.url, "verve", long_window(), 10**6, NEVER)
        await store.start(servers.DEADLINE)
        told = [add(store, number) for number in range(30_000)]
        await store.stop()
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

    async def load(store: dedup.RedisStore, first: int, stop: asyncio.Event) -> None:
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
            await until(lambda: one.up and other.up)
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


# Windows


@pytest.mark.parametrize(("engine", "warm"), [(FIRST, False), (LAST, True)])
def test_a_batch_that_comes_too_late_is_stored_in_the_open_window(
    server: servers.Redis, proxy: servers.Proxy, warm: bool
) -> None:
    async def test() -> None:
        seconds = window_with(1.5)
        async with opened(server.url, seconds=seconds) as punctual, opened(proxy.url, seconds=seconds) as late:
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
def test_windows_left_open_are_told_by_the_first_that_is_back(server: servers.Redis) -> None:
    async def test() -> None:
        left: dict[int, int] = {}
        async with opened(server.url, seconds=1) as store:  # whose windows nobody rolls
            for count in 2, 3:
                await until(lambda: store.now() > store.window + 2.1 or not left)  # so one without ids lies between
                await stored(store, *range(10 * count, 11 * count))
                left[store.window] = count
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


def test_many_windows_left_open(server: servers.Redis) -> None:
    """As they would be found after hours: more than are closed by one script."""

    async def test() -> None:
        now = int(time.time()) // 60 * 60
        left = {start: start // 60 % 7 + 1 for start in range(now - 60 * 2 * dedup.ROLL_LIMIT - 600, now, 60)}
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
for name in "ROLL", "ARRIVE":
    script = getattr(dedup, name)
    time = "local time = redis.call('TIME')"
    assert script.count(time) == 1
    wrong = "\\ntime[1] = tostring(time[1] + tonumber(redis.call('GET', 'error') or 0))"
    setattr(dedup, name, script.replace(time, time + wrong))
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
                    await until(lambda: not other.up or max(told, default=0) > window)
                    assert other.up, other.why
                    await stored(one, 3)
                    await stored(other, 4)
                    assert name_of(window) not in server.reports()

    play(test())


@last_engine
def test_a_foreign_entry_in_the_stream(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url, seconds=1) as store, telling(store) as told:
            ask(server, "XADD", "verve:reports", "*", "hello", "world")
            window = store.window
            await until(lambda: max(told, default=0) > window)
            await stored(store, 1)

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


def test_another_length_of_windows_is_refused_when_redis_comes_late(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url, seconds=3600):
            pass
        with servers.Proxy(server.port) as proxy:
            proxy.refuse = True
            store = dedup.RedisStore(proxy.url, "verve", 60, 10**6, NEVER)
            await store.start(0.1)
            proxy.refuse = False
            with pytest.raises(dedup.StoreError, match="3600"):
                await store.failure()
            await store.stop()

    play(test())


# Redis answers with an error


class Trouble:
    """A fault of Redis that can be caused and cured."""

    def __init__(self, cause: Callable[[servers.Redis], object], cure: Callable[[servers.Redis], object], advice: str):
        self.cause = cause
        self.cure = cure
        self.advice = advice


def do(*words: str | int) -> Callable[[servers.Redis], object]:
    return lambda server: ask(server, *words)


def block(key: str) -> Trouble:
    return Trouble(do("SET", key, "foreign"), do("DEL", key), "key-prefix")


READONLY = Trouble(do("REPLICAOF", "127.0.0.1", 1), do("REPLICAOF", "NO", "ONE"), "replica.*primary")
AT_RUN_TIME = {
    "OOM": Trouble(do("CONFIG", "SET", "maxmemory", 1), do("CONFIG", "SET", "maxmemory", 0), "maxmemory"),
    "READONLY": READONLY,
    "MASTERDOWN": Trouble(
        lambda server: [do("CONFIG", "SET", "replica-serve-stale-data", "no")(server), READONLY.cause(server)],
        do("REPLICAOF", "NO", "ONE"),
        "replica",
    ),
    "NOPERM": Trouble(
        do("ACL", "SETUSER", "default", "-sadd"), do("ACL", "SETUSER", "default", "+sadd"), "user may not"
    ),
}


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
            store = dedup.RedisStore(server.url, "verve", long_window(), 10**6, NEVER)
            await log.wait_for("key-prefix")
            assert add(store, 1).result() == dedup.DOWN
            ask(server, "DEL", f"verve:{key}")
            await back(store, asyncio.get_running_loop().time())
            await stored(store, 1)
            await store.stop()
        assert len(log.found(AWAY)) == 1

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
            assert ids(server) == set()
            ask(server, "CONFIG", "SET", "maxmemory", 0)
            await until(lambda: store.up)
            await stored(store, 5)

    play(test())


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


# The program, when Redis fails


def failed(response: support.Response) -> bool:
    """Check that an answer is `ok`, or says properly that the store failed; return whether it does that."""
    if response.status == 200:
        assert response.body == b"ok"
        return False
    assert response.status == 503
    assert response.body == b"failed"
    assert int(response.fields["retry-after"]) >= 1
    assert response.fields["verve-error"]
    return True


def complaints(program: support.Program) -> list[str]:
    return [line for line in program.log.all if re.search(r" (WARNING|ERROR|CRITICAL) ", line)]


def wait_for_ok(client: support.Client, number: int) -> None:
    """Ask until the store takes ids again, which it does soon."""
    since = time.monotonic()
    while failed(client.ask(support.accept(number))):
        assert time.monotonic() - since < BACK
        time.sleep(0.01)


def wait_until(true: Callable[[], object]) -> None:
    since = time.monotonic()
    while not true():
        assert time.monotonic() - since < servers.DEADLINE
        time.sleep(0.01)


@last_engine
def test_the_program_in_trouble(server: servers.Redis) -> None:
    trouble = AT_RUN_TIME["OOM"]
    window = str(long_window())
    with (
        support.verve("--redis-url", server.url, "--window", window) as program,
        support.Client(program.address) as client,
    ):
        assert not failed(client.ask(support.accept(1)))
        trouble.cause(server)
        assert all(failed(client.ask(support.accept(number))) for number in range(2, 50))
        assert not failed(client.ask(support.accept(1))), "it is in the store"
        (line,) = complaints(program)
        assert "maxmemory" in line
        trouble.cure(server)
        wait_for_ok(client, 50)
        assert ids(server) == {1, 50}
        assert len(complaints(program)) <= 2


@first_engine
def test_redis_that_comes_late(server: servers.Redis) -> None:
    server.kill()
    with support.verve("--redis-url", server.url) as program, support.Client(program.address) as client:
        assert all(failed(client.ask(support.accept(number))) for number in range(50))
        (line,) = complaints(program)
        assert re.search(AWAY, line)
        server.start()
        wait_for_ok(client, 1)
        wait_for_ok(client, 2)
        assert ids(server) >= {2}
        assert len(complaints(program)) <= 2


@first_engine
def test_redis_that_hangs(server: servers.Redis) -> None:
    sent = iter(range(10**9))
    ok: set[int] = set()
    lost: set[int] = set()

    def take(response: support.Response, number: int) -> None:
        (lost if failed(response) else ok).add(number)

    flags = "--redis-url", server.url, "--window", "2", "--request-timeout", "1"
    with support.verve(*flags) as program, support.Client(program.address) as client:
        for number in range(20):
            take(client.ask(support.accept(next(sent))), number)
        assert not lost
        server.freeze()
        since = time.monotonic()
        take(client.ask(support.accept(number := next(sent))), number)
        assert time.monotonic() - since < 1 + SLACK
        assert lost == {20}
        since = time.monotonic()
        for _ in range(50):
            take(client.ask(support.accept(number := next(sent))), number)
        assert time.monotonic() - since < 25, "50 requests at once, and not a second each"
        assert len(lost) == 51
        (line,) = complaints(program)
        assert re.search(AWAY, line)
        frozen = int(time.time()) // 2 * 2
        wait_until(lambda: time.time() > frozen + 2.2)
        server.thaw()
        wait_for_ok(client, number := next(sent))
        ok.add(number)
        take(client.ask(support.accept(number := next(sent))), number)
        assert number in ok
        last = name_of(int(time.time()) // 2 * 2)
        program.log.wait_for(f"unique ids in {last}: ")
        reports = server.reports()
        assert len(ok) <= sum(reports.values()) <= len(ok) + len(lost)
        starts = [*map(start_of, reports)]
        assert starts == [*range(starts[0], starts[-1] + 1, 2)], "a window is missing"
        assert len(complaints(program)) == 2


SECRET = "hunter2"


@first_engine
@pytest.mark.parametrize("given", ["", "wrong-secret"])
def test_a_password_that_redis_does_not_take(engine: str, given: str) -> None:
    with servers.Redis(engine, password=SECRET) as server:
        url = f"redis://{':' + given + '@' if given else ''}127.0.0.1:{server.port}"
        with support.verve("--redis-url", url) as program, support.Client(program.address) as client:
            assert all(failed(client.ask(support.accept(number))) for number in range(20))
            (line,) = complaints(program)
            assert "password" in line
            assert "--redis-url" in line
            ask(server, "CONFIG", "SET", "requirepass", given)
            server.password = given
            wait_for_ok(client, 1)
            assert not [line for line in program.log.all if SECRET in line or "wrong-secret" in line]


@last_engine
def test_a_redis_that_refuses_now_and_then_does_not_flood_the_log(server: servers.Redis) -> None:
    """As one does whose memory others fill and empty."""
    over = threading.Event()

    def refuse() -> None:
        with server.client() as client:
            while not over.is_set():
                client.config_set("maxmemory", 1)
                client.config_set("maxmemory", 0)

    with (
        support.verve("--redis-url", server.url, "--window", str(long_window())) as program,
        support.Client(program.address) as client,
    ):
        thread = threading.Thread(target=refuse)
        thread.start()
        since = time.monotonic()
        said = [failed(client.ask(support.accept(number))) for number in range(3000)]
        over.set()
        thread.join()
        changes = sum(one != other for one, other in itertools.pairwise(said))
        assert changes > 50, "Redis refused too seldom"
        assert len(complaints(program)) <= 4 + 2 * (time.monotonic() - since) / dedup.HUSH
        server.client().config_set("maxmemory", 1)
        wait_until(
            lambda: failed(client.ask(support.accept(random.getrandbits(60)))) and "refuses" in complaints(program)[-1]
        )


@last_engine
def test_a_link_that_comes_and_goes_does_not_flood_the_log(server: servers.Redis, proxy: servers.Proxy) -> None:
    with (
        support.verve("--redis-url", proxy.url, "--window", str(long_window())) as program,
        support.Client(program.address) as client,
    ):
        since = time.monotonic()
        for number in range(12):
            wait_for_ok(client, number)
            proxy.cut()
        waits = sum(min(dedup.RETRY[0] * 2**turn, dedup.RETRY[1]) / 2 for turn in range(11))  # at least, between them
        assert time.monotonic() - since > waits, "so many could have been told of in no time"
        assert len(complaints(program)) <= 2 * 12


def bulk(text: str) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(text.encode()), text.encode())


EVIL = "\x1b[31m\u2028\x85\x00\x7f"  # what a terminal or a reader of lines would act on
INFO = "redis_version:7.0.0\r\nrun_id:1\r\n"
NONSENSE: dict[str, dict[str, bytes]] = {
    "version": {"INFO": bulk(f"redis_version:5.0.{EVIL}\r\n")},
    "policy": {"INFO": bulk(f"{INFO}maxmemory:1\r\nmaxmemory_policy:{EVIL}\r\n"), "EVAL": b"-ERR\r\n"},
    "window": {"EVAL": f"-WINDOW 7{EVIL}\r\n".encode()},
    "error": {"INFO": f"-ERR {EVIL}\r\n".encode()},
    "no-version": {"INFO": bulk(f"redis_version:{EVIL}\r\n")},
    "no-utf-8": {"INFO": b"$4\r\n\xff\xfe\x00\x1b\r\n"},
    "no-text": {"INFO": b":1\r\n"},
    "no-mark": {"EVAL": b":1\r\n"},
    "no-protocol": {"INFO": EVIL.encode() + b"\r\n"},
    "no-redis": {"INFO": b"HTTP/1.1 400 Bad Request\r\n\r\n"},
    "no-length": {"INFO": f"${EVIL}\r\n".encode()},
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_redis_that_talks_nonsense_is_told_of_once_and_not_repeated(name: str) -> None:
    said = {"INFO": bulk(INFO), "EVAL": bulk("1 0"), "XRANGE": b"*0\r\n"} | NONSENSE[name]
    with servers.Impostor(lambda words: said.get(words[0].decode(), b"+OK\r\n")) as impostor:
        url = f"redis://user:{SECRET}@127.0.0.1:{impostor.port}"
        program = support.Program(["--redis-url", url, "--log-level", "debug"], ())
        try:
            wait_until(lambda: impostor.connections > 3 or program.process.poll() is not None)
            assert program.process.poll() == 1 or program.stop() == 0
            program.wait()
        finally:
            program.end()
    lines = program.log.all
    assert all(line.isprintable() for line in lines)
    assert not any(SECRET in line for line in lines)
    assert len([line for line in lines if line.startswith("Traceback")]) <= 1
    assert 1 <= len(complaints(program)) <= 2, complaints(program)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_redis_that_is_too_old_is_refused(workers: str) -> None:
    with servers.Impostor(lambda words: bulk("redis_version:6.0.16\r\n") if words[0] == b"INFO" else b"+OK\r\n") as old:
        found = support.run("--redis-url", f"redis://127.0.0.1:{old.port}", "--workers", workers)
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert line.endswith("ERROR verve: Redis 6.0.16 is too old: expected 6.2 or newer, or Valkey")


@pytest.mark.parametrize("name", ["AUTH", "SADD"])
def test_what_redis_repeats_of_a_command_is_not_logged(engine: str, name: str) -> None:
    """Of one that it does not know it repeats the words: a password, or ids."""
    with servers.Redis(engine, "--rename-command", name, "") as server:
        url = f"redis://{'user:' + SECRET + '@' if name == 'AUTH' else ''}127.0.0.1:{server.port}"
        with support.verve("--redis-url", url, "--log-level", "debug") as program:
            with support.Client(program.address) as client:
                assert failed(client.ask(support.accept(123456789)))
            (line,) = complaints(program)
            assert f"unknown command '{name}'" in line
            assert SECRET not in line
            assert "123456789" not in line


@last_engine
def test_an_id_that_is_negative_zero_or_at_the_edge(server: servers.Redis) -> None:
    with (
        support.verve("--redis-url", server.url, "--window", str(long_window())) as program,
        support.Client(program.address) as client,
    ):
        client.send(*map(support.accept, EDGES * 2))
        assert {response.status for response in client.receive(2 * len(EDGES))} == {200}
        for bad in str(2**63), str(-(2**63) - 1), "1.0":
            assert client.ask(support.get(f"{support.PATH}?id={bad}")).status == 400
        assert ids(server) == {*EDGES}


class Load:
    """Threads that ask, one connection each, a new id with every request, until told that it was the last."""

    def __init__(self, address: support.Address, count: int) -> None:
        self.ok: set[int] = set()
        self.unanswered: list[str] = []
        self._address = address
        self._threads = [threading.Thread(target=self._ask, args=(number << 40,)) for number in range(count)]
        self.running = threading.Barrier(count + 1)
        for thread in self._threads:
            thread.start()
        self.running.wait(servers.DEADLINE)

    def _ask(self, number: int) -> None:
        quiet = 0.0
        try:
            with support.Client(self._address) as client:
                answered = time.monotonic()
                for count in range(10**9):
                    numbers = range(number, number := number + 3)
                    quiet = time.monotonic() - answered
                    client.send(*map(support.accept, numbers))
                    for each in numbers:
                        (response,) = client.receive()
                        if failed(response):
                            self.unanswered.append(str(response))
                        self.ok.add(each)
                        if response.closes:
                            assert each == number - 1, "answered as the last, with others taken behind it"
                            assert client.rest() == b""
                            return
                    answered = time.monotonic()
                    if count == 20:
                        self.running.wait(servers.DEADLINE)
        except (OSError, AssertionError, threading.BrokenBarrierError) as error:
            if quiet < QUIET:
                self.unanswered.append(repr(error))

    def join(self) -> None:
        for thread in self._threads:
            thread.join(servers.DEADLINE)
            assert not thread.is_alive()


@last_engine
def test_a_stop_under_load(server: servers.Redis) -> None:
    with support.verve("--redis-url", server.url, "--window", str(long_window())) as program:
        load = Load(program.address, 6)
        assert program.stop(signal.SIGTERM) == 0
        load.join()
        assert load.unanswered == []
        assert ids(server) == load.ok


@first_engine
def test_a_stop_while_redis_hangs(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--window", str(long_window()), "--request-timeout", "0.3"
    with support.verve(*flags) as program, support.Client(program.address) as client:
        assert not failed(client.ask(support.accept(1)))
        server.freeze()
        client.send(support.accept(2))
        program.send(signal.SIGTERM)
        (response,) = client.receive()
        assert failed(response)
        client.close()
        assert program.wait() == 0


@last_engine
def test_the_first_answer_of_a_fresh_instance_is_ok(server: servers.Redis, proxy: servers.Proxy) -> None:
    """Even if Redis takes a moment to answer, and the client is at the door from the beginning."""
    port = servers.free_port()
    first: list[support.Response] = []

    def knock() -> None:
        since = time.monotonic()
        while time.monotonic() - since < servers.DEADLINE:
            try:
                with support.Client(("127.0.0.1", port)) as client:
                    first.append(client.ask(support.accept(1)))
                    return
            except ConnectionRefusedError:
                time.sleep(0.005)

    thread = threading.Thread(target=knock)
    thread.start()
    proxy.stall()
    try:
        program = support.Program(["--redis-url", proxy.url, "--port", str(port)], ())
        wait_until(lambda: proxy.connections)
    finally:
        proxy.flow()
    thread.join(servers.DEADLINE)
    assert program.stop() == 0
    assert [response.status for response in first] == [200]


# Where Redis is


def counts_there(server: servers.Redis, prefix: str, *flags: str, environ: tuple[str, ...] = ()) -> str:
    """Run the program, see that an id gets to where it should, and return the log."""
    words = ("env", *environ) if environ else ()
    with (
        support.verve("--window", str(long_window()), *flags, prefix=words) as program,
        support.Client(program.address) as client,
    ):
        assert not failed(client.ask(support.accept(1)))
        found = sets(server)
        assert [*found.values()] == [{1}]
        assert all(key.startswith(prefix + ":") for key in found)
        return "\n".join(program.log.all)


@first_engine
def test_a_prefix(server: servers.Redis) -> None:
    counts_there(server, "a|b:c", "--redis-url", server.url, "--key-prefix", "a|b:c")
    assert all(key.startswith("a|b:c:") for key in kinds(server))


@last_engine
def test_a_unix_socket(engine: str) -> None:
    with tempfile.TemporaryDirectory(prefix="verve-") as folder:
        path = str(Path(folder, "redis.sock"))
        with servers.Redis(engine, "--unixsocket", path) as server:
            assert path in counts_there(server, "verve", "--redis-url", f"unix://{path}")


@last_engine
def test_a_database(server: servers.Redis) -> None:
    log = counts_there_in(server, 3, f"{server.url}/3")
    assert "database 3" in log
    counts_there_in(server, 5, f"{server.url}?db=5")
    assert kinds(server) == {}, "nothing in database 0"


def counts_there_in(server: servers.Redis, database: int, url: str) -> str:
    with (
        support.verve("--window", str(long_window()), "--redis-url", url) as program,
        support.Client(program.address) as client,
    ):
        assert not failed(client.ask(support.accept(1)))
        with redis.Redis(port=server.port, db=database, decode_responses=True) as there:
            keys: Any = there.keys("verve:*:ids")
            members: Any = there.smembers(keys[0])
            assert members == {"1"}
        return "\n".join(program.log.all)


@first_engine
def test_a_user_and_a_password(engine: str) -> None:
    with servers.Redis(engine, password=SECRET) as server:
        assert SECRET not in counts_there(server, "verve", "--redis-url", server.url)
        ask(server, "FLUSHALL")
        ask(server, "ACL", "SETUSER", "verve", "on", ">p@ss:w/rd", "~verve:*", "&*", "+@all")
        url = f"redis://verve:p%40ss%3Aw%2Frd@127.0.0.1:{server.port}"
        assert "p@ss" not in counts_there(server, "verve", "--redis-url", url)


@last_engine
def test_redis_named_by_the_environment(server: servers.Redis) -> None:
    link = "REDIS_PORT_6379_TCP_ADDR=127.0.0.1", f"REDIS_PORT_6379_TCP_PORT={server.port}"
    nowhere = f"redis://127.0.0.1:{servers.free_port()}"
    for environ, flags in (
        ((f"REDIS_URL={server.url}", "REDIS_PORT_6379_TCP_ADDR=127.0.0.1", "REDIS_PORT_6379_TCP_PORT=1"), ()),
        (link, ()),
        ((f"VERVE_REDIS_URL={server.url}", f"REDIS_URL={nowhere}"), ()),
        ((f"REDIS_URL={nowhere}",), ("--redis-url", server.url)),
    ):
        counts_there(server, "verve", *flags, environ=environ)
        ask(server, "FLUSHALL")


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


@last_engine
def test_a_queue_that_is_never_empty_is_not_taken_for_a_redis_that_hangs(
    server: servers.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "MAX_BATCH", 50)

    async def test() -> None:
        timeout = SLACK / 2
        async with opened(server.url, timeout=timeout) as store:
            loop = asyncio.get_running_loop()
            end = loop.time() + 1.5 * timeout
            number = 0
            outcomes: list[int] = []
            while loop.time() < end:
                while len(store._numbers) < 200:
                    number += 1
                    assert store.add(number, outcomes.append) is None
                await asyncio.sleep(0)
            await until(lambda: len(outcomes) == number)
            assert set(outcomes) == {dedup.STORED}

    play(test())
