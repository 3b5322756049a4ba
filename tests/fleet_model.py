"""A model of a fleet: several stores in one event loop, against a real server, through faults that are chosen.

Redis's clock and every instance's own are in its hands, so that an hour of edges takes no time, and so is each link:
commands and replies are held, lost, cut or late at the place that matters. After each step it is known where every id
may be, and must be. What it finds is shrunk to a few steps and printed as a program that does it again.
"""

import asyncio
import contextlib
import functools
import math
import random
import time
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TypeVar

import pytest
import redis
import servers

import dedup
import redis_store.alone
import redis_store.batches
import redis_store.node
import redis_store.replay
import redis_store.scripts
import redis_store.windows
import redis_store.wire

T = TypeVar("T")
Trouble = str | int | None
Step = tuple[str, dict[str, Any]]  # a method of Fleet, and its arguments

LENGTH = 10  # seconds of a window
EPOCH = 1_800_000_000  # where its time starts: an edge
TICK = 0.001  # seconds by which a clock that is right may be wrong
PATIENCE = 1.5  # seconds of Redis's time after a loss in which nothing is closed
SAID = {
    dedup.NEW: "ok",
    dedup.STORED: "ok",
    dedup.DUPLICATE: "ok",
    dedup.LOST: "lost",
    dedup.DOWN: "no",
    dedup.BUSY: "no",
}
PAST = (-TICK / 2, 0.0, TICK / 2, 2.0, 4.0, 15.0, 65.0)  # seconds from an edge
LATE = 99  # a fault: the commands arrive when nobody waits for the replies any more

# What the model changes in the scripts: Redis's clock is a key, and a set that was counted is kept, to see what was in
# it.
CLOCK = {"redis.call('TIME')": "redis.call('LRANGE', string.gsub(KEYS[1], '[^:]+$', 'clock'), 0, 1)"}
COUNTED = {
    "redis.call('UNLINK', key)": "redis.call('RENAME', key, prefix .. ':counted:' .. start .. ':'"
    " .. redis.call('INCR', prefix .. ':closings'))",
}
SCRIPTS = {
    "ARRIVE": (redis_store.alone, CLOCK),
    "BRING": (redis_store.windows, CLOCK),
    "OPEN": (redis_store.scripts, CLOCK),
    "ROLL": (redis_store.windows, CLOCK | COUNTED),
}

SETS = """
local sets = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. ':*')) do
  if redis.call('TYPE', key).ok == 'set' then
    sets[#sets + 1] = {key, redis.call('SMEMBERS', key)}
  end
end
return sets
"""

actor: ContextVar["Instance"] = ContextVar("actor")  # whose code runs, and so whose link is made


class Pace:
    """As many batches under way as a play has drawn; the real one goes by measured time."""

    most = 1

    def wait(self, trips: int) -> float:
        return 0.0 if trips < self.most else math.inf

    def begun(self, now: float) -> None:
        pass

    def ended(self, idle: float) -> None:
        pass


@contextlib.contextmanager
def small_world() -> Iterator[None]:
    """Have the store go by the model's clocks and links, and meet its limits with a handful of ids."""
    with pytest.MonkeyPatch.context() as patch:
        for name, (module, changes) in SCRIPTS.items():
            script = getattr(module, name)
            for old, new in changes.items():
                assert script.count(old) == 1
                script = script.replace(old, new)
            patch.setattr(module, name, script)
        patch.setattr(dedup, "gc", types.SimpleNamespace(collect=lambda _: None, freeze=lambda: None))
        patch.setattr(redis_store.node, "random", types.SimpleNamespace(uniform=lambda *_: 0.01))
        patch.setattr(redis_store.wire, "Wire", Link)
        patch.setattr(redis_store.batches, "Pace", Pace)
        patch.setattr(Pace, "most", 1)
        small: dict[Any, dict[str, Any]] = {
            dedup: {"SHARDS": 3, "WIDTHS": [1]},
            redis_store: {"SHARDS": 3},
            redis_store.batches: {"MAX_BATCH": 4, "MAX_WAITING": 12},
            redis_store.replay: {"CHUNK": 2},
            redis_store.windows: {"ROLL_LIMIT": 3, "BRING_CHUNK": 2},
            redis_store.node: {"PROBE": 1e6},  # looked at when the model says so
            redis_store.alone: {"patience": lambda _: PATIENCE},
        }
        for module, values in small.items():
            for name, value in values.items():
                patch.setattr(module, name, value)
        yield


