r"""Two instances of two workers on a real cluster, under a steady load and under faults, and the account afterwards.

    python tests/cluster_fleet.py --scenario killed --seed 7 --engine valkey
    python tests/cluster_fleet.py --scenario all --seconds 60

A cluster has three primaries with a replica each, windows are two seconds long, and 2,500 requests a second are sent:
new ids, of which every fifth burst goes to both instances at once. A scenario does its fault as often as FAULTS has it,
in mid-window, before an edge or after it, and goes on until --seconds are over. Afterwards must hold:

- every id that was answered `ok` is counted, once, in the window that was open (accounts.py has the bounds);
- every window stands in the stream once, in order, with the count that every instance has logged, and no count that was
  seen in the stream has ever changed;
- answers come in time, and both instances say `ok` to everything within two seconds of the cluster being whole
  (steady.py); besides, what the docstring of a fault promises.

`calm` sends each id to every worker of every instance at once instead, and knows each window's count exactly. `soak`
does all faults at random; so does `python tests/soak.py --cluster`. The status is 0 if
all held, 1 if not.
"""

import argparse
import asyncio
import contextlib
import functools
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Sequence
from typing import Any, NamedTuple, Self

import accounts
import clusters
import fleet
import redis
import servers
import steady
import support

sys.path.append(str(support.ROOT))
from redis_store import parts  # only to know which ids share a fate

STREAM = "verve:reports"
SIZE = 2  # instances
WORKERS = 2
WINDOW = 2  # seconds
LOOK = 0.05  # seconds between two looks at the stream
RATE = 2000  # requests a second that there must be
AWAY = 5.0  # seconds that a node without a replica is away
STILL = 1.5  # seconds that a node or an instance stands still
NOTICED = 1.0  # seconds in which an instance must have noticed that a node is gone
AT_ONCE = 0.5  # seconds in which an id must fail whose node is known to be gone
SLOTS = 4000  # that are moved
MOVED = 0.25  # seconds that ids of a part may fail besides, when its slot is moved


class Watcher:
    """Reads the stream all the time, from whoever has it."""

    def __init__(self, nodes: Collection[clusters.Node], window: int) -> None:
        self.counts: dict[int, int] = {}  # by the start of a window: the first that was seen
        self.wrong: list[str] = []
        self.latest = 0.0  # seconds from a window's end until it was seen, the longest time
        self._nodes = nodes
        self._home: redis.Redis | None = None  # a connection to it
        self._window = window
        self._over = threading.Event()
        self._seen = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(servers.DEADLINE)
        if self._home is not None:
            self._home.close()

    def wait_for(self, start: int) -> None:
        """Wait until the window that starts at `start`, or a newer one, was seen."""
        with self._seen:
            there = self._seen.wait_for(lambda: max(self.counts, default=0) >= start, servers.DEADLINE)
        assert there, f"the window at {start} is not reported"

    def look(self, count: int = 30) -> dict[int, int] | None:
        """Return the newest windows and their counts, in the stream's order, if somebody has the stream."""
        if self._home is not None:
            with contextlib.suppress(redis.RedisError):
                return self._read(self._home, count)
            self._home.close()
            self._home = None
        for node in self._nodes:
            if node.process and not node.still:
                client = node.client()
                with contextlib.suppress(redis.RedisError):
                    found = self._read(client, count)
                    self._home = client
                    return found
                client.close()
        return None

    @staticmethod
    def _read(client: redis.Redis, count: int) -> dict[int, int]:
        entries: Any = client.xrevrange(STREAM, count=count)
        return {fleet.start_of(fields["window"]): int(fields["count"]) for _, fields in reversed(entries)}

    def _run(self) -> None:
        while not self._over.wait(LOOK):
            with self._seen:
                self.note(self.look() or {}, time.time())
                self._seen.notify_all()

    def note(self, found: dict[int, int], now: float) -> None:
        newest = max(self.counts, default=0)
        for start, count in found.items():
            if self.counts.setdefault(start, count) != count:
                self.wrong.append(f"{start} was {self.counts[start]} and is {count}")
            elif start > newest:
                self.latest = max(self.latest, now - start - self._window) if newest else 0.0
        if early := [start for start in found if start < newest and start not in self.counts]:
            self.wrong.append(f"{early} came after {newest}")


