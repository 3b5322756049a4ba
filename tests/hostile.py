"""Hostile clients by the thousand, and what a well-behaved one beside them notices. `python tests/hostile.py`, minutes.

    python tests/hostile.py                         # every attack, against a server in memory
    python tests/hostile.py --redis idle pipelines  # two of them, against one that counts in Redis

Each attack is a coroutine that is one client, and the number of them at once. They run in a process of their own, on
the core of the well-behaved client and behind it (nice 10); the server has the other core. That client has a request
due every 2 ms, every 16th on a new connection, and its latency counts from when it was due, so that a stall shows in
every request that it delays; a request whose connection waits holds up no other. Memory is the server's resident
set: before, at its most, and SETTLE seconds after.

Prints a table, and ends with status 1 if a p99 is past 50 ms or a request of the well-behaved client is not answered
`ok`. The same attacks in smaller numbers are in test_hostile.py, where memory and answers are asserted and no time.
"""

import argparse
import asyncio
import contextlib
import itertools
import math
import multiprocessing
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import servers
import support
import uvloop

DUE = 0.002  # seconds from one request of the well-behaved client to the next
NEW = 16  # every so many of them come on a new connection
SETTLE = 4.0  # seconds after an attack; those that are told to go have 2
BOUND = 0.050  # seconds, p99
NOTHING = struct.pack("ii", 1, 0)  # SO_LINGER of a socket whose close is a reset
PATH = support.PATH.encode()
HEAD = b"Host: a\r\n"
START = b"GET %b?id=7 HTTP/1.1\r\n" % PATH
POST = b"POST %b?id=7 HTTP/1.1\r\nHost: a\r\n" % PATH
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

Attack = Callable[["Peer", random.Random], Awaitable[None]]


class Peer:
    """One hostile client's connection, from an address of its own among 127.0.0.0/8, so that ports don't run out."""

    def __init__(self, address: support.Address) -> None:
        self.address = address
        self.loop = asyncio.get_running_loop()

    async def connect(self) -> None:
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.bind((f"127.{random.randrange(1, 250)}.{random.randrange(250)}.1", 0))
        await self.loop.sock_connect(self.socket, self.address)

    async def send(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.socket, data)
        await asyncio.sleep(0)  # what goes out at once lets no other client have its turn

    async def read(self) -> bytes:
        """Return what comes next, empty at the end."""
        return await self.loop.sock_recv(self.socket, 1 << 20)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOTHING)
        self.socket.close()


async def idle(peer: Peer, chance: random.Random) -> None:
    """Ask once, half of them with as much in the head as is allowed, and then never again."""
    await asyncio.sleep(2 * chance.random())
    await peer.send(START + HEAD + chance.choice((b"", b"X: %b\r\n" % (b"x" * 32_000))) + b"\r\n")
    while await peer.read():
        pass


async def slow(peer: Peer, chance: random.Random) -> None:
    """Send a head a few bytes a second."""
    for byte in itertools.chain(START + HEAD, itertools.cycle(b"X: y\r\n")):
        await peer.send(bytes([byte]))
        await asyncio.sleep(chance.random())


async def deaf(peer: Peer, chance: random.Random) -> None:
    """Ask without end, in the shortest way with the longest answers, and never read one."""
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    while True:
        await peer.send(b"GET /%d HTTP/1.1\r\nHost:a\r\n\r\n" % chance.randrange(10) * 10_000)


async def resets(peer: Peer, chance: random.Random) -> None:
    """Reset at every step of an exchange, and amid it."""
    exchange = POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n" + b"hello" + START + HEAD + b"\r\n"
    await peer.send(exchange[: chance.randrange(len(exchange) + 1)])
    if chance.random() < 0.5:
        await peer.read()
    peer.reset()


