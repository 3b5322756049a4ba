"""A cluster in one place: real instances of the store, in one event loop, whose time and links are the model's.

All nodes of the cluster are databases of one plain server, so a replica that lags, a stale primary and a restart that
lost its tail are copies of a moment. The nodes are made here: which slot is where, what they answer with MOVED, whether
a replica acknowledges. The scripts are the product's own, run by Redis, and so is all that an instance does. Commands
and replies go on their way one by one, when they are told to; no time passes but what is said to pass.

What must hold is checked against what the scripts did: CLOSE leaves the set that it counted for the model to read, and
REPORT the counts that it added up.
"""

import asyncio
import contextlib
import math
import selectors
import sys
import types
from collections import defaultdict, deque
from collections.abc import Coroutine, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import redis
import servers
from cluster_ledger import Ledger
from cluster_nodes import EPOCH, LENGTH, PARTS, PREFIX, Client, Node, Nodes, Transaction, Words

import dedup
import redis_store.alone
import redis_store.batches
import redis_store.closing
import redis_store.cluster
import redis_store.home
import redis_store.member
import redis_store.node
import redis_store.parts
import redis_store.replay
import redis_store.scripts
import redis_store.slots
import redis_store.windows
import redis_store.wire

TIMEOUT = 0.5  # seconds that an id may wait
STOPPING = 8.0  # seconds that an instance has to stop
TURNS = 2_000  # of the loop, at one moment

CLOCK = {"redis.call('TIME')": "redis.call('LRANGE', 'clock', 0, 1)"}
COUNTED = {
    "redis.call('UNLINK', set)": "if kind == 'set' then redis.call('RENAME', set, 'counted') end",
}
TOLD = {"redis.call('UNLINK', COUNTS)": "redis.call('RENAME', COUNTS, 'told')"}
SCRIPTS: dict[str, tuple[Any, dict[str, str]]] = {
    "ARRIVE": (redis_store.home, CLOCK),
    "BRING": (redis_store.windows, CLOCK),
    "TAKE": (redis_store.member, CLOCK),
    "CLOSING": (redis_store.closing, CLOCK),
    "CLOSE": (redis_store.closing, CLOCK | COUNTED),
    "REPORT": (redis_store.closing, CLOCK | TOLD),
}

actor: ContextVar["Instance"] = ContextVar("actor")  # whose code runs, and so whose links are made


class Loop(asyncio.SelectorEventLoop):
    """A loop that stops when nothing is left to do by the time that it may reach."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.until = 1000.0
        self.turns = 0  # without rest
        self.errors: list[str] = []
        super().__init__(_Selector(self))
        self.set_exception_handler(lambda _, context: self.errors.append(repr(context)))

    def time(self) -> float:
        return self.now

    def go(self, seconds: float = 0.0) -> None:
        """Do all that is due, and let time pass."""
        self.until = self.now + seconds
        self.run_forever()
        self.now = self.until


class _Selector(selectors.SelectSelector):
    """Waits for nothing; moves its loop's time to the next timer."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        loop = self._loop
        loop.turns += 1
        if timeout != 0:
            loop.turns = 0
        assert loop.turns < TURNS, "something goes round without end"
        if timeout is None or loop.now + timeout > loop.until:
            loop.stop()
        elif timeout > 0:
            loop.now += timeout
        return []


class Pace:
    """Two batches under way at most; the real one goes by measured time."""

    most = 2

    def wait(self, trips: int) -> float:
        return 0.0 if trips < self.most else math.inf

    def begun(self, now: float) -> None:
        pass

    def ended(self, idle: float) -> None:
        pass


async def _found(_: Any) -> None:
    raise redis_store.node.FoundClusterError


