"""Windows of time: which one an id falls into, and that each is closed and told once, whatever the clock does.

No test sleeps: time is that of virtual_time.py.
"""

import asyncio
import itertools
import json
import logging
import math
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from virtual_time import Clock, VirtualLoop

import dedup
import reporter
from dedup import DUPLICATE, FULL, NEW, MemoryStore

Result = TypeVar("Result")
Window = tuple[int, int]  # start and count

T = 1_795_329_060  # 2026-11-22T06:31:00Z, the start of a minute
NEVER = 10**9  # more ids than any test adds


@pytest.fixture
def clock() -> Clock:
    return Clock(float(T))


@pytest.fixture
def loop(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualLoop]:
    virtual = VirtualLoop(clock)
    monkeypatch.setattr(time, "monotonic", virtual.time)
    yield virtual
    assert virtual.errors == []
    virtual.close()


class Rolling:
    """A store and a loop to roll it in, since `roll` needs one that runs."""

    def __init__(self, clock: Clock, loop: VirtualLoop, seconds: int = 60, max_ids: int = NEVER) -> None:
        self.clock = clock
        self.loop = loop
        self.store = MemoryStore(seconds, max_ids, clock)

    def add(self, *numbers: int) -> list[int | None]:
        return [self.store.add(number, unexpected) for number in numbers]

    def roll(self) -> list[Window]:
        async def roll() -> list[Window]:
            return list(await self.store.roll())

        return self.loop.run(roll())


def unexpected(outcome: int) -> None:
    raise AssertionError("a store in memory says at once what became of an id")


@pytest.fixture
def minute(clock: Clock, loop: VirtualLoop) -> Rolling:
    return Rolling(clock, loop)


# What a window holds


def test_an_id_counts_once_in_a_window(minute: Rolling) -> None:
    assert minute.add(7, 8, 7, 7, 8) == [NEW, NEW, DUPLICATE, DUPLICATE, DUPLICATE]
    assert minute.store.count == 2
    minute.clock.now = T + 60
    assert minute.roll() == [(T, 2)]
    assert minute.store.count == 0
    assert minute.add(7) == [NEW]


def test_ids_of_all_64_bits_are_told_apart(minute: Rolling) -> None:
    ids = [sign * (1 << bit) + near for bit in range(63) for near in (-1, 0, 1) for sign in (1, -1)]
    ids += [-(2**63), 2**63 - 1, 2**61 - 1, 2**62 - 2, -1, -2]  # those hash alike, some of them
    for number in ids:
        minute.add(number)
    assert minute.store.count == len(set(ids))
    assert set(minute.add(*ids)) == {DUPLICATE}


@pytest.mark.parametrize("factor", [1, 2, 1000, 1021, 1021 * 1024, 2**32, 2**43, -1021, -(2**32)])
def test_ids_with_a_common_factor_are_told_apart(minute: Rolling, factor: int) -> None:
    assert set(minute.add(*range(0, 20_000 * factor, factor))) == {NEW}
    assert minute.store.count == 20_000
    assert set(minute.add(*range(0, 20_000 * factor, factor))) == {DUPLICATE}


@pytest.mark.parametrize("factor", [1, 2, 1000, 2**20, 2**32, -12345, -(2**32)])
def test_ids_with_a_common_factor_do_not_crowd_into_one_set(minute: Rolling, factor: int) -> None:
    """A set of millions stalls the process when it grows and when it is freed."""
    minute.add(*range(0, 50_000 * factor, factor))
    sets = minute.store._ids.sets
    assert max(map(len, sets)) <= 5 * 50_000 / len(sets)


@pytest.mark.parametrize("step", [1, -1, 1000])
def test_sets_do_not_grow_all_at_once(minute: Rolling, step: int) -> None:
    """As sets of one size would, filled with numbers that go up one by one."""
    before = 0
    grown = []
    for start in range(0, 500_000, 1000):
        minute.add(*range(start * step, (start + 1000) * step, step))
        size = sum(map(sys.getsizeof, minute.store._ids.sets))
        grown.append(size - before)
        before = size
    assert max(grown[50:]) < before / 8


