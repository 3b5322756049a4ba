"""What the fleet agrees on: the time, which window is open, and which are closed and reported.

Redis's clock is the fleet's. Each ROLL brings its time, and between two of them this process goes by its own monotonic
clock. A window that is over by that is closed here at once, so that no id is stored in one that a slow Redis may have
forgotten; it is closed for the fleet by whoever runs ROLL first, and all others read its report in the stream.

Redis is told of the windows that this process lived through, so that empty ones are reported too, and how many ids it
holds of each, so that a set which was deleted is noticed. A process remembers the reports that it saw: where Redis has
lost data, all that arrive bring what they remember, and the stream is built from it. So it reads what stands in the
stream when it is started, too: the reports of a week outlive those who made them.

An entry of the stream that is not a report, with an id above the next report's, keeps that out. Then no window is
closed before somebody takes the entry out: the counts wait in their sets.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import redis

from dedup import StoreError
from redis_store.advice import code_of
from redis_store.held import Held
from redis_store.scripts import BRING, ROLL, Command, Keys
from redis_store.wire import good

ROLL_LIMIT = 100  # windows closed by one call of ROLL: some 2 ms of Redis's time
REPORTS = 10_080  # entries kept in the stream: a week of minutes
BRING_CHUNK = 500  # reports brought back by one call of BRING
RECALL_CHUNK = 500  # entries of the stream that are read at once: some 5 ms
POLL = 0.05  # seconds until a window is asked for again that Redis found not over yet
BARRED_POLL = 1.0  # seconds likewise, where an entry of the stream has to be taken out first

log = logging.getLogger("verve.store")


class Home(Protocol):
    """The server that has what the fleet agrees on."""

    mark: bytes  # found last; none if the data may have been lost since
    patience: float  # seconds that the fleet needs after a loss, as far as this process knows
    own_patience: float  # seconds that this process does

    async def ask(self, commands: Sequence[Command], deadline: float = 0.0) -> list[Any]:
        """Send commands; return their replies, errors among them. Raises TimeoutError, redis.ConnectionError."""

    async def confirm_place(self) -> None:
        """Raise redis.ConnectionError if another server has become home."""

    def give_up(self, why: Exception) -> None:
        """Begin anew with this server."""


class Windows:
    """This process's part in the agreement."""

    def __init__(self, home: Home, keys: Keys, held: Held, resume: int, clock: Callable[[], float]) -> None:
        """`resume` is the first window to report, 0 for those closed from now on."""
        self.reported_until = 0  # a time: all windows that start before it are reported, or not ours to report
        self.first = 0  # what `reported_until` was when Redis was first reached
        self.reports: list[tuple[int, int]] = []  # start and count of windows that are reported, for who asks next
        self.news = asyncio.Event()  # set when there are new reports in the stream
        self._newest = -1  # start of the newest report that this process knows of
        self.waiting = 0  # windows that are over and could not be closed yet
        self.barred = ""  # what keeps reports out of the stream, and the remedy
        self._home = home
        self._keys = keys
        self._held = held
        self._resume = resume
        self._clock = clock
        self._open = 0  # start of the open window, as home told last
        self._offset = 0.0  # Redis's time less this process's monotonic time
        self._unclosed = 0  # the oldest window that this process lived through and does not know to be closed
        self._known: deque[tuple[int, str]] = deque(maxlen=REPORTS)  # reports seen: start, "NAME SECONDS COUNT"
        self._recalled = False  # those of them are known that are older than `first`
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
        await self._bring(settles)
        await self.roll()
        await self._recall()

    async def _bring(self, settles: bool) -> None:
        known = list(self._known)
        while settles and self._held.window:
            chunk, known = known[:BRING_CHUNK], known[BRING_CHUNK:]
            pairs = [text for start, member in chunk for text in (str(start), member)]
            good(await self._home.ask([self._keys.run(BRING, str(self._newest), *pairs)]))
            settles = bool(known)

    async def _recall(self) -> None:
        """Learn, once, the reports that were in the stream before this process reached home."""
        found: list[tuple[int, str]] = []
        count, upto = 0, f"{self.first}000"
        while not self._recalled:
            asked = ("XREVRANGE", self._keys.stream, upto, "-", "COUNT", str(RECALL_CHUNK))
            (entries,) = good(await self._home.ask([asked]))
            found += [(start, member) for start, member, _ in map(report_in, entries) if start >= 0]
            count += len(entries)
            if len(entries) < RECALL_CHUNK or count >= REPORTS:
                self._recalled = True
                self._known = deque(sorted({*found, *self._known}), maxlen=REPORTS)
            else:
                upto = f"({entries[-1][0].decode()}"

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
            self._home.give_up(error)
            raise
        finally:
            self._rolling.release()

    def met_closed(self, window: int) -> None:
        """Note that somebody has closed a window: ROLL tells what there is to know of it."""

    async def _step(self, deadline: float) -> bool:
        """Close up to ROLL_LIMIT windows; return whether more can be closed now."""
        await self._home.confirm_place()
        _, more = await self._learn(deadline)
        return more

    def _roll(self, mine: range) -> Command:
        """Return the command that closes what is over; `mine` are windows that this process lived through."""
        lived = [text for start in mine for text in (str(start), self._keys.member(start), str(self._held.of(start)))]
        fixed = (self._keys.prefix, self._keys.seconds, ROLL_LIMIT, REPORTS, self._home.mark.decode())
        return self._keys.run(ROLL, *map(str, fixed), str(self._home.own_patience), self._last(mine), *lived)

    def _last(self, mine: range) -> str:
        """Return the last window that may be closed now.

        What is not named yet is not closed yet: the fleet would take it that nobody lived through it.
        """
        return str(mine[-1]) if mine and mine[-1] < self._held.window else "+inf"

    async def _ask(self, commands: Sequence[Command], deadline: float) -> list[Any]:
        return await self._home.ask(commands, deadline)

    async def _learn(self, deadline: float) -> tuple[list[int], bool]:
        """Have home close what is over, and take note of all that it tells.

        Return the windows that wait to be counted part by part, which are in a cluster alone, as starts and lengths in
        turn; and whether more can be closed now.
        """
        held, seconds = self._held, self._keys.seconds
        mine = range(self._unclosed, held.window + 1, seconds)[:ROLL_LIMIT] if held.window else range(0)
        new = ("XRANGE", self._keys.stream, f"{self.reported_until}000-0", "+", "COUNT", str(2 * ROLL_LIMIT))
        before = self._clock()
        rolled, entries = self._understood(await self._ask([self._roll(mine), new], deadline))
        *numbers, agreed, put_back, bar = rolled[:9]
        time_, microseconds, opened, left, newest, settles = map(int, numbers)
        closing = [int(number) for number in rolled[9]] if len(rolled) > 9 else []
        self._newest = max(self._newest, newest)
        self._note_time(time_ + microseconds / 1e6, before, self._clock())
        self._home.patience = max(self._home.own_patience, float(agreed))
        if put_back:
            log.warning("Redis has lost reports; those that were put back: %d", put_back)
        self._open = opened
        if not held.window:  # the first time: what was reported before is not ours to tell
            held.open(opened)
            self._unclosed = min(opened, -(-self._resume // seconds) * seconds or opened)
            self.reported_until = self.first = self._resume or newest + 1
            return [], True
        if opened > held.window:
            held.open(opened)
        ours = self._read(entries)
        if settles:
            return [], False
        await self._note_bar(int(bar or -1), newest)
        if self.barred:
            return [], False
        if closing:
            self._unclosed = max(self._unclosed, closing[0])
        elif mine:
            self._unclosed = max(self._unclosed, min(opened, mine[-1] + seconds))
        if left > 0 or ours == 2 * ROLL_LIMIT or (self._unclosed < opened and not closing):
            return [], True
        if not closing:
            self.reported_until = max(self.reported_until, opened)
        for window, count in held.forget(self.reported_until):
            name = self._keys.member(window).split()[0]
            log.error("the count of %s lacks ids that were answered ok, and that Redis lost: %d", name, count)
        return closing, False

    def _note_time(self, time_: float, before: float, after: float) -> None:
        """Take home's time, which it told between two moments of this process's clock."""
        self._offset = time_ - (before + after) / 2

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
                self._home.mark = b""
                raise redis.ConnectionError(str(error).replace("LOST", "it has lost")) from None
            raise

    def _read(self, entries: list[Any]) -> int:
        """Note the reports among new entries of the stream; return how many there are."""
        count = 0
        for start, member, number in map(report_in, entries):
            if start >= 0:
                count += 1
                self._known.append((start, member))
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
        (entries,) = good(await self._home.ask([("XREVRANGE", stream, "+", "-", "COUNT", "1")]))
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


def report_in(entry: tuple[bytes, list[bytes]]) -> tuple[int, str, int]:
    """Return start, "NAME SECONDS COUNT" and count of the report that an entry is; the start is -1 if it is none."""
    name, fields = entry
    report = read(fields)
    if report is None or name != b"%d000-0" % start_of(report[0]):
        return -1, "", 0
    window, seconds, count, _ = report
    return start_of(window), f"{window} {seconds} {count}", count


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
