"""A store in Redis for the tests: driven in an event loop, and looked at from outside.

`opened` keeps a `RedisStore` open on a real server, `add` and `stored` put ids into it, `telling` has its windows
rolled in time; `Log` is what is logged meanwhile. `ask`, `sets` and `ids` look into Redis. Nothing is waited for but
events and the ends of windows: where a server tells nobody, it is asked again and again until a guard that only a
fault can reach.
"""

import asyncio
import contextlib
import gc
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import pytest
import servers
import support
import uvloop

import dedup
import redis_store
import reporter

NEVER = 60.0  # seconds; a time-out that no test lives to see
TIMEOUT = 2.0  # seconds; one that is waited for: a Redis that may have lost data closes nothing for longer than that
BACK = 6.0  # seconds until the store is back: 2 by the contract, and what a busy machine may add
SLACK = 4.0  # seconds that a busy machine may add to a time-out
QUIET = 0.4  # seconds after which a stopping process may close an idle connection; it waits a little longer
AWAY = r"WARNING verve\.store: Redis is away"
EDGES = [0, -1, 1, -7, 2**63 - 1, -(2**63)]
KNOWN = (dedup.STORED, dedup.DUPLICATE)

# For tests that take long and are about us rather than about Redis: one engine will do, but not always the same.
FIRST, *_, LAST = [*servers.ENGINES] * 2
first_engine = pytest.mark.parametrize("engine", [FIRST])
last_engine = pytest.mark.parametrize("engine", [LAST])


# What is drawn by lot can be tried with other seeds: SEEDS=10 python -m pytest tests -k loss
seeds = pytest.mark.parametrize("seed", range(1, 1 + int(os.environ.get("SEEDS", "1"))))


# Redis, looked at from outside


def ask(server: servers.Redis, *words: str | bytes | int) -> Any:
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
    """Return the length of a window that ends soon, but not before `least` seconds; the next one lasts for a while."""
    now = time.time()
    return min(
        (seconds for seconds in range(8, 100) if seconds - now % seconds >= least),
        key=lambda seconds: seconds - now % seconds + seconds / 4,
    )


def end_of(store: dedup.Store, window: int) -> float:
    """Return when a window ends, by a clock that all on this machine share."""
    return window + store.seconds


async def at(moment: float) -> None:
    """Wait until a moment of Redis's time, Unix seconds."""
    await asyncio.sleep(moment - time.time())


def cut_all(server: servers.Redis) -> None:
    """Break all links, as Redis can itself."""
    ask(server, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def used(server: servers.Redis) -> int:
    """Return the bytes that Redis has in use."""
    return int(ask(server, "INFO", "memory")["used_memory"])


def let_settle(server: servers.Redis) -> None:
    """Have a server that is new to all take it that nothing is lost, which would take it a while."""
    ask(server, "DEL", "verve:settling")


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
    timeout: float = TIMEOUT,
    resume: int = 0,
) -> AsyncIterator[redis_store.RedisStore]:
    """Keep a store open while the block runs; without `seconds`, its window does not end meanwhile."""
    store = redis_store.RedisStore(url, prefix, seconds or long_window(), max_ids, timeout, resume)
    try:
        await store.start(servers.DEADLINE)
        yield store
    finally:
        await store.stop(0.5)


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


def up(store: redis_store.RedisStore) -> bool:
    """Return whether the link stands, and ids can be taken if Redis does."""
    return not store.unavailable.startswith("Redis is away")


async def gone(store: redis_store.RedisStore) -> None:
    """Have the store notice that Redis is gone: an idle link is looked at only now and then."""
    while up(store):
        assert await add(store, 10**9) in (dedup.LOST, dedup.DOWN)


async def back(store: redis_store.RedisStore, since: float) -> None:
    """Wait until the store takes ids again, which `since` (loop time) it could have done."""
    await until(lambda: up(store))
    assert asyncio.get_running_loop().time() - since < BACK


@contextlib.asynccontextmanager
async def telling(store: redis_store.RedisStore) -> AsyncIterator[dict[int, int]]:
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


# Redis answers with an error


class Trouble:
    """A fault of Redis that can be caused and cured."""

    def __init__(self, cause: Callable[[servers.Redis], object], cure: Callable[[servers.Redis], object], advice: str):
        self.cause = cause
        self.cure = cure
        self.advice = advice


def do(*words: str | int) -> Callable[[servers.Redis], object]:
    return lambda server: ask(server, *words)


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


def complaint(program: support.Program) -> str:
    """Return the one complaint in the log, as soon as it is there."""
    program.log.wait_for(" (WARNING|ERROR|CRITICAL) ")
    (line,) = complaints(program)
    return line


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


SECRET = "hunter2"


def bulk(text: str) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(text.encode()), text.encode())
