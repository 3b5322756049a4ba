"""What was sent, what became of it, and whether the counts that are told can be right.

A burst is a number of ids that were sent at one time. From when it was sent and when it was answered follows in which
windows its ids may be counted: an instance knows Redis's time well, but not to the microsecond, so MARGIN seconds are
allowed for on both sides. Of these ids some are counted surely, those that were answered `ok`; some maybe, those whose
answer was lost; and some maybe once more, those that were sent twice and not surely within one window.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MARGIN = 0.25  # seconds


@dataclass(frozen=True)
class Burst:
    """Ids that were sent together, by the clock of Redis."""

    sent: float
    answered: float
    sure: int
    maybe: int = 0
    again: int = 0  # of all these ids, those that may be counted twice


def burst(sent: float, answered: float, window: int, *answers: Iterable[str]) -> Burst:
    """Return the burst of the same ids to one instance or several; each of `answers` has theirs in one order."""
    within = (sent - MARGIN) // window == (answered + MARGIN) // window
    sure = maybe = again = 0
    for of_one in zip(*answers, strict=True):
        sure += "ok" in of_one
        maybe += "ok" not in of_one and "lost" in of_one
        stored = len(of_one) - of_one.count("no")
        again += max(0, stored - 1) if not within else 0
    return Burst(sent, answered, sure, maybe, again)


class Account:
    """All bursts, by the windows in which they may be counted."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.sure = 0
        self.most = 0
        self.late: list[tuple[float, float]] = []  # from when until when windows may not have ended, though it was time
        self._bursts: list[Burst] = []

    def add(self, burst: Burst) -> None:
        self._bursts.append(burst)
        self.sure += burst.sure
        self.most += burst.sure + burst.maybe + burst.again

    def check(self, reports: Mapping[int, int]) -> None:
        """Check the counts of windows, by their starts, in all and one by one."""
        total = sum(reports.values())
        assert self.sure <= total <= self.most, f"{total} counted, expected {self.sure} to {self.most}"
        least, most = self._bounds(reports)
        before = 0
        for start, count in sorted(reports.items()):
            assert count <= most[start], f"{count} counted at {start}, expected no more than {most[start]}"
            before += count
            assert before >= least[start], f"{before} counted up to {start}, expected no fewer than {least[start]}"

    def _bounds(self, starts: Iterable[int]) -> tuple[dict[int, int], dict[int, int]]:
        """Return how many ids are counted up to each window, at least, and how many in each, at most."""
        least = dict.fromkeys(starts, 0)
        most = dict.fromkeys(starts, 0)
        for burst in self._bursts:
            for start in least:
                end = start + self.window
                if burst.answered + MARGIN < end:
                    least[start] += burst.sure
                if burst.answered + MARGIN >= start and burst.sent - MARGIN < self._end(end):
                    most[start] += burst.sure + burst.maybe + burst.again
        return least, most

    def _end(self, end: float) -> float:
        """Return until when a window may have been filled, at the latest."""
        return max([end, *(until for since, until in self.late if since <= end <= until)])