class Trial(steady.Steady):
    """Instances on a cluster, and what is done to it."""

    rate = 2500
    size_of_burst = 25

    def __init__(self, cluster: clusters.Cluster, watcher: Watcher, seed: int, slack: float) -> None:
        super().__init__(cluster.nodes[0], seed, SIZE, WINDOW, WORKERS, slack)
        self.cluster = cluster
        self.watcher = watcher
        self.account = accounts.Account(WINDOW)
        self.round = 0  # faults so far
        self.quick = False  # a node is known to be gone: ids must fail at once
        self.slots = SLOTS
        self.failing: dict[int, float] = {}  # parts of which ids are not stored, and since when
        self.longest_failing = 0.0  # seconds that ids of a part were not stored, since it was set to 0
        self.longest_moved = 0.0  # the same while slots were moved
        self._others: dict[int, list[fleet.Caller]] = {number: [] for number in range(SIZE)}
        self.living: list[list[str]] = []  # logs of the instances that lived at the end
        self._began = 0.0  # monotonic time
        self._before = 0  # answers until then
        self._rate = 0.0

    def __str__(self) -> str:
        return (
            f"{super().__str__()}; {self.per_second():.0f} requests a second, "
            f"a window was reported {self.watcher.latest:.2f} s after its end at the latest, "
            f"ids of a part that was moved failed for up to {self.longest_moved:.2f} s"
        )

    def begin(self) -> None:
        """Begin to measure the rate."""
        self._began, self._before = time.monotonic(), self.said.total()

    def end_of_load(self) -> None:
        """Measure the rate, and keep who lives."""
        self.living = [program.log.all for program in self.programs.values()]
        count = self.said.total() - self._before + self.deeds["answers"]
        away = sum(until - since for since, until in self.absent)
        self._rate = count / (time.monotonic() - self._began - away)

    def per_second(self) -> float:
        """Return how many requests were answered a second while there was an instance."""
        return self._rate

    def draw(self, probability: float) -> bool:
        return self.random.random() < probability

    # Instead of what a fleet asks of its one server

    def url(self, number: int) -> str:
        return self.cluster.url

    def now(self) -> float:
        return time.time()  # all nodes are on this machine

    def wait_for_report(self, start: int) -> None:
        self.watcher.wait_for(start)

    def reports(self) -> dict[str, int]:
        found = self.watcher.look(100_000)
        assert found is not None, "nobody has the stream"
        return {fleet.name_of(start): count for start, count in found.items()}

    def servers(self) -> list[int]:
        return [process.pid for node in self.cluster.nodes if (process := node.process)]

    # The load

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        async with self.load():
            await self.back()
            self.begin()
            yield
            self.end_of_load()
        for callers in self._others.values():
            for caller in callers:
                caller.close()

    async def burst(self, number: int, idle: list[fleet.Caller]) -> None:
        """Send new ids to an instance, and sometimes to another one at the same time."""
        numbers = self.ids(self.size_of_burst)
        wanted = [(number, idle)]
        if self.random.random() < 0.2:
            wanted += [(other, self._others[other]) for other in range(self.size) if other != number]
        since, before = self.now(), self.kept_waiting(number)
        answers = await asyncio.gather(*(self.send(one, numbers, callers) for one, callers in wanted))
        until = self.now()
        for said in answers:
            self.said.update(said)
        if any(answers):
            self.account.add(accounts.burst(since, until, self.window, *filter(None, answers)))
        self.follow_parts(numbers, answers[0], until)
        took = until - since - self.waited_since(number, before)
        if self.quick and took > AT_ONCE + self.slack:
            self.wrong.append(f"{answers} took {took:.2f} s while a node was known to be gone")

    def follow_parts(self, numbers: list[int], answers: list[str], now: float) -> None:
        """Keep for how long ids of a part were not stored, one after the other."""
        if self.failing or {*answers} != {"ok"}:
            for number, said in zip(numbers, answers, strict=bool(answers)):
                part = parts.part_of(number)
                if said != "ok":
                    self.failing.setdefault(part, now)
                elif part in self.failing:
                    self.longest_failing = max(self.longest_failing, now - self.failing.pop(part))

    # For the faults

    def victim(self, *, followed: bool = False) -> "Node":
        """Return home or, as often, another primary; one that has a replica, if it is to be `followed`."""
        home = self.cluster.primary_of(STREAM)
        found = [node for node in self.cluster.primaries() if not followed or self.cluster.replicas_of(node)]
        others = [node for node in found if node is not home]
        return home if home in found and (self.round % 2 == 0 or not others) else self.random.choice(others)

    def pair(self) -> tuple["Node", "Node"]:
        """Return a primary, and its replica."""
        primary = self.victim(followed=True)
        self.deeds["of home"] += primary is self.cluster.primary_of(STREAM)
        return primary, self.cluster.replicas_of(primary)[0]

    def whole(self) -> None:
        """Say that from now on everything can be stored again."""
        self.clear = time.monotonic()

    async def moment(self) -> None:
        """Wait for mid-window, or for the end of one, or for when it is about to be reported."""
        first, last = self.random.choice([(0.4, WINDOW - 0.4), (-0.05, 0.0), (0.0, 0.05), (0.05, 0.4)])
        await self.into_window(self.random.uniform(first, last))

    @contextlib.contextmanager
    def away(self, node: "Node") -> Iterator[None]:
        """While a node is away: if it is home, no window ends."""
        since = self.now()
        home = node is self.cluster.primary_of(STREAM)
        yield
        if home:
            self.account.late.append((since - accounts.MARGIN, self.now() + steady.BACK))

    def check(self) -> None:
        """Check the stream, what was seen of it, the logs, the sums, and the times.

        A stream that was lost is as the instances know it that lived at the end. What was told before they did is
        taken from whom it was told.
        """
        reports = {fleet.start_of(window): count for window, count in self.reports().items()}
        assert [*reports] == sorted(reports)
        logged = [{fleet.start_of(window): count for window, count in told.items()} for told in self.told()]
        for told, log in zip(logged, self.logs, strict=True):
            missing = told.keys() - reports.keys()
            assert not missing or log not in self.living, f"told by who lived, and not in the stream: {missing}"
        for told in [self.watcher.counts, *logged]:
            for start, count in told.items():
                assert reports.setdefault(start, count) == count, f"{start} told as {count}, and as {reports[start]}"
        reports = dict(sorted(reports.items()))
        for told in filter(None, logged):
            assert [*told] == [start for start in reports if min(told) <= start <= max(told)]
        self.check_no_gap([*reports])
        self.deeds["windows"] = len(reports)
        self.deeds["counted"] = sum(reports.values())
        self.account.check(reports)
        assert not self.watcher.wrong, "\n".join(self.watcher.wrong)
        assert self.said["ok"], "nothing was counted"
        self.check_times()