def test_max_ids_is_a_limit_of_one_window(clock: Clock, loop: VirtualLoop) -> None:
    rolling = Rolling(clock, loop, 60, max_ids=3)
    assert rolling.add(1, 2, 2, 3, 4, 1, 3, 5) == [NEW, NEW, DUPLICATE, NEW, FULL, DUPLICATE, DUPLICATE, FULL]
    assert rolling.store.count == 3
    clock.now = T + 60
    assert rolling.roll() == [(T, 3)]
    assert rolling.add(4, 5, 6, 7) == [NEW, NEW, NEW, FULL]


# Edges


@pytest.mark.parametrize("seconds", [1, 7, 60, 86400])
@pytest.mark.parametrize("now", [0.0, 1.0, 59.999, 1e6 + 0.5, T + 0.0, T + 59.5, 2**31 + 0.25, 2**33 + 0.75])
def test_windows_are_aligned_to_the_epoch(seconds: int, now: float) -> None:
    store = MemoryStore(seconds, NEVER, Clock(now))
    assert store.window % seconds == 0
    assert store.window <= now < store.window + seconds
    assert store.remaining() == store.window + seconds - now
    assert isinstance(store.window, int)


@pytest.mark.parametrize("seconds", [1, 7, 60, 86400])
def test_the_edge_belongs_to_the_new_window(loop: VirtualLoop, clock: Clock, seconds: int) -> None:
    edge = T // seconds * seconds + seconds
    clock.now = edge - 0.5
    rolling = Rolling(clock, loop, seconds)
    rolling.add(1)
    clock.now = math.nextafter(edge, 0)
    rolling.add(2)
    assert rolling.store.remaining() > 0
    assert rolling.roll() == []
    clock.now = edge
    assert rolling.store.remaining() == 0
    assert rolling.roll() == [(edge - seconds, 2)]
    assert rolling.store.window == edge
    assert rolling.add(1) == [NEW]
    assert rolling.store.remaining() == seconds
    assert rolling.roll() == []
    assert rolling.store.count == 1
    clock.now = edge + seconds
    assert rolling.roll() == [(edge, 1)]


def test_what_comes_between_the_edge_and_a_late_timer_is_counted_in_the_open_window(minute: Rolling) -> None:
    minute.add(1)
    minute.clock.now = T + 61.5
    assert minute.store.remaining() == -1.5
    minute.add(2)
    assert minute.roll() == [(T, 2)]
    assert minute.store.window == T + 60
    assert minute.add(2) == [NEW]


def test_what_is_closed_is_closed_before_it_is_told(minute: Rolling) -> None:
    """An id that comes while the closed windows are still being told is in the open one."""

    async def main() -> None:
        minute.add(1)
        minute.clock.now = T + 180
        told = iter(await minute.store.roll())
        assert minute.add(1, 2) == [NEW, NEW]
        assert list(told) == [(T, 1), (T + 60, 0), (T + 120, 0)]
        assert (minute.store.window, minute.store.count) == (T + 180, 2)

    minute.loop.run(main())


# Clocks that are set


@pytest.mark.parametrize("back", [1, 60, 61, 3600])
def test_a_clock_set_back_repeats_no_window(minute: Rolling, back: int) -> None:
    minute.add(1)
    minute.clock.now = T + 60
    assert minute.roll() == [(T, 1)]
    minute.clock.now = T + 60 - back
    minute.add(1, 2)
    assert minute.roll() == []
    assert minute.store.remaining() == 60 + back
    minute.clock.now = T + 119
    assert minute.roll() == []
    assert minute.add(2, 3) == [DUPLICATE, NEW]
    minute.clock.now = T + 120
    assert minute.roll() == [(T + 60, 3)]
    assert minute.store.window == T + 120


@pytest.mark.parametrize("forward", [60, 90, 3600, 86400])
def test_a_clock_set_forward_skips_no_window(minute: Rolling, forward: int) -> None:
    minute.add(1, 2)
    minute.clock.now = T + 30 + forward
    windows = minute.roll()
    assert windows == [(T, 2)] + [(start, 0) for start in range(T + 60, T + 30 + forward - 59, 60)]
    assert minute.store.window == (T + 30 + forward) // 60 * 60
    assert windows[-1][0] + 60 == minute.store.window


