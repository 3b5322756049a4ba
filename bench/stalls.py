"""How long requests wait while a window fills with millions of ids, and at the roll. `python bench/stalls.py`.

Sends distinct ids at `--rate`, pipelined on a few connections, until the window holds `--ids` of them; meanwhile, and
until ten seconds after the window's end, another connection sends a request every 2 ms, at times fixed beforehand, so
that a stall shows in every request that it delays. Prints the slowest of these before the ids come, while they come,
around the window's end and after, and the server's memory. The machine's own noise is what the first row shows. The
ids are sent 5 s behind an edge; the window is as long as `--window` says.
"""

import argparse
import asyncio
import contextlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import uvloop

ROOT = Path(__file__).resolve().parent.parent
EVERY = 0.002  # seconds from probe to probe
DEPTH = 64  # requests in one write
Probe = tuple[float, float]  # when it was to be sent, Unix seconds, and how long it took


def request(number: int) -> bytes:
    return b"GET /api/verve/accept?id=%d HTTP/1.1\r\nHost: bench\r\n\r\n" % number


async def receive(reader: asyncio.StreamReader, count: int) -> None:
    for _ in range(count):
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"a request failed: {head!r}")
        await reader.readexactly(2)


async def fill(port: int, numbers: range, rate: float = math.inf) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    began = time.time()
    for start in range(numbers.start, numbers.stop, DEPTH):
        await asyncio.sleep(max(0.0, began + (start - numbers.start) / rate - time.time()))
        chunk = range(start, min(start + DEPTH, numbers.stop))
        writer.write(b"".join(map(request, chunk)))
        left = len(chunk)
        while left:  # answers are all alike, so counting the bodies is enough
            data = await reader.read(2**18)
            left -= data.count(b"HTTP/1.1 200")
            if not data or data.count(b"HTTP/1.1 ") != data.count(b"HTTP/1.1 200"):
                raise SystemExit("a request failed")
    writer.close()


async def probe(port: int, until: float, probes: list[Probe]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    due = time.time()
    while due < until:
        due += EVERY
        with contextlib.suppress(ValueError):
            await asyncio.sleep(max(0.0, due - time.time()))
        writer.write(request(1))
        await receive(reader, 1)
        probes.append((due, time.time() - due))
    writer.close()


async def drive(port: int, pid: int, options: argparse.Namespace) -> None:
    await asyncio.sleep(options.window - time.time() % options.window + 1)
    edge = time.time() // options.window * options.window + options.window
    probes: list[Probe] = []
    probing = asyncio.create_task(probe(port, edge + 10, probes))
    await asyncio.sleep(4)
    start = time.time()
    share = options.ids // 4
    ranges = (range(10 + share * n, 10 + share * (n + 1)) for n in range(4))
    await asyncio.gather(*(fill(port, numbers, options.rate / 4) for numbers in ranges))
    filled = time.time()
    print(f"{options.ids:,} ids in {filled - start:.1f} s, {edge - filled:.1f} s before the edge", file=sys.stderr)
    memory = Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]  # noqa: ASYNC240
    await probing
    phases = {
        "idle": (0.0, start),
        "filling": (start, filled),
        "full": (filled, edge - 0.1),
        "roll": (edge - 0.1, edge + 2),
        "freeing": (edge + 2, edge + 10),
    }
    print(f"memory {int(memory) / 1024:.0f} MiB")
    for name, (first, last) in phases.items():
        times = sorted(took for due, took in probes if first <= due < last)
        if times:
            p99 = times[int(len(times) * 0.99)]
            print(f"{name:8} {len(times):6} probes, p99 {p99 * 1e3:6.1f} ms, slowest {times[-1] * 1e3:6.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=5_000_000)
    parser.add_argument("--rate", type=int, default=60_000, help="ids a second [60,000]")
    parser.add_argument("--window", type=int, default=120)
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("flags", nargs="*", help="more flags of verve_server.py, after --")
    options = parser.parse_args()
    command = ["taskset", "-c", "0", sys.executable, str(ROOT / "verve_server.py"), "--admin", "off"]
    command += ["--port", str(options.port), "--window", str(options.window), *options.flags]
    with subprocess.Popen(command) as server:
        try:
            time.sleep(2)
            os.sched_setaffinity(0, {1})
            uvloop.run(drive(options.port, server.pid, options))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
