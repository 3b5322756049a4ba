r"""Every fault of a Redis and of a network, at random and one after the other, under a steady load.

    python tests/soak.py                          # ten minutes, a seed drawn by lot
    python tests/soak.py --seconds 60 --seed 7
    python tests/soak.py --cluster                # the faults of cluster_fleet.py instead

Two instances, each behind a proxy of its own to one Redis that keeps its data on disk, get 5,000 new ids a second, at
that rate whatever becomes of them. A round does one fault, or two at a time, for a while drawn by lot, after each was
done once; then, but not always, the instances are given the time to be back, which is taken. What must hold:

- the account of fleet.py: ids answered `ok` and counts that were reported agree, no window is missing;
- the times of steady.py.

Counts are never to be wrong; times are the machine's too, so there is `slack` in the normal run of the tests, which
test_soak.py is; here none. Data is lost only while both instances are connected: one that is cut
off for longer than a Redis settles, and has ids of a window that Redis lost meanwhile, brings them too late.
"""

import argparse
import asyncio
import random
import re
import shutil
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

import cluster_fleet
import fleet
import servers
import steady

SIZE = 2  # instances
WINDOW = 2  # seconds


class Soak(steady.Steady):
    """Instances behind proxies, and what is done to them."""

    def __init__(self, server: servers.Redis, other: servers.Redis, seed: int, slack: float) -> None:
        super().__init__(server, seed, SIZE, WINDOW, 1, slack)
        self.other = other  # to fail over to
        self.put_proxies()

    # The faults

    async def round(self, name: str) -> None:
        """Do a fault, or it and another; then, most of the time, wait until both instances are back."""
        chosen = [name]
        if name not in ALONE and self.random.random() < 0.3:
            others = OF_THE_NETWORK if name in OF_REDIS else [one for one in OF_REDIS if one not in ALONE]
            chosen.append(self.random.choice([*others]))
        self.doing = " and ".join(chosen)
        self.waiting.clear()
        await asyncio.gather(*(self.fault(name) for name in chosen))
        self.deeds.update(chosen)
        if self.random.random() < 0.7:
            await self.back()
            await self.pause(0, 1)

    async def fault(self, name: str) -> None:
        if name in ALONE:
            await self.back()
        else:
            await self.pause(0, 0.3)
        await (OF_REDIS | OF_THE_NETWORK)[name](self)
        self.clear = time.monotonic()

    async def last(self) -> None:
        """Let a fault last: a second on the average, seldom for so long that whoever waits has become slow to try."""
        await asyncio.sleep(min(self.random.expovariate(1), 8))

    def some(self) -> list[servers.Proxy]:
        """Return the proxies that are to be hit."""
        return self.random.sample(self.proxies, self.random.randint(1, self.size))

    def tell_redis(self, *words: str | int) -> None:
        with self.server.client() as client:
            client.execute_command(*words)


async def killed(soak: Soak) -> None:
    await asyncio.to_thread(soak.server.kill)
    await soak.last()
    await asyncio.to_thread(soak.server.start)


async def emptied(soak: Soak) -> None:
    await asyncio.to_thread(soak.server.kill)
    shutil.rmtree(Path(soak.server.folder.name, "appendonlydir"))
    await soak.pause(0, 1)
    await asyncio.to_thread(soak.server.start)


async def flushed(soak: Soak) -> None:
    """Emptied while all links stand, which is noticed at the end of the window."""
    soak.tell_redis("FLUSHALL")
    await asyncio.sleep(soak.window)


async def frozen(soak: Soak) -> None:
    soak.server.freeze()
    await soak.last()
    soak.server.thaw()


async def full(soak: Soak) -> None:
    soak.tell_redis("CONFIG", "SET", "maxmemory", 1)
    await soak.last()
    soak.tell_redis("CONFIG", "SET", "maxmemory", 0)


async def read_only(soak: Soak) -> None:
    soak.tell_redis("REPLICAOF", "127.0.0.1", 1)
    await soak.last()
    soak.tell_redis("REPLICAOF", "NO", "ONE")


async def unsafe(soak: Soak) -> None:
    """Redis refuses to write without a replica."""
    soak.tell_redis("CONFIG", "SET", "min-replicas-to-write", 1)
    await soak.last()
    soak.tell_redis("CONFIG", "SET", "min-replicas-to-write", 0)


