"""Micro-batches: the ids that wait for one node, and those that are on their way to it, over one connection.

Ids that come in two turns of the event loop go out together, as one `SADD` (or one COUNT, where somebody wants to be
told the count): the second turn costs some microseconds, and under load makes batches half as large again. In a cluster
the ids of a turn are spread over all nodes. So there a batch waits for as many more turns as there are nodes, as long
as each of them brings some: with three nodes that makes batches a third larger, and saves an eighth of the CPU.

While ids are under way more gather, and how long they do is decided by what is measured: of each trip, how long the
process had nothing to do until the reply came. Next door that is nearly nothing, as Redis answers while the next
requests are read: then one batch is under way at a time, the next goes when its reply is in, and batches are as large
as they can be (group commit). When Redis is far away the process would stand idle, so there may be another batch for
each WORTH that it did, up to MAX_TRIPS. Half of them go when their ids are there, the other half evenly spaced, so that
not all are under way at one time and none at the next.

Each batch has a deadline, that of the oldest id in it (ids that a full batch left behind count from when it went), and
a window. It may meet the end of that window on its way:

- The first batches that a connection stores in a window go along with OPEN, until the first of them is acknowledged:
  a window that holds ids is always in the index.
- A batch that comes when its window is closed meets a string in the set's place (WRONGTYPE): none of it is stored.
  All that do so wait until the windows have been rolled, once for them all, and go to the window that is open then.
- An error that Redis answers with means that nothing was stored: the ids are refused. When the connection is lost, all
  that is under way may be stored or not: it is told LOST and never sent again.

In a cluster a batch has a share in each of several parts: all go together, and each meets its own fate. An error that
says "not here, or not now" (NOT_EXECUTED) is no refusal: the share goes to wherever its part is AGAIN seconds later,
until its deadline.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter, thread_time
from typing import Any, Protocol

import redis

from dedup import BUSY, DOWN, LOST, REFUSED, STORED, Counted, Done, Meters, Tell, tell_each
from redis_store.advice import LINK_ERRORS, advice_in, advise, code_of
from redis_store.held import Held
from redis_store.parts import Part, Shares, part_of, split
from redis_store.scripts import COUNT, opened
from redis_store.wire import Outcome, Wire, pack, pack_few, pack_numbers, packed_words

MAX_WAITING = 50_000  # ids that may wait in one process, and as many to be counted one by one: half a second's worth
MAX_BATCH = 3_125  # ids in one trip: some 1.6 ms of Redis's time
MAX_COUNTED = 750  # ids besides that are counted one by one; managed services refuse commands of 4,000 arguments
ENOUGH = 64  # ids of a batch that does not wait for another turn of the loop
MAX_TRIPS = 16  # batches under way at a time
WORTH = 160e-6  # seconds of idleness that another batch under way is worth: its CPU costs 40 us here, 20 us in Redis
MIN_WAIT = 0.001  # seconds that uvloop's timers wait at least
HUSH = 1.0  # seconds that a change has to last before the log tells of it
AGAIN = 0.05  # seconds until a batch is sent again that a node of a cluster did not carry out
NOT_EXECUTED = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN")  # kinds of errors (Redis Cluster Specification)
REFUSING = 5.0  # seconds after a refusal in which the store is said to take no ids; only an id can tell that it does

log = logging.getLogger("verve.store")


class Windows(Protocol):
    """What has to be known of windows here."""

    def turn(self) -> int:
        """Open the window of now in this process if it is newer than the open one; return the open one's start.

        0 if the window of now is not open for the fleet yet.
        """

    def met_closed(self, window: int) -> None:
        """Note that somebody has closed a window, or a part of it."""

    async def roll(self, deadline: float) -> None:
        """Close what is over, open the window of now; by `deadline` (loop time)."""


@dataclass
class Counting:
    """What all links of a store share."""

    parts: Sequence[Part]  # all that there are
    held: Held
    meters: Meters
    timeout: float  # seconds that an id may wait
    tell: Tell = tell_each  # tells many what became of their ids
    # Returns the ids in all parts of a window but one, or -1 if they can't be counted; None where there is one part.
    others: Callable[[Part, int], Awaitable[int]] | None = None
    moved: Callable[[Part, redis.ResponseError], None] | None = None  # is told of errors that say a part is elsewhere
    nodes: int = 1  # that ids are spread over


class Refusals:
    """Why Redis refuses ids, as the log and `/readyz` have it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._why = ""  # the error that the last batch was refused with, if it was
        self._at = 0.0  # loop time at which it was
        self._logged = ""  # the same, as the log had it last
        self._hushed = 0.0  # loop time before which the log has no other

    @property
    def why(self) -> str:
        """Why ids can't be stored just now, in words; "" if they can."""
        return self._why if self._loop.time() - self._at < REFUSING else ""

    def note(self, refused: str) -> None:
        """Note that ids were refused, for a reason, or taken ("" then); log it if it is news."""
        if refused:
            now = self._at = self._loop.time()
            news = advice_in(refused) != advice_in(self._logged) or not self._logged
            if news and now >= self._hushed:
                log.error("Redis refuses ids, requests fail: %s", refused)
                self._logged, self._hushed = refused, now + HUSH
        elif self._logged:
            log.warning("Redis takes ids again")
            self._logged = ""
        self._why = refused


