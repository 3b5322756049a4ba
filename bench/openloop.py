"""Latency at a constant rate, over several rolls. `python bench/openloop.py`, about five minutes.

Requests are due at times fixed beforehand, `--rate` a second, each with a new id and header fields that differ, taking
turns on `--connections`; none waits for an answer to another, and its latency counts from when it was due, so that a
stall shows in every request that it delays. Prints p50, p99, p99.9 and the slowest, over all and for the second around
each roll, and draws them second by second in openloop.svg. The server is on core 0, the client and Redis on core 1.
"""

import argparse
import asyncio
import contextlib
import math
import os
import sys
import tempfile
import time
from collections import deque

import uvloop
from results import STEADY, write_section
from run import ROOT, free_port, started
from users import DIFFER, halves

TICK = 0.001  # seconds from one look at what is due to the next
PLOT = ROOT / "bench" / "openloop.svg"
MARKS = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "slowest": 1.0}
COLOURS = {"p50": "#4a8", "p99": "#48c", "p99.9": "#a5c", "slowest": "#c54"}
Times = list[tuple[float, float]]  # of each answered request: when it was due (perf_counter), and how long it took
FIRST, SECOND = ([text.encode() for text in texts] for texts in halves("differ"))


class Client(asyncio.Protocol):
    """One connection: remembers when each request was due, takes the answers in order."""

    def __init__(self, done: Times) -> None:
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
        fields = FIRST[number % len(FIRST)] + SECOND[number % len(SECOND)]
        self.transport.write(b"GET /api/verve/accept?id=%d%s" % (number, fields))  # type: ignore[attr-defined]


async def drive(options: argparse.Namespace, port: int) -> None:
    loop = asyncio.get_running_loop()
    done: Times = []
    clients = [
        (await loop.create_connection(lambda: Client(done), "127.0.0.1", port))[1] for _ in range(options.connections)
    ]
    offset = time.time() - time.perf_counter()  # to Unix time, in which windows end
    start = time.perf_counter() + options.window - time.time() % options.window - 1
    total = int(options.rate * (options.rolls * options.window - options.window + 2))
    print(f"{total:,} requests at {options.rate:,} a second", file=sys.stderr)
    sent = 0
    while sent < total:
        due = min(total, int((time.perf_counter() - start) * options.rate))
        for number in range(sent, due):
            clients[number % len(clients)].send(start + number / options.rate, number)
        sent = max(sent, due)
        await asyncio.sleep(TICK)
    await asyncio.sleep(3)  # for the last answers
    failed = total - len(done) + sum(client.failed for client in clients)
    around = [took for due, took in done if (due + offset + 0.5) % options.window < 1]
    lines = [
        f"{total:,} requests at {options.rate:,} a second on {options.connections} connections, windows of "
        f"{options.window} s, {'in memory' if options.memory else 'with Redis'}: {failed} unanswered or failed.",
        f"Sent: {DIFFER}.",
        "",
        f"| | {' | '.join(MARKS)} |",
        "| --- |" + " ---: |" * len(MARKS),
        row("all", [took for _, took in done]),
        row("the second around a window's end", around),
        "",
        "![Latency, second by second](openloop.svg)",
    ]
    write_section(STEADY, "\n".join(lines))
    rolls = [at for at in range(total // options.rate + 1) if (start + at + offset) % options.window < 0.5]
    PLOT.write_text(plot([(due - start, took) for due, took in done], [at + 0.0 for at in rolls]))
    if failed:
        raise SystemExit("not every request was answered ok")


def at_marks(times: list[float]) -> dict[str, float]:
    """Return the quantiles of some times, in ms."""
    times = sorted(times)
    return {mark: times[min(len(times) - 1, int(len(times) * at))] * 1e3 for mark, at in MARKS.items()}


def row(name: str, times: list[float]) -> str:
    return f"| {name} | " + " | ".join(f"{ms:.1f} ms" for ms in at_marks(times).values()) + " |"


def show(name: str, times: list[float]) -> None:
    print(
        f"{name:6} {len(times):8} requests: " + ", ".join(f"{mark} {ms:.1f} ms" for mark, ms in at_marks(times).items())
    )


def plot(times: Times, rolls: list[float]) -> str:
    """Return an SVG of the quantiles of each second, on a logarithmic scale, with the rolls as vertical lines."""
    width, height, left, low, high = 900, 300, 50, 0.1, 1000.0
    seconds: dict[int, list[float]] = {}
    for due, took in times:
        seconds.setdefault(int(due), []).append(took)
    marks = {second: at_marks(each) for second, each in sorted(seconds.items())}
    last = max(marks) + 1

    def x(second: float) -> float:
        return left + second / last * (width - left - 10)

    def y(ms: float) -> float:
        return height - 30 - math.log10(min(max(ms, low), high) / low) / math.log10(high / low) * (height - 50)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"',
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for ms in (0.1, 1.0, 10.0, 100.0, 1000.0):
        parts.append(f'<path d="M{left} {y(ms):.1f}H{width - 10}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(ms) + 4:.1f}" text-anchor="end">{ms:g} ms</text>')
    parts += [f'<path d="M{x(at):.1f} 20V{height - 30}" stroke="#999" stroke-dasharray="3 3"/>' for at in rolls]
    for number, (mark, colour) in enumerate(COLOURS.items()):
        line = " ".join(f"{x(second + 0.5):.1f},{y(each[mark]):.1f}" for second, each in marks.items())
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{left + 80 * number}" y="14" fill="{colour}">{mark}</text>')
    parts.append(f'<text x="{left + 340}" y="14" fill="#666">dashed: the ends of windows</text>')
    parts.append(f'<text x="{width - 10}" y="{height - 10}" text-anchor="end">{last} s</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=10_000, help="[10000]")
    parser.add_argument("--connections", type=int, default=64, help="[64]")
    parser.add_argument("--window", type=int, default=60, help="seconds [60]")
    parser.add_argument("--rolls", type=int, default=5, help="[5]")
    parser.add_argument("--memory", action="store_true", help="count in memory, without Redis")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url, port = "", free_port()
        if not options.memory:
            store, folder = free_port(), stack.enter_context(tempfile.TemporaryDirectory())
            arguments = ("--port", str(store), "--save", "", "--dir", folder)
            stack.enter_context(started("1", "redis-server", *arguments, port=store))
            url = f"redis://127.0.0.1:{store}"
        flags = ["--admin", "off", "--port", str(port), "--window", str(options.window), "--redis-url", url]
        stack.enter_context(started("0", sys.executable, str(ROOT / "verve_server.py"), *flags, port=port))
        os.sched_setaffinity(0, {1})
        uvloop.run(drive(options, port))


if __name__ == "__main__":
    main()
