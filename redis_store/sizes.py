"""How many ids there are in a window of a cluster: the sizes of all its parts, asked for at once.

They are sizes of one moment and the next. So a count that is told along with an id holds that id, and no id that was
not stored when it was told; two such counts may be the same.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import redis

from redis_store.advice import code_of
from redis_store.member import Member
from redis_store.parts import Part
from redis_store.scripts import Command
from redis_store.wire import good

PartCommands = Sequence[tuple[Part, Command]]


def places_by_owner(commands: PartCommands, owners: Mapping[Part, Member]) -> dict[Member, list[int]]:
    """Return at which places of a list the commands are that a node carries out."""
    found: dict[Member, list[int]] = {}
    for place, (part, _) in enumerate(commands):
        found.setdefault(owners[part], []).append(place)
    return found


class Sizes:
    """The sizes of parts."""

    def __init__(self, parts: Sequence[Part], owners: Mapping[Part, Member]) -> None:
        self._parts = parts
        self._owners = owners

    async def all(self, window: int) -> int:
        """Return how many ids there are in a window, -1 if it is closed. Raises TimeoutError, redis.RedisError."""
        sizes = await self._of(self._parts, window)
        return -1 if min(sizes) < 0 else sum(sizes)

    async def others(self, part: Part, window: int) -> int:
        """Return how many ids there are in all parts of a window but one; -1 if that can't be told."""
        others = [other for other in self._parts if other is not part]
        with contextlib.suppress(redis.RedisError, TimeoutError, OSError, ValueError):
            sizes = await self._of(others, window)
            closed = [other for other, size in zip(others, sizes, strict=True) if size < 0]
            texts = good(await self._ask([(other, ("GET", other.keys.ids(window))) for other in closed]))
            counts = [int(str(text, "ascii").removeprefix("closed ")) for text in texts]
            return sum(size for size in sizes if size >= 0) + sum(counts)
        return -1

    async def _of(self, parts: Sequence[Part], window: int) -> list[int]:
        """Return how many ids there are in each of some parts of a window, -1 for those that are closed."""
        if any(part.batches is None for part in parts):
            raise redis.ConnectionError("a part is away")
        replies = await self._ask([(part, ("SCARD", part.keys.ids(window))) for part in parts])
        closed = [isinstance(reply, redis.ResponseError) and code_of(reply) == "WRONGTYPE" for reply in replies]
        return good([-1 if over else reply for over, reply in zip(closed, replies, strict=True)])

    async def _ask(self, commands: PartCommands) -> list[Any]:
        """Have each command carried out where its part is; return the replies."""
        by_owner = places_by_owner(commands, self._owners)
        asking = [owner.ask([commands[place][1] for place in places]) for owner, places in by_owner.items()]
        replies: list[Any] = [None] * len(commands)
        for places, found in zip(by_owner.values(), await asyncio.gather(*asking), strict=True):
            for place, reply in zip(places, found, strict=True):
                replies[place] = reply
        return replies