class Batch:
    """Ids that are sent together, and whom to tell. In each part all of them are stored, or none."""

    __slots__ = ("came", "counted", "deadline", "dones", "numbers", "opens", "shares", "window")

    def __init__(
        self, numbers: list[int], dones: list[Done], counted: list[Counted], deadline: float, came: float
    ) -> None:
        self.numbers = numbers  # those that are counted one by one come first
        self.dones = dones
        self.counted = counted  # of the first of them: who wants to be told the count
        self.deadline = deadline  # loop time
        self.came = came  # perf_counter() when the first of them came
        self.shares: Shares = []  # its ids by part
        self.window = 0  # start of the one that it was sent to last
        self.opens: list[Part] = []  # parts in which its connection had stored nothing in that window yet

    def only(self, part: Part) -> "Batch":
        """Return the batch of what it has of a part."""
        if len(self.shares) == 1:
            return self
        places = [place for place, number in enumerate(self.numbers) if part_of(number) == part.number]
        counted = [self.counted[place] for place in places if place < len(self.counted)]
        numbers = [self.numbers[place] for place in places]
        batch = Batch(numbers, [self.dones[place] for place in places], counted, self.deadline, self.came)
        batch.shares = [(part, numbers)]
        batch.window = self.window
        batch.opens = [part] if part in self.opens else []
        return batch

    def packed(self) -> tuple[bytes, int]:
        """Return the commands that store it, and how many they are."""
        if self.opens or self.counted:
            packed = [self._packed(part, numbers) for part, numbers in self.shares]
            return b"".join(commands for commands, _ in packed), sum(count for _, count in packed)
        adds = [(part.keys.adding(self.window), numbers) for part, numbers in self.shares]
        return pack_numbers(*adds[0]) if len(adds) == 1 else pack_few(adds), len(adds)

    def _packed(self, part: Part, numbers: list[int]) -> tuple[bytes, int]:
        counted = len(self.only(part).counted)
        if counted:  # in their order, which pack_numbers does not keep
            words = ("EVAL", COUNT, "1", part.keys.ids(self.window), str(counted), *map(str, numbers[:counted]))
            command = pack_numbers(packed_words(words), numbers[counted:])
        else:
            command = pack_numbers(part.keys.adding(self.window), numbers)
        if part not in self.opens:
            return command, 1
        before, after = part.keys.opening(self.window)
        around = [[pack(*each) for each in commands] for commands in (before, after)]
        return b"".join([*around[0], command, *around[1]]), len(before) + 1 + len(after)

    def replies(self, outcome: list[Any]) -> list[Any]:
        """Return the reply to each share, of the replies to all commands."""
        found = []
        at = 0
        for part, _ in self.shares:
            if part not in self.opens:
                found.append(outcome[at])
                at += 1
            else:
                size = sum(map(len, part.keys.opening(self.window))) + 1
                found.append(opened(outcome[at : at + size]))
                at += size
        return found