Node = clusters.Node
Fault = Callable[[Trial], Awaitable[None]]


# The faults. Each leaves the cluster whole, or about to be.


async def killed(trial: Trial) -> None:
    """kill -9 of a primary, whose replica is promoted."""
    primary, replica = trial.pair()
    await trial.moment()
    with trial.away(primary):
        await asyncio.to_thread(primary.kill)
        await asyncio.to_thread(trial.cluster.wait_until_promoted, replica)
    trial.whole()
    await trial.back()
    await asyncio.to_thread(primary.start)


async def failed_over(trial: Trial, how: str = "") -> None:
    """A replica takes its primary's place, as for maintenance."""
    primary, replica = trial.pair()
    await trial.moment()
    with trial.away(primary):
        await asyncio.to_thread(trial.cluster.fail_over, replica, how)
    trial.whole()


async def taken_over(trial: Trial) -> None:
    """A replica takes its primary's place without asking, and the old one takes writes for some time yet."""
    await failed_over(trial, "TAKEOVER")


async def lagged(trial: Trial) -> None:
    """kill -9 of a primary, whose replica has missed what was stored last."""
    primary, _ = trial.pair()
    await trial.moment()
    await asyncio.to_thread(trial.cluster.lag, primary)
    await trial.pause(0.2, 0.8)
    with trial.away(primary):
        await asyncio.to_thread(trial.cluster.lose_tail, primary)
    trial.whole()
    await trial.back()
    await asyncio.to_thread(primary.start)