async def targets(peer: Peer, _: random.Random) -> None:
    """Send a target of 1 MiB."""
    await peer.send(b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    await peer.read()


async def headers(peer: Peer, _: random.Random) -> None:
    """Send fields that never end."""
    await peer.send(START + HEAD)
    while True:
        await peer.send(b"X: y\r\n")


async def chunks(peer: Peer, _chance: random.Random) -> None:
    """Send bodies of as many chunks as is allowed, of one byte each, and then one that never ends."""
    for _ in range(8):  # of 393 KB
        await peer.send(CHUNKED + b"1\r\nx\r\n" * 65_536 + b"0\r\n\r\n")
    await peer.send(CHUNKED)
    while True:
        await peer.send(b"1\r\nx\r\n" * 1000)


async def pipelines(peer: Peer, chance: random.Random) -> None:
    """Send 10,000 requests at once, of all that is slowest to read; read the answers."""
    requests = (
        START + HEAD + b"\r\n",
        b"GET %b?x=1&id=%d HTTP/1.1\r\nHost: b\r\n\r\n" % (PATH, chance.randrange(1000)),
        b"HEAD * HTTP/1.1\r\nhost:c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost:a\r\n\r\n",
    )
    sending = asyncio.ensure_future(
        peer.send(chance.choice(requests) * 10_000 + START + HEAD + b"Connection: close\r\n\r\n")
    )
    try:
        while await peer.read():
            pass
    finally:
        sending.cancel()


async def storm(peer: Peer, _: random.Random) -> None:
    """Connect, ask once, leave."""
    await peer.send(START + HEAD + b"\r\n")
    await peer.read()


ATTACKS: dict[str, tuple[int, Attack]] = {
    attack.__name__: (count, attack)
    for count, attack in (
        (5000, idle),
        (2000, slow),
        (1000, deaf),
        (200, resets),
        (50, targets),
        (200, headers),
        (50, chunks),
        (50, pipelines),
        (200, storm),
    )
}


async def one(attack: Attack, address: support.Address, chance: random.Random) -> None:
    """Be one hostile client, over and over."""
    while True:
        peer = Peer(address)
        with contextlib.suppress(OSError):
            await peer.connect()
            await attack(peer, chance)
        peer.socket.close()
        await asyncio.sleep(0)


async def many(attack: Attack, count: int, address: support.Address, seed: int, stop: Event) -> None:
    """Be `count` hostile clients until told to stop."""
    clients = [asyncio.create_task(one(attack, address, random.Random(seed + number))) for number in range(count)]
    await asyncio.to_thread(stop.wait)
    for client in clients:
        client.cancel()
    await asyncio.wait(clients)


def run_attack(name: str, count: int, address: support.Address, seed: int, stop: Event) -> None:
    os.nice(10)
    uvloop.run(many(ATTACKS[name][1], count, address, seed, stop))


@contextlib.contextmanager
def attacked(name: str, count: int, address: support.Address, seed: int = 1) -> Iterator[None]:
    """Have a server attacked while the block runs."""
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    process = context.Process(target=run_attack, args=(name, count, address, seed, stop), daemon=True)
    process.start()
    try:
        yield
        assert process.is_alive(), "the attack itself failed"
    finally:
        stop.set()
        process.join(support.DEADLINE)
        if process.is_alive():
            process.kill()
            process.join()


def resident(pid: int) -> int:
    """Return the bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Asker:
    """The well-behaved client: latencies of requests on connections that it keeps, and on new ones."""

    def __init__(self, address: support.Address, pid: int) -> None:
        self.address = address
        self.pid = pid
        self.kept: list[float] = []
        self.new: list[float] = []
        self.failed = 0
        self.peak = 0  # bytes of the server's memory
        self.pool: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def run(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        asking: set[asyncio.Task[None]] = set()
        for number in range(int(seconds / DUE)):
            due = start + number * DUE
            await asyncio.sleep(max(0, due - loop.time()))
            task = asyncio.create_task(self.ask(number, due, anew=number % NEW == 0))
            asking.add(task)
            task.add_done_callback(asking.discard)
            if number % 50 == 0:
                self.peak = max(self.peak, resident(self.pid))
        await asyncio.gather(*asking)
        for _, writer in self.pool:
            writer.close()

    async def ask(self, number: int, due: float, anew: bool) -> None:
        """Have an id counted; a connection that is busy is left alone."""
        try:
            async with asyncio.timeout(support.DEADLINE):
                if anew or not self.pool:
                    reader, writer = await asyncio.open_connection(*self.address)
                else:
                    reader, writer = self.pool.pop(0)
                writer.write(support.accept(number))
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 ")
                assert await reader.readexactly(2) == b"ok"
        except (OSError, EOFError, AssertionError):
            self.failed += 1
            return
        (self.new if anew else self.kept).append(asyncio.get_running_loop().time() - due)
        if anew:
            writer.close()
        else:
            self.pool.append((reader, writer))


def ask(address: support.Address, seconds: float, pid: int) -> Asker:
    """Be the well-behaved client of a server for so many seconds."""
    asker = Asker(address, pid)
    asyncio.run(asker.run(seconds))
    return asker


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[math.ceil(q * len(values)) - 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"of {', '.join(ATTACKS)}; all by default")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each attack (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--redis", action="store_true", help="count in a Redis of its own")
    options = parser.parse_args()
    names = options.attacks or list(ATTACKS)
    print(
        "| attack | clients | asked beside it | failed | p50 / p99 / slowest, ms | on new connections "
        "| MiB before, at most, after |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    bad = 0
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-1:])
    with contextlib.ExitStack() as stack:
        flags = []
        if options.redis:
            flags = ["--redis-url", stack.enter_context(servers.Redis(next(iter(servers.ENGINES)))).url]
        program = stack.enter_context(support.verve("--window", "86400", *flags))
        os.sched_setaffinity(program.pid, cores[:1])
        for name in names:
            count = ATTACKS[name][0]
            ask(program.address, 1, program.pid)
            before = resident(program.pid)
            with attacked(name, count, program.address, options.seed):
                asker = ask(program.address, options.seconds, program.pid)
            time.sleep(SETTLE)
            after = resident(program.pid)
            kept, new = (
                " / ".join(f"{1000 * quantile(took, q):.1f}" for q in (0.5, 0.99, 1.0))
                for took in (asker.kept, asker.new)
            )
            memory = ", ".join(f"{size / 2**20:.0f}" for size in (before, asker.peak, after))
            bad += asker.failed > 0 or max(quantile(asker.kept, 0.99), quantile(asker.new, 0.99)) > BOUND
            print(
                f"| {name} | {count:,} | {len(asker.kept) + len(asker.new):,} | {asker.failed} | {kept} | {new} "
                f"| {memory} |",
                flush=True,
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