def commands_of(packed: bytes) -> list[bytes]:
    """Return commands that were packed together one by one."""
    found = []
    while packed:
        start = packed.index(b"\r\n") + 2
        end = start
        for _ in range(int(packed[1 : start - 2])):
            after = packed.index(b"\r\n", end) + 2
            end = after + int(packed[end + 1 : after - 2]) + 2
        found.append(packed[:end])
        packed = packed[end:]
    return found


class Link(redis_store.wire.Wire):
    """A link whose trips are the model's: each may be held before the command or before the reply, or broken."""

    def __init__(self) -> None:
        super().__init__()
        self.node = actor.get()
        self.node.link = self
        self.unsent: list[tuple[bytes, int, float, redis_store.wire.Done]] = []
        self.unsaid: list[tuple[redis_store.wire.Done, redis_store.wire.Outcome]] = []

    @property
    def still(self) -> bool:
        """Whether nothing is under way but what is held."""
        return not self._trips

    def send(self, packed: bytes, count: int, deadline: float, done: redis_store.wire.Done) -> None:
        if self.unsent or self.node.held == "command":
            self.unsent.append((packed, count, deadline, done))
            return
        fault, self.node.fault = self.node.fault, None
        if fault == LATE:
            self.node.world.late.append(commands_of(packed))
            self.end(done, TimeoutError())
        elif fault:
            cut = redis.ConnectionError("cut by the model")
            seen = commands_of(packed)[:fault]
            super().send(b"".join(seen), len(seen), deadline, lambda _: self.end(done, cut))
        elif fault is not None:
            self.end(done, redis.ConnectionError("cut by the model"))
        else:
            super().send(packed, count, deadline, functools.partial(self.replied, done))

    def end(self, done: redis_store.wire.Done, why: Exception) -> None:
        """Break, and tell who has waited for this trip."""
        self.abort(why)
        self._loop.call_soon(done, why)

    def replied(self, done: redis_store.wire.Done, outcome: redis_store.wire.Outcome) -> None:
        if isinstance(outcome, list) and (self.unsaid or self.node.held == "reply"):
            self.unsaid.append((done, outcome))
        else:
            done(outcome)

    def release(self) -> None:
        unsaid, self.unsaid = self.unsaid, []
        for done, outcome in unsaid:
            done(outcome)
        unsent, self.unsent = self.unsent, []
        for trip in unsent:
            self.send(*trip)

    def abort(self, why: Exception) -> None:
        super().abort(why)
        waiting = [done for done, _ in self.unsaid] + [done for *_, done in self.unsent]
        self.unsaid, self.unsent = [], []
        for done in waiting:
            self._loop.call_soon(done, why)


