"""Windows of time, and the set of distinct ids seen in each: in this process, or in Redis for a whole fleet.

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

In Redis a window is one set. Its life, and what keeps each id in exactly one window:

- Opened by the first batch that anyone stores in it: OPEN puts it into the index before its ids come, so a window
  that holds ids is always found again, even if everybody dies. A window not newer than the newest report can't be
  opened; OPEN closes its key instead.
- Filled by batches. Ids wait until the link is free; then all that wait go out as one `SADD` and one round trip
  (group commit: no delay when idle, large batches under load). `ok` is said when Redis has said it.
- Closed by ROLL, one script: count the set, add the report to the stream with the window's start as the entry's
  id, and put a string in the set's place. A batch that comes too late then fails with WRONGTYPE, having stored
  nothing, and is stored in the open window instead. So `SADD` alone is as safe as a transaction that looks at a
  mark first, and no closed count changes.
- Whoever rolls first closes. ROLL goes by Redis's own clock, and closes everything in the index that is over,
  oldest first, along with the empty windows that its caller lived through: so reports come in order, whatever
  the others do, and after an outage of the whole fleet the windows that hold ids are reported by the first
  instance that is back. Windows that nobody lived through and that hold nothing are not reported. An empty window
  that only an instance cut off from Redis lived through is not, either, once the others have reported a newer one.
- A Redis that may have lost data closes nothing for SETTLE seconds, and for as long again after each chunk that an
  instance brings back. That is a Redis where ARRIVE, the first thing said on a connection, finds no mark of its own or
  that of another server (`run_id`): emptied, restarted from an old snapshot, or a replica that was promoted. The mark
  is named in every ROLL, so that an instance whose link stood through a FLUSHALL learns of it too, at the next edge.
- The string and the sets expire after KEEP, the last resort; a process does not store in a window that is over by
  its own clock, so it can't open a forgotten one again.

An id stored by this process is kept in its own sets too, until its window is reported. A duplicate of it needs no
trip; and after every reconnect all of them are stored again before new ids are taken, so a Redis that comes back
empty has lost nothing that a living instance acknowledged.

An id with somebody to be told the count (a callback) is stored by COUNT instead, a script, which says for each id
whether it was new and how many there are with it.

The link to Redis is one connection, which redis-py makes (addresses, TLS, passwords), and one task. When it fails,
or does not answer in time, everything that waits is told so; what was under way is not sent again, since it may have
been stored. Until it is back, after 50 ms to 0.5 s each try, `add` says DOWN at once.
"""

import asyncio
import bisect
import contextlib
import gc
import itertools
import logging
import math
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from time import perf_counter
from typing import Any, Final, cast

import redis
import redis.asyncio

# What became of an id.
NEW: Final = 0  # stored, for the first time in its window
DUPLICATE: Final = 1  # it was there
STORED: Final = 2  # one of the two
FULL: Final = 3  # not stored: the process holds --max-ids
BUSY: Final = 4  # not stored: MAX_WAITING ids wait for Redis
DOWN: Final = 5  # not stored: there is no Redis
LOST: Final = 6  # Redis did not answer in time, or the link broke: stored or not
REFUSED: Final = 7  # Redis answered with an error: not stored, or not where it would be found again

# A prime that nobody can aim at; at 5 million ids up to 10,000 a set, copied in half a millisecond.
SHARDS: Final = random.choice([n for n in range(8000, 9000) if all(n % d for d in range(2, 95))])  # noqa: S311
WIDTHS = range(4, 17)  # shards that share a set: a set grows fourfold at a time
FREE_FOR = 0.0005  # seconds at a time that freeing may take
FREE_EVERY = 0.003  # seconds from one time to the next; some 2 million ids are freed in a second

MAX_WAITING = 50_000  # ids that may wait for Redis in one process: half a second's worth
MAX_BATCH = 10_000  # ids in one round trip: some 5 ms of Redis's time
MAX_COUNTED = 2_000  # of those that are counted one by one
REPLAY_CHUNK = 1_000  # ids in one SADD of a replay
ROLL_LIMIT = 100  # windows closed by one call of ROLL: some 2 ms of Redis's time
REPORTS = 10_080  # entries kept in the stream: a week of minutes
KEEP = 2 * 86_400  # seconds after which Redis may forget a window's keys, two windows at least
SETTLE = 1.5  # seconds after a loss of data in which nothing is closed: longer than it takes to connect again
SETTLE_ALL = 60.0  # seconds after which windows are closed whoever still brings ids back
RETRY = (0.05, 0.5)  # seconds between attempts to connect, doubling from the first to the second
ARRIVAL = 1.0  # seconds to connect, and again to the first answer: with the wait before, less than the promised 2
LATE = 0.05  # seconds past a deadline in which a reply is read that came while this process did other things
HUSH = 1.0  # seconds for which Redis must have kept to what it last did for the log to follow it at once
LEASE = 10.0  # seconds after which another instance delivers reports, when the one that did is silent
ALIVE_EVERY = 1.0  # seconds after which an idle link is tried
RECENT = 60  # closed windows that are remembered without Redis, for those who watch
REFUSING = 5.0  # seconds after a refusal in which the store is said to take no ids; only an id can tell that it does

# Upper bounds of what is counted in a `Histogram`.
TRIPS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds
WAITS = TRIPS[TRIPS.index(0.0025) :]  # taken from the loop's time, which goes by milliseconds
SIZES = (1, 4, 16, 64, 256, 1024, 4096, MAX_BATCH)

log = logging.getLogger("verve.store")

Command = tuple[str | bytes, ...]
Done = Callable[[int], None]  # takes what became of an id, once
Tell = Callable[[Sequence[Any], int], None]  # takes many such, and what became of all their ids
Counted = Callable[[int, int], None]  # takes the start of a window and the fleet's count in it


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
        gc.collect(1)  # the young garbage, lest it be frozen too
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


