"""A steady load on a fleet, at the same rate whatever becomes of it, and the times that are taken of its answers.

What must hold: every answer comes within --request-timeout and LATE seconds, less the time that its instance had no
processor; and each instance says `ok` to a whole burst within BACK seconds of the end of a fault. Times are the
machine's too, so `slack` seconds may be added to both. What did not hold is in `wrong`, and for `check_times` to raise.
"""

import asyncio
import contextlib
import os
import time
from collections import Counter
from pathlib import Path

import fleet
import servers

TIMEOUT = 1.0  # seconds: --request-timeout as it is without a flag
LATE = 0.5  # seconds that an answer may come later
BACK = 2.0  # seconds until an instance takes ids again


def waiting_time(pid: int) -> float:
    """Return for how many seconds a process had something to do and no processor, so far. Raises OSError."""
    file = os.open(f"/proc/{pid}/schedstat", os.O_RDONLY)  # by the quickest way: it is asked for thousands of times
    try:
        return int(os.read(file, 100).split()[1]) / 1e9
    finally:
        os.close(file)


class Steady(fleet.Fleet):
    """A fleet whose load does not wait for answers."""

    rate = 5000  # requests a second, over all instances
    size_of_burst = 50  # of them at a time, on one connection

    def __init__(
        self, server: servers.Redis, seed: int, size: int, window: int, workers: int, slack: float = 0.0
    ) -> None:
        super().__init__(server, seed, size, window, workers)
        self.slack = slack
        self.slowest = 0.0  # answer, seconds, less what the instance had no processor
        self.starved = 0.0  # seconds of an answer that an instance had none
        self.longest = 0.0  # time until an instance was back, seconds
        self.wrong: list[str] = []  # what took too long, or was not answered
        self.reasons: Counter[str] = Counter()  # why ids were not stored
        self.doing = ""  # the faults of this round
        self.clear = 0.0  # monotonic time at which the last fault ended
        self.hurt: set[int] = set()  # instances that may close connections, or keep them waiting
        self.waiting: dict[int, asyncio.Event] = {}  # by instance: set when it says ok

    def __str__(self) -> str:
        return (
            f"{super().__str__()}; slowest answer {self.slowest:.2f} s (besides up to {self.starved:.2f} s without a "
            f"processor), longest time to be back {self.longest:.2f} s; "
            f"{dict(self.reasons)}"
        )

    async def feed(self, number: int) -> None:
        """Send ids to an instance at a steady rate, on as many connections as that takes."""
        every = self.size_of_burst * self.size * fleet.CONNECTIONS / self.rate
        idle: list[fleet.Caller] = []
        bursts: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while not self.over:
            burst = asyncio.create_task(self.burst(number, idle))
            bursts.add(burst)
            burst.add_done_callback(self.ended)
            burst.add_done_callback(bursts.discard)
            due = max(due + every, time.monotonic() - TIMEOUT)  # what is missed is made up for
            await asyncio.sleep(due - time.monotonic())
        await asyncio.gather(*bursts)
        for caller in idle:
            caller.close()

    def ended(self, burst: asyncio.Task[None]) -> None:
        """Keep what a burst has raised."""
        if not burst.cancelled() and (error := burst.exception()):
            self.wrong.append(f"{error!r} ({self.doing})")

    async def burst(self, number: int, idle: list[fleet.Caller]) -> None:
        """Have new ids counted."""
        numbers = self.ids(self.size_of_burst)
        self.said.update(await self.send(number, numbers, idle))

    async def send(self, number: int, numbers: list[int], idle: list[fleet.Caller]) -> list[str]:
        """Send ids to an instance; return what became of each, and nothing if it does not run."""
        program = self.programs.get(number)
        if program is None:
            return []
        while idle and idle[-1].closed:  # the instance was killed since
            idle.pop()
        try:
            caller = idle.pop() if idle else await fleet.call(program.address)
        except OSError:
            assert self.programs.get(number) is not program, "no connection to an instance that runs"
            return []
        since, before = time.monotonic(), self.kept_waiting(number)
        answers = await caller.ask(numbers)
        self.reasons += caller.reasons
        waited = self.waited_since(number, before)
        took = time.monotonic() - since - waited
        well = number not in self.hurt and self.programs.get(number) is program
        if not caller.closed:
            idle.append(caller)
        elif well:
            self.wrong.append(f"a connection was closed ({self.doing})")
        if well:
            self.starved = max(self.starved, waited)
            self.slowest = max(self.slowest, took)
        if well and took > TIMEOUT + LATE + self.slack:
            self.wrong.append(f"an answer took {took:.2f} s, {set(answers)} ({self.doing})")
        if {*answers} == {"ok"} and since > self.clear and number in self.waiting:
            self.waiting[number].set()
        return answers

    def kept_waiting(self, number: int) -> dict[int, float]:
        """Return for how many seconds an instance, and whom it waits for, had something to do and no processor, by pid.

        That is Linux's account. With several processes it is more than that of those which were asked.
        """
        pids = [os.getpid(), *self.servers()]
        found: dict[int, float] = {}
        with contextlib.suppress(OSError):
            if program := self.programs.get(number):
                children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text()
                pids += map(int, children.split() or [str(program.pid)])
            for pid in pids:
                found[pid] = waiting_time(pid)
        return found

    def waited_since(self, number: int, before: dict[int, float]) -> float:
        """Return for how many seconds those have waited who were there before, and still are."""
        return sum(now - before[pid] for pid, now in self.kept_waiting(number).items() if pid in before)

    def servers(self) -> list[int]:
        """Return the processes that an instance waits for."""
        return [self.server.process.pid] if self.server.process else []

    async def back(self) -> None:
        """Wait until every instance says ok; they have BACK seconds from the end of the last fault."""
        self.waiting = {number: asyncio.Event() for number in self.programs}
        async with asyncio.timeout(servers.DEADLINE):
            await asyncio.gather(*(event.wait() for event in self.waiting.values()))
        took = time.monotonic() - self.clear if self.clear else 0.0
        self.clear = 0.0
        self.longest = max(self.longest, took)
        if took > BACK + self.slack:
            self.wrong.append(f"it took {took:.2f} s to be back ({self.doing})")

    def check_times(self) -> None:
        """Check that nothing took too long."""
        assert not self.wrong, "\n".join(self.wrong)