class Instance(redis_store.RedisStore):
    """A store whose clock and link are the model's.

    `held` is where its work stops: "connect", or in a round trip before the "command" or the "reply". `fault` is
    what becomes of the next round trip: how many of its commands reach Redis before the link breaks, or LATE.
    """

    def __init__(self, world: "Fleet", number: int) -> None:
        self.world = world
        self.number = number
        self.now = -1e6 * (number + 1)
        self.held = ""
        self.fault: int | None = None
        self.link: Link | None = None
        self.gate: asyncio.Future[None] | None = None
        self.rolling: asyncio.Task[Any] | None = None
        self.synced = False
        self.nudged = False  # the clock is wrong by TICK
        self.wrong = True  # the clock is wrong by more, for all that the model knows
        self.born = 0  # the first window of which it can be asked that it is reported
        self.due: set[int] = set()  # windows that it should have had reported
        self.floor = -1  # windows up to this one are not its to tell
        self.heard: list[int] = []
        self.losses = 0  # of the link
        self.rolls_since = (0, 0)  # losses, and moves of the clocks, when it began to roll
        self.waiting: Counter[int] = Counter()  # ids not answered yet
        self.stored: dict[int, int] = {}  # ids answered ok by this one, and the window that each was then in
        actor.set(self)
        super().__init__(world.server.url, world.prefix, LENGTH, 10**6, servers.DEADLINE, clock=lambda: self.now)
        node = self._servers
        assert isinstance(node, redis_store.alone.Alone)
        self.node = node
        self.really_connect, self.node._connect = self.node._connect, self.connect  # type: ignore[method-assign]
        self.really_go_down, self.node._down = self.node._down, self.go_down  # type: ignore[method-assign]
        self.really_roll, self._windows.roll = self._windows.roll, self.roll_windows  # type: ignore[method-assign]

    @property
    def up(self) -> bool:
        return self.node.batches is not None

    @property
    def quiet(self) -> bool:
        """Whether it waits for something that the model does."""
        if self.gate is not None and not self.gate.done():
            return True
        link = self.link
        if link is None or link.closed.done():
            return False
        return bool(link.unsent or link.unsaid) or (self.up and link.still)

    def trouble(self, what: Trouble) -> None:
        """Have the next round trip held or broken."""
        if isinstance(what, int):
            self.fault = what
        elif what is not None and not self.held:
            self.held = what

    def release(self) -> None:
        self.held = ""
        if self.gate is not None and not self.gate.done():
            self.gate.set_result(None)
        if self.link is not None:
            self.link.release()

    async def notice(self) -> None:
        """Look whether the link still stands, and leads to what it did."""
        if self.up and self.quiet and self.link and self.link.still and not self.held:
            with contextlib.suppress(redis.RedisError, OSError):
                await self.node.look()

    def kill_link(self) -> None:
        """Have Redis close the connection, if there is one."""
        if self.link is not None and not self.link.closed.done():
            host, port = self.link._transport.get_extra_info("sockname")
            with contextlib.suppress(redis.ResponseError):  # it is closed already
                self.world.client.execute_command("CLIENT", "KILL", f"{host}:{port}")  # type: ignore[no-untyped-call]

    async def crash(self) -> None:
        self._task.cancel()
        if self.rolling is not None:
            self.rolling.cancel()
        await asyncio.wait([self._task])

    async def connect(self) -> None:
        while self.held == "connect":
            self.gate = asyncio.get_running_loop().create_future()
            await self.gate
        world = self.world
        turn, newest = world.turn, world.newest()
        await self.really_connect()
        world.restored(self, newest if world.turn == turn else world.newest())

    def go_down(self, why: str) -> None:
        self.losses += 1
        self.really_go_down(why)

    async def roll_windows(self, deadline: float = 0.0) -> None:
        world = self.world
        moves, newest = world.moves, world.newest()
        await self.really_roll(deadline)
        if not self.synced:
            self.floor = newest if moves == world.moves else world.newest()
        if moves != world.moves:  # time passed meanwhile, so it knows Redis's time badly
            self.wrong = True
        else:
            if self.wrong:
                self.born, self.due = world.open, set()
            self.wrong = self.nudged = False
            world.check_gaps(self, newest)
        self.synced = True