async def full_and_cut(soak: Soak) -> None:
    """Memory is full, and all links break."""
    soak.tell_redis("CONFIG", "SET", "maxmemory", 1)
    soak.tell_redis("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await soak.last()
    soak.tell_redis("CONFIG", "SET", "maxmemory", 0)


async def swapped(soak: Soak) -> None:
    """Two databases change places, and back when that was noticed."""
    await soak.noticed(lambda: soak.tell_redis("SWAPDB", 0, 1))
    await soak.pause(0, soak.window)
    await soak.noticed(lambda: soak.tell_redis("SWAPDB", 0, 1))


async def failed_back(soak: Soak) -> None:
    """Another server takes over; then the first one does, which lived on."""
    await soak.noticed(lambda: soak.lead(soak.other, 0.0))
    await soak.pause(0, soak.window)
    await soak.noticed(lambda: soak.lead(soak.server, 0.8))
    with soak.other.client() as client:
        client.flushall()


async def barred(soak: Soak) -> None:
    """An entry of somebody else keeps reports out of the stream, until what the log says is done."""
    program = soak.programs[soak.random.randrange(soak.size)]
    seen = len(program.log.all)
    soak.tell_redis(*fleet.foreign_entry(soak.random.choice([0, 5, 86_400])))
    line = await asyncio.to_thread(program.log.wait_for, r"ERROR verve\.store: .*RENAME.*", seen)
    await soak.last()

    def mend() -> None:
        for command in re.findall(r"\b(?:RENAME verve:[a-z:]+ [a-z:]+|DEL verve:[a-z:]+)", line[0]):
            soak.tell_redis(*command.split())

    await soak.noticed(mend)


async def silent(soak: Soak) -> None:
    """Some links fall silent, the others are reset."""
    chosen = soak.some()
    for proxy in soak.proxies:
        if proxy in chosen:
            proxy.silence()
        else:
            proxy.cut()
    await asyncio.sleep(steady.TIMEOUT)


async def cut(soak: Soak) -> None:
    for proxy in soak.some():
        proxy.cut()


def planned(plan: str) -> Callable[[Soak], Awaitable[None]]:
    async def fault(soak: Soak) -> None:
        proxies = soak.some()
        for proxy in proxies:
            proxy.set_plan(plan)
        for proxy in proxies:
            await asyncio.to_thread(proxy.done.wait, servers.DEADLINE)

    return fault


async def refused(soak: Soak) -> None:
    proxies = soak.some()
    for proxy in proxies:
        proxy.refuse = True
        proxy.cut()
    await soak.last()
    for proxy in proxies:
        proxy.refuse = False


async def delayed(soak: Soak) -> None:
    proxies = soak.some()
    for proxy in proxies:
        proxy.stall()
    await soak.last()
    for proxy in proxies:
        proxy.flow()


async def held(soak: Soak) -> None:
    proxies = soak.some()
    for proxy in proxies:
        proxy.hold()
    await soak.last()
    for proxy in proxies:
        proxy.release()


async def dripping(soak: Soak) -> None:
    proxies = soak.some()
    for proxy in proxies:
        proxy.drip = True
    await soak.last()
    for proxy in proxies:
        proxy.drip = False


def swallowed(direction: str) -> Callable[[Soak], Awaitable[None]]:
    async def fault(soak: Soak) -> None:
        proxies = soak.some()
        for proxy in proxies:
            proxy.swallow = direction
        await soak.last()
        for proxy in proxies:
            proxy.swallow = ""

    return fault


Fault = Callable[[Soak], Awaitable[None]]

OF_REDIS: dict[str, Fault] = {
    "Redis killed": killed,
    "Redis emptied": emptied,
    "Redis flushed": flushed,
    "Redis frozen": frozen,
    "memory full": full,
    "read-only": read_only,
    "without a replica": unsafe,
    "memory full and all links cut": full_and_cut,
    "databases swapped and back": swapped,
    "failed over and back": failed_back,
    "an entry of others": barred,
}
ALONE = ("Redis emptied", "Redis flushed", "databases swapped and back", "failed over and back", "an entry of others")
OF_THE_NETWORK: dict[str, Fault] = {
    "cut": cut,
    "silent beside cut": silent,
    "cut before a batch": planned("before_command"),
    "cut in a batch": planned("inside_command"),
    "cut before a reply": planned("before_reply"),
    "cut in a reply": planned("inside_reply"),
    "connections refused": refused,
    "replies delayed": delayed,
    "commands delayed": held,
    "replies byte by byte": dripping,
    "commands lost": swallowed("commands"),
    "replies lost": swallowed("replies"),
}


async def play(soak: Soak, seconds: float) -> None:
    async with soak.load():
        await soak.back()
        names = [*OF_REDIS, *OF_THE_NETWORK]
        soak.random.shuffle(names)
        for number in fleet.during(seconds, lambda: len(soak.deeds) == len(names)):
            await soak.round(names[number] if number < len(names) else soak.random.choice(names))
        await soak.back()
    soak.check_with_logs()
    soak.check_times()


def run(seconds: float, seed: int, engine: str, slack: float = 0.0) -> str:
    """Soak; return what was done, counted and measured. Raises AssertionError if anything does not hold."""
    with servers.Redis(engine, "--appendfsync", "everysec", persist=True) as server, servers.Redis(engine) as other:
        soak = Soak(server, other, seed, slack)
        try:
            asyncio.run(play(soak, seconds))
        except BaseException as error:
            error.add_note(f"seed {seed}, {engine}, during {soak.doing}; {soak}")
            error.add_note("\n".join(f"instance: {line}" for log in soak.logs for line in log))
            raise
        finally:
            soak.end()
        return str(soak)


def main() -> int:
    parser = argparse.ArgumentParser(description="Soak two instances in faults, and see whether they count right.")
    parser.add_argument("--seconds", type=float, default=600, help="how long; default 600")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="default: drawn by lot")
    parser.add_argument("--cluster", action="store_true", help="on a cluster, with its faults")
    options = parser.parse_args()
    if options.cluster:
        return cluster_fleet.play("soak", options.seconds, options.seed, None)
    engines = sorted(servers.ENGINES)
    engine = engines[options.seed % len(engines)]
    print(f"seed {options.seed}, {engine}", flush=True)
    try:
        print(f"held; {run(options.seconds, options.seed, engine)}", flush=True)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
