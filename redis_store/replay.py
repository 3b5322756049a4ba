"""Stores ids that were acknowledged before once more, over a new connection, before that takes new ones.

With each chunk the instance says that it is still bringing ids back, so that a server that has lost data closes nothing
meanwhile. A chunk for a window that is closed is not needed any more.

A server without memory to spare refuses `SADD` even for ids that it has, so it is asked which of them those are; the
others are known as missing from then on, and tried again as soon as there may be room.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import redis

from dedup import Ids
from redis_store.advice import code_of
from redis_store.held import Held
from redis_store.parts import Part, Shares, split
from redis_store.scripts import Command, opened
from redis_store.wire import good

CHUNK = 1_000  # ids that are stored at once

Ask = Callable[[Sequence[Command]], Awaitable[list[Any]]]
Look = Callable[[Part], Command]  # gives a command that returns a part's mark, alone or first in a list


class Replay:
    """Brings back what is held of the windows that are not reported."""

    def __init__(self, ask: Ask, held: Held, parts: Sequence[Part]) -> None:
        """`parts` are all that there are."""
        self._ask = ask
        self._held = held
        self._parts = parts

    async def all(self, arrived: Sequence[Part], arrive: Look) -> int:
        """Store all ids of some parts again, each chunk along with `arrive`; return how many of them are in Redis now.

        Raises redis.ConnectionError when a part's mark is another than it was: then it lost data just now.
        """
        count = 0
        for window, ids in list(self._held.windows()):
            wanted = {part.number for part in arrived}  # without those in which the window is closed
            for chunk in chunks(ids):
                shares = [(part, numbers) for part, numbers in split(chunk, self._parts) if part.number in wanted]
                for (part, numbers), reply in zip(shares, await self._store(window, shares, arrive), strict=True):
                    if isinstance(reply, redis.ResponseError):
                        if code_of(reply) == "WRONGTYPE":
                            wanted.discard(part.number)
                            continue
                        missing = await self._missing_of(window, part, numbers)
                        self._held.lose(window, part.number, missing)
                        count -= len(missing)
                    count += len(numbers)
                if not wanted:
                    break
        return count

    async def missing(self, reached: Sequence[Part]) -> None:
        """Store the ids again that there was no room for; those that still find none stay missing.

        Nobody waits for them: a part that settles does not do so for longer, or it might never close anything.
        """
        held = self._held
        numbers_of = {part.number: part for part in reached}
        for (window, number), numbers in list(held.missing.items()):
            part = numbers_of.get(number)
            while part is not None and numbers:
                chunk = numbers[-CHUNK:]
                (reply,) = await self._store(window, [(part, chunk)], lambda part: ("GET", part.keys.mark))
                if isinstance(reply, redis.ResponseError):
                    return  # no room yet; or closed without them, which is told when the count is
                del numbers[-CHUNK:]
                held.add(window, [(part, chunk)])
            if not numbers:
                held.missing.pop((window, number), None)

    async def _store(self, window: int, shares: Shares, look: Look) -> list[Any]:
        """Store a chunk; return the reply to each SADD, which may say that there is no memory, or that it is closed."""
        commands: list[Command] = []
        for part, numbers in shares:
            before, after = part.keys.opening(window)
            commands += [look(part), *before, ("SADD", part.keys.ids(window), *map(str, numbers)), *after]
        replies = await self._ask(commands) if commands else []
        each = len(replies) // max(1, len(shares))
        return [self._understood(part, replies[i * each : (i + 1) * each]) for i, (part, _) in enumerate(shares)]

    @staticmethod
    def _understood(part: Part, replies: list[Any]) -> Any:
        looked, *stored = replies
        good([looked])
        reply = opened(stored)
        if (looked[0] if isinstance(looked, list) else looked) != part.mark:
            raise redis.ConnectionError("it has lost its data")
        if isinstance(reply, redis.ResponseError) and code_of(reply) not in ("OOM", "WRONGTYPE"):
            raise reply
        return reply

    async def _missing_of(self, window: int, part: Part, chunk: list[int]) -> list[int]:
        """Return which ids are not in Redis."""
        (there,) = good(await self._ask([("SMISMEMBER", part.keys.ids(window), *map(str, chunk))]))
        return [number for number, found in zip(chunk, there, strict=True) if not found]


def chunks(ids: Ids) -> Iterator[list[int]]:
    """Yield all ids, CHUNK at a time."""
    numbers = (number for shard in ids.sets for number in list(shard))
    while chunk := list(islice(numbers, CHUNK)):
        yield chunk
