"""Counts in Redis, for a whole fleet: one exact count over all processes of a key prefix.

A window is one set in Redis, and this is its life:

- *Opened* by the first batch that anyone stores in it: OPEN puts it into the index before its ids come, so a window
  that holds ids is always found again, even if everybody dies. A window that is not newer than the newest report
  can't be opened: OPEN closes its key instead, where there is no set.
- *Filled* by batches: one `SADD` for all ids that wait. `ok` is said when Redis has said it.
- *Closed and reported* by ROLL, one script: it counts the set, adds the report to the stream with the window's start as
  the entry's id, and leaves a string in the set's place. A batch that comes later fails with WRONGTYPE, having stored
  nothing, and is stored in the open window instead. So a plain `SADD` is safe without a look at a mark, and a closed
  count never changes. ROLL goes by Redis's clock and takes the oldest window first. Whoever calls it first closes, for
  all; after an outage of the whole fleet the first instance that is back closes what was left open.

Redis may lose data: it is restarted without persistence, a replica that lagged is promoted, somebody flushes it. Then
the acknowledged ids are in the memory of the processes that stored them, and nowhere else:

- Each server has a *mark*: who it is, and when it may have lost data last. Who finds another mark than it knows takes
  that for a loss. The server then *settles*: it closes no window for as long as the slowest instance of the fleet needs
  to notice and to come back (`node.patience`), and for as long again after each chunk of ids that is brought back.
- Every process that arrives stores its ids of all windows that are not reported again, and brings the reports that it
  knows. After the settling the stream is built from them, in order, before any window is closed.
- Which window was reported last is a key of its own (REPORTED), and no window up to it is ever reported again.
- At a window's end, ROLL compares the set with what its caller holds, so a set that was deleted is noticed, too.

One Redis is one core and one memory. In a cluster, which is found out from the server, the ids are in PARTS instead,
fixed shares by the id's value that lie on all its primaries, and a window's end takes three steps (`closing`). What is
said above of a server and its mark then holds of each part by itself.

The rooms: `wire` is one connection, `batches` what waits and is under way on it, `replay` what is stored again, `node`
keeps a connection to one server, `alone` is the only one that there is, `member` one of a cluster, `cluster` says which
part is where, `topology` how a server is reached, `parts` what is known of each part, `held` is what this process
stored, `windows` what the fleet agrees on, `closing` the same in a cluster, `outbox` the stream as the webhook reads
it, and `scripts` the Lua and the names of the keys.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import redis

from dedup import DOWN, DUPLICATE, SHARDS, Counted, Done, Servers, Store, StoreError, Tell, tell_each
from redis_store.alone import Alone
from redis_store.batches import Counting
from redis_store.cluster import Cluster
from redis_store.held import Held
from redis_store.node import FoundClusterError
from redis_store.outbox import StreamOutbox
from redis_store.parts import PARTS, Part, part_of
from redis_store.scripts import Command, Keys
from redis_store.topology import Topology, place
from redis_store.windows import Windows, read, start_of
from redis_store.wire import good

__all__ = ["RedisStore", "StreamOutbox", "place"]

log = logging.getLogger("verve.store")

UNKNOWN = 1.0  # seconds until Redis is asked for its time again, before it has told it


class RedisStore(Store):
    """Counts in Redis, together with every process of the same prefix."""

    def __init__(
        self,
        url: str,
        prefix: str,
        seconds: int,
        max_ids: int,
        request_timeout: float,
        resume: int = 0,
        sentinel_password: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start to connect. `request_timeout` is how long an id may wait for Redis, in seconds.

        `roll` first returns the windows that start at `resume` or later; without it, those that are closed only now.
        `clock` is monotonic, in seconds.
        """
        super().__init__(seconds, max_ids)
        self.place = place(url)
        self.keys = Keys(prefix, seconds)
        self._resume = resume
        self._clock = clock
        self._topology = Topology(url, sentinel_password)
        self._ready = asyncio.Event()  # set while ids are taken, all of them
        self._parts = [Part(0, self.keys)]
        self._held = Held(max_ids)
        self._counting = Counting(self._parts, self._held, self.meters, request_timeout)
        alone = Alone(self._topology, self.keys, self._counting, self._ready)
        self._servers: Alone | Cluster = alone
        self._windows = Windows(alone, self.keys, self._held, resume, clock)
        alone.home = self._windows
        self._task = asyncio.create_task(self._serve(alone))
        self._following = asyncio.create_task(self._topology.follow(lambda: alone.address, alone.give_up))

    async def _serve(self, alone: Alone) -> None:
        """Keep the links, until stopped. Raises StoreError."""
        try:
            await alone.start()
        except FoundClusterError:
            try:
                seeds = self._topology.seeds()
            except ValueError as error:
                raise StoreError(str(error)) from None
            self.keys = Keys(self.keys.prefix, self.seconds, PARTS)
            self._parts = [Part(number, keys) for number, keys in enumerate(self.keys.parts(PARTS))]
            self._held = Held(self.max_ids, PARTS)
            self._counting = Counting(self._parts, self._held, self.meters, self._counting.timeout, self._counting.tell)
            cluster = Cluster(seeds, self.keys, self._counting, self._ready, self._resume, self._clock)
            self._servers, self._windows = cluster, cluster.windows
            cluster.told_away = bool(alone.why)
            await cluster.failed

    def add(self, number: int, done: Done, counted: Counted | None = None) -> int | None:
        parts = self._parts
        if len(parts) == 1:
            batches = parts[0].batches
            if batches is None:
                return DOWN
        else:
            batches = parts[part_of(number)].batches
        if number in self._held.ids.shards[number % SHARDS]:
            return DUPLICATE
        return DOWN if batches is None else batches.add(number, done, counted)

    @property
    def news(self) -> asyncio.Event:
        """Set when there are new reports in the stream."""
        return self._windows.news

    @property
    def window(self) -> int:
        return self._held.window

    @property
    def count(self) -> int:
        return self._held.count

    @property
    def kept(self) -> int:
        return self._held.total

    @property
    def queued(self) -> int:
        waiting = {id(part.batches): part.batches.queued for part in self._parts if part.batches is not None}
        return sum(waiting.values()) + self._held.flying

    @property
    def unavailable(self) -> str:
        return self._servers.unavailable

    @property
    def servers(self) -> Servers:
        return self._servers.state(self._windows.waiting)

    @property
    def warnings(self) -> list[str]:
        found = [self._windows.barred] if self._windows.barred else []
        found += self._servers.warnings
        if self._held.missing_count:
            found.append(
                f"Redis has no room for ids that it lost, and that were answered ok: {self._held.missing_count}"
            )
        return found

    @property
    def first(self) -> int:
        """Start of the first window that can have been closed since this process reached Redis."""
        return self._windows.first

    async def recent(self, most: int) -> list[tuple[int, int, int]] | None:
        window = self.window
        try:
            (entries,) = good(await self.query(("XREVRANGE", self.keys.stream, "+", "-", "COUNT", str(most))))
            count = await self._servers.size(window)
        except (redis.RedisError, TimeoutError, OSError):
            return None
        reports = [report for _, fields in entries if (report := read(fields))]  # else it is not one of ours
        closed = [(start_of(name), length, number) for name, length, number, _ in reports]
        if count < 0 or (closed and closed[0][0] >= window):
            window += self.seconds  # another instance closed it a moment ago
            count = 0
        return [(window, self.seconds, count), *closed][:most]

    async def query(self, *commands: Command) -> list[Any]:
        """Send commands that count nothing; return their replies, errors among them. Raises RedisError if away."""
        try:
            return await self._servers.ask(commands)
        except TimeoutError as error:
            raise redis.ConnectionError("Redis did not answer in time") from error

    def remaining(self) -> float:
        if self._windows.reports:
            return 0
        return self._windows.remaining() if self.window else UNKNOWN

    async def roll(self) -> Iterable[tuple[int, int]]:
        """Close what is over, here at once and in Redis when the link stands; return what is reported and not told."""
        if self.window:
            self._windows.turn()
        if self._servers.reachable:
            with contextlib.suppress(
                redis.RedisError, OSError, StoreError
            ):  # the node has given the link up, and logs it
                await self._windows.roll()
        reports, self._windows.reports = self._windows.reports, []
        return reports

    async def start(self, timeout: float, tell: Tell = tell_each) -> bool:
        self._counting.tell = tell
        ready = asyncio.create_task(self._ready.wait())
        await asyncio.wait([ready, self._task], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._task.done():
            self._task.result()
        return self._ready.is_set()

    async def failure(self) -> None:
        await asyncio.wait([self._task])
        self._task.result()

    async def stop(self, timeout: float) -> int:
        confirmed = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                confirmed = await self._servers.confirm()
        lost = self._held.total if self._servers.lost else 0
        if not confirmed and not lost:
            log.warning("stopped without Redis; ids that were answered ok and are in its care: %d", self._held.total)
        self._following.cancel()
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._servers.stop()
        self._topology.close()
        return lost
