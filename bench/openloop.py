"""Latency at a constant rate, over several rolls. `python bench/openloop.py [-- --redis-url redis://...]`.

Requests are due at times fixed beforehand, `--rate` a second, each with a new id, taking turns on `--connections`;
none waits for an answer to another, and its latency counts from when it was due, so that a stall shows in every
request that it delays. Prints p50, p99, p99.9 and the slowest, over all and for the second around each roll. The
server is pinned to core 0, the client to core 1 (with Redis, if that was started so).
"""

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import uvloop

ROOT = Path(__file__).resolve().parent.parent
TICK = 0.001  # seconds from one look at what is due to the next


class Client(asyncio.Protocol):
    """One connection: remembers when each request was due, takes the answers in order."""

    def __init__(self, done: list[tuple[float, float]]) -> None:
        self.due: deque[float] = deque()
        self.done = done
        self.failed = 0
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        *answers, self.rest = (self.rest + data).split(b"\r\n\r\nok")
        for answer in answers:
            self.failed += not answer.startswith(b"HTTP/1.1 200")
            due = self.due.popleft()
            self.done.append((due, now - due))

    def send(self, due: float, number: int) -> None:
        self.due.append(due)
        self.transport.write(b"GET /api/verve/accept?id=%d HTTP/1.1\r\nHost: bench\r\n\r\n" % number)  # type: ignore[attr-defined]


async def drive(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    done: list[tuple[float, float]] = []
    clients = [
        (await loop.create_connection(lambda: Client(done), "127.0.0.1", options.port))[1]
        for _ in range(options.connections)
    ]
    offset = time.time() - time.perf_counter()  # to Unix time, in which windows end
    start = time.perf_counter() + options.window - time.time() % options.window - 1
    total = int(options.rate * (options.rolls * options.window - options.window + 2))
    sent = 0
    while sent < total:
        due = min(total, int((time.perf_counter() - start) * options.rate))
        for number in range(sent, due):
            clients[number % len(clients)].send(start + number / options.rate, number)
        sent = max(sent, due)
        await asyncio.sleep(TICK)
    await asyncio.sleep(3)  # for the last answers
    print(f"{total:,} requests at {options.rate:,} a second: {total - len(done)} unanswered or failed")
    show("all", [took for _, took in done])
    show("rolls", [took for due, took in done if (due + offset + 0.5) % options.window < 1])
    if len(done) < total or any(client.failed for client in clients):
        raise SystemExit("not every request was answered ok")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def show(name: str, times: list[float]) -> None:
    times.sort()
    marks = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "slowest": 1.0}
    figures = (f"{mark} {times[min(len(times) - 1, int(len(times) * at))] * 1e3:.1f} ms" for mark, at in marks.items())
    print(f"{name:6} {len(times):8} requests: " + ", ".join(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--window", type=int, default=10)
    parser.add_argument("--rolls", type=int, default=5)
    parser.add_argument("--port", type=int, default=18081)
    parser.add_argument("flags", nargs="*", help="more flags of verve_server.py, after --")
    options = parser.parse_args()
    command = ["taskset", "-c", "0", sys.executable, str(ROOT / "verve_server.py"), "--admin", "off"]
    command += ["--port", str(options.port), "--window", str(options.window), *options.flags]
    with subprocess.Popen(command) as server:
        try:
            os.sched_setaffinity(0, {1})
            time.sleep(2)
            uvloop.run(drive(options))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
