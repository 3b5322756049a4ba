r"""Real instances on a real Redis, under load and under faults, and the account that is taken afterwards.

    python tests/fleet.py --scenario killed --seconds 60 --seed 7
    python tests/fleet.py --scenario all

Each id is sent once, to one instance, and its answer kept. When the dust has settled, the counts of all windows must
add up to the ids that were answered `ok`, plus at most those whose answer was lost: 503 because the store did not
answer in time, or no answer at all. Every window must stand in the stream once, in order, none left out while an
instance lived; and what an instance has logged must be what the stream says.

`waves` sends each id to every worker of every instance at once instead, and knows each window's count exactly.
`model` runs the model of fleet_model.py with as many seeds as there is time for, from --seed on.

The status is 0 if all held, 1 if not. What is drawn by lot comes from the seed; what the machine made of it doesn't,
so a run can be had again, but not to the microsecond.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import logging
import os
import random
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import servers
import support

TICK = 0.02  # seconds between a connection's requests
BURST = 20  # ids in a row
MARGIN = 0.5  # seconds before an edge
CONNECTIONS = 2  # to one instance
LATE = 60  # rounds beyond the time, of which the last must be enough
LOST = "the store did not answer in time"  # the one reason of a 503 whose id may be stored


class Caller(asyncio.Protocol):
    """One connection, on which requests are pipelined."""

    def __init__(self) -> None:
        self.closed = False
        self.reasons: Counter[str] = Counter()  # why ids were not stored that were asked for last
        self._transport: asyncio.Transport
        self._rest = b""
        self._heads: list[bytes] = []
        self._wanted = 0
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        start = 0
        while (end := data.find(b"\r\n\r\n", start)) >= 0:
            head = data[start:end]
            after = end + 4 + length_of(head)
            if after > len(data):
                break
            self._heads.append(head)
            start = after
        self._rest = data[start:]
        if len(self._heads) >= self._wanted and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, _: Exception | None) -> None:
        self.closed = True
        if not self._done.done():
            self._done.set_result(None)

    def close(self) -> None:
        self._transport.close()

    @property
    def port(self) -> int:
        """The port on this side, by which the other side knows the connection."""
        port: int = self._transport.get_extra_info("sockname")[1]
        return port

    async def talk(self, requests: Sequence[bytes]) -> list[bytes]:
        """Send requests and return the heads of the answers; fewer, if the connection breaks."""
        self._heads, self._wanted = [], len(requests)
        self._done = asyncio.get_running_loop().create_future()
        if not self.closed:
            self._transport.write(b"".join(requests))
            async with asyncio.timeout(servers.DEADLINE):
                await self._done
        assert len(self._heads) <= len(requests)
        return self._heads

    async def ask(self, numbers: Sequence[int]) -> list[str]:
        """Have ids counted; return for each "ok", "lost" if nobody can know, or "no" if it is not stored."""
        heads = await self.talk([support.accept(number) for number in numbers])
        self.reasons = Counter(why(head) for head in heads if said(head) != "ok")
        return [said(head) for head in heads] + ["lost"] * (len(numbers) - len(heads))


async def call(address: support.Address) -> Caller:
    _, caller = await asyncio.get_running_loop().create_connection(Caller, *address)
    return caller


@functools.lru_cache(1000)
def length_of(head: bytes) -> int:
    match = re.search(rb"\r\ncontent-length: ([0-9]+)", head.lower())
    assert match, head
    return int(match[1])


@functools.lru_cache(1000)
def said(head: bytes) -> str:
    status = head[9:12]
    if status == b"200":
        return "ok"
    assert status == b"503", head
    return "lost" if LOST.encode() in head else "no"


def why(head: bytes) -> str:
    match = re.search(rb"\r\nVerve-Error: (.*)", head)
    return match[1].decode().strip() if match else ""


def start_of(window: str) -> int:
    return int(datetime.fromisoformat(window).timestamp())


def name_of(start: int) -> str:
    return f"{datetime.fromtimestamp(start, UTC):%Y-%m-%dT%H:%M:%SZ}"


class Fleet:
    """Instances of the program on one Redis, what was sent to them, and what became of it."""

    def __init__(self, server: servers.Redis, seed: int, size: int, window: int, workers: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.size = size
        self.window = window
        self.workers = workers
        self.programs: dict[int, support.Program] = {}  # those that run, by number
        self.logs: list[list[str]] = []  # of all that ever ran
        self.said: Counter[str] = Counter()
        self.deeds: Counter[str] = Counter()
        self.absent: list[tuple[float, float]] = []  # from when until when no instance lived
        self.over = False  # nothing more is to be sent
        self.excused = 0  # ids that may be gone
        self.proxies: list[servers.Proxy] = []  # one before each instance, if there are any
        self._ends: dict[int, contextlib.ExitStack] = {}
        self._next = self.random.randrange(-(2**62), 2**62)

    def __str__(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in [*self.deeds.items(), *self.said.items()])

    # What is done to the instances; these block

    def url(self, number: int) -> str:
        """Return where an instance is to find Redis."""
        return self.proxies[number].url if self.proxies else self.server.url

    def put_proxies(self) -> None:
        self.proxies = [servers.Proxy(self.server.port) for _ in range(self.size)]

    def start(self, number: int) -> None:
        with contextlib.ExitStack() as stack:
            flags = ("--redis-url", self.url(number), "--window", str(self.window), "--workers", str(self.workers))
            idle = ("--idle-timeout", "3600")  # those that only the worst fault needs are not closed meanwhile
            program = stack.enter_context(support.verve(*flags, *idle))
            self.logs.append(program.log.all)
            self._ends[number] = stack.pop_all()
            self.programs[number] = program

    def stop(self, number: int) -> None:
        del self.programs[number]
        self._ends.pop(number).close()

    def kill(self, number: int) -> None:
        program = self.programs.pop(number)
        for pid in dict.fromkeys([program.pid, *self.workers_of(program)]):
            os.kill(pid, signal.SIGKILL)
        program.wait()
        self._ends.pop(number).close()

    def kill_worker(self, number: int) -> None:
        program = self.programs[number]
        seen = len(program.log.all)
        os.kill(self.random.choice(self.workers_of(program)), signal.SIGKILL)
        program.log.wait_for(r"worker [0-9]+ ended with status -9 and is replaced", seen)

    def end(self) -> None:
        """End what runs, without asking."""
        for program in self.programs.values():
            program.end()
        for stack in self._ends.values():
            stack.close()
        for proxy in self.proxies:
            proxy.__exit__()

    def workers_of(self, program: support.Program) -> list[int]:
        """Return the processes of an instance that serve, as soon as there are as many as there should be."""
        until = time.monotonic() + servers.DEADLINE
        while self.workers > 1:
            pids = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
            if len(pids) == self.workers:
                return list(map(int, pids))
            assert time.monotonic() < until, f"workers: {pids}"
            time.sleep(0.001)  # a process that is forked tells nobody
        return [program.pid]

    # Time, by Redis's clock

    def now(self) -> float:
        with self.server.client() as client:
            seconds, microseconds = client.time()
            return float(seconds + microseconds / 1e6)

    def open(self) -> int:
        """Return the start of the window that is open."""
        return int(self.now() // self.window) * self.window

    def wait_for_report(self, start: int) -> None:
        """Wait until the window that starts at `start`, or a newer one, stands in the stream."""
        until = time.monotonic() + servers.DEADLINE
        with self.server.client() as client:
            while not client.xread({"verve:reports": f"{start * 1000 - 1}-0"}, count=1, block=1000):
                assert time.monotonic() < until, f"the window at {start} is not reported"

    async def told_all(self) -> None:
        """Wait until every instance has told a window that was open just now: nothing settles any more."""
        window = self.open()
        for program in self.programs.values():
            await asyncio.to_thread(program.log.wait_for, f"unique ids in {name_of(window)}:")

    async def noticed(self, fault: Callable[[], object]) -> None:
        """Do a fault, and wait until every instance has found Redis again."""
        seen = [len(program.log.all) for program in self.programs.values()]
        await asyncio.to_thread(fault)
        for program, start in zip(self.programs.values(), seen, strict=True):
            await asyncio.to_thread(program.log.wait_for, "Redis is back", start)

    def lead(self, server: servers.Redis, apart: float) -> None:
        """Lead all instances to another server, up to so many seconds one after the other."""
        for proxy in self.proxies:
            proxy.refuse = True
            proxy.cut()
        for proxy in self.random.sample(self.proxies, self.size):
            proxy.lead_to(server.port)
            proxy.refuse = False
            time.sleep(self.random.uniform(0, apart))

    async def pause(self, least: float, most: float) -> None:
        await asyncio.sleep(self.random.uniform(least, most))

    async def into_window(self, seconds: float) -> None:
        """Wait until a window has been open for so long; less than 0: until it will open in so long."""
        now = self.now()
        await asyncio.sleep((seconds - now) % self.window)

    # The load

    def ids(self, count: int) -> list[int]:
        """Return ids that were never sent."""
        self._next += count
        return list(range(self._next - count, self._next))

    async def feed(self, number: int) -> None:
        """Send ids to an instance, whenever it runs, until it is over."""
        while not self.over:
            with contextlib.suppress(OSError, KeyError):
                caller = await call(self.programs[number].address)
                while not self.over and not caller.closed:
                    self.said.update(await caller.ask(self.ids(BURST)))
                    await asyncio.sleep(TICK)
                caller.close()
            await asyncio.sleep(TICK)

    @contextlib.asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """Run and feed the instances meanwhile, then have every window reported and stop them."""
        await asyncio.gather(*(asyncio.to_thread(self.start, number) for number in range(self.size)))
        feeds = [asyncio.create_task(self.feed(number)) for number in range(self.size) for _ in range(CONNECTIONS)]
        try:
            yield
            self.over = True
            await asyncio.gather(*feeds)
        finally:
            for feed in feeds:
                feed.cancel()
        await self.settle()

    async def settle(self) -> None:
        """Have every window reported that may hold an id, then stop the instances."""
        await asyncio.to_thread(self.wait_for_report, self.open())
        for number in list(self.programs):
            await asyncio.to_thread(self.stop, number)

    # The account

    def reports(self) -> dict[str, int]:
        """Return the windows in the stream and their counts."""
        return self.server.reports()

    def told(self) -> list[dict[str, int]]:
        """Return what each instance has logged, in order; fail if it has logged a window twice."""
        all_told = []
        for log in self.logs:
            pairs = [match.groups() for line in log if (match := re.search(r"unique ids in (\S+): ([0-9]+)$", line))]
            told = {window: int(count) for window, count in pairs}
            assert len(told) == len(pairs), f"logged twice: {pairs}"
            assert list(told) == sorted(told)
            all_told.append(told)
        return all_told

    def check(self) -> None:
        """Check the stream against the logs, and the sum."""
        reports = self.reports()
        windows = list(reports)
        for told in self.told():
            ours = list(told)
            between = [window for window in windows if ours and ours[0] <= window <= ours[-1]]
            assert told == {window: reports[window] for window in between}
        self.check_counts(reports)

    def check_with_logs(self) -> None:
        """Check the sum where Redis has lost its stream: reports that went with it are in the logs."""
        reports = self.reports()
        for told in self.told():
            for window, count in told.items():
                assert reports.setdefault(window, count) == count, f"{window} is told as {count} and {reports[window]}"
        self.check_counts(dict(sorted(reports.items())))

    def check_no_gap(self, starts: list[int]) -> None:
        """Check that windows are in order, and that none is missing but those in which no instance lived."""
        assert starts == sorted(starts)
        missing = [
            start
            for start in sorted({*range(starts[0], starts[-1], self.window)}.difference(starts))
            if not any(since - self.window < start <= until for since, until in self.absent)
        ]
        assert not missing, f"not reported: {missing}"

    def check_counts(self, reports: dict[str, int]) -> None:
        """Check that no window is missing, and that the sum is right."""
        starts = [start_of(window) for window in reports]
        self.check_no_gap(starts)
        total = sum(reports.values())
        self.deeds["windows"] = len(starts)
        self.deeds["counted"] = total
        assert self.said["ok"] - self.excused <= total <= self.said["ok"] + self.said["lost"], (
            f"{total} counted of {self.said}"
        )
        assert self.said["ok"], "nothing was counted"


# The scenarios. Each does its worst for so many seconds, and returns after the account.


async def killed(fleet: Fleet, seconds: float) -> None:
    """kill -9 of instances and of workers."""
    async with fleet.load():
        for _ in during(seconds):
            await fleet.pause(0.2, 2)
            number = fleet.random.randrange(fleet.size)
            if fleet.random.random() < 0.5:
                await asyncio.to_thread(fleet.kill_worker, number)
                fleet.deeds["workers killed"] += 1
            else:
                await asyncio.to_thread(fleet.kill, number)
                await fleet.pause(0, 1.5)
                await asyncio.to_thread(fleet.start, number)
                fleet.deeds["instances killed"] += 1
    fleet.check()


async def frozen(fleet: Fleet, seconds: float) -> None:
    """SIGSTOP of an instance for 5 s, over edges."""
    async with fleet.load():
        for _ in during(seconds):
            await fleet.pause(0.2, 2)
            program = fleet.programs[fleet.random.randrange(fleet.size)]
            await asyncio.to_thread(program.freeze)
            await asyncio.sleep(min(5.0, seconds))
            program.thaw()
            fleet.deeds["instances frozen"] += 1
    fleet.check()


async def redis_frozen(fleet: Fleet, seconds: float) -> None:
    """SIGSTOP of Redis, over an edge or a few."""
    async with fleet.load():
        for _ in during(seconds):
            await fleet.pause(0.5, 1.5)
            await fleet.into_window(-0.2)
            fleet.server.freeze()
            await fleet.pause(0.4, 3)
            fleet.server.thaw()
            fleet.deeds["Redis frozen"] += 1
    fleet.check()


async def redis_killed(fleet: Fleet, seconds: float) -> None:
    """kill -9 of a Redis that keeps its data."""
    async with fleet.load():
        for _ in during(seconds):
            await fleet.pause(0.5, 3)
            await asyncio.to_thread(fleet.server.kill)
            await fleet.pause(0, 2)
            await asyncio.to_thread(fleet.server.start)
            fleet.deeds["Redis killed"] += 1
    fleet.check()


async def redis_emptied(fleet: Fleet, seconds: float) -> None:
    """kill -9 of a Redis that keeps nothing.

    It dies when all instances have told the window before, early in the open one, and is back before that is over:
    then its ids are stored again. On a machine so slow that the end comes first they may be gone, and that round
    proves nothing; so one in time there must be.
    """
    async with fleet.load():
        for _ in during(seconds, lambda: fleet.deeds["Redis emptied"] > 0):
            before = fleet.said["ok"]
            last = fleet.open()
            for program in fleet.programs.values():
                await asyncio.to_thread(program.log.wait_for, f"unique ids in {name_of(last)}:")
            await fleet.pause(0, 0.2 * fleet.window)
            seen = [len(program.log.all) for program in fleet.programs.values()]
            in_one_window = fleet.open() == last + fleet.window
            await asyncio.to_thread(fleet.server.kill)
            at_risk = fleet.said["ok"] - before
            await asyncio.to_thread(fleet.server.start)
            for program, start in zip(fleet.programs.values(), seen, strict=True):
                await asyncio.to_thread(program.log.wait_for, "Redis is back", start)
            in_one_window &= fleet.open() == last + fleet.window
            fleet.deeds["Redis emptied" if in_one_window else "Redis emptied for too long"] += 1
            fleet.excused += 0 if in_one_window else at_risk
    fleet.check_with_logs()


async def outage(fleet: Fleet, seconds: float) -> None:
    """kill -9 of all instances, who are away for three windows."""
    async with fleet.load():
        for _ in during(seconds):
            await fleet.pause(1, 2)
            since = fleet.now()
            await asyncio.gather(*(asyncio.to_thread(fleet.kill, number) for number in range(fleet.size)))
            await asyncio.sleep(3 * fleet.window)
            await asyncio.gather(*(asyncio.to_thread(fleet.start, number) for number in range(fleet.size)))
            fleet.absent.append((since, fleet.now()))
            fleet.deeds["outages"] += 1
    fleet.check()


def tell_redis(server: servers.Redis, *words: str | int) -> None:
    with server.client() as client:
        client.execute_command(*words)


async def full_and_cut(fleet: Fleet, seconds: float) -> None:
    """Memory is full, and all links break at once; the window's end makes room all the same."""
    async with fleet.load():
        for _ in during(seconds):
            await fleet.pause(0.5, 2)
            last = fleet.open()
            tell_redis(fleet.server, "CONFIG", "SET", "maxmemory", 1)
            await fleet.pause(0, 0.5)
            tell_redis(fleet.server, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.to_thread(fleet.wait_for_report, last)
            tell_redis(fleet.server, "CONFIG", "SET", "maxmemory", 0)
            fleet.deeds["cuts in full memory"] += 1
    fleet.check()


async def swapped(fleet: Fleet, seconds: float) -> None:
    """SWAPDB there and back, over an edge."""
    async with fleet.load():
        for _ in during(seconds):
            await fleet.told_all()
            await fleet.noticed(functools.partial(tell_redis, fleet.server, "SWAPDB", 0, 1))
            await fleet.into_window(-0.3)
            await fleet.noticed(functools.partial(tell_redis, fleet.server, "SWAPDB", 0, 1))
            fleet.deeds["databases swapped and back"] += 1
    fleet.check_with_logs()


async def flushed_and_stopped(fleet: Fleet, seconds: float) -> None:
    """FLUSHALL, and a moment later a stop: it ends with status 0, and nothing is lost."""
    async with fleet.load():
        for _ in during(seconds):
            await fleet.told_all()
            number = fleet.random.randrange(fleet.size)
            tell_redis(fleet.server, "FLUSHALL")
            await fleet.pause(0, 0.6)
            await asyncio.to_thread(fleet.stop, number)
            await asyncio.to_thread(fleet.start, number)
            fleet.deeds["flushed and stopped"] += 1
    fleet.check_with_logs()


def foreign_entry(ahead: int) -> tuple[str | int, ...]:
    """Return the command that adds an entry of somebody else, so many seconds ahead of Redis's clock.

    That is read when the entry is added: so it is not older than the start of the open window, which it keeps out.
    """
    script = "local id = redis.call('TIME')[1] + ARGV[1] .. '000-0' return redis.call('XADD', KEYS[1], id, 'a', 'b')"
    return "EVAL", script, 1, "verve:reports", ahead


async def barred(fleet: Fleet, seconds: float) -> None:
    """An entry of somebody else keeps reports out of the stream, until what the log says is done."""
    async with fleet.load():
        for _ in during(seconds):
            await fleet.told_all()
            program = fleet.programs[fleet.random.randrange(fleet.size)]
            seen = len(program.log.all)
            tell_redis(fleet.server, *foreign_entry(fleet.random.choice([0, 5, 86_400])))
            await asyncio.to_thread(program.log.wait_for, r"ERROR verve\.store: .*RENAME", seen)
            await fleet.pause(0, 2 * fleet.window)
            (line,) = [line for line in program.log.all[seen:] if "RENAME" in line]
            for command in re.findall(r"\b(?:RENAME verve:[a-z:]+ [a-z:]+|DEL verve:[a-z:]+)", line):
                tell_redis(fleet.server, *command.split())
            fleet.deeds["entries of others"] += 1
    fleet.check_with_logs()


async def failed_back(fleet: Fleet, seconds: float) -> None:
    """Clients are led to another server and back, around an edge; each lives on while it is left."""
    with servers.Redis(fleet.server.engine) as other:
        async with fleet.load():
            for _ in during(seconds):
                await fleet.told_all()
                await fleet.noticed(functools.partial(fleet.lead, other, 0.0))
                await fleet.into_window(-0.2)
                await fleet.noticed(functools.partial(fleet.lead, fleet.server, 0.8))
                tell_redis(other, "FLUSHALL")
                fleet.deeds["failed over and back"] += 1
    fleet.check_with_logs()


async def promoted(fleet: Fleet, seconds: float) -> None:
    """A replica that lagged is promoted; one instance's link is reset, the others' fall silent."""
    with servers.Redis(fleet.server.engine) as second:
        replica = second
        async with fleet.load():
            for _ in during(seconds):
                await fleet.told_all()
                primary = fleet.server
                await asyncio.to_thread(replica.follow, primary)
                tell_redis(primary, "WAIT", 1, 1000)
                replica.lag(primary)
                await fleet.pause(0.1, 0.5)
                reset, *silent = fleet.random.sample(fleet.proxies, fleet.size)
                for proxy in silent:
                    proxy.silence()
                await asyncio.to_thread(primary.kill)
                await asyncio.to_thread(replica.lead)
                fleet.server, replica = replica, primary
                for proxy in fleet.proxies:
                    proxy.lead_to(fleet.server.port)
                await fleet.noticed(reset.cut)
                await asyncio.to_thread(replica.start)
                fleet.deeds["replicas promoted"] += 1
        fleet.check_with_logs()
        replica.kill()


class Wave(NamedTuple):
    """Ids that were sent to every worker of every instance at once."""

    size: int
    stored: int  # of which somebody has said ok
    window: int  # start of the one that was open when they were sent
    end: float  # Redis's time when all were answered


async def waves(fleet: Fleet, seconds: float) -> None:
    """Every id to every worker of every instance at once, in waves between two edges.

    An id that reaches one worker before an edge and another after it counts in both windows, rightly. So a wave
    starts when the window before is closed in Redis, from when on nobody can add to it, and counts as one window's
    if its last answer is there MARGIN before the end: an instance knows Redis's time to within half a round trip,
    and a round trip takes no longer than the request time-out, or it fails. Of a wave that took longer it is only
    known that each id is in one of the windows or in several. The waves grow as long as they fit well.
    """
    await asyncio.gather(*(asyncio.to_thread(fleet.start, number) for number in range(fleet.size)))
    callers: list[Caller] = []
    for program in fleet.programs.values():
        callers += await call_each(program, fleet.workers_of(program))
    size = 2000
    sent: list[Wave] = []
    for _ in during(seconds, lambda: fleet.deeds["waves"] > 0):
        ids = fleet.ids(size)
        orders = [fleet.random.sample(ids, size) + fleet.random.choices(ids, k=size // 10) for _ in callers]
        requests = [[support.accept(number) for number in order] for order in orders]
        last = fleet.open()
        await asyncio.to_thread(fleet.wait_for_report, last)
        if fleet.open() != last + fleet.window:
            continue
        heads = await asyncio.gather(*(caller.talk(one) for caller, one in zip(callers, requests, strict=True)))
        end = fleet.now()
        stored: set[int] = set()
        for order, answers in zip(orders, heads, strict=True):
            stored.update(number for number, head in zip(order, answers, strict=True) if said(head) == "ok")
            fleet.deeds["answers lost"] += sum(said(head) != "ok" for head in answers)
            fleet.deeds["answers"] += len(answers)
        wave = Wave(size, len(stored), last + fleet.window, end)
        assert wave.stored == size or fleet.deeds["answers lost"], wave
        took = wave.end - wave.window
        in_time = took < fleet.window - MARGIN and wave.stored == size
        fleet.deeds["waves" if in_time else "waves that took too long"] += 1
        if not in_time:
            size = max(100, size // 2)
        elif took < fleet.window / 3:
            size *= 2
        sent.append(wave)
    for caller in callers:
        caller.close()
    await fleet.settle()
    reports = {start_of(window): count for window, count in fleet.reports().items()}
    for wave in sent:
        counts = [reports.pop(start) for start in range(wave.window, int(wave.end) + 1, fleet.window)]
        assert sum(counts) >= wave.stored, f"{counts} counted of {wave}"
        assert max(counts) <= wave.size, f"{counts} counted of {wave}"
        if wave.end < wave.window + fleet.window - MARGIN and wave.stored == wave.size:
            assert counts == [wave.size], f"{counts} counted of {wave}"
            fleet.deeds["counted exactly"] += wave.size
    assert not any(reports.values()), f"counted, but not sent: {reports}"


async def call_each(program: support.Program, workers: Sequence[int]) -> list[Caller]:
    """Return a connection to each worker of an instance; the kernel chooses, so call until all have been had."""
    callers: dict[int, Caller] = {}
    for _ in range(200):
        caller = await call(program.address)
        assert [head[9:12] for head in await caller.talk([support.get("/")])] == [b"404"]
        pid = owner(caller.port, program.address[1], workers)
        if pid in callers:
            caller.close()
        callers.setdefault(pid, caller)
        if len(callers) == len(workers):
            return list(callers.values())
    raise AssertionError("200 connections, and a worker has none")


def owner(peer: int, port: int, pids: Sequence[int]) -> int:
    """Return which process has the connection between two ports of this machine."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, _, _, _, _, _, inode, *_ = line.split()
        if int(local.partition(":")[2], 16) == port and int(remote.partition(":")[2], 16) == peer:
            for pid in pids:
                for file in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        if str(file.readlink()) == f"socket:[{inode}]":
                            return pid
    raise AssertionError("nobody has the connection")


def during(seconds: float, enough: Callable[[], bool] = lambda: True) -> Iterator[int]:
    """Count from 0 until so many seconds have passed and it is enough; once at least.

    A busy machine may take as long as it likes for a round, whose own guards end it; only their number is bounded.
    """
    until = time.monotonic() + seconds
    late = 0
    for number in itertools.count():
        late += time.monotonic() > until
        if number and late and enough():
            return
        assert late < LATE, "never enough"
        yield number


class Plan(NamedTuple):
    """A scenario: what is done, to how many instances of how many workers, and how long a window is."""

    work: Callable[[Fleet, float], Coroutine[Any, Any, None]]
    size: int
    workers: int
    window: int  # seconds
    persist: bool = False  # whether Redis does
    proxies: bool = False  # whether there is one before each instance


PLANS = {
    "killed": Plan(killed, 3, 2, 1),
    "frozen": Plan(frozen, 2, 1, 1),
    "redis-frozen": Plan(redis_frozen, 2, 2, 1),
    "redis-killed": Plan(redis_killed, 2, 2, 1, persist=True),
    "redis-emptied": Plan(redis_emptied, 2, 1, 3),
    "outage": Plan(outage, 2, 2, 1),
    "full-and-cut": Plan(full_and_cut, 2, 2, 2),
    "swapped": Plan(swapped, 2, 1, 4),
    "flushed-and-stopped": Plan(flushed_and_stopped, 2, 1, 2),
    "barred": Plan(barred, 2, 1, 1),
    "failed-back": Plan(failed_back, 2, 1, 4, proxies=True),
    "promoted": Plan(promoted, 2, 1, 2, proxies=True),
    "waves": Plan(waves, 2, 2, 2),
}


def run(name: str, seconds: float, seed: int, engine: str) -> str:
    """Run a scenario; return what was done and counted. Raises AssertionError if the account is wrong."""
    plan = PLANS[name]
    with servers.Redis(engine, persist=plan.persist) as server:
        fleet = Fleet(server, seed, plan.size, plan.window, plan.workers)
        if plan.proxies:
            fleet.put_proxies()
        try:
            asyncio.run(plan.work(fleet, seconds))
        except BaseException as error:
            error.add_note(f"scenario {name}, seed {seed}, {engine}; {fleet}")
            error.add_note("\n".join(f"instance: {line}" for log in fleet.logs for line in log))
            raise
        finally:
            fleet.end()
        return str(fleet)


def run_model(seconds: float, seed: int, engine: str) -> str:
    """Run the model with a seed after the other."""
    sys.path.append(str(support.SERVER.parent))
    import fleet_model  # noqa: PLC0415 - which imports the product

    logging.disable()
    rounds = 0
    with servers.Redis(engine) as server:
        for rounds in during(seconds):
            try:
                fleet_model.check_model(server, range(100), seed + rounds)
            except BaseException as error:
                error.add_note(f"seed {seed + rounds}, {engine}")
                raise
    return f"{rounds + 1} rounds of 100 examples"


def main() -> int:
    parser = argparse.ArgumentParser(description="Break a fleet, and see whether it still counts right.")
    parser.add_argument("--scenario", choices=["all", "model", *PLANS], default="all")
    parser.add_argument("--seconds", type=float, default=60, help="how long each is done; default 60")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="default: drawn by lot")
    options = parser.parse_args()
    engines = sorted(servers.ENGINES)
    engine = engines[options.seed % len(engines)]
    status = 0
    for name in ["model", *PLANS] if options.scenario == "all" else [options.scenario]:
        print(f"{name}: seed {options.seed}, {engine}", flush=True)
        try:
            work = run_model if name == "model" else functools.partial(run, name)
            print(f"{name}: held; {work(options.seconds, options.seed, engine)}", flush=True)
        except Exception:
            traceback.print_exc()
            print(f"{name}: FAILED", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