async def alone(trial: Trial) -> None:
    """kill -9 of a primary that has no replica; it is back after AWAY seconds, empty.

    Meanwhile ids of the other nodes are answered `ok`, and its own fail at once. Without home they are for as long as a
    window is open that was opened before.
    """
    primary, replica = trial.pair()
    home = primary is trial.cluster.primary_of(STREAM)
    await asyncio.to_thread(replica.kill)
    await trial.moment()
    with trial.away(primary):
        await asyncio.to_thread(primary.kill)
        await asyncio.sleep(NOTICED)
        before = trial.said.copy()
        trial.quick = True
        await asyncio.sleep(AWAY - NOTICED)
        trial.quick = False
        said = trial.said - before
        await asyncio.to_thread(primary.start_empty)
        await asyncio.to_thread(clusters.wait_until, lambda: primary.is_well(len(trial.cluster.nodes)), "back")
    trial.whole()
    await trial.back()
    await asyncio.to_thread(replica.start_empty)
    share = said["no"] / said.total()
    as_expected = share > 0.15 and (share < 0.55 or home) and not said["lost"]
    if not said["ok"] or not said["no"] or not (as_expected or trial.slack):
        trial.wrong.append(f"{said} while a third of the slots was away{', with home' if home else ''}")


async def without_replica(trial: Trial) -> None:
    """kill -9 of a replica: nothing fails."""
    _, replica = trial.pair()
    await trial.moment()
    before = trial.said.copy()
    await asyncio.to_thread(replica.kill)
    await trial.pause(0.5, 2 * WINDOW)
    await asyncio.to_thread(replica.start_empty)
    await asyncio.to_thread(trial.cluster.settle)
    trial.whole()
    nothing_failed(trial, before)


async def moved(trial: Trial) -> None:
    """Slots are moved by SETSLOT and MIGRATE: nothing fails for longer than its slot is moved."""
    source, target, slots = chosen(trial)
    await trial.moment()
    with served(trial) as took:
        took.append(await asyncio.to_thread(trial.cluster.move, slots, source, target))
    trial.deeds["slots moved"] += len(slots)


async def migrated(trial: Trial) -> None:
    """Slots are moved all at once, as Valkey can: likewise."""
    source, target, slots = chosen(trial)
    await trial.moment()
    with served(trial):
        await asyncio.to_thread(trial.cluster.migrate, slots, source, target)
    trial.deeds["slots migrated"] += len(slots)


