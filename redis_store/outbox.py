"""The webhook's outbox: the reports of the stream, one after the other, for the one instance that delivers them.

A consumer group of the stream remembers what was delivered. It begins with the first window that is closed after the
group was made. All instances read as one consumer, so what one has taken and not delivered is the next one's first.

Who may deliver is settled by a lease, a key that expires: an instance that has lost it stops before the next attempt,
and one that finds it free takes it. A report that is not delivered stays in the stream, for another instance or another
day.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Any, Protocol

import redis

from redis_store.advice import advise, code_of
from redis_store.scripts import HOLD, RELEASE, Command, Keys
from redis_store.windows import read

LEASE = 10.0  # seconds after which another instance delivers reports, when the one that did is silent
PENDING = 60  # undelivered reports that are looked for, for those who watch the last windows

log = logging.getLogger("verve.store")


class Reports(Protocol):
    """The stream, as an outbox has to know it."""

    @property
    def keys(self) -> Keys:
        """The names of the keys."""

    @property
    def news(self) -> asyncio.Event:
        """Set when there are new reports."""

    @property
    def first(self) -> int:
        """Start of the first window that can have been closed since this process reached Redis."""

    async def query(self, *commands: Command) -> list[Any]:
        """Send commands; return their replies, errors among them. Raises redis.RedisError if Redis is away."""


class StreamOutbox:
    """Hands out the reports to deliver, and notes which are."""

    def __init__(self, store: Reports) -> None:
        self._store = store
        self._token = f"{random.getrandbits(128):032x}"
        self._entry = ""
        self._why = ""  # in words, if Redis does not let us

    async def next(self) -> tuple[str, int, int, bool]:
        """Return name, length, count (and True) of the window to deliver next, as soon as there is one for us."""
        while True:
            with contextlib.suppress(redis.RedisError):
                if await self.keep():
                    self._entry, fields = await self._oldest()
                    if report := read(fields):
                        return report
                    if self._entry:
                        await self.done()  # it was trimmed away, or is not one of ours
                        continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEASE / 3 * random.uniform(0.5, 1)):  # noqa: S311
                    await self._store.news.wait()
            self._store.news.clear()

    async def _oldest(self) -> tuple[str, list[bytes]]:
        """Return id and fields of the first entry that is not delivered; "" if there is none."""
        begin = f"{max(0, 1000 * self._store.first - 1)}-0"  # not "$": if the stream was lost, all in it is new
        create = ("XGROUP", "CREATE", self._store.keys.stream, "webhook", begin, "MKSTREAM")
        first = ("SET", self._store.keys.first, str(self._store.first), "NX")
        for position in ("0", ">"):  # taken before, but not delivered; then new ones
            take = ("XREADGROUP", "GROUP", "webhook", "all", "COUNT", "1", "STREAMS", self._store.keys.stream, position)
            created, _, found = await self._store.query(create, first, take)
            if isinstance(found, redis.ResponseError):
                self._note(created if code_of(found) == "NOGROUP" else found)
                raise found
            self._note()
            for entry, fields in found[0][1] if found else ():
                return entry.decode(), fields or []
        return "", []

    def _note(self, error: redis.ResponseError | None = None) -> None:
        """Log that Redis does not let us deliver, or does again, if that is news."""
        why = advise(error) if error else ""
        if why != self._why:
            if why:
                log.error("Redis refuses the webhook's commands, no report is delivered: %s", why)
            else:
                log.warning("Redis takes the webhook's commands again")
        self._why = why

    async def keep(self) -> bool:
        """Take the lease or keep it; return whether we have it."""
        try:
            hold = ("EVAL", HOLD, "1", self._store.keys.lease, self._token, str(int(LEASE * 1000)))
            (held,) = await self._store.query(hold)
        except redis.RedisError:
            return False
        if isinstance(held, redis.ResponseError):
            self._note(held)
        return bool(held == 1)

    async def done(self) -> None:
        """Note that what `next` returned is delivered; if that fails, it will be delivered again."""
        with contextlib.suppress(redis.RedisError):
            await self._store.query(("XACK", self._store.keys.stream, "webhook", self._entry))

    async def delivered(self) -> Callable[[int], bool | None] | None:
        """Return what tells whether the report of a window, by its start, is delivered.

        That says None of a window that was closed before there was a webhook. None if Redis can't be asked.
        """
        try:
            groups, pending, first = await self._store.query(
                ("XINFO", "GROUPS", self._store.keys.stream),
                ("XPENDING", self._store.keys.stream, "webhook", "-", "+", str(PENDING)),
                ("GET", self._store.keys.first),
            )
        except redis.RedisError:
            return None
        if isinstance(groups, redis.ResponseError) or isinstance(pending, redis.ResponseError):
            return lambda start: None  # there is no group yet, or we may not look
        found = [dict(zip(group[::2], group[1::2], strict=True)) for group in groups]
        (last,) = [group[b"last-delivered-id"] for group in found if group[b"name"] == b"webhook"]
        taken = {entry for entry, *_ in pending}
        newest, begin = int(last.partition(b"-")[0]), int(first) if isinstance(first, bytes) else 0

        def tell(start: int) -> bool | None:
            if start < begin:
                return None
            return 1000 * start <= newest and b"%d000-0" % start not in taken

        return tell

    async def settle(self) -> None:
        """What is not delivered stays in the stream, for another instance or another day."""

    async def close(self) -> None:
        """Let another have the lease."""
        with contextlib.suppress(redis.RedisError):
            await self._store.query(("EVAL", RELEASE, "1", self._store.keys.lease, self._token))