class Model(RuleBasedStateMachine):
    """Any order of adding, of time going by, of clocks set and of rolling, against a set and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock(0)
        self.loop = VirtualLoop(self.clock)
        self.open: set[int] = set()
        self.told: list[Window] = []
        self.added = 0

    @initialize(
        seconds=st.sampled_from([1, 7, 60, 86400]),
        max_ids=st.sampled_from([1, 3, NEVER]),
        now=st.floats(0, 2**33),
    )
    def start(self, seconds: int, max_ids: int, now: float) -> None:
        self.clock.now = now
        self.seconds, self.max_ids = seconds, max_ids
        self.rolling = Rolling(self.clock, self.loop, seconds, max_ids)
        self.first = self.window = self.rolling.store.window

    @rule(numbers=st.lists(st.one_of(st.integers(-5, 5), st.integers(-(2**63), 2**63 - 1)), max_size=8))
    def add(self, numbers: list[int]) -> None:
        for number in numbers:
            expected = DUPLICATE if number in self.open else FULL if len(self.open) >= self.max_ids else NEW
            if expected == NEW:
                self.open.add(number)
                self.added += 1
            assert self.rolling.add(number) == [expected]

    @rule(share=st.floats(0, 1.5))
    def time_goes_by(self, share: float) -> None:
        self.clock.now += share * self.seconds

    @rule(near=st.sampled_from([-1, 0, 1]), windows=st.integers(-3, 3))
    def time_stands_at_an_edge(self, near: int, windows: int) -> None:
        edge = float(max(0, self.window + windows * self.seconds))
        self.clock.now = max(0.0, math.nextafter(edge, near * math.inf)) if near else edge

    @rule(seconds=st.one_of(st.integers(1, 3600), st.floats(0, 86400)))
    def the_clock_is_set_back(self, seconds: float) -> None:
        self.clock.now = max(0.0, self.clock.now - seconds)

    @rule(windows=st.integers(2, 300))
    def the_machine_sleeps(self, windows: int) -> None:
        self.clock.now += windows * self.seconds

    @rule()
    def roll(self) -> None:
        closed = self.rolling.roll()
        if closed:
            assert closed[0] == (self.window, len(self.open))
            assert all(count == 0 for _, count in closed[1:])
            self.open = set()
            self.window = closed[-1][0] + self.seconds
        self.told += closed
        # Rolling has nothing left to do, and the window that is open is the clock's, unless that went back.
        assert self.rolling.store.remaining() > 0
        assert self.clock.now < self.window + self.seconds
        if closed:
            assert self.window <= self.clock.now

    @invariant()
    def every_window_is_told_once_and_every_id_is_counted_once(self) -> None:
        if not hasattr(self, "rolling"):
            return
        store = self.rolling.store
        assert (store.window, store.count) == (self.window, len(self.open))
        assert [start for start, _ in self.told] == list(range(self.first, self.window, self.seconds))
        assert sum(count for _, count in self.told) + store.count == self.added
        assert store.remaining() == store.window + self.seconds - self.clock.now

    def teardown(self) -> None:
        self.loop.close()


Model.TestCase.settings = hypothesis.settings(deadline=None, max_examples=40, stateful_step_count=30)
TestModel = Model.TestCase


# The memory of a closed window


def sets_of(store: MemoryStore) -> list["weakref.ref[set[int]]"]:
    return [weakref.ref(ids) for ids in store._ids.sets]


def alive(sets: Iterable["weakref.ref[set[int]]"]) -> int:
    return sum(ref() is not None for ref in sets)


def test_a_closed_window_is_freed_little_by_little_and_wholly(minute: Rolling) -> None:
    loop, store = minute.loop, minute.store
    minute.add(*range(100_000))
    sets = sets_of(store)
    biggest = max(map(len, store._ids.sets))
    assert biggest <= 12_000 * 100_000 / 5_000_000  # ids of a set, at 5 million a window
    minute.clock.now = T + 60
    loop.tick = 0.0001  # so that freeing takes time
    assert minute.roll() == [(T, 100_000)]
    assert alive(sets) > 0.9 * len(sets)
    assert minute.add(*range(100)) == [NEW] * 100  # which are in sets of their own
    loop.naps.clear()
    steps = 0
    while left := alive(sets):
        loop.run(asyncio.sleep(dedup.FREE_EVERY))
        assert alive(sets) < left
        steps += 1
        assert steps <= len(sets)
    assert steps > 10
    assert min(loop.naps) > 0  # other things had their turn
    assert store.count == 100
    assert minute.add(*range(100)) == [DUPLICATE] * 100


def test_windows_that_close_faster_than_they_are_freed_are_freed_too(minute: Rolling) -> None:
    sets = []
    for number in range(1, 6):
        minute.add(*range(1000))
        sets += sets_of(minute.store)
        minute.clock.now = T + 60 * number
        assert minute.roll() == [(T + 60 * (number - 1), 1000)]
    minute.loop.run(asyncio.sleep(60))
    assert alive(sets) == 0


# The timer


class Timer:
    """`roll_windows` on a virtual loop, and what it tells."""

    def __init__(self, rolling: Rolling, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rolling = rolling
        self.clock, self.loop = rolling.clock, rolling.loop
        self.told: list[Window] = []
        self.when: list[float] = []  # by the wall clock
        monkeypatch.setattr(reporter, "log_count", self.tell)

    def tell(self, start: int, count: int, *, final: bool = True) -> None:
        assert final
        self.told.append((start, count))
        self.when.append(self.clock.now)

    def run(self, *steps: tuple[float, Callable[[], object]]) -> None:
        """Let the timer run, and do each step so many seconds after the one before."""

        async def main() -> None:
            store = self.rolling.store
            timer = asyncio.create_task(reporter.roll_windows(store.remaining, store.roll, self.tell))
            for seconds, step in steps:
                await asyncio.sleep(seconds)
                step()
            assert not timer.done()
            timer.cancel()
            with suppress(asyncio.CancelledError):
                await timer

        self.loop.run(main())

    def assert_contiguous(self) -> None:
        seconds = self.rolling.store.seconds
        starts = [start for start, _ in self.told]
        assert starts == list(range(T // seconds * seconds, self.rolling.store.window, seconds))


@pytest.fixture
def timer(minute: Rolling, monkeypatch: pytest.MonkeyPatch) -> Timer:
    return Timer(minute, monkeypatch)


def nothing() -> None:
    pass


def test_the_timer_tells_each_window_as_it_ends(timer: Timer) -> None:
    add = timer.rolling.add
    timer.run((59.5, lambda: add(1, 2)), (1, lambda: add(1)), (59, lambda: add(3)), (121, nothing))
    assert timer.told == [(T, 2), (T + 60, 2), (T + 120, 0), (T + 180, 0)]
    for (start, _), when in zip(timer.told, timer.when, strict=True):
        assert start + 60 <= when < start + 60.1
    assert len(timer.loop.naps) < 10 * 240  # it sleeps, and does not poll


@pytest.mark.parametrize(("seconds", "windows"), [(1, 300), (7, 100), (60, 50), (86400, 1)])
def test_no_error_adds_up(
    clock: Clock, loop: VirtualLoop, monkeypatch: pytest.MonkeyPatch, seconds: int, windows: int
) -> None:
    """Every waking is late; after many windows the last one still ends at its edge."""
    first = T // seconds * seconds
    clock.now = first + seconds - 0.75
    timer = Timer(Rolling(clock, loop, seconds), monkeypatch)
    loop.late = 0.013
    timer.run((1 + seconds * (windows - 1), nothing))
    assert timer.told == [(first + seconds * number, 0) for number in range(windows)]
    for (start, _), when in zip(timer.told, timer.when, strict=True):
        assert 0 <= when - (start + seconds) < 0.1


def test_a_clock_set_back_under_the_timer(timer: Timer) -> None:
    def back(seconds: float) -> Callable[[], None]:
        def step() -> None:
            timer.rolling.add(int(seconds))
            timer.clock.now -= seconds

        return step

    timer.run((60.5, back(1)), (65.25, back(3600)), (3720, nothing))
    timer.assert_contiguous()
    assert sum(count for _, count in timer.told) == 2
    assert timer.rolling.store.window <= timer.clock.now < timer.rolling.store.window + 60


@pytest.mark.parametrize("seconds", [59.0, 61.0, 3600.0, 3 * 86400.0])
def test_a_clock_set_forward_under_the_timer(timer: Timer, seconds: float) -> None:
    """So it is after a suspension too: the time that the loop goes by stands still while a machine sleeps."""
    noticed: list[float] = []

    def forward() -> None:
        timer.rolling.add(1, 2, 3)
        timer.clock.now += seconds
        noticed.append(timer.clock.now + 2)

    timer.run((10.75, forward), (120, nothing))
    timer.assert_contiguous()
    assert timer.told[0] == (T, 3)
    assert {count for _, count in timer.told[1:]} == {0}
    # It is noticed within a second, and what had ended by then is told at once.
    for (start, _), when in zip(timer.told, timer.when, strict=True):
        assert when < max(start + 60 + 0.1, noticed[0])


def test_other_things_have_their_turn_while_thousands_of_windows_are_told(
    clock: Clock, loop: VirtualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = Timer(Rolling(clock, loop, 1), monkeypatch)
    seen: list[int] = []  # windows told, whenever something else has a turn

    def look() -> None:
        seen.append(len(timer.told))
        if seen[-1] < 86400:
            loop.call_soon(look)

    def tell(start: int, count: int) -> None:
        if not timer.told:
            loop.call_soon(look)
        remember(start, count)

    def forward() -> None:
        clock.now += 86400

    remember = timer.tell
    monkeypatch.setattr(timer, "tell", tell)
    timer.run((0.5, forward), (1.1, nothing))
    assert timer.told == [(start, 0) for start in range(T, T + 86401)]
    assert seen[-1] >= 86400
    assert max(after - before for before, after in itertools.pairwise([0, *seen])) <= 1000


def test_windows_already_told_are_not_told_again_by_the_last_roll(timer: Timer) -> None:
    """As a stopping process does it: the timer is cancelled, then what has ended since is closed by hand."""
    timer.run((61, lambda: timer.rolling.add(1)))
    timer.clock.now = T + 121
    assert timer.told == [(T, 0)]
    assert timer.rolling.roll() == [(T + 60, 1)]
    assert timer.rolling.roll() == []


# Telling


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(file: Path) -> list[str]:
    return file.read_bytes().decode("utf-8").splitlines()


@pytest.mark.parametrize(
    ("start", "name"),
    [(0, "1970-01-01T00:00:00Z"), (T, "2026-11-22T06:31:00Z"), (4_102_444_800, "2100-01-01T00:00:00Z")],
)
def test_the_name_of_a_window(start: int, name: str) -> None:
    assert reporter.iso(start) == name


def test_a_count_as_text(root_logger: logging.Logger, tmp_path: Path) -> None:
    file = tmp_path / "log"
    reporter.log_to(str(file), "text", "info")
    reporter.log_count(T, 12345)
    reporter.log_count(T + 60, 0)
    reporter.log_count(T + 120, 7, final=False)
    lines = logged(file)
    assert len(lines) == 3
    assert lines[0].endswith(" INFO verve.reporter: unique ids in 2026-11-22T06:31:00Z: 12345")
    assert lines[1].endswith(" INFO verve.reporter: unique ids in 2026-11-22T06:32:00Z: 0")
    assert " INFO verve.reporter: unique ids in 2026-11-22T06:33:00Z: 7 (not final" in lines[2]
    stamp = datetime.fromisoformat(lines[0].split()[0])
    assert stamp.utcoffset() == UTC.utcoffset(None)
    assert abs((datetime.now(UTC) - stamp).total_seconds()) < 60


def test_a_count_as_json(root_logger: logging.Logger, tmp_path: Path) -> None:
    file = tmp_path / "log"
    reporter.log_to(str(file), "json", "info")
    reporter.log_count(T, 12345)
    reporter.log_count(T + 60, 7, final=False)
    first, second = map(json.loads, logged(file))
    assert first["message"] == "unique ids in 2026-11-22T06:31:00Z: 12345"
    assert (first["level"], first["logger"]) == ("info", "verve.reporter")
    assert (first["window"], first["count"], first["final"]) == ("2026-11-22T06:31:00Z", 12345, True)
    assert (second["window"], second["count"], second["final"]) == ("2026-11-22T06:32:00Z", 7, False)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_log_level(root_logger: logging.Logger, tmp_path: Path, level: str, expected: list[str]) -> None:
    file = tmp_path / "log"
    reporter.log_to(str(file), "json", level)
    for name in ("debug", "info", "warning", "error"):
        logging.getLogger("verve").log(logging.getLevelNamesMapping()[name.upper()], "at %s", name)
    assert [json.loads(line)["level"] for line in logged(file)] == expected


def test_a_log_file_is_appended_to(root_logger: logging.Logger, tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("before\n")
    reporter.log_to(str(file), "text", "info")
    reporter.log_count(T, 1)
    assert len(logged(file)) == 2
    file.rename(tmp_path / "log.1")
    reporter.log_count(T + 60, 2)
    assert len(logged(file)) == 1
    assert len(logged(tmp_path / "log.1")) == 2


def test_why_a_log_file_is_not_written_is_told_once_each_time(
    root_logger: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, away = tmp_path / "log", tmp_path / "away"
    folder.mkdir()
    reporter.log_to(str(folder / "log"), "text", "info")
    for number in 1, 2:
        folder.rename(away)
        reporter.log_count(T, number)
        reporter.log_count(T + 60, number)
        why, *lines = capsys.readouterr().err.splitlines()
        assert why == f"can't log to {folder / 'log'}: No such file or directory"
        assert [line.split(": ", 1)[1] for line in lines] == [
            f"unique ids in 2026-11-22T06:31:00Z: {number}",
            f"unique ids in 2026-11-22T06:32:00Z: {number}",
        ]
        away.rename(folder)
        reporter.log_count(T + 120, number)
        assert logged(folder / "log")[-1].endswith(f" unique ids in 2026-11-22T06:33:00Z: {number}")
        assert capsys.readouterr().err == ""


def test_a_log_file_that_cannot_be_opened(root_logger: logging.Logger, tmp_path: Path) -> None:
    handlers = root_logger.handlers[:]
    with pytest.raises(OSError, match="missing"):
        reporter.log_to(str(tmp_path / "missing" / "log"), "text", "info")
    assert root_logger.handlers == handlers


def record(message: str, *values: object, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "verve.test", "levelno": 30, "levelname": "WARNING", "msg": message})
    made.args = values
    made.created = T + 0.25
    made.__dict__.update(extra)
    return made


def test_a_json_line() -> None:
    line = json.loads(reporter.JsonFormatter().format(record("%d of %s", 3, "four")))
    assert datetime.fromisoformat(line.pop("time")).timestamp() == T + 0.25
    assert line == {"level": "warning", "logger": "verve.test", "message": "3 of four"}


@given(message=st.text(), logger=st.text(), value=st.text())
def test_a_json_record_is_one_line_of_ascii_whatever_it_says(message: str, logger: str, value: str) -> None:
    made = record("%s", message, name=logger, window=value, count=2**64)
    text = reporter.JsonFormatter().format(made)
    assert text.isascii()
    assert text.isprintable()
    line = json.loads(text)
    assert (line["message"], line["logger"], line["window"], line["count"]) == (message, logger, value, 2**64)


@pytest.mark.parametrize("message", ["two\nlines", "\r\n\x1b[31m\x00", "größer als ½", "\u2028\x85", "\ud800", '"'])
def test_what_would_break_a_line(message: str) -> None:
    assert json.loads(reporter.JsonFormatter().format(record("%s", message)))["message"] == message


@given(message=st.text())
def test_a_message_as_text_is_one_line_whatever_it_says(message: str) -> None:
    line = reporter.TextFormatter().format(record("%s", message))
    assert line.isprintable()
    assert re.match(r"2026-11-22T06:31:00\.\d{3}Z WARNING verve\.test: ", line)
    if message.isprintable():
        assert line.endswith(": " + message)


def test_an_exception_as_json_is_one_line_too() -> None:
    try:
        raise ValueError("größer\nals")
    except ValueError:
        made = record("failed", exc_info=sys.exc_info())
    text = reporter.JsonFormatter().format(made)
    assert text.isascii()
    assert text.isprintable()
    line = json.loads(text)
    assert line["message"] == "failed"
    assert "Traceback" in line["exception"]
    assert "größer\nals" in line["exception"]
    assert json.loads(reporter.JsonFormatter().format(record("none", exc_info=(None, None, None))))


def test_an_exception_as_text(root_logger: logging.Logger, tmp_path: Path) -> None:
    file = tmp_path / "log"
    reporter.log_to(str(file), "text", "info")
    try:
        raise ValueError("größer")
    except ValueError:
        logging.getLogger("verve").exception("failed")
    lines = logged(file)
    assert lines[0].endswith(" ERROR verve: failed")
    assert lines[-1] == "ValueError: größer"