class Store(ABC):
    """What counts ids, wherever it keeps them."""

    place: str  # where the ids are, in words
    window = 0  # start of the open window, Unix seconds; 0 until the store has told its time
    count = 0  # ids in the open window, as far as this process knows

    def __init__(self, seconds: int, max_ids: int) -> None:
        """`seconds` is the length of a window; this process keeps at most `max_ids` of one."""
        self.seconds = seconds
        self.max_ids = max_ids
        self.tell: Tell = tell_each  # or what knows a quicker way for what it gave `add`
        self.waits = Histogram(WAITS)  # seconds that ids waited, as long as the first of their batch
        self.trips = Histogram(TRIPS)  # seconds that a batch took
        self.sizes = Histogram(SIZES)  # ids in a batch
        self._ids = Ids()
        self._new = 0

    @property
    def new(self) -> int:
        """Ids that this process stored and that were new in their window, since it was started."""
        return self._new

    @property
    def queued(self) -> int:
        """Ids that wait."""
        return 0

    @property
    def obstacle(self) -> str:
        """Why ids can't be stored, in words; "" if they can."""
        return ""

    @property
    def warning(self) -> str:
        """What is to be mended although they can."""
        return ""

    @abstractmethod
    def add(self, number: int, done: Done, counted: Counted | None = None) -> int | None:
        """Put an id into the open window. Return what became of it, or None if `done` will be told that later.

        If it is new in its window, `counted` is told the count with it.
        """

    def add_all(self, numbers: Sequence[int]) -> int | None:
        """Put many ids into the open window and return STORED; or None, with none put, if each has to be asked for."""
        return None

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

    async def start(self, timeout: float) -> bool:
        """Wait until ids can be taken, for at most `timeout` seconds; return whether they can. Raises StoreError."""
        return True

    async def failure(self) -> None:
        """Return never; raise StoreError when the store turns out to be of no use."""
        await asyncio.get_running_loop().create_future()

    @abstractmethod
    async def stop(self) -> None:
        """Settle what waits, as long as the caller has patience, and let go of the store."""


