"""A connection to one server, made again whenever it is lost: what is the same for a server alone and for a node of a
cluster.

Connect; look at what kind of server it is, its version and `run_id`, and whether it may drop keys when memory is full;
then do all that has to come before the first id (`_arrive`), and take ids, in micro-batches. A connection that stands
proves nothing: behind it data may have been flushed or databases swapped, and a silent one may lead nowhere. So it is
looked at every PROBE seconds (`look`).

An outage goes to the log once, not once a try. What waits or is under way when the connection is lost is told LOST, and
until the next one takes ids there are no `batches`.
"""

import asyncio
import logging
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import redis

from dedup import StoreError
from redis_store.advice import advice_in, advise
from redis_store.batches import HUSH, Batches, Counting, Refusals
from redis_store.scripts import Command
from redis_store.wire import Address, Wire, connect, good

OLDEST = (6, 2)  # version of Redis that has all commands used here
RETRY = (0.05, 0.5)  # seconds between attempts to connect, doubling from the first to the second
ARRIVAL = 1.0  # seconds to connect, and again to the first answer: with the wait before, less than the promised 2
PROBE = 0.5  # seconds from one look at the mark to the next
RETURN = 2.0  # seconds in which a server that was away is found to be back
RECONNECT = 0.5  # seconds that connecting and arriving take at most, where there is a server that answers
SETTLE_ALL = 60.0  # seconds after a loss in which settling may be prolonged by those who still bring ids back

log = logging.getLogger("verve.store")


def patience(timeout: float) -> float:
    """Return the seconds until an instance whose link is silent has noticed, and has arrived again.

    It is noticed by a probe, or an id, that is not answered within `timeout` seconds, or by asking the sentinels as
    often as that.
    """
    return PROBE + timeout + RETRY[1] + RECONNECT


class FoundClusterError(Exception):
    """A server that was taken for one that is alone is a node of a cluster."""


class Server(NamedTuple):
    """What a server says of itself."""

    run_id: str
    mode: str  # "standalone", "cluster" or "sentinel"


class Node(ABC):
    """Keeps a connection to one server, for as long as this process lives."""

    def __init__(self, counting: Counting) -> None:
        self.batches: Batches | None = None  # while ids are taken
        self.why = ""  # there are none, in words; "" before the first attempt has failed
        self.evicting = ""  # the policy by which the server may drop ids; "" if it doesn't
        self.refusals = Refusals()
        self.address: Address | None = None  # of the server, while there is a link or one is tried
        self._advised: set[str] = set()  # what the log has said to do in this outage
        self._loop = asyncio.get_running_loop()
        self._counting = counting
        self._wire: Wire | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> "asyncio.Task[None]":
        """Start to connect; return the task, which fails with StoreError if the server is of no use."""
        self._task = asyncio.create_task(self._keep())
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
        return ARRIVAL if self.batches is None else self._counting.timeout

    def give_up(self, why: Exception) -> None:
        """Give the connection up; another will be made."""
        if self._wire is not None:
            self._wire.abort(why)

    async def stop(self) -> None:
        """End the connection."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    # What each kind of node does in its own way

    @abstractmethod
    async def _find(self) -> Address:
        """Return how to connect to the server, as of now."""

    @abstractmethod
    async def _arrive(self, wire: Wire, server: Server) -> None:
        """Do all that has to come before the first id."""

    @abstractmethod
    async def look(self) -> None:
        """See that the server still is what was found on arrival; else give the connection up, and raise why."""

    @abstractmethod
    def _left(self, batches: Batches | None) -> None:
        """Take note that there is no connection any more."""

    @property
    @abstractmethod
    def _known(self) -> bool:
        """Whether the server was of use once: then an error of configuration may pass, as others do."""

    async def _keep(self) -> None:
        """Keep a connection, until stopped."""
        delay = RETRY[0]
        while True:
            since = math.inf
            try:
                await self._connect()
                since = self._loop.time()
                await self._watch()
            except FoundClusterError:
                raise
            except StoreError as error:
                if not self._known:
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

    async def _connect(self) -> None:
        """Connect, and do all that has to come before the first new id."""
        self.address = await self._find()
        self._wire = await connect(self.address, ARRIVAL)
        await self._arrive(self._wire, await self._check())

    async def _watch(self) -> None:
        """Look at the server now and then, until the connection is lost; raise why it is."""
        assert self._wire is not None
        closed = self._wire.closed
        while True:
            await asyncio.wait([closed], timeout=PROBE)
            if closed.done():
                raise closed.result()
            await self.look()

    async def _check(self) -> Server:
        """Refuse a server that is too old, warn of one that may drop ids; return what it is."""
        server, memory = good(await self.ask([("INFO", "server"), ("INFO", "memory")], self._loop.time() + ARRIVAL))
        info = dict(line.split(":", 1) for line in (server + memory).decode().splitlines() if ":" in line)
        mode = info.get("redis_mode") or info.get("server_mode", "standalone")  # the latter is Valkey's
        if mode == "sentinel":
            raise redis.ConnectionError("it is a sentinel")
        version = info.get("redis_version", "0")
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            raise StoreError(f"Redis {version} is too old: expected {'.'.join(map(str, OLDEST))} or newer, or Valkey")
        policy = info.get("maxmemory_policy", "noeviction")
        before = self.evicting
        self.evicting = policy if policy != "noeviction" and info.get("maxmemory", "0") != "0" else ""
        if self.evicting not in ("", before):
            log.warning("%s", eviction_warning(self.evicting))
        return Server(info.get("run_id", "?"), mode)

    def _down(self, why: str) -> None:
        """Note, and log if that is news, that the connection is lost or can't be made."""
        news = self.batches is not None or not self.why
        if news:
            self._advised.clear()
        advice = advice_in(why)
        if advice and advice not in self._advised:
            self._advised.add(advice)
            news = True
        self.why = why
        if news:
            self._tell_down(why)

    def _tell_down(self, why: str) -> None:
        log.warning("Redis is away, requests fail: %s", why)

    def _close(self) -> None:
        """Let go of the connection, and tell those who wait."""
        self.address = None
        wire, self._wire = self._wire, None
        batches, self.batches = self.batches, None
        self._left(batches)
        if wire is not None:
            wire.abort(redis.ConnectionError(self.why))
        if batches is not None:
            batches.close()


def eviction_warning(policy: str) -> str:
    """Return the warning of a server that drops keys by `policy` when its memory is full."""
    return f"Redis may evict ids unseen: set its maxmemory-policy to noeviction (it is {policy})"
