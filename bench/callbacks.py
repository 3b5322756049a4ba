"""How many callbacks arrive, and how late; and what a receiver that hangs costs. `python bench/callbacks.py`.

First `--rate` requests a second for `--seconds`, each with a new id and an `endpoint` on a trivial receiver here: how
many of the callbacks came, and how long after their requests were due: the ids are new and come in order, so the count
says which request a callback belongs to, but for a few that overtook each other. Then the same load of plain requests,
three times in turn without and with `--hanging` further requests a second whose receiver takes connections and never
answers: the plain requests' p99 and the server's memory. The server counts in memory; nothing is pinned.
"""

import argparse
import asyncio
import multiprocessing
import multiprocessing.connection
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import uvloop
from openloop import TICK, Client, Times, show
from run import ROOT, free_port

FOUND = re.compile(rb"GET /\?count=([0-9]+) HTTP/1\.1\r\n").findall
ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


class Receiver(asyncio.Protocol):
    """Answers every request at once, and notes when it came with which count."""

    def __init__(self, came: list[tuple[int, float]]) -> None:
        self.came = came

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.time()
        for count in FOUND(data):
            self.came.append((int(count), now))
            self.transport.write(ANSWER)  # type: ignore[attr-defined]


def receive(port: int, hanging_port: int, pipe: "multiprocessing.connection.Connection") -> None:
    """Receive on one port, hang on the other, until asked; then tell when each callback came."""
    came: list[tuple[int, float]] = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        await loop.create_server(lambda: Receiver(came), "127.0.0.1", port)
        await loop.create_server(asyncio.Protocol, "127.0.0.1", hanging_port)
        pipe.send("ready")
        await loop.run_in_executor(None, pipe.recv)

    uvloop.run(work())
    pipe.send(came)


async def drive(port: int, rate: int, seconds: float, write: Callable[[int], bytes]) -> tuple[float, Times]:
    """Send `write(number)` at a constant rate; return when it began, and when each answer was due and how late."""
    loop = asyncio.get_running_loop()
    done: Times = []
    clients = [(await loop.create_connection(lambda: Client(done), "127.0.0.1", port))[1] for _ in range(64)]
    start = time.perf_counter()
    began = time.time()
    total, sent = int(rate * seconds), 0
    while sent < total:
        due = min(total, int((time.perf_counter() - start) * rate))
        for number in range(sent, due):
            client = clients[number % len(clients)]
            client.due.append(start + number / rate)
            client.transport.write(write(number))  # type: ignore[attr-defined]
        sent = max(sent, due)
        await asyncio.sleep(TICK)
    await asyncio.sleep(1)
    failed = sum(client.failed + len(client.due) for client in clients)
    print(f"{total:,} requests at {rate:,} a second: {failed} unanswered or failed")
    return began, done


def request(number: int, endpoint: str = "") -> bytes:
    more = f"&endpoint={endpoint}" if endpoint else ""
    return f"GET /api/verve/accept?id={number}{more} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()


def memory(pid: int) -> str:
    return f"{int(Path(f'/proc/{pid}/status').read_text().partition('VmRSS:')[2].split()[0]) / 1024:.0f} MiB"


async def run(options: argparse.Namespace, port: int, pid: int, ready: str, hanging: str) -> float:
    """Return when the requests whose callbacks are answered began."""
    first = 0

    def plain(number: int) -> bytes:
        return request(first + number)

    def hung(number: int) -> bytes:
        return request(first + 5 * 10**7 + number, hanging)

    print("callbacks to a receiver that answers:")
    began, done = await drive(port, options.rate, options.seconds, lambda number: request(number, ready))
    show("answers", [took for _, took in done])
    await asyncio.sleep(3)
    print(f"memory {memory(pid)}\n\nplain requests, alone and beside callbacks to a receiver that hangs:")
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(3):
        for figures, others in ((alone, 0), (beside, options.hanging)):
            first += 10**8
            jobs = [drive(port, options.rate, options.seconds / 2, plain)]
            if others:
                jobs.append(drive(port, others, options.seconds / 2, hung))
            took = sorted(took for _, took in (await asyncio.gather(*jobs))[0][1])
            figures.append(took[int(len(took) * 0.99)] * 1e3)
            print(f"  p99 {figures[-1]:.1f} ms, memory {memory(pid)}")
    ratio = statistics.median(beside) / statistics.median(alone)
    print(f"p99 alone {statistics.median(alone):.1f} ms, beside {statistics.median(beside):.1f} ms: {ratio:.2f} times")
    return began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--hanging", type=int, default=1000)
    options = parser.parse_args()
    port, receiving, hanging = free_port(), free_port(), free_port()
    ours, theirs = multiprocessing.Pipe()
    receiver = multiprocessing.Process(target=receive, args=(receiving, hanging, theirs))
    receiver.start()
    ours.recv()
    command = [sys.executable, str(ROOT / "verve_server.py"), "--admin", "off", "--port", str(port), "--redis-url", ""]
    command += ["--window", "86400"]
    with subprocess.Popen([*command, "--callback-allow", "127.0.0.0/8", "--log-level", "error"]) as server:
        try:
            time.sleep(2)
            ready, hung = (quote(f"http://127.0.0.1:{number}/", safe="") for number in (receiving, hanging))
            began = uvloop.run(run(options, port, server.pid, ready, hung))
        finally:
            server.terminate()
            ours.send("stop")
            came = ours.recv()
            receiver.join()
    total = int(options.rate * options.seconds)
    late = [at - began - (count - 1) / options.rate for count, at in came]
    print(f"\ncallbacks that arrived: {len(late):,} of {total:,} ({len(late) / total:.2%})")
    show("late", late)


if __name__ == "__main__":
    main()
