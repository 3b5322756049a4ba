"""One node of a cluster: a primary, and the parts whose slots the map says it has.

A part is *taken* before ids of it are: read the part's mark, ask home which windows are open, being closed or reported,
store again what is held of it, and only then route ids here. Arriving before asking is what keeps ids out of a reported
window on a server that has lost its marks. A part's mark stands in the part's own slot and moves with it, so after any
change of owner it names another server, and that is a possible loss of data.

Parts come and go while the connection stands, since slots move: what happens to one part disturbs no other. Home's slot
is taken first where it is here; without home no part can be taken, while those that are go on.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import redis

from redis_store.advice import advice_in, advise, code_of
from redis_store.batches import AGAIN, NOT_EXECUTED, Batches, Counting
from redis_store.closing import ClusterWindows
from redis_store.node import ARRIVAL, PROBE, SETTLE_ALL, Node, Server
from redis_store.parts import Part
from redis_store.replay import Replay
from redis_store.scripts import TAKE, Command
from redis_store.wire import Address, Wire, connect, good

FOLLOWERS: Command = ("INFO", "replication")
REST = 0.01  # seconds between two attempts to take parts: nodes that do not agree yet name each other in turn

log = logging.getLogger("verve.store")


class Home(Protocol):
    """Home, as a node has to know it."""

    windows: ClusterWindows
    patience: float  # seconds that the fleet needs after a loss
    reachable: bool  # it can be asked

    async def take(self, member: "Member", run_id: str) -> None:
        """Arrive, over the connection to `member`. Raises TimeoutError, redis.RedisError, StoreError."""

    def look(self, mark: bytes | redis.ResponseError | None) -> None:
        """Take note of its mark as it is now."""

    def lose(self) -> None:
        """Ask nothing before it is arrived at anew."""


class Owner(Protocol):
    """The cluster, as one of its nodes has to know it."""

    known: bool  # parts were taken once
    told_away: bool  # the log says that parts are away

    def moved(self, part: Part, error: redis.ResponseError) -> None:
        """Take note of an error that says that a part is elsewhere, or can't be reached now."""

    def note(self, stored_again: int = 0) -> None:
        """Take note that parts were taken, or are away; ids of those taken were stored again."""