class Fleet:
    """What may befall a fleet, in any order, and what must hold all the while.

    Ids from 1 up are sent once each, to one instance. Those from -5 to 0 are sent to any, at any time.
    """

    def __init__(self, server: servers.Redis) -> None:
        self.server = server
        self.prefix = "model"
        self.client = server.client()
        self.runner = asyncio.Runner()
        self.turn = 0  # how often it ran
        self.errors: list[dict[str, Any]] = []
        self.run(self.watch())
        self.nodes: list[Instance] = []
        self.born = 0  # instances so far
        self.now = EPOCH * 1_000_000  # Redis's time, microseconds
        self.moves = 0  # how often any clock was moved
        self.late: list[list[bytes]] = []  # round trips that Redis has still to see
        self.next = 1  # the id that is sent next
        self.acked: set[int] = set()
        self.refused: set[int] = set()
        self.sends: Counter[int] = Counter()  # how often an id was sent and not refused: it may be in so many windows
        self.excused: set[int] = set()  # ids that Redis lost, and nobody has stored again
        self.reports: dict[int, set[int]] = {}  # every window that was ever reported, and its count
        self.counted: dict[int, set[int]] = {}  # its ids
        self.forgotten: set[int] = set()  # windows that were reported before Redis lost its data
        self.stepped_back = False
        self.lost_data = False

    # What can be asked of it

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        self.turn += 1
        return self.runner.run(work)

    async def watch(self) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.errors.append(context))

    @property
    def open(self) -> int:
        """Start of the window that Redis's clock stands in."""
        return self.now // 1_000_000 // LENGTH * LENGTH

    def newest(self) -> int:
        """Start of the newest window in the stream."""
        entries: Any = self.client.xrevrange(f"{self.prefix}:reports", count=1)
        return int(entries[0][0].partition("-")[0]) // 1000 if entries else -1

    def pick(self, number: int) -> Instance:
        node = self.nodes[number % len(self.nodes)]
        actor.set(node)
        return node

    async def settle(self) -> None:
        """Wait until everything waits for the model."""
        loop = asyncio.get_running_loop()
        until = loop.time() + servers.DEADLINE
        calm = 0
        while calm < 5:  # what a reply sets off runs in the turns after
            await asyncio.sleep(0)
            calm = calm + 1 if all(node.quiet for node in self.nodes) else 0
            assert loop.time() < until, "an instance hangs"

    def set_clock(self, client: Any) -> None:
        client.delete(f"{self.prefix}:clock")
        client.rpush(f"{self.prefix}:clock", *divmod(self.now, 1_000_000))

    def move(self, seconds: float) -> None:
        """Move Redis's clock."""
        self.now += round(seconds * 1_000_000)
        self.moves += 1
        self.set_clock(self.client)
        until: Any = self.client.get(f"{self.prefix}:settling")
        if until and float(until) * 1e6 <= self.now:
            self.client.delete(f"{self.prefix}:settling")

    def pass_time(self, seconds: float) -> None:
        self.move(seconds)
        for node in self.nodes:
            node.now += seconds

    # What may happen

    def can(self, name: str) -> bool:
        """Whether a step of that name can be done now."""
        if name == "start":
            return len(self.nodes) < 3
        if name == "let_go":
            return any(node.held for node in self.nodes)
        if name == "deliver_late":
            return bool(self.late)
        if name == "lose_data":
            return bool(self.nodes) and not self.stepped_back
        return bool(self.nodes) or name in ("begin", "pass_edge", "step")

    def begin(self, instances: int, into: float) -> None:
        self.client.flushall()
        self.pass_time(into)
        for _ in range(instances):
            self.start()

    def start(self, held: str = "") -> None:
        async def start() -> None:
            self.born += 1
            node = Instance(self, self.born)
            node.held = held
            self.nodes.append(node)
            await self.settle()

        self.run(start())

    def send_new(self, pick: int, count: int, trouble: Trouble = None) -> None:
        self.next += count
        self.send(pick, range(self.next - count, self.next), trouble)

    def send_any(self, pick: int, numbers: list[int], trouble: Trouble = None) -> None:
        self.send(pick, numbers, trouble)

    def send(self, pick: int, numbers: Sequence[int], trouble: Trouble) -> None:
        async def send() -> None:
            node = self.pick(pick)
            node.trouble(trouble)
            for number in numbers:
                outcome = node.add(number, functools.partial(self.told, node, number))
                if outcome is None:
                    node.waiting[number] += 1
                    self.sends[number] += 1
                else:
                    assert outcome != dedup.DUPLICATE or number <= 0
                    self.answer(number, outcome)
            await self.settle()

        self.run(send())

    def told(self, node: Instance, number: int, outcome: int) -> None:
        if not node.waiting[number]:
            self.errors.append({"message": f"id {number} was answered twice"})
        node.waiting[number] -= 1
        self.answer(number, outcome)
        if SAID.get(outcome) == "ok":
            node.stored[number] = -1  # until `look` finds where it is

    def answer(self, number: int, outcome: int) -> None:
        if outcome not in SAID:
            self.errors.append({"message": f"id {number} was answered {outcome}"})
        elif SAID[outcome] == "ok":
            self.acked.add(number)
        elif SAID[outcome] == "no" and number > 0:
            self.refused.add(number)

    def pass_edge(self, past: float, rolls: int = 0) -> None:
        """Let time pass until the next edge, or just before or past it; the instances whose bits are set roll."""

        async def roll() -> None:
            for number in range(len(self.nodes)):
                if rolls >> number & 1:
                    self.begin_roll(self.pick(number))
            await self.settle()

        self.pass_time(self.open + LENGTH - self.now / 1e6 + past)
        self.run(roll())

    def roll(self, pick: int, trouble: Trouble = None) -> None:
        async def roll() -> None:
            node = self.pick(pick)
            node.trouble(trouble)
            self.begin_roll(node)
            await self.settle()

        self.run(roll())

    def begin_roll(self, node: Instance) -> None:
        if node.rolling is None:
            node.rolls_since = node.losses, self.moves
            node.rolling = asyncio.create_task(node.roll())

    def cut(self, pick: int, noticed: bool, away: bool) -> None:
        """Break the link to Redis; `away`: until it is let go."""

        async def cut() -> None:
            node = self.pick(pick)
            node.kill_link()
            if away and not node.held:
                node.held = "connect"
            if noticed:
                await node.notice()
            await self.settle()

        self.run(cut())

    def let_go(self, pick: int) -> None:
        """Have an instance that is held go on."""

        async def let_go() -> None:
            held = [node for node in self.nodes if node.held]
            held[pick % len(held)].release()
            await self.settle()

        self.run(let_go())

    def deliver_late(self) -> None:
        """Let Redis see the commands of a round trip that was given up long ago."""
        connection: Any = redis.Connection(port=self.server.port)  # type: ignore[no-untyped-call]
        connection.send_packed_command(packed := self.late.pop(0))
        for _ in packed:
            with contextlib.suppress(redis.ResponseError):
                connection.read_response()
        connection.disconnect()

    def leave(self, pick: int, gently: bool = False) -> None:
        """End an instance; if it can't be stopped `gently`, by force."""
        node = self.pick(pick)
        self.nodes.remove(node)
        if not gently or node.held or node.rolling is not None:
            self.run(node.crash())
            return
        assert self.run(node.stop(servers.DEADLINE)) == 0, "stopped with ids that are lost"
        assert not +node.waiting, "stopped with ids that wait"

    def set_wrong(self, pick: int, seconds: float) -> None:
        """Set an instance's clock wrong, until it asks for Redis's time again; by a TICK, every clock is."""
        node = self.pick(pick)
        if abs(seconds) > TICK:
            node.wrong = True
            self.moves += 1
        elif node.nudged:
            return
        node.nudged = True
        node.now += seconds

    def step(self, seconds: float) -> None:
        """Set Redis's clock wrong, for good."""
        if seconds < 0:
            if self.lost_data or self.now / 1e6 + seconds < EPOCH:
                return  # without its data Redis can't know that a window was closed before
            self.stepped_back = True
        self.move(seconds)
        for node in self.nodes:
            node.wrong = True

    def lose_data(self, noticed: bool) -> None:
        """Kill Redis and start it again, empty."""

        async def lose_data() -> None:
            if noticed:
                for node in self.nodes:
                    await node.notice()
            await self.settle()

        stream = self.look()
        self.lost_data = True
        self.forgotten |= stream.keys()
        self.excused |= set().union(*self.open_sets().values())
        self.late.clear()
        for node in self.nodes:
            node.floor = max([node.floor, *node.heard])
            node.born = max(node.born, self.open)  # an older window may be over for the others, and is not asked for
        with self.client.pipeline(transaction=True) as pipe:
            pipe.flushall()
            self.set_clock(pipe)
            pipe.execute()
        for node in self.nodes:
            node.kill_link()
        self.run(lose_data())

    # What must hold

    def restored(self, node: Instance, newest: int) -> None:
        """An instance that is back has stored its ids again, of all windows that were not reported."""
        mine = {number for number, start in node.stored.items() if start > newest and start not in self.reports}
        missing = mine.difference(*self.sets().values())
        if missing:
            self.errors.append({"message": f"instance {node.number} has not stored {missing} again"})

    def check_gaps(self, node: Instance, newest: int) -> None:
        """A window that a connected instance lived through is reported when it rolls, or the next time."""
        due = {start for start in range(node.born, self.open, LENGTH) if start > newest} - self.reports.keys()
        if due and self.now / 1e6 < float(self.client.get(f"{self.prefix}:settling") or 0):
            return
        due -= self.stream().keys() if due else set()
        missed = due & node.due
        if missed:
            self.errors.append({"message": f"instance {node.number} lived through {missed}, which nobody reported"})
        node.due = due

    def sets(self) -> dict[str, set[int]]:
        """Return all sets of ids, by key."""
        found: Any = self.client.eval(SETS, 0, self.prefix)
        return {key: set(map(int, numbers)) for key, numbers in found}

    def open_sets(self) -> dict[str, set[int]]:
        return {key: numbers for key, numbers in self.sets().items() if key.endswith(":ids")}

    def stream(self) -> dict[int, int]:
        entries: Any = self.client.xrange(f"{self.prefix}:reports")
        reports = {}
        for entry, fields in entries:
            start = int(entry.removesuffix("000-0"))
            reports[start] = int(fields["count"])
            if start not in self.reports:
                assert start % LENGTH == 0
                assert start + LENGTH <= self.now / 1e6, "reported before its end"
                name = f"{datetime.fromtimestamp(start, UTC):%Y-%m-%dT%H:%M:%SZ}"
                assert fields == {"window": name, "seconds": str(LENGTH), "count": fields["count"]}
        assert list(reports) == sorted(reports)
        return reports

    def look(self) -> dict[int, int]:
        """See where every id is, and whether it may be there; return the stream."""
        assert not self.errors, self.errors
        stream = self.stream()
        where: dict[int, set[int]] = defaultdict(set)
        counted: dict[int, set[int]] = {start: set() for start in stream}
        for key, numbers in sorted(self.sets().items()):
            _, kind, *rest = key.split(":")
            if kind == "counted":
                start = int(rest[0])
                if start not in stream:  # brought back after a loss of data, but reported before
                    assert numbers <= self.counted.get(start, set()), f"dropped from {start}: {numbers}"
                    continue
                assert not counted[start], "counted twice"
                counted[start] = numbers
            else:
                start = int(kind.strip("{}"))
                if start in self.forgotten and start in stream and numbers <= self.counted[start]:
                    continue  # brought back before its report was, until the next roll
                assert start not in stream, "a closed window is open again"
                for number in numbers:
                    where[number].add(start)
        for start, count in stream.items():
            if start in self.forgotten and count in self.reports[start] and counted[start] <= self.counted[start]:
                continue  # put back by one that had seen it, whatever others brought back of its ids
            assert count == len(counted[start])
            if start in self.forgotten:  # see test_a_window_reported_before_redis_lost_its_data
                self.reports[start].add(count)
                self.counted[start] |= counted[start]
                continue
            assert self.reports.setdefault(start, {count}) == {count}, "a closed count has changed"
            assert self.counted.setdefault(start, counted[start]) == counted[start], "a closed window has changed"
        for start, numbers in self.counted.items():
            for number in numbers:
                where[number].add(start)
        for number, windows in where.items():
            assert len(windows) <= self.sends[number], f"id {number} is counted in {windows}"
        self.excused -= where.keys()
        lost = self.acked - where.keys() - self.excused
        assert not lost, f"acknowledged and not counted: {lost}"
        assert not self.refused & where.keys(), "refused and counted"
        for node in self.nodes:
            for number, start in node.stored.items():
                if start < 0 and number > 0 and where[number]:
                    node.stored[number] = max(where[number])
        return stream

    def check(self) -> None:
        stream = self.look()
        for node in self.nodes:
            if node.rolling is None or not node.rolling.done():
                continue
            for start, count in node.rolling.result():
                assert not node.heard or start > node.heard[-1], "told out of order"
                assert count in self.reports[start], "told another count than was reported"
                node.heard.append(start)
            node.rolling = None
            if node.up and node.rolls_since == (node.losses, self.moves) and not self.stepped_back:
                missing = {start for start in stream if start > node.floor and start >= node.born} - {*node.heard}
                assert not missing, f"not told: {missing}"

    def close(self) -> None:
        for node in self.nodes:
            self.run(node.crash())
        self.run(asyncio.sleep(0))
        self.runner.close()
        self.client.close()

    def end(self) -> None:
        """Let everything come back, everybody die, and one who comes after close what they left open."""
        for name, arguments in {"deliver_late": (), "let_go": (0,), "leave": (0,)}.items():
            while self.can(name):
                getattr(self, name)(*arguments)
                self.check()
        self.start()
        self.pass_edge(300.0, rolls=1)  # beyond all windows that wrong clocks opened
        self.check()
        assert not self.open_sets(), "never closed"


