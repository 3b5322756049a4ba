"""One primary of Redis: the connection to it, made again whenever it is lost, and what has to come first on each.

1. Connect; look at what kind of server it is, its version and `run_id`, and whether it may drop keys when memory is
   full; select the database.
2. Arrive: read the server's mark, which says who it is and when it may have lost data last. A mark that is missing, or
   another server's, or another than the one under which this process stored its ids last, is a possible loss: the
   server then closes nothing for the fleet's patience.
3. Tell what this process knows of reports, and learn the time and what is closed (`Home.arrived`).
4. Replay: store again what this process acknowledged and nobody has reported.
5. Take ids, in micro-batches.

A connection that stands proves nothing: behind it data may have been flushed or databases swapped, and a silent one may
lead nowhere. So the mark is read every PROBE seconds, and when it is another the connection is given up.

An outage goes to the log once, not once a try. What waits or is under way when the connection is lost is told LOST, and
until the next one takes ids there are no `batches`.
"""

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import redis

from dedup import Meters, StoreError, Tell
from redis_store.advice import advice_in, advise
from redis_store.batches import HUSH, Batches, Refusals, Windows
from redis_store.held import Held
from redis_store.replay import Replay
from redis_store.scripts import ARRIVE, Command, Keys
from redis_store.topology import Topology
from redis_store.wire import Address, Wire, connect, good

OLDEST = (6, 2)  # version of Redis that has all commands used here
RETRY = (0.05, 0.5)  # seconds between attempts to connect, doubling from the first to the second
ARRIVAL = 1.0  # seconds to connect, and again to the first answer: with the wait before, less than the promised 2
PROBE = 0.5  # seconds from one look at the mark to the next
RETURN = 2.0  # seconds in which a server that was away is found to be back
RECONNECT = 0.5  # seconds that connecting and arriving take at most, where there is a server that answers
KINDS = {"cluster": "a node of a cluster", "sentinel": "a sentinel"}  # of servers that keep no counts, by their mode
SETTLE_ALL = 60.0  # seconds after a loss in which settling may be prolonged by those who still bring ids back

log = logging.getLogger("verve.store")


def patience(timeout: float) -> float:
    """Return the seconds until an instance whose link is silent has noticed, and has arrived again.

    It is noticed by a probe, or an id, that is not answered within `timeout` seconds, or by asking the sentinels as
    often as that.
    """
    return PROBE + timeout + RETRY[1] + RECONNECT


class Home(Windows, Protocol):
    """What the fleet agrees on, as a node has to know it."""

    async def arrived(self, settles: bool) -> None:
        """Tell a server that may have lost reports what they were; learn the time and what is closed."""