class Waiting:
    """Ids that are not sent yet."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.dones: list[Done] = []  # whom to tell of each of them
        self.counted: list[tuple[int, Done, Counted]] = []  # ids that are to be counted one by one
        self.since = 0.0  # loop time at which the first of all these came
        self.came = 0.0  # perf_counter() then: uvloop's time goes by milliseconds

    def __len__(self) -> int:
        return len(self.numbers) + len(self.counted)

    def take(self, now: float, timeout: float) -> Batch:
        """Return the next batch; its deadline is `timeout` seconds after the first of all that wait came."""
        counted, numbers, dones = self.counted, self.numbers, self.dones
        self.counted, self.numbers, self.dones = counted[MAX_COUNTED:], numbers[MAX_BATCH:], dones[MAX_BATCH:]
        if self.numbers:
            numbers, dones = numbers[:MAX_BATCH], dones[:MAX_BATCH]
        deadline, came = self.since + timeout, self.came
        self.since, self.came = now, perf_counter()  # what is left waits anew: nothing that comes next came earlier
        if counted:
            counted = counted[:MAX_COUNTED]  # an id that is in both is new to the one who wants to be told
            numbers = [number for number, _, _ in counted] + numbers
            dones = [done for _, done, _ in counted] + dones
        return Batch(numbers, dones, [tell for _, _, tell in counted], deadline, came)

    def clear(self) -> list[Done]:
        """Let go of all; return whom to tell."""
        dones = self.dones + [done for _, done, _ in self.counted]
        self.numbers, self.dones, self.counted = [], [], []
        return dones


class Batches:
    """What waits for a node and what is under way to it, as long as one connection lasts."""

    def __init__(self, wire: Wire, counting: Counting, windows: Windows, refusals: Refusals) -> None:
        self._loop = asyncio.get_running_loop()
        self._wire = wire
        self._counting = counting
        self._held = counting.held
        self._windows = windows
        self._meters = counting.meters
        self._refusals = refusals
        self._timeout = counting.timeout
        self._waiting = Waiting()
        self._turns = 0  # for which it was put off
        self._size = 0  # ids that waited in the last of these
        self._looking = False  # a call of `_look` is sure to come: at this turn's end, or with a reply
        self._timer: asyncio.TimerHandle | None = None  # until it is looked at though none comes
        self._trips = 0  # those under way
        self._late: list[Batch] = []  # those that found their window closed, or not open yet
        self._reopening: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()  # of counts
        self._pace = Pace()

    @property
    def queued(self) -> int:
        """Ids that wait to be sent."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether ids wait to be sent, or are under way."""
        return bool(self._waiting or self._trips)

    def add(self, number: int, done: Done, counted: Counted | None) -> int | None:
        """Have an id stored in the open window; return BUSY, or None: `done` will be told."""
        waiting = self._waiting
        numbers = waiting.numbers
        if not numbers and not waiting.counted:
            waiting.since, waiting.came = self._loop.time(), perf_counter()
        if not self._looking:
            self._looking = True
            self._loop.call_soon(self._look)
        if counted is not None:
            if len(waiting.counted) >= MAX_WAITING:
                return BUSY
            waiting.counted.append((number, done, counted))
            return None
        if len(numbers) >= MAX_WAITING:
            return BUSY
        numbers.append(number)
        waiting.dones.append(done)
        return None

    def again(self, batch: Batch) -> None:
        """Send a batch that another connection did not carry out."""
        self._begin(batch)

    async def idle(self) -> None:
        """Return when nothing waits and nothing is under way."""
        landed = self._held.landed
        while self._waiting or self._held.flying:
            landed.clear()
            await landed.wait()

    def close(self) -> None:
        """Tell all who wait that the connection is lost; it is."""
        if self._waiting:
            self._meters.waits.note(perf_counter() - self._waiting.came, len(self._waiting))
            self._counting.tell(self._waiting.clear(), LOST)
        if self._timer is not None:
            self._timer.cancel()
        self._held.landed.set()

    def _look(self) -> None:
        """Send what waits, as far as it is time."""
        self._looking = False
        size = len(self._waiting)
        if self._turns < self._counting.nodes and self._size < size < ENOUGH:
            self._turns += 1
            self._size = size
            self._looking = True
            self._loop.call_soon(self._look)
            return
        self._turns = self._size = 0
        while self._waiting:
            wait = self._pace.wait(self._trips)
            if wait:
                # No batch may go before a reply comes, and `_answered` looks again then.
                self._looking = wait == math.inf
                if not self._looking and self._timer is None:
                    self._timer = self._loop.call_later(max(wait, MIN_WAIT), self._look_again)
                return
            batch = self._waiting.take(self._loop.time(), self._timeout)
            batch.shares = split(batch.numbers, self._counting.parts)
            self._held.flying += len(batch.dones)
            self._begin(batch)
        self._looking = self._trips >= self._pace.most

    def _look_again(self) -> None:
        self._timer = None
        self._look()

    def _begin(self, batch: Batch) -> None:
        window = self._windows.turn()
        if not window:
            self._reopen_for(batch)
            return
        batch.window = window
        batch.opens = [part for part, _ in batch.shares if part.opened != window]
        packed, count = batch.packed()
        self._trips += 1
        sent, cpu = perf_counter(), thread_time()
        self._pace.begun(sent)
        self._wire.send(packed, count, batch.deadline, partial(self._answered, batch, sent, cpu))

    def _answered(self, batch: Batch, sent: float, cpu: float, outcome: Outcome) -> None:
        """Take what came of a batch's trip."""
        self._trips -= 1
        now = perf_counter()
        self._meters.trips.note(now - sent)
        if isinstance(outcome, Exception):
            self._end(batch, LOST)
            return
        self._pace.ended(now - sent - (thread_time() - cpu))
        self._looking = bool(self._waiting)
        if self._looking:
            self._loop.call_soon(self._look)
        replies = batch.replies(outcome) if batch.opens else outcome
        fine = [
            not isinstance(reply, redis.ResponseError) and part.batches is self
            for (part, _), reply in zip(batch.shares, replies, strict=True)
        ]
        if all(fine):
            self._stored(batch, replies)
            return
        for (part, _), reply, good in zip(batch.shares, replies, fine, strict=True):
            share = batch.only(part)
            if good:
                self._stored(share, [reply])
            elif isinstance(reply, redis.ResponseError):
                self._failed(share, reply)
            else:  # the part is elsewhere by now, where nobody would store these ids again
                self._end(share, LOST)

    def _stored(self, batch: Batch, replies: list[Any]) -> None:
        """Tell those who wait for a batch that it is stored, and of those that are new."""
        for part in batch.opens:
            part.opened = max(part.opened, batch.window)
        self._refusals.note("")
        self._held.add(batch.window, batch.shares)
        self._end(batch, STORED)
        if not batch.counted:
            self._meters.new += sum(replies)
            return
        for (part, _), reply in zip(batch.shares, replies, strict=True):
            if isinstance(reply, int):
                self._meters.new += reply
            else:
                self._meters.new += reply[0]
                self._tell_counts(part, batch.only(part), reply[1:])

    def _tell_counts(self, part: Part, batch: Batch, reply: list[int]) -> None:
        """Tell those who want to know the count with their id, if it was new."""
        counts = [(tell, n) for tell, new, n in zip(batch.counted, reply[::2], reply[1::2], strict=True) if new]
        others = self._counting.others
        if others is None:
            for tell, count in counts:
                tell(batch.window, count)
        elif counts:
            task = asyncio.create_task(self._add_others(others(part, batch.window), batch.window, counts))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    @staticmethod
    async def _add_others(others: Awaitable[int], window: int, counts: list[tuple[Counted, int]]) -> None:
        """Tell counts of ids in one part, together with what is in the others by now."""
        more = await others
        for tell, count in counts:
            tell(window, count + more if more >= 0 else more)

    def _failed(self, batch: Batch, error: redis.ResponseError) -> None:
        """See to a batch of one part that was not stored."""
        kind = code_of(error)
        if kind in LINK_ERRORS:
            self._end(batch, LOST)
            self._wire.abort(error)
        elif kind == "WRONGTYPE":
            self._windows.met_closed(batch.window)
            self._reopen_for(batch)
        elif kind in NOT_EXECUTED and self._counting.moved is not None:
            ((part, _),) = batch.shares
            self._counting.moved(part, error)
            self._loop.call_later(AGAIN, self._begin_again, part, batch)
        else:
            self._refuse(batch, error)

    def _begin_again(self, part: Part, batch: Batch) -> None:
        """Send a batch that was not carried out to where its part is now."""
        if self._loop.time() >= batch.deadline:
            self._end(batch, DOWN)
        elif part.batches is None:
            self._loop.call_later(AGAIN, self._begin_again, part, batch)
        else:
            part.batches.again(batch)

    def _refuse(self, batch: Batch, error: redis.ResponseError) -> None:
        self._refusals.note(advise(error))
        self._end(batch, REFUSED)

    def _end(self, batch: Batch, outcome: int) -> None:
        """Tell all who wait for a batch what became of it."""
        self._held.flying -= len(batch.dones)
        self._meters.sizes.note(len(batch.dones))
        self._meters.waits.note(perf_counter() - batch.came, len(batch.dones))
        if not self._held.flying:
            self._held.landed.set()
        self._counting.tell(batch.dones, outcome)

    def _reopen_for(self, batch: Batch) -> None:
        """Have a batch stored in the window that is open now, once it is."""
        self._late.append(batch)
        if self._reopening is None:
            self._reopening = asyncio.create_task(self._reopen())

    async def _reopen(self) -> None:
        while self._late:
            late, self._late = self._late, []
            window, outcome = 0, DOWN
            try:
                await self._windows.roll(min(batch.deadline for batch in late))
                window = self._windows.turn()
            except TimeoutError:
                outcome = LOST  # too late: that it is not stored, too, is of no use to anybody
            except Exception as error:  # who rolls sees to the link
                log.debug("no window is open: %s", error)
            for batch in late:
                if not window:
                    self._end(batch, outcome)
                elif window != batch.window:
                    self._begin(batch)
                else:
                    self._refuse(batch, redis.ResponseError("WRONGTYPE a key of this window is no set"))
        self._reopening = None


class Pace:
    """How many batches may be under way, by how long the process was idle until replies came."""

    def __init__(self) -> None:
        self.most = 1
        self._idle = 0.0  # seconds of a trip in which the process had nothing to do, smoothed over some eight trips
        self._last = 0.0  # perf_counter() when the last one was begun

    def wait(self, trips: int) -> float:
        """Return the seconds until another batch may be begun beside `trips` that are under way.

        0 if it may be now, infinity if a reply has to come first.
        """
        if trips >= self.most:
            return math.inf
        if trips <= self.most // 2:
            return 0.0
        return max(0.0, self._last + self._idle / self.most - perf_counter())

    def begun(self, now: float) -> None:
        self._last = now

    def ended(self, idle: float) -> None:
        """Note how long the process was idle during a trip, in seconds."""
        self._idle += (idle - self._idle) / 8
        self.most = max(1, min(MAX_TRIPS, 1 + int(self._idle / WORTH)))
