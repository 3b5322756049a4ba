"""Home: the slot of a cluster's stream, where what the fleet agrees on stands, and the node that has that slot now.

It has a mark as each part has, which tells whether its data may have been lost. It is arrived at, and asked which
windows are open, before any part can be taken. While it is away no window is closed; ids go on being taken in the
windows that it has opened.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import redis

from redis_store.advice import code_of
from redis_store.batches import NOT_EXECUTED
from redis_store.closing import ClusterWindows
from redis_store.member import Member
from redis_store.node import ARRIVAL, PROBE, SETTLE_ALL, patience
from redis_store.scripts import ARRIVE, Command, Keys
from redis_store.wire import good


class ClusterHome:
    """Where home is, and what this process knows of it."""

    def __init__(self, keys: Keys, timeout: float, stale: Callable[[], None], found: Callable[[], None]) -> None:
        """`timeout` is how long an id may wait, in seconds.

        `stale` is called when home is not where it was taken to be, `found` when it can be asked.
        """
        self.windows: ClusterWindows  # assigned before the first connection
        self.member: Member | None = None  # by the map
        self.mark = b""  # found last; none if the data may have been lost since
        self.reachable = False  # it was arrived at, and can be asked
        # What this process needs after a loss: an election, and another map, are noticed within PROBE.
        self.own_patience = patience(timeout) + PROBE
        self.patience = self.own_patience  # what the fleet needs, as far as this process knows
        self._seen = b""  # the mark under which this process knew all that it told home
        self._keys = keys
        self._stale = stale
        self._found = found

    def move(self, member: Member) -> None:
        """Take note of the node that the map names."""
        if member is self.member:
            return
        if self.member is not None:
            self.member.hosts_home = False
        self.member, self.reachable = member, False
        member.hosts_home = True
        member.wake()

    async def ask(self, commands: Sequence[Command], deadline: float = 0.0) -> list[Any]:
        """Send commands; return their replies, errors among them. Raises TimeoutError, redis.ConnectionError."""
        if self.member is None:
            raise redis.ConnectionError("the node that has the reports is not known")
        return self._here(await self.member.ask(commands, deadline))

    async def ask_kept(self, commands: Sequence[Command], deadline: float = 0.0) -> tuple[list[Any], bool]:
        """Send commands that write; return their replies, and whether they will outlive the node.

        On arrival they are taken not to: a replica may not be in reach yet.
        """
        if self.member is None or not self.reachable:
            return await self.ask(commands, deadline), False
        replies, kept = await self.member.ask_kept(commands, deadline)
        return self._here(replies), kept

    async def confirm_place(self) -> None:
        """A node that lost home's slot says so by itself."""

    def give_up(self, why: Exception) -> None:
        """Begin anew, if data may be lost; a connection that failed is given up already."""
        if not self.mark:
            self.lose()

    async def take(self, member: Member, run_id: str) -> None:
        """Arrive, over the connection to `member`. Raises TimeoutError, redis.RedisError, StoreError."""
        arguments = (run_id, self._seen.decode(), str(self.patience), str(SETTLE_ALL + self.patience))
        deadline = asyncio.get_running_loop().time() + ARRIVAL
        (arrived,) = good(await self.ask([self._keys.run(ARRIVE, *arguments)], deadline))
        self.mark, settles, agreed = arrived
        self.patience = max(self.own_patience, float(agreed))
        await self.windows.arrived(bool(settles))
        if self.member is member and self.mark:
            self._seen = self.mark
            self.reachable = True
            self._found()

    def look(self, mark: bytes | redis.ResponseError | None) -> None:
        """Take note of the mark as it is now, or why it can't be read."""
        if isinstance(mark, redis.ResponseError):
            if code_of(mark) == "MOVED":
                self.lose()
            self._stale()
        elif self.reachable and mark != self.mark:
            self.mark = mark or b""
            self.lose()

    def lose(self) -> None:
        """Ask nothing before it is arrived at anew."""
        self.reachable = False
        if self.member is not None:
            self.member.wake()

    def _here(self, replies: list[Any]) -> list[Any]:
        for reply in replies:
            if isinstance(reply, redis.ResponseError) and code_of(reply) in NOT_EXECUTED:
                self.lose()
                self._stale()
                raise redis.ConnectionError(str(reply))
        return replies