class MemoryStore(Store):
    """Counts in this process alone; nobody waits."""

    place = "memory"

    def __init__(self, seconds: int, max_ids: int, clock: Callable[[], float] = time.time) -> None:
        super().__init__(seconds, max_ids)
        self.window = self._start(clock())
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

    def add_all(self, numbers: Sequence[int]) -> int | None:
        if self.count + len(numbers) > self.max_ids:
            return None
        self.count += self._ids.add(numbers)
        return STORED

    @property
    def new(self) -> int:
        return self._new + self.count

    @property
    def warning(self) -> str:
        return "the window holds as many ids as --max-ids allows" if self.count >= self.max_ids else ""

    def remaining(self) -> float:
        return self.window + self.seconds - self._clock()

    async def roll(self) -> Iterable[tuple[int, int]]:
        start = self._start(self._clock())
        if start <= self.window:
            return ()
        closed, count = self.window, self.count
        ids = self._ids
        self._new += count
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

    async def stop(self) -> None:
        pass

    def _start(self, now: float) -> int:
        return int(now // self.seconds) * self.seconds


class StoreError(Exception):
    """The store can't be used as it is, and no waiting will help; says what to do."""


KEYS = ("open", "reports")  # index and stream, after the prefix

# Both scripts see windows as the index has them: a sorted set of members "NAME SECONDS" by start. `last` is the
# start of the newest report there ever was, whether it still stands in the stream or not.
_NEWEST = """
local last = -1
if redis.call('EXISTS', KEYS[2]) == 1 then
  local info = redis.call('XINFO', 'STREAM', KEYS[2])
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then
      last = math.floor(tonumber(string.match(info[i + 1], '^%d+')) / 1000)
    end
  end
end
"""

# KEYS: index, stream, set of the window. ARGV: start, member, keep.
OPEN = (
    _NEWEST
    + """
if tonumber(ARGV[1]) > last then
  redis.call('ZADD', KEYS[1], ARGV[1], ARGV[2])
  redis.call('EXPIRE', KEYS[1], ARGV[3])
elseif redis.call('EXISTS', KEYS[3]) == 0 then
  redis.call('SET', KEYS[3], 'closed', 'EX', ARGV[3])
end
return 1
"""
)

# KEYS: set of the window. ARGV: how many ids are counted one by one, those ids, the other ids. Returns how many
# were new, then of each of the first whether it was and how many there are with it. Nothing is stored if the first
# can't be. Redis 6.2 hides the kind of an error that it does not get through pcall; `unpack` takes up to 7,999.
COUNT = """
local rest = tonumber(ARGV[1]) + 2
local replies = {0}
for i = 2, rest - 1 do
  local new = redis.pcall('SADD', KEYS[1], ARGV[i])
  if type(new) == 'table' then
    return new
  end
  replies[1] = replies[1] + new
  replies[#replies + 1] = new
  replies[#replies + 1] = redis.call('SCARD', KEYS[1])
end
for i = rest, #ARGV, 5000 do
  replies[1] = replies[1] + redis.call('SADD', KEYS[1], unpack(ARGV, i, math.min(i + 4999, #ARGV)))
end
return replies
"""

# KEYS: mark, settling. ARGV: run_id, keep. Returns the mark, "RUN_ID TIME": when and where data may have been lost.
ARRIVE = """
redis.call('EXPIRE', KEYS[1], ARGV[2])  -- a write that is allowed when memory is full, and allows the others
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local settling = tonumber(redis.call('GET', KEYS[2]) or 0) or 0
local mark = redis.call('GET', KEYS[1])
if not mark or string.match(mark, '^%S+') ~= ARGV[1] then
  mark = ARGV[1] .. string.format(' %.6f', now)
  redis.call('SET', KEYS[1], mark, 'EX', ARGV[2])
  settling = now
end
if settling >= now and now < tonumber(string.match(mark, '%S+$')) + SETTLE_ALL then
  redis.call('SET', KEYS[2], string.format('%.6f', now + SETTLE), 'EX', SETTLE_ALL)
end
return mark
""".replace("SETTLE_ALL", f"{SETTLE_ALL:.0f}").replace("SETTLE", str(SETTLE))

# KEYS: index, stream, length of a window, settling, mark. ARGV: prefix, length, keep, limit, entries to keep, the first
# window that may not have been reported, the mark that was found on arrival, then pairs of start and member: windows
# that the caller lived through. Returns Redis's time, the open window's start, how many windows are still to be closed
# now, the start of the newest that was reported before, and whether Redis settles, so that nothing is closed yet.
ROLL = (
    _NEWEST
    + """
local length = tonumber(ARGV[2])
local other = redis.call('GET', KEYS[3])
if other and other ~= ARGV[2] then
  return redis.error_reply('WINDOW ' .. other)
end
if redis.call('GET', KEYS[5]) ~= ARGV[7] then
  return redis.error_reply('LOST its data')
end
redis.call('EXPIRE', KEYS[5], ARGV[3])  -- a write that is allowed when memory is full, and allows the others
redis.call('SET', KEYS[3], ARGV[2], 'EX', 2 * length + 60)
local time = redis.call('TIME')
local now = tonumber(time[1])
local settling = (tonumber(redis.call('GET', KEYS[4]) or 0) or 0) > now + tonumber(time[2]) / 1e6 and 1 or 0
if settling == 1 and tonumber(ARGV[6]) - 1 > last then
  -- The stream is new, and has forgotten what was reported before.
  if last < 0 then
    redis.call('XGROUP', 'CREATE', KEYS[2], 'verve', '$', 'MKSTREAM')
    redis.call('XGROUP', 'DESTROY', KEYS[2], 'verve')
  end
  last = tonumber(ARGV[6]) - 1
  redis.call('XSETID', KEYS[2], string.format('%d', last) .. '000-0')
end
local open = math.max(now - now % length, (math.floor(last / length) + 1) * length)
for i = 8, #ARGV, 2 do
  local start = tonumber(ARGV[i])
  if start > last and start < open then
    redis.call('ZADD', KEYS[1], start, ARGV[i + 1])
  end
end
local before = last
local over = {}
if settling == 0 then
  over = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. open, 'WITHSCORES', 'LIMIT', 0, ARGV[4])
end
for i = 1, #over, 2 do
  local name, seconds = string.match(over[i], '^(%S+) (%d+)$')
  local start = over[i + 1]
  local key = ARGV[1] .. ':{' .. start .. '}:ids'
  local kind = redis.call('TYPE', key).ok
  if tonumber(start) > last then
    local count = kind == 'set' and redis.call('SCARD', key) or 0
    redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], start .. '000-0',
      'window', name, 'seconds', seconds, 'count', count)
    last = tonumber(start)
  end
  if kind == 'set' then
    redis.call('UNLINK', key)
  end
  if kind == 'set' or kind == 'none' then
    redis.call('SET', key, 'closed', 'EX', ARGV[3])
  end
  redis.call('ZREM', KEYS[1], over[i])
end
local left = redis.call('ZCOUNT', KEYS[1], '-inf', '(' .. open)
left = settling == 1 and 0 or left
return {time[1], time[2], string.format('%d', open), left, string.format('%d', before), settling}
"""
)

# Of the webhook's lease. KEYS: lease. ARGV: token, milliseconds.
HOLD = """
redis.call('UNLINK', KEYS[1] .. ':none')  -- a write that is allowed when memory is full, and allows the others
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
LET_GO = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"

# What an error that Redis answers with means, and what to do.
ADVICE = {
    "OOM": "Redis is out of memory: raise its maxmemory, or count shorter windows",
    "MISCONF": "Redis can't save its data and takes no writes: see its log and disk",
    "READONLY": "this Redis is a replica: let --redis-url name the primary",
    "LOADING": "Redis is loading its data",
    "NOAUTH": "Redis asks for a password: put it into --redis-url",
    "WRONGPASS": "Redis does not know this user and password: correct --redis-url",
    "NOPERM": "the Redis user may not do this: see docs/operations.md for what it needs",
    "WRONGTYPE": "keys of this prefix are used for something else: choose another --key-prefix",
}
WITH_DEFAULTS = {"host": "localhost", "port": 6379, "db": 0}  # of redis-py's URLs
LINK_ERRORS = ("READONLY", "MASTERDOWN", "LOADING", "NOAUTH")  # another connection may be better


class Wire(asyncio.Protocol):
    """Round trips over a connection that redis-py has made, without its stream, tasks and time-outs for each.

    A trip of 30 ids costs 38 us of CPU, most of it the kernel's, where redis-py's reader and writer took 72.
    """

    def __init__(self, connection: redis.asyncio.Connection, lost: Callable[[], None]) -> None:
        """Take the connection over; `lost` is called when it breaks."""
        self._loop = asyncio.get_running_loop()
        self._transport = cast(asyncio.Transport, connection._writer.transport)  # type: ignore[union-attr]
        self._transport.set_protocol(self)
        self._lost = lost
        self._broken = ""  # why it can't be used, in words
        self._received = b""  # what came of a reply that is not whole yet
        self._replies: list[Any] = []  # of the trip under way
        self._awaited = 0  # how many it is to have
        self._trip: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle

    async def trip(self, packed: bytes, count: int, deadline: float) -> list[Any]:
        """Send packed commands and return their `count` replies. Raises TimeoutError at `deadline`, ConnectionError."""
        if self._broken:
            raise redis.ConnectionError(self._broken)
        self._replies, self._awaited = [], count
        self._trip = self._loop.create_future()
        self._timer = self._loop.call_at(deadline, self._expire)
        try:
            self._transport.write(packed)
            await self._trip
        except RuntimeError as error:  # uvloop's, for a transport that was reset and has not said so yet
            raise redis.ConnectionError("the connection was reset") from error
        finally:
            self._timer.cancel()
            self._awaited = 0
        return self._replies

    def _expire(self) -> None:
        """End the trip in a moment: timers run before what came meanwhile is read, and it may be the reply."""
        self._timer = self._loop.call_later(LATE, self._end, TimeoutError())

    def _end(self, error: Exception | None = None) -> None:
        if self._trip is not None and not self._trip.done():
            if error is None:
                self._trip.set_result(None)
            else:
                self._trip.set_exception(error)

    def data_received(self, data: bytes) -> None:
        data = self._received + data
        pos = 0
        try:
            while pos < len(data) and len(self._replies) < self._awaited:
                reply, pos = parse(data, pos)
                self._replies.append(reply)
        except ShortError:
            self._received = data[pos:]
            return
        except ValueError:
            self._break("what came is not Redis's protocol")
            return
        self._received = b""
        if pos < len(data):
            self._break("a reply came that nobody waits for")
        elif len(self._replies) == self._awaited:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._break("the connection was closed")

    def _break(self, why: str) -> None:
        if not self._broken:
            self._broken = why
            self._transport.abort()
            self._end(redis.ConnectionError(why))
            self._lost()


class ShortError(Exception):
    """A reply is not whole yet."""


def parse(data: bytes, pos: int) -> tuple[Any, int]:
    """Read a reply (RESP2) at `pos`; return it and where the next begins. Errors are returned too, as they stand.

    Raises ShortError if there is more to come, ValueError if it is none.
    """
    end = data.find(b"\r\n", pos)
    if end < 0:
        raise ShortError
    kind, line = data[pos : pos + 1], data[pos + 1 : end]
    pos = end + 2
    if kind == b":":
        return int(line), pos
    if kind == b"+":
        return line, pos
    if kind == b"-":
        return redis.ResponseError(line.decode("utf-8", "replace")), pos
    size = int(line)
    if size < 0:
        return None, pos
    if kind == b"$":
        if len(data) < pos + size + 2:
            raise ShortError
        return data[pos : pos + size], pos + size + 2
    if kind != b"*":
        raise ValueError("a reply of an unknown kind")
    items = []
    for _ in range(size):
        item, pos = parse(data, pos)
        items.append(item)
    return items, pos


class RedisStore(Store):
    """Counts in Redis, together with every process of the same prefix."""

    def __init__(
        self, url: str, prefix: str, seconds: int, max_ids: int, request_timeout: float, resume: int = 0
    ) -> None:
        """Start to connect. `request_timeout` is how long an id may wait for Redis, in seconds.

        `roll` first returns the windows that start at `resume` or later; without it, those that are closed only now.
        """
        super().__init__(seconds, max_ids)
        self.timeout = request_timeout
        self.prefix = prefix
        self.up = False  # the link stands, and ids are taken
        self.why = ""  # in words, once it is not up
        self._evicting = ""  # the policy by which Redis may drop ids
        self.reported = asyncio.Event()  # set when there are new reports in the stream
        self.told = 0  # windows that start before this one are told, or not ours to tell
        self.first = 0  # what `told` was when Redis was first reached
        self._lived = 0  # the first window that this process lived through and has not seen closed
        self._resume = resume
        self._options = redis.asyncio.ConnectionPool.from_url(
            url,
            protocol=2,
            socket_timeout=None,
            socket_connect_timeout=ARRIVAL,
            max_connections=1,
        )
        self.place = place(url)
        self._loop = asyncio.get_running_loop()
        self._past: list[tuple[int, Ids]] = []  # windows that are over here and not yet reported, with their ids
        self._numbers: list[int] = []  # ids that wait, and whom to tell
        self._dones: list[Done] = []
        self._counted: list[tuple[int, Done, Counted]] = []  # ids that wait to be counted one by one
        self._since = 0.0  # loop time at which the first of all these came
        self._jobs: deque[tuple[Callable[[], Awaitable[Any]], asyncio.Future[Any]]] = deque()  # what else waits
        self._reported: deque[tuple[bytes, list[bytes]]] = deque(maxlen=REPORTS)  # entries seen in the stream
        self._reports: list[tuple[int, int]] = []  # start and count of windows that `roll` will return
        self._wake: asyncio.Future[None] | None = None  # of the link's task, while it has nothing to do
        self._offset = 0.0  # Redis's time less this process's monotonic time
        self._opened = False  # OPEN was sent for the window, on this connection
        self._mark = ""  # what ARRIVE said on this connection
        self._refused = ""  # the error that the last batch was refused with, if it was
        self._logged = ""  # the same, as the log had it last
        self._hushed = 0.0  # loop time before which it has no other
        self._refused_at = 0.0  # loop time at which the last one was
        self._under_way = 0  # ids in the batch that Redis has
        self._stopping = False
        self._connection: redis.asyncio.Connection
        self._wire: Wire
        self._ready: asyncio.Future[None] = self._loop.create_future()  # done when it is up for the first time
        self._task = asyncio.create_task(self._link())

    def add(self, number: int, done: Done, counted: Counted | None = None) -> int | None:
        if not self.up:
            return DOWN
        if number in self._ids.shards[number % SHARDS]:
            return DUPLICATE
        numbers = self._numbers
        if not numbers and not self._counted:
            self._since = self._loop.time()
            self._rouse()
        if counted is not None:
            if len(self._counted) >= MAX_WAITING:
                return BUSY
            self._counted.append((number, done, counted))
            return None
        if len(numbers) >= MAX_WAITING:
            return BUSY
        numbers.append(number)
        self._dones.append(done)
        return None

    @property
    def queued(self) -> int:
        return len(self._numbers) + len(self._counted) + self._under_way

    @property
    def obstacle(self) -> str:
        if not self.up:
            return f"Redis is away: {self.why or 'not reached yet'}"
        refusing = self._refused and self._loop.time() - self._refused_at < REFUSING
        return f"Redis refuses ids: {self._refused}" if refusing else ""

    @property
    def warning(self) -> str:
        if not self._evicting:
            return ""
        return f"Redis may evict ids unseen: set its maxmemory-policy to noeviction (it is {self._evicting})"

    async def recent(self, most: int) -> list[tuple[int, int, int]] | None:
        window = self.window
        newest = ("XREVRANGE", f"{self.prefix}:reports", "+", "-", "COUNT", str(most))
        try:
            entries, count = good(await self.query(newest, ("SCARD", self._key(window))))
        except redis.RedisError:
            return None
        reports = [(int(entry.partition(b"-")[0]) // 1000, read(fields)) for entry, fields in entries]
        closed = [(start, report[1], report[2]) for start, report in reports if report]  # else it is not one of ours
        if closed and closed[0][0] >= window:  # another instance closed it a moment ago
            window = closed[0][0] + self.seconds
            count = 0
        return [(window, self.seconds, count), *closed][:most]

    async def query(self, *commands: Command) -> list[Any]:
        """Send commands that count nothing; return their replies, errors among them. Raises RedisError if away."""
        replies: list[Any] = await self._do(partial(self._trip, commands))
        return replies

    async def _do(self, job: Callable[[], Awaitable[Any]]) -> Any:
        """Have the link's task do something between two batches; return what comes of it. Raises RedisError if away."""
        if not self.up:
            raise redis.ConnectionError(self.why)
        result = self._loop.create_future()
        self._jobs.append((job, result))
        self._rouse()
        return await result

    def now(self) -> float:
        """Return Redis's time, Unix seconds, as well as this process knows it."""
        return time.monotonic() + self._offset

    def remaining(self) -> float:
        if self._reports:
            return 0
        if self.up and self.told < self.window:  # Redis found it not over, a moment ago
            return RETRY[0]
        return self.window + self.seconds - self.now() if self.window else ALIVE_EVERY

    async def roll(self) -> Iterable[tuple[int, int]]:
        """Close what is over, here at once and in Redis when the link stands; return what is reported and not told."""
        if self.window:
            self._turn()
        with contextlib.suppress(redis.RedisError):
            await self._do(self._roll)
        reports, self._reports = self._reports, []
        return reports

    async def start(self, timeout: float) -> bool:
        await asyncio.wait([self._ready, self._task], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self._task.result()
        return self.up

    async def failure(self) -> None:
        await asyncio.wait([self._task])
        self._task.result()

    async def stop(self) -> None:
        self._stopping = True
        self._rouse()
        if not self.up:
            self._task.cancel()
        await asyncio.wait([self._task])

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _turn(self, start: int | None = None) -> None:
        """Open the window of now, or the one that starts at `start`, in this process, if it is a newer one."""
        if start is None:
            start = int(self.now() // self.seconds) * self.seconds
        if start > self.window:
            if self.count or self._under_way:
                self._past.append((self.window, self._ids))
            self.window, self.count, self._opened = start, 0, False
            self._ids = Ids()

    # The link

    async def _link(self) -> None:
        """Keep a connection to Redis, and serve on it, until stopped."""
        delay = RETRY[0]
        while not self._stopping:
            self._connection = self._options.make_connection()  # type: ignore[no-untyped-call]
            up = math.inf
            try:
                await self._connect()
                up = self._loop.time()
                await self._serve()
            except StoreError as error:
                if not self._ready.done():
                    raise
                self._down(str(error))
            except TimeoutError:
                self._down(f"no answer within {self.timeout if self.up else ARRIVAL:g} s")
            except (redis.RedisError, OSError) as error:
                self._down(advise(error))
            except Exception as error:  # an error of ours, or of what is no Redis, must not end the counting for good
                if advise(error) != self.why:
                    log.exception("the link to Redis failed for a reason that was not foreseen")
                self._down(advise(error))
            finally:
                await self._connection.disconnect(nowait=True)
            if not self._stopping:
                if self._loop.time() - up > HUSH:  # a link that comes and goes is not followed, and told of, each time
                    delay = RETRY[0]
                await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311
                delay = min(2 * delay, RETRY[1])

    def _down(self, why: str) -> None:
        """Tell all who wait that the link is gone, and the log if that is news."""
        news = self.up or not self.why or (advice_in(why) != advice_in(self.why) and advice_in(why))
        self.up = False
        self.why = why
        dones = self._dones + [done for _, done, _ in self._counted]
        self.waits.note(self._loop.time() - self._oldest(), len(dones))
        self._numbers, self._dones, self._counted = [], [], []
        jobs, self._jobs = self._jobs, deque()
        self.tell(dones, LOST)
        for _, result in jobs:
            if not result.done():
                result.set_exception(redis.ConnectionError(why))
        if news:
            log.warning("Redis is away, requests fail: %s", why)

    async def _connect(self) -> None:
        """Connect, agree on the time, store the open window's ids again, and take ids from then on."""
        async with asyncio.timeout(ARRIVAL):
            await self._connection.connect()  # type: ignore[no-untyped-call]
        self._wire = Wire(self._connection, self._rouse)
        arrive = await self._check()
        await self._restore()
        self._opened = False
        count = 0
        for window, ids in [*self._past, (self.window, self._ids)]:
            count += await self._replay(window, ids, arrive)
        await self._roll()
        self.up = True
        why, self.why = self.why, ""
        if why:
            log.warning("Redis is back; ids that were stored again: %d", count)
        if not self._ready.done():
            self._ready.set_result(None)

    async def _check(self) -> Command:
        """Refuse a Redis that is too old, warn of one that may drop ids; arrive, and return the command that does."""
        asked = ("INFO", "server"), ("INFO", "memory")
        server, memory = good(await self._trip(asked, self._loop.time() + ARRIVAL))
        info = dict(line.split(":", 1) for line in (server + memory).decode().splitlines() if ":" in line)
        version = info.get("redis_version", "0")
        if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
            raise StoreError(f"Redis {version} is too old: expected 6.2 or newer, or Valkey")
        policy = info.get("maxmemory_policy", "noeviction")
        before = self._evicting
        self._evicting = policy if policy != "noeviction" and info.get("maxmemory", "0") != "0" else ""
        if self._evicting not in ("", before):
            log.warning("%s", self.warning)
        arrive = ("EVAL", ARRIVE, "2", *self._names("mark", "settling"), info.get("run_id", "?"), self._keep())
        (mark,) = good(await self._trip([arrive]))
        self._mark = mark.decode()
        return arrive

    async def _restore(self) -> None:
        """Put reports back that the stream has lost, as after a restart from an old snapshot.

        One that was taken out on purpose stays out: the stream refuses ids that are not above all it ever had.
        """
        if not self._reported:
            return
        (newest,) = good(await self._trip([("XREVRANGE", f"{self.prefix}:reports", "+", "-", "COUNT", "1")]))
        last = int(newest[0][0].partition(b"-")[0]) if newest else -1
        lost = [(entry, fields) for entry, fields in self._reported if int(entry.partition(b"-")[0]) > last]
        if lost:
            added = await self._trip([("XADD", f"{self.prefix}:reports", entry, *fields) for entry, fields in lost])
            count = sum(not isinstance(reply, redis.ResponseError) for reply in added)
            if count:
                log.warning("Redis has lost reports; those that were put back: %d", count)

    async def _replay(self, window: int, ids: Ids, arrive: Command) -> int:
        """Store a window's ids again, unless it is closed; return how many there were."""
        key = self._key(window)
        before, after = self._opening(window)
        chunk: list[int] = []
        count = 0
        for shard in [*ids.sets, None]:
            if shard is not None:
                chunk += shard
            if chunk and (len(chunk) >= REPLAY_CHUNK or shard is None):
                try:
                    good(await self._trip([arrive, before, packed(("SADD", key), chunk), after]))
                except redis.ResponseError as error:
                    if code_of(error) == "WRONGTYPE":
                        return 0
                    raise
                count += len(chunk)
                chunk = []
        return count

    async def _serve(self) -> None:
        """Send what waits, batch by batch, until stopped."""
        while True:
            if self._numbers or self._counted or self._jobs:
                if self._numbers or self._counted:
                    await self._batch()
                if self._jobs:
                    await self._job()
            elif self._stopping:
                self.up = False
                return
            else:
                self._wake = self._loop.create_future()
                timer = self._loop.call_later(ALIVE_EVERY, self._rouse)
                await self._wake
                timer.cancel()
                self._wake = None
                if not (self._numbers or self._counted or self._jobs or self._stopping):
                    await self._trip([("PING",)])

    async def _batch(self) -> None:
        """Store the ids that wait, in one round trip; tell who waits for them, and of those that are new."""
        counted, numbers, dones = self._counted, self._numbers, self._dones
        self._counted, self._numbers, self._dones = counted[MAX_COUNTED:], numbers[MAX_BATCH:], dones[MAX_BATCH:]
        if self._numbers:
            numbers, dones = numbers[:MAX_BATCH], dones[:MAX_BATCH]
        deadline = self._since + self.timeout
        self._since = self._loop.time()  # what is left waits anew: nothing that comes next has come earlier
        first: list[int] = []
        if counted:
            counted = counted[:MAX_COUNTED]
            first = [number for number, _, _ in counted]  # an id that is in both is new to the one who wants to be told
            dones = [done for _, done, _ in counted] + dones

        def pack(key: str) -> bytes:
            if first:
                return packed(("EVAL", COUNT, "1", key, str(len(first)), *map(str, first)), numbers)
            return packed(("SADD", key), numbers)

        window, refused, reply = await self._store(pack, deadline, dones)
        self._note(refused)
        if refused:
            self.tell(dones, REFUSED)
            return
        numbers = first + numbers
        if window != self.window:  # that ended while the batch was under way
            for ids in [ids for past, ids in self._past if past == window]:
                ids.add(numbers)
        elif self.count < self.max_ids:
            self.count += self._ids.add(numbers)
        self.tell(dones, STORED)
        if not counted:
            self._new += reply
            return
        new, *each = reply
        self._new += new
        for (_, _, tell), first_time, count in zip(counted, each[::2], each[1::2], strict=True):
            if first_time:
                tell(window, count)

    def _note(self, refused: str) -> None:
        """Note that ids were refused, for a reason, or taken; log it if it is news."""
        if refused:
            now = self._refused_at = self._loop.time()
            news = advice_in(refused) != advice_in(self._logged) or not self._logged
            if news and now >= self._hushed:
                log.error("Redis refuses ids, requests fail: %s", refused)
                self._logged, self._hushed = refused, now + HUSH
        elif self._logged:
            log.warning("Redis takes ids again")
            self._logged = ""
        self._refused = refused

    async def _store(self, pack: Callable[[str], bytes], deadline: float, dones: list[Done]) -> tuple[int, str, Any]:
        """Store ids in the open window by `deadline` (loop time), with the command that `pack` makes for its key.

        Return the window that they are in, "", and the reply; or the window tried last, and why Redis refuses them. On
        a failure of the link, tell `dones` so. The command stores all or nothing.
        """
        sent = perf_counter()  # the loop's time goes by milliseconds
        self._under_way = len(dones)
        try:
            while True:
                self._turn()
                window = self.window
                packed = pack(self._key(window))
                if self._opened:
                    (reply,) = await self._trip([packed], deadline)
                else:
                    before, after = self._opening(window)
                    opened, reply, _ = await self._trip([before, packed, after], deadline)
                    if isinstance(opened, redis.ResponseError):
                        reply = opened  # the ids may be stored, but would not be found again if all died now
                    self._opened = window == self.window and not isinstance(reply, redis.ResponseError)
                if not isinstance(reply, redis.ResponseError):
                    return window, "", reply
                code = code_of(reply)
                if code in LINK_ERRORS:
                    raise reply
                if code == "WRONGTYPE":
                    await self._roll(deadline)
                    if self.window != window:
                        continue  # it was closed, and another is open now
                return window, advise(reply), None
        except BaseException:
            self.tell(dones, LOST)
            raise
        finally:
            self._under_way = 0
            self.sizes.note(len(dones))
            self.trips.note(perf_counter() - sent)
            self.waits.note(self._loop.time() - deadline + self.timeout, len(dones))

    def _opening(self, window: int) -> tuple[Command, Command]:
        """Return what goes before and behind the first command that stores ids in a window."""
        key, keep = self._key(window), self._keep()
        keys = (*self._names(*KEYS), key)
        return ("EVAL", OPEN, "3", *keys, str(window), self._member(window), keep), ("EXPIRE", key, keep)

    async def _job(self) -> None:
        job, result = self._jobs.popleft()
        try:
            got = await job()
        except BaseException as error:
            if not result.done():
                result.set_exception(redis.ConnectionError(advise(error)))
            raise
        if not result.done():
            result.set_result(got)

    async def _roll(self, deadline: float = 0.0) -> None:
        """Close in Redis what is over, take its time, and note what was reported and not yet told here.

        By `deadline` (loop time), if a batch waits for it.
        """
        more = True
        while more:
            mine = range(self._lived, self.window + 1, self.seconds)[:ROLL_LIMIT] if self.window else range(0)
            lived = [text for start in mine for text in (str(start), self._member(start))]
            arguments = (self.prefix, self.seconds, self._keep(), ROLL_LIMIT, REPORTS, self.told, self._mark, *lived)
            before = time.monotonic()
            commands = [
                ("EVAL", ROLL, "5", *self._names(*KEYS, "window", "settling", "mark"), *map(str, arguments)),
                ("XRANGE", f"{self.prefix}:reports", f"{self.told}000-0", "+", "COUNT", str(2 * ROLL_LIMIT)),
            ]
            try:
                rolled, entries = good(await self._trip(commands, deadline))
            except redis.ResponseError as error:
                if code_of(error) == "WINDOW":
                    length = str(error).split()[1]
                    raise StoreError(
                        f"the instances of --key-prefix {self.prefix} count windows of {length} s, not of "
                        f"{self.seconds} s: start this one with --window {length} or another prefix"
                    ) from None
                if code_of(error) == "LOST":
                    raise redis.ConnectionError("it has lost its data") from None
                raise
            seconds, microseconds, opened, left, newest, settling = map(int, rolled)
            self._offset = seconds + microseconds / 1e6 - (before + time.monotonic()) / 2
            if not self.window:  # the first time: what was reported before is not ours to tell
                self._turn(opened)
                self._lived = min(opened, -(-self._resume // self.seconds) * self.seconds or opened)
                self.told = self.first = self._resume or newest + 1
                continue
            self._turn(opened)
            for entry, fields in entries:
                start = int(entry.partition(b"-")[0]) // 1000
                self._reported.append((entry, fields))
                if report := read(fields):  # else it is not one of ours
                    self._reports.append((start, report[2]))
                self.told = max(self.told, start + 1)
                self.reported.set()
            if settling:
                return
            if mine:
                self._lived = max(self._lived, min(opened, mine[-1] + self.seconds))
            more = left > 0 or self._lived < opened or len(entries) == 2 * ROLL_LIMIT
        self.told = max(self.told, opened)
        for _, ids in [past for past in self._past if past[0] < self.told]:
            ids.free(self._loop)
        self._past = [past for past in self._past if past[0] >= self.told]

    async def _trip(self, commands: Sequence[Any], deadline: float = 0.0) -> list[Any]:
        """Send commands, tuples of strings or packed already; return their replies, errors among them.

        Raises TimeoutError at `deadline` (loop time; by default when the oldest id that waits has waited for long
        enough), redis.ConnectionError when the link breaks. Then the connection is not used again: replies may be
        under way that nobody waits for.
        """
        pack = self._connection.pack_command
        packed = b"".join([part for c in commands for part in ([c] if isinstance(c, bytes) else pack(*c))])
        return await self._wire.trip(packed, len(commands), deadline or self._oldest() + self.timeout)

    def _oldest(self) -> float:
        """Return the loop time at which the oldest id that waits came; now, if there is none."""
        return self._since if self._numbers or self._counted else self._loop.time()

    def _keep(self) -> str:
        return str(max(KEEP, 2 * self.seconds))

    def _key(self, start: int) -> str:
        return f"{self.prefix}:{{{start}}}:ids"

    def _names(self, *names: str) -> tuple[str, ...]:
        return tuple(f"{self.prefix}:{name}" for name in names)

    def _member(self, start: int) -> str:
        return f"{datetime.fromtimestamp(start, UTC):%Y-%m-%dT%H:%M:%SZ} {self.seconds}"


class Outbox:
    """The reports of the stream, one after the other, for the one instance at a time that delivers them.

    The consumer group `webhook` remembers what was delivered; it begins with the first window closed after it was made.
    All instances read as one consumer, so what one has taken and not delivered is the next one's first. Who may deliver
    is settled by a lease, a key that expires; who has lost it stops before the next attempt.
    """

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._stream, self._lease = f"{store.prefix}:reports", f"{store.prefix}:webhook"
        self._first = f"{self._lease}:first"  # key of the time from which on windows are reported
        self._token = f"{random.getrandbits(128):032x}"
        self._entry = ""
        self._why = ""  # in words, if Redis does not let us

    async def next(self) -> tuple[str, int, int, bool]:
        """Return name, length, count (and True) of the window to deliver next, as soon as there is one for us."""
        while True:
            with contextlib.suppress(redis.RedisError):
                if await self.keep():
                    self._entry, fields = await self._oldest()
                    if report := read(fields):
                        return report
                    if self._entry:
                        await self.done()  # it was trimmed away, or is not one of ours
                        continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEASE / 3 * random.uniform(0.5, 1)):  # noqa: S311
                    await self._store.reported.wait()
            self._store.reported.clear()

    async def _oldest(self) -> tuple[str, list[bytes]]:
        """Return id and fields of the first entry that is not delivered; "" if there is none."""
        begin = f"{max(0, 1000 * self._store.first - 1)}-0"  # not "$": if the stream was lost, all in it is new
        create = ("XGROUP", "CREATE", self._stream, "webhook", begin, "MKSTREAM")
        first = ("SET", self._first, str(self._store.first), "NX")
        for position in ("0", ">"):  # taken before, but not delivered; then new ones
            take = ("XREADGROUP", "GROUP", "webhook", "all", "COUNT", "1", "STREAMS", self._stream, position)
            created, _, found = await self._store.query(create, first, take)
            if isinstance(found, redis.ResponseError):
                self._note(created if code_of(found) == "NOGROUP" else found)
                raise found
            self._note()
            for entry, fields in found[0][1] if found else ():
                return entry.decode(), fields or []
        return "", []

    def _note(self, error: redis.ResponseError | None = None) -> None:
        """Log that Redis does not let us deliver, or does again, if that is news."""
        why = advise(error) if error else ""
        if why != self._why:
            if why:
                log.error("Redis refuses the webhook's commands, no report is delivered: %s", why)
            else:
                log.warning("Redis takes the webhook's commands again")
        self._why = why

    async def keep(self) -> bool:
        """Take the lease or keep it; return whether we have it."""
        try:
            (held,) = await self._store.query(("EVAL", HOLD, "1", self._lease, self._token, str(int(LEASE * 1000))))
        except redis.RedisError:
            return False
        if isinstance(held, redis.ResponseError):
            self._note(held)
        return bool(held == 1)

    async def done(self) -> None:
        """Note that what `next` returned is delivered; if that fails, it will be delivered again."""
        with contextlib.suppress(redis.RedisError):
            await self._store.query(("XACK", self._stream, "webhook", self._entry))

    async def delivered(self) -> Callable[[int], bool | None] | None:
        """Return what tells whether the report of a window, by its start, is delivered.

        That says None of a window that was closed before there was a webhook. None if Redis can't be asked.
        """
        try:
            groups, pending, first = await self._store.query(
                ("XINFO", "GROUPS", self._stream),
                ("XPENDING", self._stream, "webhook", "-", "+", str(RECENT)),
                ("GET", self._first),
            )
        except redis.RedisError:
            return None
        if isinstance(groups, redis.ResponseError) or isinstance(pending, redis.ResponseError):
            return lambda start: None  # there is no group yet, or we may not look
        found = [dict(zip(group[::2], group[1::2], strict=True)) for group in groups]
        (last,) = [group[b"last-delivered-id"] for group in found if group[b"name"] == b"webhook"]
        taken = {entry for entry, *_ in pending}
        newest, begin = int(last.partition(b"-")[0]), int(first) if isinstance(first, bytes) else 0

        def tell(start: int) -> bool | None:
            if start < begin:
                return None
            return 1000 * start <= newest and b"%d000-0" % start not in taken

        return tell

    async def settle(self) -> None:
        """What is not delivered stays in the stream, for another instance or another day."""

    async def close(self) -> None:
        """Let another have the lease."""
        with contextlib.suppress(redis.RedisError):
            await self._store.query(("EVAL", LET_GO, "1", self._lease, self._token))


def read(fields: list[bytes]) -> tuple[str, int, int, bool] | None:
    """Return name, length, count (and True) of the window that an entry of the stream tells of, if it does."""
    report = dict(zip(fields[::2], fields[1::2], strict=True))
    try:
        name, seconds = report[b"window"].decode("ascii"), int(report[b"seconds"])
        start = datetime.strptime(name, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        if name != f"{start:%Y-%m-%dT%H:%M:%SZ}" or not 1 <= seconds <= 86_400:
            return None
        return name, seconds, int(report[b"count"]), True
    except (KeyError, ValueError):
        return None


def place(url: str) -> str:
    """Return where a Redis URL leads, in words and without its secrets."""
    options = WITH_DEFAULTS | redis.asyncio.connection.parse_url(url)
    return f"Redis at {options.get('path') or '{host}:{port}'.format_map(options)}, database {options['db']}"


def packed(words: Sequence[str], numbers: Iterable[int]) -> bytes:
    """Return a command as it is sent: some words of ASCII, then integers, in any order."""
    texts = sorted(map(str, numbers), key=len)
    parts = [f"*{len(words) + len(texts)}", *(f"\r\n${len(word)}\r\n{word}" for word in words)]
    for size, equal in itertools.groupby(texts, len):
        start = f"\r\n${size}\r\n"
        parts += [start, start.join(equal)]
    return ("".join(parts) + "\r\n").encode("ascii")


def good(replies: list[Any]) -> list[Any]:
    """Return replies of Redis; raise the first that is an error."""
    for reply in replies:
        if isinstance(reply, redis.ResponseError):
            raise reply
    return replies


def code_of(error: BaseException) -> str:
    """Return the first word of an error that Redis answered with, which says what kind it is."""
    return getattr(error, "status_code", None) or str(error).split(" ", 1)[0]


def advise(error: BaseException) -> str:
    """Return what an error means and what to do, in one line of printable text, without what Redis repeats to us.

    That is the words of a command it does not know: a password, where AUTH is disabled; or ids.
    """
    words = str(error).partition(", with args beginning with")[0] or type(error).__name__
    text = " ".join(ascii(words)[1:-1].split())[:200]
    advice = ADVICE.get(code_of(error))
    return f"{advice} ({text})" if advice else text


def advice_in(text: str) -> str:
    """Return what `advise` said to do, without Redis's words, which may differ from time to time."""
    return next((advice for advice in ADVICE.values() if text.startswith(advice)), "")
