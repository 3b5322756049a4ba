"""A cluster of Redis or Valkey: which part is on which node, and where home is.

The map comes from the nodes themselves (CLUSTER SLOTS), and is asked for again every REFRESH seconds, and soon when a
node says that a slot is elsewhere, or a part is away. It only says where to look: that a node has a part's data is
shown by the part's mark, not by the map. So a map that is old costs time and nothing else.

While a node is away, the ids of its parts fail at once, and those of others are taken. They are never stored elsewhere.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import redis

from dedup import Servers
from redis_store.advice import advise, code_of
from redis_store.batches import Counting
from redis_store.closing import ClusterWindows
from redis_store.home import ClusterHome
from redis_store.member import Member
from redis_store.node import ARRIVAL, RETURN, eviction_warning
from redis_store.parts import Part
from redis_store.scripts import SLOTS, Command, Keys, slot_of
from redis_store.sizes import Sizes, places_by_owner
from redis_store.slots import MAP, Range, ask_all_for_map, lacking, moved_to, ranges
from redis_store.wire import Address, good

REFRESH = 10.0  # seconds until the map is asked for again
AWAY_REFRESH = 0.3  # seconds likewise, while a part is away
NEWER = 1.0  # seconds for which a redirection counts more than the map, which the nodes agree on a bit later
SOON = 0.05  # seconds likewise, at least

log = logging.getLogger("verve.store")


class Cluster:
    """The nodes of a cluster, for as long as this process lives."""

    def __init__(
        self,
        seeds: Sequence[Address],
        keys: Keys,
        counting: Counting,
        ready: asyncio.Event,
        resume: int,
        clock: Callable[[], float],
    ) -> None:
        """`seeds` are nodes that are asked first; `ready` is set while ids of all parts are taken."""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # by StoreError
        self.known = False  # parts were taken once
        self.why = "not reached yet"  # there is no map, in words
        self.told_away = False  # the log says that parts are away
        self.members: dict[tuple[str, int], Member] = {}  # by host and port
        self._loop = asyncio.get_running_loop()
        self._seeds = seeds
        self._keys = keys
        self._counting = counting
        self._ready = ready
        self._slots = {part: slot_of(part.keys.mark) for part in counting.parts}
        self._owners: dict[Part, Member] = {}
        self.sizes = Sizes(counting.parts, self._owners)
        self._moved: dict[Part, float] = {}  # loop time at which a node last said that a part is elsewhere
        self._stale = asyncio.Event()  # the map is not right
        self._stored_again = 0  # ids, since parts were away
        self._refused = ""  # why nodes that are there take no ids of some parts, in words
        self.home = ClusterHome(keys, counting.timeout, self._stale.set, self._wake_all)
        self.windows = ClusterWindows(self.home, self, counting.parts, keys, counting.held, resume, clock)
        self.home.windows = self.windows
        counting.others = self.sizes.others
        counting.moved = self.moved
        self._task = asyncio.create_task(self._follow())

    # What others want to know

    @property
    def reachable(self) -> bool:
        """Whether what the fleet agrees on can be asked for."""
        return self.home.reachable

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Have home carry out commands; return their replies. Raises TimeoutError, redis.RedisError."""
        return await self.home.ask(commands)

    @property
    def away(self) -> list[Part]:
        """The parts whose ids fail."""
        return [part for part in self._counting.parts if part.batches is None]

    def state(self, waiting: int) -> Servers:
        """Return how the nodes are that have parts, or home; `waiting` windows could not be closed yet."""
        up = sum(member.linked for member in self.members.values())
        return Servers(up, len(self.members) - up, len(self.away), waiting)

    async def size(self, window: int) -> int:
        """Return how many ids there are in a window, -1 if it is closed. Raises TimeoutError, redis.RedisError."""
        return await self.sizes.all(window)

    @property
    def unavailable(self) -> str:
        """Why no id can be stored, in words; "" if some can."""
        if len(self.away) < len(self._counting.parts):
            refused = [member.refusals.why for member in self.members.values()]
            return f"Redis refuses ids: {refused[0]}" if refused and all(refused) else ""
        return f"Redis is away: {self.reason}"

    @property
    def warnings(self) -> list[str]:
        """What is to be mended although ids can be stored, a line each."""
        found = [eviction_warning(member.evicting) for member in self.members.values() if member.evicting][:1]
        if away := self.away:
            found.append(f"{len(away)} of {len(self._counting.parts)} parts are away: {self.reason}")
        if not self.reachable and len(away) < len(self._counting.parts):
            found.append("no window is closed: the node that has the reports is away")
        return found

    @property
    def reason(self) -> str:
        """Why parts are away, in words."""
        for owner in (*map(self._owners.get, self.away), self.home.member):
            if owner is not None and owner.why:
                return f"{owner.place}: {owner.why}"
        return self.why or self._refused or "parts are being taken"

    @property
    def lost(self) -> bool:
        """Whether acknowledged ids are known not to be in Redis."""
        held = self._counting.held
        return bool(held.total and (held.missing_count or any(part.mark != part.seen for part in self._counting.parts)))

    # The nodes, as windows and batches have to know them

    async def ask_parts(self, commands: Sequence[tuple[Part, Command]]) -> Iterable[tuple[Part, Any]]:
        """Have each command carried out where its part is; return the reply to each, None if it may not outlive."""
        by_owner = places_by_owner(commands, self._owners)
        replies: list[Any] = [None] * len(commands)

        async def ask(owner: Member, places: list[int]) -> None:
            found, kept = await owner.ask_kept([commands[place][1] for place in places])
            for place, reply in zip(places, found, strict=True):
                replies[place] = reply if kept or isinstance(reply, redis.ResponseError) else None
            if not kept:
                self._stale.set()  # perhaps the replica is gone, or the node is none any more

        asking = [ask(owner, places) for owner, places in by_owner.items()]
        await asyncio.gather(*asking, return_exceptions=True)  # a link that failed is given up, and made again
        return [(part, reply) for (part, _), reply in zip(commands, replies, strict=True)]

    def moved(self, part: Part, error: redis.ResponseError) -> None:
        """Take note of an error that says that a part is elsewhere, or can't be reached now."""
        self._stale.set()
        owner = self._owners[part]
        if code_of(error) == "CLUSTERDOWN":
            if not self._refused:
                self._tell(advise(error))
            self._refused = advise(error)
            owner.lose(part)
        elif code_of(error) == "MOVED":
            place = moved_to(error, owner.own)
            # With TLS the map may know the same node by another name, the one in its certificate.
            if place is None or (owner.own.tls and place not in self.members):
                owner.lose(part)
            else:
                self._moved[part] = self._loop.time()
                self._give(part, *place, 0)

    def lose(self, part: Part) -> None:
        """Take note that the data of a part may have been lost, or that it can't be reached."""
        owner = self._owners.get(part)
        if owner is not None:
            owner.lose(part)
            owner.wake()
        self.note()

    def note(self, stored_again: int = 0) -> None:
        """Take note that parts were taken, or are away; ids of those taken were stored again."""
        self._stored_again += stored_again
        away = self.away
        if len(away) < len(self._counting.parts):
            self.known = True
        if away:
            self._ready.clear()
            self._stale.set()
            return
        self._ready.set()
        if self.told_away:
            log.warning("Redis is back, all parts; ids that were stored again: %d", self._stored_again)
        self.told_away = False
        self._refused = ""
        self._stored_again = 0

    def _wake_all(self) -> None:
        for member in self.members.values():
            member.wake()

    # The map

    async def _follow(self) -> None:
        """Keep the map right, until stopped."""
        while True:
            try:
                missing = self._assign(await ask_map([*self.members.values()], self._seeds))
                why = advise(redis.ConnectionError(missing)) if missing else ""
                news = why not in ("", self.why)
            except Exception as error:
                why = advise(error)
                news = why != self.why and not self.members  # else they tell it
            if news:
                self._tell(why)
            self.why = why
            self._stale.clear()
            await asyncio.sleep(SOON * random.uniform(1, 2))  # noqa: S311
            limit = AWAY_REFRESH if self.away or not self.home.reachable else REFRESH
            try:
                async with asyncio.timeout(limit * random.uniform(0.5, 1)):  # noqa: S311
                    await self._stale.wait()
            except TimeoutError:
                pass

    def _assign(self, found: list[Range]) -> str:
        """Give each part, and home, to the node that the map names; return why it names none for some, in words."""
        owners: list[Range | None] = [None] * SLOTS
        for each in found:
            owners[each.first : each.last + 1] = [each] * (each.last + 1 - each.first)
        for member in self.members.values():
            member.replicas = 0
        home_slot = slot_of(self._keys.stream)
        told = self._loop.time() - NEWER
        for part, slot in self._slots.items():
            if (owner := owners[slot]) is not None and owner.host and self._moved.get(part, 0.0) < told:
                self._give(part, owner.host, owner.port, owner.replicas)
        if (owner := owners[home_slot]) is not None and owner.host:
            member = self._member(owner.host, owner.port)
            member.replicas = owner.replicas
            self.home.move(member)
        for place, member in list(self.members.items()):
            if not (member.parts or member.hosts_home or member.busy):
                del self.members[place]
                self._loop.create_task(member.stop())
        self._counting.nodes = max(1, sum(bool(member.parts) for member in self.members.values()))
        return lacking([owners[slot] for slot in (home_slot, *self._slots.values())])

    def _tell(self, why: str) -> None:
        """Log why parts are away that no node tells of itself."""
        which = "" if len(self.away) == len(self._counting.parts) else " for some parts"
        log.warning("Redis is away, requests%s fail: %s", which, why)
        self.told_away = True

    def _give(self, part: Part, host: str, port: int, replicas: int) -> None:
        member = self._member(host, port)
        member.replicas = max(member.replicas, replicas)
        before = self._owners.get(part)
        if part in member.parts:
            return
        if before is not None:
            before.drop(part)
        self._owners[part] = member
        member.parts.add(part)
        member.wake()

    def _member(self, host: str, port: int) -> Member:
        member = self.members.get((host, port))
        if member is None:
            address = replace(self._seeds[0], host=host, port=port, path="")
            announced = address not in self._seeds
            member = Member(address, announced, self, self.home, self._keys.mark, self._counting)
            self.members[host, port] = member
            member.start().add_done_callback(self._ended)
        return member

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def confirm(self) -> bool:
        """Return when nothing waits any more, and all that was acknowledged is known to be in Redis: True.

        False if nodes are away for longer than it takes to come back, and nothing is known to be lost.
        """
        held = self._counting.held
        until = self._loop.time() + RETURN
        while True:
            for member in [*self.members.values()]:
                if member.batches is not None:
                    await member.batches.idle()
            if not held.total:
                return True
            looked = True
            for member in [*self.members.values()]:
                try:
                    await member.look()
                except (redis.RedisError, TimeoutError, OSError):
                    looked = False  # what the link's end means is not known here yet
            if looked and not self.away and not self.lost and self.home.reachable:  # which knows the windows then
                return True
            if not self.lost and self._loop.time() > until:
                return False
            await asyncio.sleep(AWAY_REFRESH)

    async def stop(self) -> None:
        """End all connections."""
        self._task.cancel()
        await asyncio.gather(*[member.stop() for member in self.members.values()])


async def ask_map(members: Sequence[Member], seeds: Sequence[Address]) -> list[Range]:
    """Return the map, of the first node that tells it. Raises redis.RedisError, TimeoutError if none does."""
    linked = [member for member in members if member.linked]
    random.shuffle(linked)
    for member in linked:
        try:
            (slots,) = good(await member.ask([MAP]))
            return ranges(slots, member.own)
        except (redis.RedisError, TimeoutError, OSError):
            pass
    return await ask_all_for_map([*seeds, *(member.own for member in members)], ARRIVAL)
