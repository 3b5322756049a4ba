"""What counting is: windows of time, the distinct ids seen in each, what can become of an id, and the store in memory.

A window is named by its start, Unix seconds, a multiple of its length: all processes that agree on the time and
the length agree on the windows. Exactly one is open. `add` puts an id into it; `roll`, called by the timer at the
end of each window, closes it and opens the one that the clock stands in. The ids that come after the edge and
before the timer runs are counted in the old window: what is open decides.

A clock that is set back finds the open window not over: it stays open until the clock has passed its end, so no
window is repeated. Set forward, or after a suspension, the windows slept through are closed too, empty, in order:
none is skipped.

Ids are kept in many small sets and not in one: a set that grows is copied, and one of five million ids stalls its
process for a third of a second when it does, and again when it is freed. An id's shard is its remainder by a prime,
SHARDS, so that ids with a common factor, as generators make them, spread as well as random ones; a set takes from 4 to
16 shards, so that sets grow at different times even under ids that go up one by one, where a thousand equal ones would
all be copied within the same thousand ids, 0.16 s. A closed window's sets are freed a few at a time, between requests.

A `Store` is whatever keeps the ids: this process (`MemoryStore`), or Redis for a whole fleet (`redis_store`).
"""

import asyncio
import bisect
import gc
import itertools
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

# What became of an id.
NEW: Final = 0  # stored, for the first time in its window
DUPLICATE: Final = 1  # it was there
STORED: Final = 2  # one of the two
FULL: Final = 3  # not stored: the process holds --max-ids
BUSY: Final = 4  # not stored: too many ids wait for Redis
DOWN: Final = 5  # not stored: there is no Redis
LOST: Final = 6  # Redis did not answer in time, or the link broke: stored or not
REFUSED: Final = 7  # Redis answered with an error: not stored, or not where it would be found again

# A prime that nobody can aim at; at 5 million ids up to 10,000 a set, copied in half a millisecond.
SHARDS: Final = random.choice([n for n in range(8000, 9000) if all(n % d for d in range(2, 95))])  # noqa: S311
WIDTHS = range(4, 17)  # shards that share a set: a set grows fourfold at a time
FREE_FOR = 0.0005  # seconds at a time that freeing may take
FREE_EVERY = 0.003  # seconds from one time to the next; some 2 million ids are freed in a second

RECENT = 1440  # closed windows that are remembered without Redis, for those who watch: a day of minutes

# Upper bounds of what is counted in a `Histogram`.
TIMES = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds
SIZES = (1, 4, 16, 64, 256, 1024, 4096)

Done = Callable[[int], None]  # takes what became of an id, once
Tell = Callable[[Sequence[Any], int], None]  # takes many such, and what became of all their ids
Counted = Callable[[int, int], None]  # takes the start of a window and the fleet's count in it, -1 if it can't be told


def tell_each(dones: Sequence[Done], outcome: int) -> None:
    """Tell what became of ids, one by one."""
    for done in dones:
        done(outcome)