def draw_steps(lot: random.Random) -> list[Step]:
    """Draw what is to happen in one play; what is rare leaves most plays alone."""

    def trouble() -> Trouble:
        return lot.choice([None, None, None, "command", "command", "reply", 0, 1, 2, 3, 4, 5, LATE])

    def pick() -> int:
        return lot.randrange(3)

    draws: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {  # how often, and with which arguments
        "send_new": (8, lambda: {"pick": pick(), "count": lot.randint(1, 9), "trouble": trouble()}),
        "send_any": (
            4,
            lambda: {"pick": pick(), "numbers": lot.sample(range(-5, 1), lot.randint(1, 4)), "trouble": trouble()},
        ),
        "pass_edge": (8, lambda: {"past": lot.choice(PAST), "rolls": lot.randrange(8)}),
        "roll": (4, lambda: {"pick": pick(), "trouble": trouble()}),
        "let_go": (6, lambda: {"pick": pick()}),
        "start": (3, lambda: {"held": lot.choice(["", "", "connect", "command", "reply"])}),
        "cut": (3, lambda: {"pick": pick(), "noticed": lot.random() < 0.5, "away": lot.random() < 0.5}),
        "deliver_late": (3, dict),
        "leave": (2, lambda: {"pick": pick(), "gently": lot.random() < 0.3}),
        "set_wrong": (3, lambda: {"pick": pick(), "seconds": lot.choice([-12.0, -3.0, -TICK, TICK, 3.0, 25.0])}),
        "step": (lot.choice([0, 0, 2]), lambda: {"seconds": lot.choice([-25.0, -3.0, 3.0, 25.0])}),
        "lose_data": (lot.choice([0, 0, 4]), lambda: {"noticed": lot.random() < 0.7}),
    }
    names = lot.choices(list(draws), [often for often, _ in draws.values()], k=40)
    start = {"instances": lot.randint(1, 3), "into": lot.choice([0.0, 4.0, 9.999])}
    return [("begin", start), *((name, draws[name][1]()) for name in names)]


