"""What the fleet agrees on in a cluster, where the ids of a window are in many parts, on many servers.

Home is the slot of the stream. What a single server does at a window's end in one script takes three steps here, and
any instance may do, or do again, any of them at any time:

1. CLOSING, at home: the windows that are over by home's clock are closed from now on for good; the window of now and
   the one after it are open. A process stores ids in no window whose opening home has not acknowledged, so each
   window that holds ids is known at home. The one after it is opened along, so that a home that is away over one edge
   stops nobody.
2. CLOSE, at each part: count the set, and leave the count in its place. It is done under the mark of the part, and
   never while that settles. Who comes later is told the same count.
3. REPORT, at home: bring the counts; the first that is brought of a part stands. When all are there, and no older
   window waits, the report is added to the stream. It is done under the mark of home that step 1 was done under; if
   that is another by now, all begins anew.

A server may be one that was replaced a moment ago and does not know it yet. So where a node has replicas, one of them
has to acknowledge each step (WAIT) before the next; if none does, the step is done again later.
"""

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any, Protocol

import redis

from redis_store.held import Held
from redis_store.parts import Part
from redis_store.scripts import CLOSE, CLOSING, REPORT, Command, Keys
from redis_store.windows import POLL, REPORTS, ROLL_LIMIT, Home, Windows

AT_ONCE = 10  # windows whose parts are closed at once
SURE = 0.1  # seconds by which a trip that tells the time may be longer than the shortest one
PART_POLL = 0.2  # seconds until it is tried again to close parts that could not be closed


class ClusterHome(Home, Protocol):
    """The node that has home's slot."""

    async def ask_kept(self, commands: Sequence[Command], deadline: float = 0.0) -> tuple[list[Any], bool]:
        """Send commands that write; return their replies, and whether they will outlive the node."""


class Nodes(Protocol):
    """The other nodes."""

    async def ask_parts(self, commands: Sequence[tuple[Part, Command]]) -> Iterable[tuple[Part, Any]]:
        """Have each command carried out where its part is; return the replies that came and will outlive the node."""

    def moved(self, part: Part, error: redis.ResponseError) -> None:
        """Take note of an error that says that a part is elsewhere."""

    def lose(self, part: Part) -> None:
        """Take note that the data of a part may have been lost."""