class Histogram:
    """How often a value was at most each of some bounds but none before, or above them all; and the values' sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def note(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times


class Meters:
    """What a store counts of its own work, since it was started."""

    def __init__(self) -> None:
        self.waits = Histogram(TIMES)  # seconds that ids waited, as long as the first of their batch
        self.trips = Histogram(TIMES)  # seconds that a batch took
        self.sizes = Histogram(SIZES)  # ids in a batch
        self.new = 0  # ids that this process stored and that were new in their window


class Ids:
    """The distinct ids of one window, in many small sets."""

    def __init__(self) -> None:
        widths = itertools.cycle(WIDTHS)
        self.sets: list[set[int]] = []
        self.shards: list[set[int]] = []  # an id's set is shards[id % SHARDS]
        while len(self.shards) < SHARDS:
            self.sets.append(set())
            self.shards += self.sets[-1:] * next(widths)
        # The collector would walk through every id of every set, 0.1 s for five million; frozen, it passes them by.
        gc.collect(1)  # first the young garbage, or it would be frozen too
        gc.freeze()

    def add(self, numbers: Iterable[int]) -> int:
        """Add ids; return how many were not there."""
        shards, modulus = self.shards, SHARDS
        new = 0
        for number in numbers:
            ids = shards[number % modulus]
            if number not in ids:
                ids.add(number)
                new += 1
        return new

    def remove(self, numbers: Iterable[int]) -> int:
        """Remove ids; return how many were there."""
        removed = 0
        for number in numbers:
            ids = self.shards[number % SHARDS]
            if number in ids:
                ids.remove(number)
                removed += 1
        return removed

    def free(self, loop: asyncio.AbstractEventLoop) -> None:
        """Free the ids, a few sets at a time."""
        self.shards = []
        sets = self.sets
        until = time.monotonic() + FREE_FOR
        while sets:
            sets.pop()
            if time.monotonic() > until:
                loop.call_later(FREE_EVERY, self.free, loop)
                return


class Servers(NamedTuple):
    """How the servers of a store are."""

    up: int = 0
    down: int = 0
    parts_away: int = 0  # of all ids, those parts that can't be stored just now
    windows_waiting: int = 0  # that are over and could not be closed yet


class Store(ABC):
    """What counts ids, wherever it keeps them."""

    place: str  # where the ids are, in words

    def __init__(self, seconds: int, max_ids: int) -> None:
        """`seconds` is the length of a window; this process keeps at most `max_ids` of one."""
        self.seconds = seconds
        self.max_ids = max_ids
        self.meters = Meters()

    @property
    @abstractmethod
    def window(self) -> int:
        """Start of the open window, Unix seconds; 0 until the store has told its time."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Ids in the open window, as far as this process knows."""

    @property
    def new(self) -> int:
        """Ids that this process stored and that were new in their window, since it was started."""
        return self.meters.new

    @property
    def kept(self) -> int:
        """Ids in this process's memory: of the open window, and of those that are over and not reported."""
        return self.count

    @property
    def queued(self) -> int:
        """Ids that wait."""
        return 0

    @property
    def unavailable(self) -> str:
        """Why ids can't be stored, in words; "" if they can."""
        return ""

    @property
    def servers(self) -> Servers:
        """How the servers that keep the ids are, as this process sees them."""
        return Servers()

    @property
    def warnings(self) -> list[str]:
        """What is to be mended although they can, a line each."""
        return []

    @abstractmethod
    def add(self, number: int, done: Done, counted: Counted | None = None) -> int | None:
        """Put an id into the open window. Return what became of it, or None if `done` will be told that later.

        If it is new in its window, `counted` is told the count with it.
        """

    @abstractmethod
    def remaining(self) -> float:
        """Return the seconds until `roll` has something to do; less than 0 if it has."""

    @abstractmethod
    async def roll(self) -> Iterable[tuple[int, int]]:
        """Close what is over and open the window of now; return start and count of each closed one, oldest first."""

    @abstractmethod
    async def recent(self, most: int) -> list[tuple[int, int, int]] | None:
        """Return start, length and count of the open window, then of the newest closed ones; `most` in all.

        The counts are the fleet's. None if the store can't be asked.
        """

    async def start(self, timeout: float, tell: Tell = tell_each) -> bool:
        """Wait until ids can be taken, for at most `timeout` seconds; return whether they can. Raises StoreError.

        `tell` is called with what `add` was given, or with many such, when it is known what became of their ids.
        """
        return True

    async def failure(self) -> None:
        """Return never; raise StoreError when the store turns out to be of no use."""
        await asyncio.get_running_loop().create_future()

    @abstractmethod
    async def stop(self, timeout: float) -> int:
        """Settle what waits, within `timeout` seconds, and let go of the store.

        Return how many of the ids that were taken are not known to be where they will be counted.
        """


class MemoryStore(Store):
    """Counts in this process alone; nobody waits."""

    place = "memory"
    window = 0
    count = 0

    def __init__(self, seconds: int, max_ids: int, clock: Callable[[], float] = time.time) -> None:
        super().__init__(seconds, max_ids)
        self.window = self._start(clock())
        self._ids = Ids()
        self._clock = clock
        self._recent: deque[tuple[int, int, int]] = deque(maxlen=RECENT)  # newest first

    def add(self, number: int, done: Done, counted: Counted | None = None) -> int | None:
        ids = self._ids.shards[number % SHARDS]
        if number in ids:
            return DUPLICATE
        if self.count >= self.max_ids:
            return FULL
        ids.add(number)
        self.count += 1
        if counted is not None:
            counted(self.window, self.count)
        return NEW

    @property
    def new(self) -> int:
        return self.meters.new + self.count

    @property
    def warnings(self) -> list[str]:
        return ["the window holds as many ids as --max-ids allows"] if self.count >= self.max_ids else []

    def remaining(self) -> float:
        return self.window + self.seconds - self._clock()

    async def roll(self) -> Iterable[tuple[int, int]]:
        start = self._start(self._clock())
        if start <= self.window:
            return ()
        closed, count = self.window, self.count
        ids = self._ids
        self.meters.new += count
        self.window, self.count, self._ids = start, 0, Ids()
        ids.free(asyncio.get_running_loop())
        return self._closed(closed, count, start)

    def _closed(self, window: int, count: int, end: int) -> Iterator[tuple[int, int]]:
        for start in range(window, end, self.seconds):
            self._recent.appendleft((start, self.seconds, count))
            yield start, count
            count = 0

    async def recent(self, most: int) -> list[tuple[int, int, int]]:
        return [(self.window, self.seconds, self.count), *self._recent][:most]

    async def stop(self, timeout: float) -> int:
        return 0

    def _start(self, now: float) -> int:
        return int(now // self.seconds) * self.seconds


class StoreError(Exception):
    """The store can't be used as it is, and no waiting will help; says what to do."""
