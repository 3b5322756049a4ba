"""What the fleet agrees on: the time, which window is open, and which are closed and reported.

Redis's clock is the fleet's. Each ROLL brings its time, and between two of them this process goes by its own monotonic
clock. A window that is over by that is closed here at once, so that no id is stored in one that a slow Redis may have
forgotten; it is closed for the fleet by whoever runs ROLL first, and all others read its report in the stream.

Redis is told of the windows that this process lived through, so that empty ones are reported too, and how many ids it
holds of each, so that a set which was deleted is noticed. A process remembers the reports that it saw: where Redis has
lost data, all that arrive bring what they remember, and the stream is built from it.

An entry of the stream that is not a report, with an id above the next report's, keeps that out. Then no window is
closed before somebody takes the entry out: the counts wait in their sets.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import redis

from dedup import StoreError
from redis_store.advice import code_of
from redis_store.held import Held
from redis_store.node import Node
from redis_store.scripts import BRING, ROLL, Keys
from redis_store.wire import good

ROLL_LIMIT = 100  # windows closed by one call of ROLL: some 2 ms of Redis's time
REPORTS = 10_080  # entries kept in the stream: a week of minutes
BRING_CHUNK = 500  # reports brought back by one call of BRING
POLL = 0.05  # seconds until a window is asked for again that Redis found not over yet
BARRED_POLL = 1.0  # seconds likewise, where an entry of the stream has to be taken out first

log = logging.getLogger("verve.store")


class Windows:
    """This process's part in the agreement."""

    def __init__(self, node: Node, keys: Keys, held: Held, resume: int, clock: Callable[[], float]) -> None:
        """`resume` is the first window to report, 0 for those closed from now on."""
        self.reported_until = 0  # a time: all windows that start before it are reported, or not ours to report
        self.first = 0  # what `reported_until` was when Redis was first reached
        self.reports: list[tuple[int, int]] = []  # start and count of windows that are reported, for who asks next
        self.news = asyncio.Event()  # set when there are new reports in the stream
        self._newest = -1  # start of the newest report that this process knows of
        self.barred = ""  # what keeps reports out of the stream, and the remedy
        self._node = node
        self._keys = keys
        self._held = held
        self._resume = resume
        self._clock = clock
        self._offset = 0.0  # Redis's time less this process's monotonic time
        self._unclosed = 0  # the oldest window that this process lived through and does not know to be closed
        self._known: deque[tuple[int, str]] = deque(maxlen=REPORTS)  # reports seen: start, "NAME SECONDS COUNT"
        self._rolling = asyncio.Lock()

    def now(self) -> float:
        """Return Redis's time, Unix seconds, as well as this process knows it."""
        return self._clock() + self._offset

    def turn(self) -> int:
        """Open the window of now in this process if it is newer than the open one; return the open one's start."""
        held = self._held
        now = self._clock() + self._offset
        if now >= held.window + self._keys.seconds:
            held.open(int(now // self._keys.seconds) * self._keys.seconds)
        return held.window

    def remaining(self) -> float:
        """Return the seconds until there is something to roll."""
        if self._held.window and self.reported_until < self._held.window:
            return BARRED_POLL if self.barred else POLL
        return self._held.window + self._keys.seconds - self.now()

    async def arrived(self, settles: bool) -> None:
        """Tell a server that may have lost reports what they were; learn the time and what is closed."""
        known = list(self._known)
        while settles and self._held.window:
            chunk, known = known[:BRING_CHUNK], known[BRING_CHUNK:]
            pairs = [text for start, member in chunk for text in (str(start), member)]
            good(await self._node.ask([self._keys.run(BRING, str(self._newest), *pairs)]))
            settles = bool(known)
        await self.roll()

    async def roll(self, deadline: float = 0.0) -> None:
        """Close in Redis what is over, take its time, and note what was reported; each trip by `deadline` (loop time).

        On any failure the connection is given up. Raises TimeoutError, redis.RedisError, StoreError.
        """
        async with asyncio.timeout_at(deadline or None):
            await self._rolling.acquire()
        try:
            while await self._step(deadline):
                pass
        except Exception as error:
            self._node.give_up(error)
            raise
        finally:
            self._rolling.release()

    async def _step(self, deadline: float) -> bool:
        """Close up to ROLL_LIMIT windows; return whether more can be closed now."""
        held, seconds = self._held, self._keys.seconds
        mine = range(self._unclosed, held.window + 1, seconds)[:ROLL_LIMIT] if held.window else range(0)
        roll = self._keys.run(ROLL, *self._arguments(mine))
        new = ("XRANGE", self._keys.stream, f"{self.reported_until}000-0", "+", "COUNT", str(2 * ROLL_LIMIT))
        before = self._clock()
        rolled, entries = self._understood(await self._node.ask([roll, new], deadline))
        *numbers, agreed, put_back, bar = rolled
        time_, microseconds, opened, left, newest, settles = map(int, numbers)
        self._newest = max(self._newest, newest)
        self._offset = time_ + microseconds / 1e6 - (before + self._clock()) / 2
        self._node.patience = max(self._node.own_patience, float(agreed))
        if put_back:
            log.warning("Redis has lost reports; those that were put back: %d", put_back)
        if not held.window:  # the first time: what was reported before is not ours to tell
            held.open(opened)
            self._unclosed = min(opened, -(-self._resume // seconds) * seconds or opened)
            self.reported_until = self.first = self._resume or newest + 1
            return True
        if opened > held.window:
            held.open(opened)
        ours = self._read(entries)
        if settles:
            return False
        await self._note_bar(int(bar or -1), newest)
        if self.barred:
            return False
        if mine:
            self._unclosed = max(self._unclosed, min(opened, mine[-1] + seconds))
        if left > 0 or self._unclosed < opened or ours == 2 * ROLL_LIMIT:
            return True
        self.reported_until = max(self.reported_until, opened)
        for window, count in held.forget(self.reported_until):
            name = self._keys.member(window).split()[0]
            log.error("the count of %s lacks ids that were answered ok, and that Redis lost: %d", name, count)
        return False

    def _understood(self, replies: list[Any]) -> list[Any]:
        """Return replies; raise what an error among them means."""
        try:
            return good(replies)
        except redis.ResponseError as error:
            if code_of(error) == "WINDOW":
                length = str(error).split()[1]
                raise StoreError(
                    f"the instances of --key-prefix {self._keys.prefix} count windows of {length} s, not of "
                    f"{self._keys.seconds} s: start this one with --window {length} or another prefix"
                ) from None
            if code_of(error) == "LOST":
                self._node.mark = b""
                raise redis.ConnectionError(str(error).replace("LOST", "it has lost")) from None
            raise

    def _arguments(self, mine: range) -> list[str]:
        lived = [text for start in mine for text in (str(start), self._keys.member(start), str(self._held.of(start)))]
        # What is not named yet is not closed yet: the fleet would take it that nobody lived through it.
        last = str(mine[-1]) if mine and mine[-1] < self._held.window else "+inf"
        mark, patience_ = self._node.mark.decode(), str(self._node.own_patience)
        fixed = (self._keys.prefix, self._keys.seconds, ROLL_LIMIT, REPORTS, mark, patience_, last)
        return [*map(str, fixed), *lived]

    def _read(self, entries: list[Any]) -> int:
        """Note the reports among new entries of the stream; return how many there are."""
        count = 0
        for entry, fields in entries:
            report = read(fields)
            if report is None or entry != b"%d000-0" % start_of(report[0]):
                continue
            count += 1
            name, seconds, number, _ = report
            start = start_of(name)
            self._known.append((start, f"{name} {seconds} {number}"))
            self.reports.append((start, number))
            self._newest = max(self._newest, start)
            self.reported_until = max(self.reported_until, start + 1)
            self.news.set()
        return count

    async def _note_bar(self, window: int, newest: int) -> None:
        """Note, and log if that is news, that the report of a window can't get into the stream (-1: none is barred)."""
        if window < 0:
            if self.barred:
                log.warning("the stream %s takes reports again", self._keys.stream)
            self.barred = ""
            return
        stream = self._keys.stream
        (entries,) = good(await self._node.ask([("XREVRANGE", stream, "+", "-", "COUNT", "1")]))
        foreign = [entry.decode() for entry, _ in entries if entry != b"%d000-0" % newest]
        barred = (
            f"the stream {stream} has {f'an entry that is not a report, {foreign[0]}' if foreign else 'had an entry'}, "
            f"whose id keeps the report of {self._keys.member(window).split()[0]} and all later ones out: "
            f"RENAME {stream} {stream}:aside, then DEL {self._keys.mark}, and the stream is built anew"
        )
        if barred != self.barred:
            log.error("%s", barred)
        self.barred = barred


def start_of(name: str) -> int:
    """Return the start of a window by its name. Raises ValueError."""
    return int(datetime.fromisoformat(name).replace(tzinfo=UTC).timestamp())  # not strptime: a day is read at once


def read(fields: list[bytes]) -> tuple[str, int, int, bool] | None:
    """Return name, length, count (and True) of the window that an entry of the stream tells of, if it does."""
    report = dict(zip(fields[::2], fields[1::2], strict=True))
    try:
        name, seconds = report[b"window"].decode("ascii"), int(report[b"seconds"])
        if name != f"{datetime.fromtimestamp(start_of(name), UTC).isoformat()[:19]}Z" or not 1 <= seconds <= 86_400:
            return None
        return name, seconds, int(report[b"count"]), True
    except (KeyError, ValueError):
        return None
