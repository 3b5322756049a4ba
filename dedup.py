"""Windows of time, and the set of distinct ids seen in each.

A window is named by its start, Unix seconds, a multiple of its length: all processes that agree on the time and
the length agree on the windows. Exactly one is open. `add` puts an id into it; `roll`, called by the timer at the
end of each window, closes it and opens the one that the clock stands in. The ids that come after the edge and
before the timer runs are counted in the old window: what is open decides, and a window is closed in one step
between two requests, so no id falls between count and reset.

The clock is the wall clock, looked at by `roll` alone. Set back, it finds the open window not over: that goes on
until the clock has passed its end, so that no window is repeated. Set forward, or after a suspension, the windows
that were slept through are closed too, empty, in order: none is skipped.

The ids are kept in SHARDS small sets and not in one: a set that grows is copied, and one of five million ids
stalls its process for a third of a second when it does, and again when it is freed. The shard is the remainder by
a prime, so that ids with a common factor, as generators make them, spread as well as random ones. A closed
window's sets are freed a few at a time, between requests.
"""

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

# What became of an id.
NEW: Final = 0  # stored, for the first time in its window
DUPLICATE: Final = 1  # it was there
FULL: Final = 2  # not stored: the process holds --max-ids

SHARDS = 1021  # at 5 million ids, 5,000 a set: copied in well under a millisecond
FREE_FOR = 0.0005  # seconds at a time that freeing may take
FREE_EVERY = 0.003  # seconds from one time to the next; some 2 million ids are freed in a second

Done = Callable[[int], None]  # takes what became of an id, once


class Store(Protocol):
    """What counts ids, wherever it keeps them."""

    window: int  # start of the open window, Unix seconds
    seconds: int  # length of a window
    count: int  # ids in the open window, as far as this process knows

    def add(self, number: int, later: Callable[[], Done]) -> int | None:
        """Put an id into the open window. Return what became of it, or None if that will be told to `later()`."""

    def remaining(self) -> float:
        """Return the seconds until `roll` has something to do; less than 0 if it has."""

    def roll(self) -> Iterator[tuple[int, int]]:
        """Close what is over and open the window of now; yield start and count of each closed one, oldest first."""

    async def stop(self) -> None:
        """Settle what waits and let go of the store."""


class Ids:
    """The distinct ids of one window, in many small sets."""

    def __init__(self) -> None:
        self.shards: list[set[int]] = [set() for _ in range(SHARDS)]
        # The collector would walk through every id of every set, 0.1 s for five million; frozen, it passes them by.
        gc.collect(1)  # the young garbage, lest it be frozen too
        gc.freeze()

    def free(self, loop: asyncio.AbstractEventLoop) -> None:
        """Free the ids, a few sets at a time."""
        shards = self.shards
        until = loop.time() + FREE_FOR
        while shards:
            shards.pop()
            if time.monotonic() > until:
                loop.call_later(FREE_EVERY, self.free, loop)
                return


class MemoryStore:
    """Counts in this process alone."""

    def __init__(self, seconds: int, max_ids: int, clock: Callable[[], float] = time.time) -> None:
        self.seconds = seconds
        self.max_ids = max_ids
        self.count = 0
        self.window = self._start(clock())
        self._clock = clock
        self._ids = Ids()

    def add(self, number: int, later: Callable[[], Done]) -> int | None:
        """Put an id into the open window: NEW, DUPLICATE or FULL, always at once."""
        ids = self._ids.shards[number % SHARDS]
        if number in ids:
            return DUPLICATE
        if self.count >= self.max_ids:
            return FULL
        ids.add(number)
        self.count += 1
        return NEW

    def remaining(self) -> float:
        """Return the seconds until the open window is over; negative if it is."""
        return self.window + self.seconds - self._clock()

    def roll(self) -> Iterator[tuple[int, int]]:
        """Close the open window if it is over, and open the one of now. Yield what was closed."""
        start = self._start(self._clock())
        if start <= self.window:
            return iter(())
        closed, count = self.window, self.count
        ids = self._ids
        self.window, self.count, self._ids = start, 0, Ids()
        ids.free(asyncio.get_running_loop())
        return self._closed(closed, count, start)

    def _closed(self, window: int, count: int, end: int) -> Iterator[tuple[int, int]]:
        yield window, count
        for empty in range(window + self.seconds, end, self.seconds):
            yield empty, 0

    async def stop(self) -> None:
        """Nothing waits."""

    def _start(self, now: float) -> int:
        return int(now // self.seconds) * self.seconds
