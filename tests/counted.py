"""The counts that stand in a program's log."""

import re
from datetime import UTC, datetime

from support import Program

# A window in the log, as text and, after `stopped`, one that went on without the process.
COUNT = re.compile(r"unique ids in (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ): (\d+)( \(not final\b.*\))?$")
TEXT_LINE = re.compile(r"\S+ (?:DEBUG|INFO|WARNING|ERROR) [a-z.]+: [ -~]+")


def epoch(window: str) -> int:
    return int(datetime.strptime(window, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())


def counts(lines: list[str]) -> list[tuple[int, int]]:
    """Start and count of every window in the log, the last one included that was not final."""
    return [(epoch(match[1]), int(match[2])) for line in lines if (match := COUNT.search(line))]


def assert_contiguous(windows: list[tuple[int, int]], seconds: int) -> None:
    starts = [start for start, _ in windows]
    assert starts
    assert starts == list(range(starts[0], starts[-1] + 1, seconds))
    assert starts[0] % seconds == 0


def assert_partial(program: Program, count: int | None = None) -> None:
    """The log ends in the count of the window that the process did not live to see closed, and only there."""
    matches = [match for line in program.log.all if (match := COUNT.search(line))]
    assert COUNT.search(program.log.all[-1]), program.log.all[-1]
    assert [bool(match[3]) for match in matches] == [False] * (len(matches) - 1) + [True]
    if count is not None:
        assert sum(int(match[2]) for match in matches) == count


def windows_seen(program: Program, number: int) -> None:
    """Wait until `number` windows stand in the log."""
    program.log.wait_until(lambda lines: True if len(counts(lines)) >= number else None, f"{number} windows")
