"""Several batches under way at a time, as where Redis is far away: over a window's end, a cut, a loss of data.

Between the store and a real server stands `Distance`, which delays what is said by some milliseconds each way, so that
batches do overlap; each test sees that they did. Ids go up one by one and each is sent once, so every count is known.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Self, cast

import pytest
import servers
from stores import ask, calls, let_settle, opened, play, telling, until

import dedup
import redis_store

AWAY = 0.005  # seconds each way
TURN = 0.001  # seconds between two ids


class End(asyncio.Protocol):
    """One end of a connection through a `Distance`."""

    def __init__(self, distance: "Distance", other: "End | None" = None) -> None:
        self.distance = distance
        self.other = other
        self.transport: asyncio.Transport
        self.early: list[bytes] = []  # what came before there was another end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.distance.ends.add(self)
        if self.other is None:
            self.distance.work.append(asyncio.create_task(self._go_on()))

    async def _go_on(self) -> None:
        loop = asyncio.get_running_loop()
        _, self.other = await loop.create_connection(lambda: End(self.distance, self), "127.0.0.1", self.distance.port)
        for data in self.early:
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.early.append(data)
            return
        asyncio.get_running_loop().call_later(AWAY, self.other.pass_on, data)

    def pass_on(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.distance.ends.discard(self)
        if self.other is not None:
            self.other.transport.abort()


class Distance:
    """A link of some length to a server on this machine."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = ""
        self.ends: set[End] = set()
        self.work: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.get_running_loop().create_server(lambda: End(self), "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self.work)

    def cut(self) -> None:
        """Reset every connection."""
        for end in list(self.ends):
            end.transport.abort()


class Load:
    """Ids that go up one by one, and what became of each."""

    def __init__(self, store: redis_store.RedisStore) -> None:
        self.store = store
        self.outcomes: dict[int, int] = {}
        self.sent = 0

    def send(self) -> None:
        number = self.sent
        self.sent += 1

        def done(outcome: int) -> None:
            assert number not in self.outcomes, "told twice"
            self.outcomes[number] = outcome

        outcome = self.store.add(number, done)
        if outcome is not None:
            done(outcome)

    def count(self, *outcomes: int) -> int:
        return sum(outcome in outcomes for outcome in self.outcomes.values())

    async def answered(self) -> None:
        await until(lambda: len(self.outcomes) == self.sent)


@contextlib.asynccontextmanager
async def loaded(store: redis_store.RedisStore) -> AsyncIterator[Load]:
    """Send ids all the time while the block runs; then see each answered."""
    load = Load(store)

    async def go_on() -> None:
        while True:
            load.send()
            await asyncio.sleep(TURN)

    task = asyncio.create_task(go_on())
    try:
        yield load
    finally:
        task.cancel()
    await load.answered()


def test_batches_overlap_where_redis_is_far_away(server: servers.Redis) -> None:
    async def test() -> None:
        async with Distance(server.port) as distance, opened(distance.url) as store, loaded(store) as load:
            await until(lambda: load.count(dedup.STORED) > 200)
            before, batches = load.count(dedup.STORED), calls(server, "sadd")
            loop = asyncio.get_running_loop()
            since = loop.time()
            await until(lambda: load.count(dedup.STORED) > before + 400)
            trips = (loop.time() - since) / (2 * AWAY)  # that one after the other would have had time for, at most
            assert calls(server, "sadd") - batches > 1.5 * trips

    play(test())


@pytest.mark.parametrize("seed", range(3))
def test_batches_that_overlap_the_end_of_a_window(server: servers.Redis, seed: int) -> None:
    """Each may find it closed by another instance: it is stored in the next, and counted once."""

    async def test() -> None:
        async with (
            Distance(server.port) as distance,
            opened(server.url, seconds=1) as near,
            opened(distance.url, seconds=1) as store,
            telling(near) as told,
        ):
            let_settle(server)
            async with loaded(store) as load:
                await until(lambda: len(told) > 3 + seed)
            assert load.count(dedup.STORED) == load.sent
            last = store.window
            await until(lambda: max(told) >= last)
            assert sum(told.values()) == load.sent

    play(test())


@pytest.mark.parametrize("seed", range(3))
def test_a_cut_while_batches_overlap(server: servers.Redis, seed: int) -> None:
    """All that are under way are lost; none is sent again, and what was answered `ok` is counted."""

    async def test() -> None:
        async with (
            Distance(server.port) as distance,
            opened(server.url, seconds=2) as near,
            opened(distance.url, seconds=2) as store,
            telling(near) as told,
        ):
            let_settle(server)
            async with loaded(store) as load:
                for turn in range(3):
                    enough = load.count(dedup.STORED) + 300 + 37 * seed * turn
                    while load.count(dedup.STORED) < enough:  # noqa: ASYNC110
                        await asyncio.sleep(TURN)
                    distance.cut()
            last = store.window
            await until(lambda: max(told, default=0) >= last)
            kept, lost = load.count(dedup.STORED), load.count(dedup.LOST)
            assert lost > 0
            assert kept + lost + load.count(dedup.DOWN) == load.sent
            assert kept <= sum(told.values()) <= kept + lost

    play(test())


def test_data_lost_while_batches_overlap(server: servers.Redis) -> None:
    """What was answered `ok` before is brought back, and what comes after is counted with it."""

    async def test() -> None:
        async with Distance(server.port) as distance, opened(distance.url) as store, loaded(store) as load:
            await until(lambda: load.count(dedup.STORED) > 300)
            ask(server, "FLUSHALL")
            await until(lambda: load.count(dedup.LOST))  # the mark was missed
            kept = load.count(dedup.STORED)
            await until(lambda: load.count(dedup.STORED) > kept + 100)  # which comes after the replay
            stored = {number for number, outcome in load.outcomes.items() if outcome == dedup.STORED}
            there = {int(member) for member in ask(server, "SMEMBERS", f"verve:{{{store.window}}}:ids")}
            assert stored <= there
            assert load.count(dedup.STORED, dedup.LOST, dedup.DOWN) == len(load.outcomes)

    play(test())
