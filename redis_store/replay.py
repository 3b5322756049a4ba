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
from redis_store.scripts import Command, Keys, opened
from redis_store.wire import good

CHUNK = 1_000  # ids in one SADD

Ask = Callable[[Sequence[Command]], Awaitable[list[Any]]]


class Replay:
    """Brings back what is held of the windows that are not reported."""

    def __init__(self, ask: Ask, keys: Keys, held: Held) -> None:
        self._ask = ask
        self._keys = keys
        self._held = held

    async def all(self, arrive: Command, mark: bytes) -> int:
        """Store all ids again, each chunk along with `arrive`; return how many of them are in Redis now.

        Raises redis.ConnectionError when the server's mark is another than `mark`: then it lost data just now.
        """
        count = 0
        for window, ids in list(self._held.windows()):
            for chunk in chunks(ids):
                reply = await self._store(window, chunk, arrive, mark)
                if isinstance(reply, redis.ResponseError):
                    if code_of(reply) == "WRONGTYPE":
                        break
                    missing = await self._missing_of(window, chunk)
                    self._held.lose(window, missing)
                    count -= len(missing)
                count += len(chunk)
        return count

    async def missing(self, mark: bytes) -> None:
        """Store the ids again that there was no room for; those that still find none stay missing.

        Nobody waits for them: a server that settles does not do so for longer, or it might never close anything.
        """
        held = self._held
        look = ("GET", self._keys.mark)
        for window, numbers in list(held.missing.items()):
            while numbers:
                chunk = numbers[-CHUNK:]
                reply = await self._store(window, chunk, look, mark)
                if isinstance(reply, redis.ResponseError):
                    return  # no room yet; or closed without them, which is told when the count is
                del numbers[-CHUNK:]
                held.add(window, chunk)
            held.missing.pop(window, None)

    async def _store(self, window: int, chunk: list[int], look: Command, mark: bytes) -> int | redis.ResponseError:
        """Store a chunk; return the reply to SADD, which may say that there is no memory, or that it is closed.

        `look` is the command that returns the server's mark, alone or first in a list.
        """
        before, after = self._keys.opening(window)
        add = ("SADD", self._keys.ids(window), *map(str, chunk))
        looked, *replies = await self._ask([look, *before, add, *after])
        good([looked])
        reply = opened(replies)
        if (looked[0] if isinstance(looked, list) else looked) != mark:
            raise redis.ConnectionError("it has lost its data")
        if isinstance(reply, redis.ResponseError) and code_of(reply) not in ("OOM", "WRONGTYPE"):
            raise reply
        return reply  # type: ignore[no-any-return]

    async def _missing_of(self, window: int, chunk: list[int]) -> list[int]:
        """Return which ids are not in Redis."""
        (there,) = good(await self._ask([("SMISMEMBER", self._keys.ids(window), *map(str, chunk))]))
        return [number for number, found in zip(chunk, there, strict=True) if not found]


def chunks(ids: Ids) -> Iterator[list[int]]:
    """Yield all ids, CHUNK at a time."""
    numbers = (number for shard in ids.sets for number in list(shard))
    while chunk := list(islice(numbers, CHUNK)):
        yield chunk