class Member(Node):
    """The connection to one node, and what is reached over it."""

    def __init__(
        self, address: Address, announced: bool, owner: Owner, home: Home, home_mark: str, counting: Counting
    ) -> None:
        """`home_mark` is the key of home's mark; `announced`, that only the cluster has this address."""
        super().__init__(counting)
        self.parts: set[Part] = set()  # those that the map says are here
        self.hosts_home = False
        self.replicas = 0  # of this node, by the map, which knows no replica before it was sent something
        self._followers = 0  # by its own account
        self.own = address
        self._announced = announced
        self._reached = False  # at least once
        self._owner = owner
        self._home = home
        self._home_mark = home_mark
        self._run_id = ""
        self._wake = asyncio.Event()
        self._keeping: Wire | None = None  # for what a replica has to acknowledge: WAIT holds its connection up
        self._connecting = asyncio.Lock()  # held while that is made
        self._replay = Replay(self.ask, counting.held, counting.parts)

    @property
    def place(self) -> str:
        """Where the node is, in words."""
        return f"{self.own.host}:{self.own.port}"

    @property
    def linked(self) -> bool:
        """Whether the connection stands."""
        return self.batches is not None

    @property
    def busy(self) -> bool:
        """Whether anything waits or is under way on the connection."""
        return self.batches is not None and self.batches.busy

    def wake(self) -> None:
        """Have it look now at what is to be taken."""
        self._wake.set()

    def drop(self, part: Part) -> None:
        """Let go of a part that is elsewhere now."""
        self.parts.discard(part)
        self.lose(part)

    def lose(self, part: Part) -> None:
        """Take no ids of a part until it is taken anew."""
        if part.batches is not None and part.batches is self.batches:
            part.batches = None

    async def ask_kept(self, commands: Sequence[Command], deadline: float = 0.0) -> tuple[list[Any], bool]:
        """Send commands that write; return their replies, and whether they will outlive the node.

        They do where there is no replica, or one of them has acknowledged. Raises TimeoutError, redis.RedisError.
        """
        if not (self.replicas or self._followers):
            return await self.ask(commands, deadline), True
        async with self._connecting:
            if self._keeping is None or self._keeping.closed.done():
                self._keeping = await self._connect_again()
            if not self.linked:  # it was left meanwhile
                self._keeping.abort(redis.ConnectionError(self.why))
        wait = str(max(1, int(500 * self._allowed)))  # milliseconds
        deadline = deadline or self._loop.time() + self._allowed
        *replies, kept = await self._keeping.ask([*commands, ("WAIT", "1", wait)], deadline)
        return replies, isinstance(kept, int) and kept > 0

    async def _connect_again(self) -> Wire:
        """Return one more connection to the server that was arrived at; another may be in its place by now."""
        wire = await connect(self.own, self._allowed)
        (info,) = good(await wire.ask([("INFO", "server")], self._loop.time() + self._allowed))
        if f"run_id:{self._run_id}".encode() not in info.split():
            wire.abort(error := redis.ConnectionError("it was restarted"))
            raise error
        return wire

    async def _find(self) -> Address:
        return self.own

    async def _connect(self) -> None:
        try:
            await super()._connect()
        except (redis.ConnectionError, TimeoutError) as error:
            if self._reached or not self._announced or advice_in(advise(error)):
                raise
            why = str(error) or f"no answer within {ARRIVAL:g} s"
            raise redis.ConnectionError(f"announced as {self.place}: {why}") from error

    @property
    def _known(self) -> bool:
        return self._owner.known

    async def _arrive(self, wire: Wire, server: Server) -> None:
        if server.mode != "cluster":
            raise redis.ConnectionError("it is in no cluster")
        self._reached = True
        self._run_id = server.run_id
        (told,) = good(await self.ask([FOLLOWERS], self._loop.time() + ARRIVAL))
        self._followers = followers_in(told)
        self.batches = Batches(wire, self._counting, self._home.windows, self.refusals)
        self.why = ""

    async def _watch(self) -> None:
        """Take what is to be taken, and look at the marks, until the connection is lost; raise why it is."""
        assert self._wire is not None
        closed = self._wire.closed
        closed.add_done_callback(lambda _: self._wake.set())
        while True:
            self._wake.clear()
            try:
                await self._take()
            except (redis.RedisError, TimeoutError, OSError):
                if closed.done():
                    raise
            await asyncio.sleep(REST)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE):
                    await self._wake.wait()
            if closed.done():
                raise closed.result()
            await self.look()

    async def _take(self) -> None:
        """Take what is here by the map, and not taken. Raises TimeoutError, redis.RedisError, StoreError."""
        owner = self._owner
        if self.hosts_home and not self._home.reachable:
            await self._home.take(self, self._run_id)
        waiting = [part for part in self.parts if part.batches is None]
        if not waiting:
            return
        arrived: list[Part] = []
        asked = [self._taking(part, part.seen) for part in waiting]
        for part, reply in zip(waiting, await self.ask(asked, self._loop.time() + ARRIVAL), strict=True):
            if isinstance(reply, redis.ResponseError):
                if code_of(reply) not in NOT_EXECUTED:
                    raise reply
                owner.moved(part, reply)
                self._loop.call_later(AGAIN, self.wake)
            elif part in self.parts:  # else it was given to another node meanwhile
                part.mark, _ = reply
                arrived.append(part)
        if not arrived or not self._home.reachable:  # what has arrived goes on settling until all are here
            return
        await self._home.windows.learn()
        count = await self._replay.all(arrived, lambda part: self._taking(part, part.mark))
        for part in arrived:
            if part in self.parts:
                part.seen = part.mark
                part.opened = 0
                part.batches = self.batches
        owner.note(count)

    def _taking(self, part: Part, seen: bytes) -> Command:
        patience = self._home.patience
        return part.keys.run(TAKE, self._run_id, seen.decode(), str(patience), str(SETTLE_ALL + patience))

    async def look(self) -> None:
        """See that the marks are still those that were found, now; try again to bring back what is missing.

        Take note of replicas, too: one that was down may be back, and none may be left.
        """
        owner = self._owner
        reached = [part for part in self.parts if part.batches is not None]
        asked = [("GET", part.keys.mark) for part in reached]
        hosts_home = self.hosts_home  # it may have moved when the reply comes
        if hosts_home:
            asked.append(("GET", self._home_mark))
        if not asked:
            return
        *found, told = await self.ask([*asked, FOLLOWERS])
        self._followers = followers_in(told)
        if hosts_home:
            mark = found.pop()
            if self.hosts_home:
                self._home.look(mark)
        lost = 0
        for part, mark in zip(reached, found, strict=True):
            if part.batches is not self.batches:
                continue
            if isinstance(mark, redis.ResponseError):
                owner.moved(part, mark)
            elif mark != part.mark:
                part.mark = mark or b""
                self.lose(part)
                lost += 1
        if lost:
            log.warning("Redis at %s has lost its data; parts whose ids fail until they are back: %d", self.place, lost)
            owner.told_away = True
            owner.note()
            self.wake()
        if self._counting.held.missing:
            await self._replay.missing([part for part in reached if part.batches is not None])

    def _tell_down(self, why: str) -> None:
        if self.parts:
            self._owner.told_away = True
            log.warning("Redis at %s is away, requests for its parts fail: %s", self.place, why)

    def _left(self, batches: Batches | None) -> None:
        for part in self.parts:
            if part.batches is batches:
                part.batches = None
        if self.hosts_home:
            self._home.lose()
        if self._keeping is not None:
            self._keeping.abort(redis.ConnectionError(self.why))
        self._owner.note()


def followers_in(told: bytes | redis.ResponseError) -> int:
    """Return how many replicas follow a node and have all its data, by its own account (INFO); 0 if it does not say."""
    return 0 if isinstance(told, redis.ResponseError) else told.count(b"state=online")