@contextlib.contextmanager
def small_world(scripts: dict[bytes, str], connect: Any) -> Iterator[None]:
    """Have the store go by the model's clocks and links, in a cluster of few parts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, (module, changes) in SCRIPTS.items():
            script = getattr(redis_store.scripts, name)
            for old, new in changes.items():
                assert script.count(old) == 1, (name, old)
                script = script.replace(old, new)
            patch.setattr(module, name, script)
            scripts[script.encode()] = name
        calm = types.SimpleNamespace(uniform=lambda least, _: least, shuffle=lambda _: None)
        small: dict[Any, dict[str, Any]] = {
            dedup: {
                "SHARDS": 3,
                "WIDTHS": [1],
                "gc": types.SimpleNamespace(collect=lambda _: None, freeze=lambda: None),
            },
            redis_store: {"SHARDS": 3, "PARTS": PARTS},
            redis_store.parts: {"_SHIFT": 64 - (PARTS - 1).bit_length()},
            redis_store.batches: {"Pace": Pace},
            redis_store.replay: {"CHUNK": 2},
            redis_store.windows: {"BRING_CHUNK": 2},
            redis_store.alone.Alone: {"start": _found},
            redis_store.node: {"random": calm, "connect": connect},
            redis_store.cluster: {"random": calm},
            redis_store.member: {"connect": connect},
            redis_store.slots: {"connect": connect},
        }
        for target, values in small.items():
            for name, value in values.items():
                patch.setattr(target, name, value)
        patch.setattr(redis_store.parts.Part, "__hash__", lambda self: self.number, raising=False)  # one order of sets
        yield


@contextlib.contextmanager
def no_surprise(errors: list[str]) -> Iterator[None]:
    """Note what the store logs with a traceback: it was not foreseen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            redis_store.node.log, "exception", lambda text, *_: errors.append(f"{text}: {sys.exc_info()[1]!r}")
        )
        yield


class Link(redis_store.wire.Wire):
    """A connection whose commands and replies go on their way when the model says so."""

    def __init__(self, world: "World", owner: "Instance", node: "Node") -> None:
        super().__init__()
        self.world = world
        self.owner = owner
        self.node = node
        self.born = world.loop.now
        self.held = False  # nothing goes on its way
        self.unsent: deque[tuple[redis_store.wire.Trip, Words]] = deque()
        self.transaction = Transaction()
        world.links.append(self)

    @property
    def busy(self) -> bool:
        """Whether something can go on its way."""
        return not self.node.frozen and bool(self._trips)

    def send(self, packed: bytes, count: int, deadline: float, done: redis_store.wire.Done) -> None:
        if self.closed.done():
            self._loop.call_soon(done, self.closed.result())
            return
        trip = redis_store.wire.Trip(count, done)
        trip.timer = self._loop.call_at(deadline, self._expire, trip)
        self._trips.append(trip)
        pos = 0
        while pos < len(packed):
            words, pos = redis_store.wire.parse(packed, pos)
            self.unsent.append((trip, words))
        if self.world.auto:
            self._loop.call_soon(self.world.deliver_all)

    def abort(self, why: Exception) -> None:
        if self.closed.done():
            return
        self.closed.set_result(why)
        self.world.links.remove(self)
        if self.unsent:
            self.world.late.append((self.node, self.node.boots, [words for _, words in self.unsent]))
            self.unsent.clear()
        trips, self._trips = self._trips, deque()
        for trip in trips:
            trip.timer.cancel()
            trip.done(why)

    def execute(self, most: int) -> None:
        """Have the node carry out some commands."""
        while self.unsent and most:
            most -= 1
            trip, words = self.unsent.popleft()
            trip.replies.append(self.node.reply(self.transaction, words))

    def answer(self) -> None:
        """Let the replies come that are there."""
        actor.set(self.owner)
        while self._trips and len(self._trips[0].replies) == self._trips[0].awaited:
            trip = self._trips.popleft()
            trip.timer.cancel()
            trip.done(trip.replies)