def play(server: servers.Redis, steps: Sequence[Step]) -> AssertionError | None:
    """Do the steps, and see after each and in the end that all holds; return what does not."""
    world = Fleet(server)
    try:
        for name, arguments in steps:
            if world.can(name):
                getattr(world, name)(**arguments)
                world.check()
        world.end()
    except AssertionError as error:
        return error
    finally:
        world.close()
    return None


def shrink(server: servers.Redis, steps: list[Step], error: AssertionError) -> tuple[list[Step], AssertionError]:
    """Leave out what a failure does not need, for as long as that helps or half a minute."""
    until = time.monotonic() + servers.DEADLINE
    size = len(steps) // 2
    while size:
        start = 1
        while start < len(steps) and time.monotonic() < until:
            fewer = steps[:start] + steps[start + size :]
            found = play(server, fewer)
            if found:
                steps, error = fewer, found
            else:
                start += size
        size //= 2
    return steps, error


def check_model(server: servers.Redis, plays: Iterable[int], seed: int) -> None:
    """Do the plays of these numbers; a failure tells the steps that lead to it, which can be played again by hand."""
    with small_world():
        for number in plays:
            Pace.most = 1 + number % 3
            steps = draw_steps(random.Random(f"{seed} {number}"))
            error = play(server, steps)
            if error:
                steps, error = shrink(server, steps, error)
                error.add_note(f"seed {seed}, play {number}, {server.engine}, {Pace.most} under way at a time")
                error.add_note("this does it, or world.end() after it:")
                for name, arguments in steps:
                    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
                    error.add_note(f"world.{name}({words})\nworld.check()")
                raise error
