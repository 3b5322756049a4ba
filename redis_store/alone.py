"""One primary of Redis that holds everything, and what has to come first on each connection to it.

1. Connect, see that it is of use (`Node`), select the database.
2. Arrive: read the server's mark, which says who it is and when it may have lost data last. A mark that is missing, or
   another server's, or another than the one under which this process stored its ids last, is a possible loss: the
   server then closes nothing for the fleet's patience.
3. Tell what this process knows of reports, and learn the time and what is closed (`Home.arrived`).
4. Replay: store again what this process acknowledged and nobody has reported.
5. Take ids, in micro-batches.

The mark is read again every PROBE seconds; when it is another, the connection is given up.
"""

import asyncio
import contextlib
import logging
from typing import Protocol

import redis

from dedup import Servers, StoreError
from redis_store.advice import code_of
from redis_store.batches import Batches, Counting, Windows
from redis_store.node import (
    ARRIVAL,
    PROBE,
    RETRY,
    RETURN,
    SETTLE_ALL,
    FoundClusterError,
    Node,
    Server,
    eviction_warning,
    patience,
)
from redis_store.replay import Replay
from redis_store.scripts import ARRIVE, Command, Keys
from redis_store.topology import Topology
from redis_store.wire import Address, Wire, good

log = logging.getLogger("verve.store")


class Home(Windows, Protocol):
    """What the fleet agrees on, as a node has to know it."""

    async def arrived(self, settles: bool) -> None:
        """Tell a server that may have lost reports what they were; learn the time and what is closed."""


class Alone(Node):
    """The one server of a store."""

    def __init__(self, topology: Topology, keys: Keys, counting: Counting, ready: asyncio.Event) -> None:
        """`topology` finds the server; `ready` is set while ids are taken."""
        super().__init__(counting)
        # What this process needs after a loss, in seconds: each address that gives no answer takes some more.
        self.own_patience = patience(max(counting.timeout, topology.notices)) + topology.others * (ARRIVAL + RETRY[1])
        self.patience = self.own_patience  # the fleet's, as far as this process knows
        self.home: Home  # assigned before the start
        self._ready = ready
        self._topology = topology
        self._keys = keys
        (self._part,) = counting.parts
        self._held = counting.held
        self._replay = Replay(self.ask, counting.held, counting.parts)

    @property
    def mark(self) -> bytes:
        """The mark that was found last; none if Redis has lost data since."""
        return self._part.mark

    @mark.setter
    def mark(self, mark: bytes) -> None:
        self._part.mark = mark

    @property
    def unavailable(self) -> str:
        """Why no id can be stored, in words; "" if they can."""
        if self.batches is None:
            return f"Redis is away: {self.why or 'not reached yet'}"
        refused = self.refusals.why
        return f"Redis refuses ids: {refused}" if refused else ""

    @property
    def warnings(self) -> list[str]:
        """What is to be mended although they can, a line each."""
        return [eviction_warning(self.evicting)] if self.evicting else []

    @property
    def reachable(self) -> bool:
        """Whether what the fleet agrees on can be asked for."""
        return self.batches is not None

    @property
    def lost(self) -> bool:
        """Whether acknowledged ids are known not to be in Redis: it lost data, and they are not brought back yet."""
        return bool(self._held.total and (self._held.missing_count or self.mark != self._part.seen))

    def state(self, waiting: int) -> Servers:
        """Return how the server is; `waiting` windows could not be closed yet."""
        away = int(self.batches is None)
        return Servers(1 - away, away, away, waiting)

    async def confirm_place(self) -> None:
        """Raise redis.ConnectionError if another server than the one connected to is the primary now."""
        if self.address is not None:
            await self._topology.confirm(self.address)

    async def size(self, window: int) -> int:
        """Return how many ids there are in a window, -1 if it is closed. Raises TimeoutError, redis.RedisError."""
        if not self.reachable:  # there may be a connection, over which ids are still brought back
            raise redis.ConnectionError(self.unavailable)
        (count,) = await self.ask([("SCARD", self._keys.ids(window))])
        if isinstance(count, redis.ResponseError):
            if code_of(count) != "WRONGTYPE":
                raise count
            return -1
        return int(count)

    async def confirm(self) -> bool:
        """Return when nothing waits any more, and all that was acknowledged is known to be in Redis: True.

        False if Redis is away for longer than it takes to come back, and nothing is known to be lost.
        """
        while True:
            if self.batches is not None:
                await self.batches.idle()
            if not self._held.total:
                return True
            if self.batches is not None:
                with contextlib.suppress(redis.RedisError, OSError, StoreError):
                    await self.home.roll(0.0)  # it compares what Redis has with what is held
                    if not self.lost:
                        return True
            if self.lost:
                await self._ready.wait()
                if self._held.missing_count:
                    await asyncio.sleep(PROBE)  # as often as it is tried to bring them back
                continue
            try:
                async with asyncio.timeout(RETURN):
                    await self._ready.wait()
            except TimeoutError:
                return self._ready.is_set()

    async def _find(self) -> Address:
        return await self._topology.find()

    @property
    def _known(self) -> bool:
        return bool(self._part.seen)

    async def _arrive(self, wire: Wire, server: Server) -> None:
        assert self.address is not None
        if server.mode == "cluster":
            if self._known:
                raise redis.ConnectionError("it is a node of a cluster now")
            raise FoundClusterError
        if self.address.database:
            selecting = ("SELECT", str(self.address.database))
            good(await self.ask([selecting], self._loop.time() + ARRIVAL))
        (arrived,) = good(await self.ask([self._arriving(server.run_id, self._part.seen)]))
        self.mark, settles, agreed = arrived
        self.patience = max(self.own_patience, float(agreed))
        await self.home.arrived(bool(settles))
        again = self._arriving(server.run_id, self.mark)
        count = await self._replay.all(self._counting.parts, lambda _: again)
        self._part.seen = self.mark
        self._part.opened = 0
        self.batches = self._part.batches = Batches(wire, self._counting, self.home, self.refusals)
        why, self.why = self.why, ""
        if why:
            log.warning("Redis is back; ids that were stored again: %d", count)
        if self._held.missing_count:
            log.error("Redis has no room for ids that it lost, and that were answered ok: %d", self._held.missing_count)
        self._ready.set()

    def _arriving(self, run_id: str, seen: bytes) -> Command:
        return self._keys.run(ARRIVE, run_id, seen.decode(), str(self.patience), str(SETTLE_ALL + self.patience))

    async def look(self) -> None:
        """See that the mark is still the one found on arrival; try again to bring back what is missing."""
        (mark,) = good(await self.ask([("GET", self._keys.mark)]))
        if mark != self.mark:
            self.mark = mark or b""
            error = redis.ConnectionError("it has lost its data")
            self.give_up(error)
            raise error
        if self._held.missing:
            await self._replay.missing(self._counting.parts)
            if not self._held.missing:
                log.warning("Redis has room again for the ids that it lost: all are back")

    def _left(self, batches: Batches | None) -> None:
        self._ready.clear()
        self._part.batches = None
        if batches is None:
            self._topology.turn()