class ClusterWindows(Windows):
    """This process's part in the agreement."""

    def __init__(
        self,
        home: ClusterHome,
        nodes: Nodes,
        parts: Sequence[Part],
        keys: Keys,
        held: Held,
        resume: int,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(home, keys, held, resume, clock)
        self._place = home
        self._nodes = nodes
        self._parts = parts
        self._kept = False  # whether what home did last will outlive it
        self._met = -1  # start of the newest window that is known to be closed, or in part
        self._counts: dict[int, dict[int, int]] = {}  # by window and part, as far as they are known here
        self._brought: dict[int, int] = {}  # how many of them home was told, by window
        self._stuck = False  # nothing could be closed just now
        self._closing = asyncio.Lock()  # held by who closes parts, which may take as long as the slowest node
        self._shortest = math.inf  # seconds that the shortest trip to home took

    def turn(self) -> int:
        held, seconds = self._held, self._keys.seconds
        now = self.now()
        if now < held.window + seconds:
            return held.window
        window = int(now // seconds) * seconds
        if window > self._open + seconds:
            return 0  # home has not opened it
        held.open(window)
        return window

    def remaining(self) -> float:
        left = super().remaining()
        return PART_POLL if left == POLL and self._stuck else left

    def met_closed(self, window: int) -> None:
        self._met = max(self._met, window)

    async def arrived(self, settles: bool) -> None:
        self._brought.clear()
        await self._bring(settles)
        await self.learn()
        await self._recall()

    async def learn(self) -> None:
        """Learn from home the time, and which windows are open, being closed or reported.

        Raises TimeoutError, redis.RedisError, StoreError.
        """
        try:
            async with self._rolling:
                while (await self._learn(0.0))[1]:
                    pass
        except Exception as error:
            self._home.give_up(error)
            raise

    async def roll(self, deadline: float = 0.0) -> None:
        """Close what is over; with `deadline` (loop time), only see that the window of now is open, and by then."""
        if deadline:
            async with asyncio.timeout_at(deadline):
                await self.learn()
            return
        try:
            async with self._closing:
                while await self._step(deadline):
                    pass
        except Exception as error:
            self._home.give_up(error)
            raise

    def _note_time(self, time_: float, before: float, after: float) -> None:
        """Take home's time only from a trip that did not wait: for a connection, for a replica, or for a node."""
        self._shortest = min(self._shortest, after - before)
        if after - before < self._shortest + SURE:
            super()._note_time(time_, before, after)

    def _last(self, mine: range) -> str:
        """Others have opened windows ahead, which this process may have lived through and not named yet."""
        return str(mine[-1]) if mine else super()._last(mine)

    async def _ask(self, commands: Sequence[Command], deadline: float) -> list[Any]:
        replies, self._kept = await self._place.ask_kept(commands, deadline)
        return replies

    def _roll(self, mine: range) -> Command:
        lived = [text for start in mine for text in (str(start), self._keys.member(start))]
        fixed = (self._keys.seconds, ROLL_LIMIT, REPORTS, self._home.mark.decode(), self._home.own_patience)
        arguments = [*map(str, fixed), self._last(mine), str(len(self._parts)), str(self._met), *lived]
        return self._keys.run(CLOSING, *arguments, keys=self._keys.closing)

    async def _step(self, deadline: float) -> bool:
        async with self._rolling:
            closing, more = await self._learn(deadline)
        self.waiting = len(closing) // 2
        pairs = zip(closing[::2], closing[1::2], strict=True)
        windows = list(takewhile(lambda window: window[1], pairs))[:AT_ONCE]  # 0 seconds: it has to wait, and all later
        for start in [start for start in self._counts if not closing or start < closing[0]]:
            del self._counts[start]
            self._brought.pop(start, None)
        if more or not windows or not self._kept:
            self._stuck = bool(closing)
            return more
        await self._close([start for start, _ in windows])
        done = await self._report(windows, deadline)
        self._stuck = not done
        return done

    async def _close(self, windows: list[int]) -> None:
        """Count the parts of windows that are not counted yet, as far as they are in reach."""
        asked: list[tuple[Part, Command]] = []
        starts: list[int] = []
        for start in windows:
            known = self._counts.setdefault(start, {})
            for part in self._parts:
                if part.number not in known and part.batches is not None:
                    arguments = (part.mark.decode(), str(self._home.patience), str(self._held.of(start, part.number)))
                    close = part.keys.run(CLOSE, *arguments, keys=(part.keys.ids(start),))
                    asked.append((part, close))
                    starts.append(start)
        for start, (part, reply) in zip(starts, await self._nodes.ask_parts(asked), strict=True):
            if isinstance(reply, int) and reply >= 0:
                self._counts[start][part.number] = reply
            elif isinstance(reply, redis.ResponseError):
                if str(reply).startswith("LOST"):
                    self._nodes.lose(part)
                else:
                    self._nodes.moved(part, reply)

    async def _report(self, windows: list[tuple[int, int]], deadline: float) -> bool:
        """Bring the counts home; return whether a window is reported."""
        reports: list[Command] = []
        for start, seconds in windows:
            counts = self._counts[start]
            if len(counts) < len(self._parts) and len(counts) == self._brought.get(start, 0):
                continue
            self._brought[start] = len(counts)
            name = self._keys.member(start).split()[0]
            fixed = (REPORTS, self._home.mark.decode(), len(self._parts), start, name, seconds)
            pairs = [str(number) for pair in counts.items() for number in pair]
            keys = (*self._keys.closing, self._keys.counts(start))
            reports.append(self._keys.run(REPORT, *map(str, fixed), *pairs, keys=keys))
        if not reports:
            return False
        replies, _ = await self._place.ask_kept(reports, deadline)
        return 1 in self._understood(replies)