class Instance(redis_store.RedisStore):
    """A real one, and what it was told and has told."""

    def __init__(self, world: "World", number: int) -> None:
        self.world = world
        self.number = number
        self.dead = False
        self.contacts: list[tuple[float, bool]] = []  # when it asked home, and whether it could
        self.heard: list[tuple[int, int]] = []
        self.acked: set[int] = set()
        actor.set(self)
        super().__init__("redis://n0:7000", PREFIX, LENGTH, 10**6, TIMEOUT, clock=lambda: world.loop.now)
        self.reporting = asyncio.create_task(self.report())

    async def report(self) -> None:
        while True:
            await asyncio.sleep(max(0.02, min(1.0, self.remaining())))
            for start, count in await self.roll():
                self.world.ledger.tell(self, start, count)
            await asyncio.sleep(0.01)  # a link that broke is known to be away by then
            self.contacts.append((EPOCH + self.world.loop.now, self._servers.reachable))

    def lived_through(self, last: int) -> set[int]:
        """Return the windows before `last` during which it could ask home all the while, and after their end."""
        windows: dict[int, list[bool]] = defaultdict(list)
        for time, reached in self.contacts:
            windows[int(time) // LENGTH * LENGTH].append(reached)
            windows[int(time - LENGTH / 2) // LENGTH * LENGTH].append(reached)
        found = {start for start, reached in windows.items() if all(reached) and start < last}
        return {start for start in found if windows[start - LENGTH] and self.contacts[0][0] < start}

    @property
    def known(self) -> set[int]:
        """Windows of whose reports it knows."""
        return {start for start, _ in self._windows._known}

    def arrived_everywhere(self, marks: dict[str, bytes], owners: dict[str, Node]) -> bool:
        """Return whether it knows the marks as they are now, and has stored again what it holds."""
        cluster = self._servers
        if not isinstance(cluster, redis_store.cluster.Cluster):
            return True
        if not cluster.reachable or cluster.home.mark != marks["home"]:
            return False
        for part in self._parts:
            unit = f"p{part.number}"
            owner = cluster._owners.get(part)
            if owner is None or owner.own.port != owners[unit].port:
                return False
            if part.batches is None or not part.mark == part.seen == marks[unit]:
                return False
        return True

    def send(self, number: int) -> None:
        actor.set(self)
        outcome = self.add(number, lambda outcome: self.told(number, outcome))
        if outcome is not None:
            self.told(number, outcome)

    def told(self, number: int, outcome: int) -> None:
        if outcome in (dedup.NEW, dedup.STORED, dedup.DUPLICATE) and not self.dead:
            self.acked.add(number)
        elif outcome in (dedup.DOWN, dedup.BUSY, dedup.REFUSED):
            self.world.ledger.refused.add(number)

    async def crash(self) -> None:
        self.dead = True
        self.reporting.cancel()
        self._following.cancel()
        self._task.cancel()
        await self._servers.stop()


class World:
    """The cluster, the fleet, and all that is on its way between them."""

    def __init__(self, server: servers.Redis) -> None:
        self.client = Client(server.port)
        self.client.run(0, ("FLUSHALL",))
        self.loop = Loop()
        self.auto = True  # what is sent is delivered at once
        scripts: dict[bytes, str] = {}
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(small_world(scripts, self.connect))
        self.ledger = Ledger(self.client, scripts)
        self.patches.enter_context(no_surprise(self.ledger.errors))
        self.nodes = Nodes(self.client, self.loop.time, self.ledger.ran)
        self.ledger.nodes = self.nodes
        self.instances: list[Instance] = []
        self.born = 0  # instances so far
        self.links: list[Link] = []
        self.late: list[tuple[Node, int, list[Words]]] = []  # what nobody waits for any more
        self.next = 1  # the id that is sent next

    async def connect(self, address: redis_store.wire.Address, timeout: float) -> Link:
        """Stand in for the product's `connect`."""
        owner = actor.get()
        node = self.nodes.all[address.port - 7000]
        if node.frozen:
            await asyncio.sleep(timeout)
            raise TimeoutError
        await asyncio.sleep(0)
        if not node.up or owner.dead:
            raise redis.ConnectionError("nobody is there")
        return Link(self, owner, node)

    # What happens by itself

    def run(self, work: Coroutine[Any, Any, Any], seconds: float = 0.0) -> Any:
        task = self.loop.create_task(work)
        self.loop.go(seconds)
        return task.result()

    def deliver_all(self) -> None:
        """Let everything go on its way that is not held."""
        while busy := [link for link in self.links if link.busy and not link.held]:
            for link in busy:
                link.execute(1 << 30)
                link.answer()

    def step(self, seconds: float = 0.0) -> None:
        """Let what follows of itself happen, and time pass, with nothing on its way."""
        self.auto = False
        self.loop.go(seconds)
        self.ledger.check()

    def flow(self, seconds: float = 0.0) -> None:
        """The same, with everything on its way at once."""
        self.auto = True
        self.loop.call_soon(self.deliver_all)
        self.loop.go(seconds)
        self.auto = False
        self.ledger.check()

    def late_arrives(self, node: Node, commands: list[Words]) -> None:
        """Have a node carry out what nobody waits for any more; a transaction only whole."""
        transaction = Transaction()  # one that was begun before is not carried out
        for words in commands:
            if words[0] not in (b"EXPIRE", b"EXEC") or transaction.commands is not None:
                node.reply(transaction, words)

    def unsettled(self) -> bool:
        """Whether somebody has not arrived again yet where data may be lost."""
        owners = self.nodes.owners
        if any(node.stale or node.frozen or node.minority or not node.up for node in set(owners.values())):
            return True
        keys = {"home": self.nodes.keys.mark} | {f"p{part}": keys.mark for part, keys in enumerate(self.nodes.parts)}
        marks = {unit: self.client.run(owners[unit].number, ("GET", key))[0] for unit, key in keys.items()}
        return not all(instance.arrived_everywhere(marks, owners) for instance in self.instances)

    # The end

    def quiesce(self) -> None:
        """Let everything come back, and everything be reported; then see that nothing is missing."""
        for link in self.links:
            link.held = False
        for node in self.nodes.all:
            node.frozen = node.lags = node.minority = False
        for node in self.nodes.all:
            if node.stale:
                self.nodes.heal(node)
            if not node.up:
                self.nodes.restart(node)
        self.excuse()
        if not self.instances:
            self.start()
        self.flow(12.0)
        self.flow(LENGTH - self.loop.now % LENGTH + 0.5)
        last = int(EPOCH + self.loop.now) // LENGTH * LENGTH
        self.flow(8.0)
        for instance in self.instances:
            assert instance.contacts[-1][1], f"instance {instance.number} never arrived"
        self.ledger.check_end(self.instances, last)

    def close(self) -> None:
        for instance in self.instances:
            with contextlib.suppress(Exception):
                self.run(instance.crash())
        self.auto = False
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.go(1.0)
        self.loop.close()
        self.client.close()
        self.patches.close()

    # What may befall it

    def silence(self, instance: Instance) -> None:
        """Have all links that an instance has now fall silent."""
        for link in self.links:
            link.held = link.held or link.owner is instance

    def give_voice(self, instance: Instance) -> None:
        for link in self.links:
            link.held = link.held and link.owner is not instance

    def refresh(self, instance: Instance) -> None:
        """Have an instance ask for the map."""
        assert isinstance(instance._servers, redis_store.cluster.Cluster)
        instance._servers._stale.set()

    def delete_ids(self, part: int) -> None:
        """Delete what a part has of the open window."""
        node, keys = self.nodes.of_part(part), self.nodes.parts[part]
        self.client.run(node.number, ("DEL", keys.ids(int(EPOCH + self.loop.now) // LENGTH * LENGTH)))

    def start(self) -> None:
        async def start() -> None:
            self.born += 1
            self.instances.append(Instance(self, self.born))

        self.run(start())

    def crash(self, instance: Instance) -> None:
        self.auto = False
        self.instances.remove(instance)
        self.run(instance.crash(), 0.0)
        self.ledger.orphans |= instance.acked
        self.excuse()

    def stop(self, instance: Instance, thaw: Node | None = None) -> int:
        """Stop an instance, and have a frozen node go on 3 s later; return how many ids it says that it lost.

        If nothing is away, all that it has acknowledged is in Redis then.
        """
        whole = not any(node.stale or node.frozen or node.minority or not node.up for node in self.nodes.all)
        self.instances.remove(instance)
        instance.reporting.cancel()
        stopping = self.loop.create_task(instance.stop(STOPPING))
        self.flow(3.0)
        if thaw is not None:
            thaw.frozen = False
        self.flow(STOPPING - 2)
        instance.dead = True
        self.ledger.orphans |= instance.acked
        if whole and not stopping.result():
            left = (instance.acked - self.ledger.excused) - self.ledger.kept(self.instances)
            assert not left, f"instance {instance.number} left {left} behind"
        self.excuse()
        return int(stopping.result())

    def excuse(self) -> None:
        self.ledger.excuse(self.instances)

    def kill(self, node: Node) -> None:
        node.up = False
        node.boots += 1
        for link in [link for link in self.links if link.node is node]:
            self.cut(link)
        self.loop.go()
        self.late = [each for each in self.late if each[0] is not node]

    def cut(self, link: Link) -> None:
        def cut() -> None:
            actor.set(link.owner)
            link.abort(redis.ConnectionError("the connection was closed"))

        self.loop.call_soon(cut)