async def added(trial: Trial) -> None:
    """A node is added, and gets its share of the slots from each other: likewise."""
    node = await asyncio.to_thread(trial.cluster.add)
    for source, slots in trial.cluster.primaries().items():
        some = sorted(slots)[: min(trial.slots, len(slots)) // 4]
        with served(trial) as took:
            took.append(await asyncio.to_thread(trial.cluster.move, some, source, node))


@contextlib.contextmanager
def served(trial: Trial) -> Iterator[list[float]]:
    """See that no part fails meanwhile for longer than the seconds that are put into the list, and some more."""
    allowed = [trial.slack]
    trial.longest_failing = 0.0
    yield allowed
    trial.whole()
    trial.longest_moved = max(trial.longest_moved, trial.longest_failing)
    if trial.longest_failing > max(allowed) + MOVED:
        trial.wrong.append(f"ids of a part were not stored for {trial.longest_failing:.2f} s ({trial.doing})")


def chosen(trial: Trial) -> tuple[Node, Node, list[int]]:
    """Return a primary, another, and slots of the first; home's among them, if it has that."""
    source = trial.victim()
    primaries = trial.cluster.primaries()
    target = trial.random.choice([node for node in primaries if node is not source])
    slots = sorted(primaries[source])
    count = min(trial.slots, len(slots) * 3 // 4)
    first = trial.random.randrange(len(slots) - count)
    if (home := clusters.slot_of(STREAM)) in slots:
        at = slots.index(home)
        first = min(max(0, at - trial.random.randrange(count)), len(slots) - count)
    return source, target, slots[first : first + count]


def nothing_failed(trial: Trial, before: Any) -> None:
    """Check that since then all was answered `ok`, on a machine that has time for it."""
    said = trial.said - before
    if (said["no"] or said["lost"]) and not trial.slack:
        trial.wrong.append(f"{said} ({trial.doing})")


async def flushed(trial: Trial) -> None:
    """FLUSHALL of a node whose links stand, which is noticed by a probe."""
    node = trial.victim()
    await trial.moment()
    with trial.away(node):
        await asyncio.to_thread(node.tell, "FLUSHALL")
        await asyncio.sleep(trial.window)
    trial.whole()


async def frozen(trial: Trial) -> None:
    """SIGSTOP of a primary over an edge, for so long that its replica may be promoted or not."""
    node = trial.victim()
    await trial.into_window(-trial.random.uniform(0.1, STILL - 0.1))
    with trial.away(node):
        node.freeze()
        await asyncio.sleep(STILL)
        node.thaw()
        await asyncio.to_thread(trial.cluster.settle)
    trial.whole()


async def cut(trial: Trial) -> None:
    """All connections of clients to a node break; where another fault has a primary away, to one that can be asked."""
    await trial.moment()
    with contextlib.suppress(redis.RedisError):
        await asyncio.to_thread(trial.random.choice(trial.cluster.running()).cut)
    trial.whole()


async def outage(trial: Trial) -> None:
    """kill -9 of all instances, who are away for three windows."""
    await trial.moment()
    since = trial.now()
    await asyncio.gather(*(asyncio.to_thread(trial.kill, number) for number in range(trial.size)))
    await asyncio.sleep(3 * trial.window)
    await asyncio.gather(*(asyncio.to_thread(trial.start, number) for number in range(trial.size)))
    trial.absent.append((since, trial.now()))
    trial.whole()


async def instance_killed(trial: Trial) -> None:
    """kill -9 of an instance, or of one of its workers."""
    await trial.moment()
    number = trial.random.randrange(trial.size)
    trial.hurt.add(number)
    if trial.random.random() < 0.5:
        await asyncio.to_thread(trial.kill_worker, number)
    else:
        await asyncio.to_thread(trial.kill, number)
        await asyncio.to_thread(trial.start, number)
    trial.whole()
    await trial.back()
    trial.hurt.discard(number)


async def instance_frozen(trial: Trial) -> None:
    """SIGSTOP of an instance's workers, for a while."""
    await trial.moment()
    number = trial.random.randrange(trial.size)
    trial.hurt.add(number)
    program = trial.programs[number]
    pids = dict.fromkeys([program.pid, *trial.workers_of(program)])
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(STILL)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    trial.whole()
    await trial.back()
    trial.hurt.discard(number)


class Plan(NamedTuple):
    """A fault, how often it is done at least, and what it needs."""

    fault: Fault
    times: int = 10
    engine: str = ""  # the only one that can


PLANS = {
    "killed": Plan(killed),
    "failed-over": Plan(failed_over),
    "taken-over": Plan(taken_over),
    "lagged": Plan(lagged),
    "alone": Plan(alone, 3),
    "without-replica": Plan(without_replica),
    "moved": Plan(moved, 1),
    "migrated": Plan(migrated, 4, "valkey"),
    "added": Plan(added, 1),
    "flushed": Plan(flushed),
    "frozen": Plan(frozen),
    "cut": Plan(cut),
    "outage": Plan(outage, 3),
    "instance-killed": Plan(instance_killed),
    "instance-frozen": Plan(instance_frozen),
}
LOSING = ("killed", "taken-over", "lagged", "alone", "flushed", "frozen")  # what was stored last may be gone
DYING = ("outage", "instance-killed")  # instances, and what only they know
ONCE = ("added",)
SOME = 200  # slots that the soak moves at a time


async def calm(trial: Trial, seconds: float) -> None:
    """Send every id to all workers at once."""
    trial.begin()
    await fleet.waves(trial, seconds)
    trial.end_of_load()
    assert not trial.watcher.wrong, trial.watcher.wrong


async def repeat(names: Sequence[str], times: int, trial: Trial, seconds: float) -> None:
    """Do some faults, one after the other, so many times, and until so many seconds are over."""
    async with trial.running():
        until = time.monotonic() + seconds
        while trial.round < times * len(names) or time.monotonic() < until:
            name = names[trial.round % len(names)]
            if name in LOSING and len(names) > 1:
                await trial.told_all()
            await one(trial, name)
            await trial.back()
    trial.check()


async def soak(trial: Trial, seconds: float) -> None:
    """Do each fault once, and then at random; losses and deaths only when all that was before is told."""
    trial.slots = SOME
    names = [name for name, plan in PLANS.items() if plan.engine in ("", trial.cluster.engine)]
    trial.random.shuffle(names)
    async with trial.running():
        until = time.monotonic() + seconds
        while trial.round < len(names) or time.monotonic() < until:
            name = names[trial.round] if trial.round < len(names) else trial.random.choice(names)
            if name in ONCE and trial.deeds[name]:
                continue
            if name in LOSING or name in DYING:
                await trial.told_all()
            await asyncio.gather(one(trial, name), *([cut(trial)] if name in LOSING and trial.draw(0.3) else []))
            await trial.back()
    trial.check()


async def one(trial: Trial, name: str) -> None:
    await asyncio.to_thread(trial.cluster.rest)
    trial.doing = f"{name}, number {trial.round}"
    trial.round += 1
    await PLANS[name].fault(trial)
    trial.deeds[name] += 1


Work = Callable[[Trial, float], Coroutine[Any, Any, None]]
WORKS: dict[str, Work] = {"calm": calm, "soak": soak}
WORKS |= {name: functools.partial(repeat, [name], plan.times) for name, plan in PLANS.items()}


def run(
    work: Work, seconds: float, seed: int, engine: str, slack: float = 0.0, slots: int = SLOTS, **options: Any
) -> Trial:
    """Run a scenario and check it; return what was done. Raises AssertionError if anything does not hold.

    `options` are those of the cluster.
    """
    with clusters.Cluster(engine, **options) as cluster, Watcher(cluster.nodes, WINDOW) as watcher:
        trial = Trial(cluster, watcher, seed, slack)
        trial.slots = slots
        try:
            asyncio.run(work(trial, seconds))
        except BaseException as error:
            error.add_note(f"seed {seed}, {engine}, during {trial.doing}; {trial}")
            error.add_note("\n".join(f"instance: {line}" for log in trial.logs for line in log))
            with contextlib.suppress(Exception):  # what comes of an end by force
                trial.end()
            raise
        trial.end()
        return trial


def main() -> int:
    """Run scenarios as the command line has them."""
    parser = argparse.ArgumentParser(description="Break a cluster under a fleet, and see whether it counts right.")
    parser.add_argument("--scenario", choices=["all", *WORKS], default="all")
    parser.add_argument("--seconds", type=float, default=0, help="how long each is done at least; default 60 for calm")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="default: drawn by lot")
    parser.add_argument("--engine", choices=sorted(servers.ENGINES), help="default: by the seed")
    options = parser.parse_args()
    return play(options.scenario, options.seconds, options.seed, options.engine)


def play(wanted: str, seconds: float, seed: int, engine: str | None) -> int:
    """Run a scenario, or all, and print what became of them; return the status."""
    engines = sorted(servers.ENGINES)
    engine = engine or engines[seed % len(engines)]
    status = 0
    for name in ["calm", *PLANS] if wanted == "all" else [wanted]:
        plan = PLANS.get(name)
        if plan and plan.engine not in ("", engine):
            print(f"{name}: not for {engine}", flush=True)
            continue
        print(f"{name}: seed {seed}, {engine}", flush=True)
        try:
            trial = run(WORKS[name], seconds or DEFAULTS.get(name, 0.0), seed, engine)
            assert trial.per_second() >= RATE, f"{trial.per_second():.0f} requests a second, expected {RATE}"
            print(f"{name}: held; {trial}", flush=True)
        except Exception:
            traceback.print_exc()
            print(f"{name}: FAILED", flush=True)
            status = 1
    return status


DEFAULTS = {"calm": 60.0, "soak": 600.0}  # seconds


if __name__ == "__main__":
    sys.exit(main())
