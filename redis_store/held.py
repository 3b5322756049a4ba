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
from collections.abc import Iterable, Iterator

from dedup import Ids


class Held:
    """The ids that this process stored, by window."""

    def __init__(self, max_ids: int) -> None:
        """`max_ids` bounds the ids of the open window, and of all past ones together; of these one is always kept."""
        self.max_ids = max_ids
        self.window = 0  # start of the open window, Unix seconds; 0 until Redis has told its time
        self.ids = Ids()  # of the open window
        self.count = 0  # how many these are
        self.flying = 0  # ids on their way to Redis
        self.landed = asyncio.Event()  # set when there are none, or the connection is lost
        self.past: dict[int, tuple[Ids, int]] = {}  # windows that are over here and not reported: ids, how many
        self.missing: dict[int, list[int]] = {}  # by window: acknowledged ids that Redis lost and has no room for
        self._loop = asyncio.get_running_loop()

    @property
    def total(self) -> int:
        """Ids of all windows that are not reported, missing ones among them."""
        return self.count + sum(count for _, count in self.past.values()) + self.missing_count

    @property
    def missing_count(self) -> int:
        """Acknowledged ids that are known not to be in Redis."""
        return sum(map(len, self.missing.values()))

    def open(self, start: int) -> None:
        """Open a newer window."""
        if self.count or self.flying:  # what is on its way may still be stored in the one before
            self.past[self.window] = self.ids, self.count
        self.window, self.count, self.ids = start, 0, Ids()
        while len(self.past) > 1 and sum(count for _, count in self.past.values()) > self.max_ids:
            self._drop(min(self.past))

    def add(self, window: int, numbers: list[int]) -> None:
        """Note that ids are stored in a window."""
        if window == self.window:
            if self.count < self.max_ids:
                self.count += self.ids.add(numbers)
        elif window in self.past:
            ids, count = self.past[window]
            self.past[window] = ids, count + ids.add(numbers)

    def lose(self, window: int, numbers: list[int]) -> None:
        """Note that ids of a window are not in Redis any more, and can't be brought back yet."""
        if not numbers:
            return
        if window == self.window:
            self.count -= self.ids.remove(numbers)
        elif window in self.past:
            ids, count = self.past[window]
            self.past[window] = ids, count - ids.remove(numbers)
        self.missing.setdefault(window, []).extend(numbers)

    def of(self, window: int) -> int:
        """Return how many ids are held of a window."""
        return self.count if window == self.window else self.past.get(window, (None, 0))[1]

    def windows(self) -> Iterator[tuple[int, Ids]]:
        """Return the windows that are not reported, and the ids held of them, oldest first."""
        yield from [(window, ids) for window, (ids, _) in sorted(self.past.items())]
        yield self.window, self.ids

    def forget(self, until: int) -> Iterable[tuple[int, int]]:
        """Free what is held of windows before `until`; return them with the numbers of ids that were missing."""
        for window in [window for window in self.past if window < until]:
            self._drop(window)
        over = [window for window in self.missing if window < until]
        return [(window, len(self.missing.pop(window))) for window in over]

    def _drop(self, window: int) -> None:
        ids, _ = self.past.pop(window)
        ids.free(self._loop)