class Node:
    """Keeps a connection to one primary, for as long as this process lives."""

    def __init__(
        self, topology: Topology, keys: Keys, held: Held, timeout: float, tell: Callable[[], Tell], meters: Meters
    ) -> None:
        """`topology` finds the server; `tell` returns what tells what became of ids.

        `timeout` is how long an id may wait, in seconds.
        """
        self.batches: Batches | None = None  # while ids are taken
        self.why = ""  # there are none, in words; "" before the first attempt has failed
        self.evicting = ""  # the policy by which the server may drop ids; "" if it doesn't
        self.refusals = Refusals()
        self.own_patience = patience(max(timeout, topology.notices))  # seconds that this process needs after a loss
        self.patience = self.own_patience  # the fleet's, as far as this process knows
        self.mark = b""  # found last; none if Redis has lost data since
        self.address: Address | None = None  # of the server, while there is a link or one is tried
        self.ready: asyncio.Event = asyncio.Event()  # set while ids are taken
        self._seen = b""  # the mark under which all ids held were stored
        self._loop = asyncio.get_running_loop()
        self._topology = topology
        self._keys = keys
        self._held = held
        self._timeout = timeout
        self._tell = tell
        self._meters = meters
        self._replay = Replay(self.ask, keys, held)
        self._wire: Wire | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, home: Home) -> "asyncio.Task[None]":
        """Start to connect; return the task, which fails with StoreError if the server is of no use."""
        self._task = asyncio.create_task(self._keep(home))
        return self._task

    async def ask(self, commands: Sequence[Command], deadline: float = 0.0) -> list[Any]:
        """Send commands that count nothing; return their replies, errors among them.

        By `deadline` (loop time); without, in the time that an id may wait, or ARRIVAL before ids are taken. Raises
        TimeoutError, redis.ConnectionError.
        """
        if self._wire is None:
            raise redis.ConnectionError(self.why)
        return await self._wire.ask(commands, deadline or self._loop.time() + self._allowed)

    @property
    def _allowed(self) -> float:
        """Seconds that a trip may take."""
        return ARRIVAL if self.batches is None else self._timeout

    def give_up(self, why: Exception) -> None:
        """Give the connection up; another will be made."""
        if self._wire is not None:
            self._wire.abort(why)

    @property
    def lost(self) -> bool:
        """Whether acknowledged ids are known not to be in Redis: it lost data, and they are not brought back yet."""
        return bool(self._held.total and (self._held.missing_count or self.mark != self._seen))

    async def confirm(self, home: Home) -> bool:
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
                    await home.roll(0.0)  # it compares what Redis has with what is held
                    if not self.lost:
                        return True
            if self.lost:
                await self.ready.wait()
                if self._held.missing_count:
                    await asyncio.sleep(PROBE)  # as often as it is tried to bring them back
                continue
            try:
                async with asyncio.timeout(RETURN):
                    await self.ready.wait()
            except TimeoutError:
                return self.ready.is_set()

    async def stop(self) -> None:
        """End the connection."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _keep(self, home: Home) -> None:
        """Keep a connection, until stopped."""
        delay = RETRY[0]
        while True:
            since = math.inf
            try:
                await self._connect(home)
                since = self._loop.time()
                await self._watch()
            except StoreError as error:
                if not self._seen:
                    raise
                self._down(str(error))
            except TimeoutError:
                self._down(f"no answer within {self._allowed:g} s")
            except (redis.RedisError, OSError) as error:
                self._down(advise(error))
            except Exception as error:  # an error of ours, or of what is no Redis, must not end the counting for good
                if advise(error) != self.why:
                    log.exception("the link to Redis failed for a reason that was not foreseen")
                self._down(advise(error))
            finally:
                self._close()
            if self._loop.time() - since > HUSH:  # a link that comes and goes is not followed, and told of, each time
                delay = RETRY[0]
            await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311
            delay = min(2 * delay, RETRY[1])

    async def _connect(self, home: Home) -> None:
        """Connect, and do all that has to come before the first new id."""
        self.address = await self._topology.find()
        self._wire = await connect(self.address, ARRIVAL)
        run_id = await self._check(self.address.database)
        settles = await self._arrive(run_id)
        await home.arrived(settles)
        count = await self._replay.all(self._arriving(run_id, self.mark.decode()), self.mark)
        self._seen = self.mark
        self.batches = Batches(
            self._wire,
            self._keys,
            self._held,
            home,
            self._tell(),
            self._meters,
            self.refusals,
            self._timeout,
        )
        why, self.why = self.why, ""
        if why:
            log.warning("Redis is back; ids that were stored again: %d", count)
        if self._held.missing_count:
            log.error("Redis has no room for ids that it lost, and that were answered ok: %d", self._held.missing_count)
        self.ready.set()

    async def _check(self, database: int) -> str:
        """Refuse a server of no use, warn of one that may drop ids; select the database; return the server's run_id."""
        asked: list[Command] = [("INFO", "server"), ("INFO", "memory")]
        if database:
            asked.append(("SELECT", str(database)))
        server, memory, *selected = await self.ask(asked, self._loop.time() + ARRIVAL)
        good([server, memory])
        info = dict(line.split(":", 1) for line in (server + memory).decode().splitlines() if ":" in line)
        mode = info.get("redis_mode") or info.get("server_mode")  # the latter is Valkey's
        if mode in KINDS:
            raise redis.ConnectionError(f"it is {KINDS[mode]}")
        good(selected)  # a cluster and a sentinel have one database
        version = info.get("redis_version", "0")
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            raise StoreError(f"Redis {version} is too old: expected {'.'.join(map(str, OLDEST))} or newer, or Valkey")
        policy = info.get("maxmemory_policy", "noeviction")
        before = self.evicting
        self.evicting = policy if policy != "noeviction" and info.get("maxmemory", "0") != "0" else ""
        if self.evicting not in ("", before):
            log.warning("%s", eviction_warning(self.evicting))
        return str(info.get("run_id", "?"))

    async def _arrive(self, run_id: str) -> bool:
        """Read the server's mark, or give it one; return whether the server settles."""
        (arrived,) = good(await self.ask([self._arriving(run_id, self._seen.decode())]))
        self.mark, settles, agreed = arrived
        self.patience = max(self.own_patience, float(agreed))
        return bool(settles)

    def _arriving(self, run_id: str, seen: str) -> Command:
        return self._keys.run(ARRIVE, run_id, seen, str(self.patience), str(SETTLE_ALL + self.patience))

    async def _watch(self) -> None:
        """Look at the mark now and then, until the connection is lost; raise why it is."""
        assert self._wire is not None
        closed = self._wire.closed
        while True:
            await asyncio.wait([closed], timeout=PROBE)
            if closed.done():
                raise closed.result()
            await self._look()
            if self._held.missing:
                await self._replay.missing(self.mark)
                if not self._held.missing:
                    log.warning("Redis has room again for the ids that it lost: all are back")

    async def _look(self) -> None:
        """See that the server's mark is still the one found on arrival; else give the connection up, and raise why."""
        (mark,) = good(await self.ask([("GET", self._keys.mark)]))
        if mark != self.mark:
            self.mark = mark or b""
            error = redis.ConnectionError("it has lost its data")
            self.give_up(error)
            raise error

    def _down(self, why: str) -> None:
        """Note, and log if that is news, that the connection is lost or can't be made."""
        news = self.batches is not None or not self.why
        if not news:
            news = advice_in(why) not in ("", advice_in(self.why))
        self.why = why
        if news:
            log.warning("Redis is away, requests fail: %s", why)

    def _close(self) -> None:
        """Let go of the connection, and tell those who wait."""
        self.ready.clear()
        self.address = None
        wire, self._wire = self._wire, None
        batches, self.batches = self.batches, None
        if wire is not None:
            wire.abort(redis.ConnectionError(self.why))
        if batches is not None:
            batches.close()


def eviction_warning(policy: str) -> str:
    """Return the warning of a server that drops keys by `policy` when its memory is full."""
    return f"Redis may evict ids unseen: set its maxmemory-policy to noeviction (it is {policy})"
