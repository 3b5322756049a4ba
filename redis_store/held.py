"""What this process holds of each window: the ids that it stored in Redis, until their window is reported.

They serve three ends. A duplicate of one needs no trip. After every reconnect they are stored again, so that a Redis
that comes back empty has lost nothing that a living process acknowledged. And a window's end tells Redis how many
there must be at least, so that a set which was deleted is noticed.

One window is open here; older ones are kept in `past` until they are reported, or there are more ids than --max-ids. An
id that could not be brought back, since Redis has no room, is `missing`: it is not held any more, so a request for it
goes to Redis like any new one, and it is kept aside to be stored again as soon as there is room. If its window is
reported before, the log says how many ids the count lacks.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator

from dedup import Ids
from redis_store.parts import Shares


class Kept:
    """The ids that this process stored in one window."""

    def __init__(self, parts: int) -> None:
        self.ids = Ids()
        self.counts = [0] * parts  # how many of them are in each part
        self.count = 0  # in all

    def add(self, shares: Shares) -> None:
        """Add ids, by part."""
        for part, numbers in shares:
            new = self.ids.add(numbers)
            self.count += new
            self.counts[part.number] += new

    def remove(self, part: int, numbers: list[int]) -> None:
        gone = self.ids.remove(numbers)
        self.count -= gone
        self.counts[part] -= gone


class Held:
    """The ids that this process stored, by window."""

    def __init__(self, max_ids: int, parts: int = 1) -> None:
        """`max_ids` bounds the ids of the open window, and of all past ones together; of these one is always kept."""
        self.max_ids = max_ids
        self.window = 0  # start of the open window, Unix seconds; 0 until Redis has told its time
        self.flying = 0  # ids on their way to Redis
        self.landed = asyncio.Event()  # set when there are none, or the connection is lost
        self.past: dict[int, Kept] = {}  # windows that are over here and not reported
        self.missing: dict[
            tuple[int, int], list[int]
        ] = {}  # acknowledged ids without room in Redis, by window and part
        self._parts = parts
        self._open = Kept(parts)
        self.ids = self._open.ids  # of the open window
        self._loop = asyncio.get_running_loop()

    @property
    def count(self) -> int:
        """How many ids of the open window there are."""
        return self._open.count

    @property
    def total(self) -> int:
        """Ids of all windows that are not reported, missing ones among them."""
        return self.count + sum(kept.count for kept in self.past.values()) + self.missing_count

    @property
    def missing_count(self) -> int:
        """Acknowledged ids that are known not to be in Redis."""
        return sum(map(len, self.missing.values()))

    def open(self, start: int) -> None:
        """Open a newer window."""
        if self.count or self.flying:  # what is on its way may still be stored in the one before
            self.past[self.window] = self._open
        self.window, self._open = start, Kept(self._parts)
        self.ids = self._open.ids
        while len(self.past) > 1 and sum(kept.count for kept in self.past.values()) > self.max_ids:
            self._drop(min(self.past))

    def add(self, window: int, shares: Shares) -> None:
        """Note that ids are stored in a window."""
        kept = self._kept(window)
        if kept is not None and (kept is not self._open or kept.count < self.max_ids):
            kept.add(shares)

    def lose(self, window: int, part: int, numbers: list[int]) -> None:
        """Note that ids of a part are not in Redis any more, and can't be brought back yet."""
        if not numbers:
            return
        kept = self._kept(window)
        if kept is not None:
            kept.remove(part, numbers)
        self.missing.setdefault((window, part), []).extend(numbers)

    def of(self, window: int, part: int = 0) -> int:
        """Return how many ids of a part are held of a window."""
        kept = self._kept(window)
        return kept.counts[part] if kept is not None else 0

    def windows(self) -> Iterator[tuple[int, Ids]]:
        """Return the windows that are not reported, and the ids held of them, oldest first."""
        yield from [(window, kept.ids) for window, kept in sorted(self.past.items())]
        yield self.window, self.ids

    def forget(self, until: int) -> Iterable[tuple[int, int]]:
        """Free what is held of windows before `until`; return them with the numbers of ids that were missing."""
        for window in [window for window in self.past if window < until]:
            self._drop(window)
        lacking: Counter[int] = Counter()
        for window, part in [key for key in self.missing if key[0] < until]:
            lacking[window] += len(self.missing.pop((window, part)))
        return lacking.items()

    def _kept(self, window: int) -> Kept | None:
        return self._open if window == self.window else self.past.get(window)

    def _drop(self, window: int) -> None:
        self.past.pop(window).ids.free(self._loop)
