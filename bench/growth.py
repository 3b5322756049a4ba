"""How cost grows with ids in a window and with connections. `python bench/growth.py`, about five minutes.

For each number of ids the service is started anew, the ids are sent behind the start of a window, pipelined on four
connections, and its end is awaited: CPU a request, memory an id (of the server, and what Redis says it uses), and the
slowest of the requests that another connection sends every 2 ms from a second before the end to three after it. Then
wrk, for each number of connections. Writes a section of RESULTS.md.
"""

import argparse
import asyncio
import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
import time

import uvloop
from results import GROWTH, write_section
from run import CASES, command, cpu, free_port, load, memory, started
from stalls import Probe, fill, probe
from users import DIFFER, write

IDS = (10_000, 100_000, 1_000_000, 5_000_000)  # in a window
SHORTEST = 5  # seconds, of a window
CONNECTIONS = (1, 10, 100, 1000, 5000)


def redis_memory(port: int) -> float:
    """Return the MiB that Redis uses."""
    text = subprocess.run(["redis-cli", "-p", str(port), "INFO", "memory"], capture_output=True, text=True, check=True)
    return int(re.findall(r"used_memory:(\d+)", text.stdout)[0]) / 2**20


async def one(name: str, port: int, pid: int, store: int, store_pid: int, ids: int, window: int) -> tuple[str, float]:
    """Fill a window and see it end; return a row's figures, and how many seconds an id took."""
    await asyncio.sleep(window - time.time() % window + 0.5)
    edge = time.time() // window * window + window
    before = cpu(pid), cpu(store_pid), memory(pid), redis_memory(store)
    began = time.time()
    share = ids // 4
    await asyncio.gather(*(fill(port, range(share * n + 10, share * (n + 1) + 10)) for n in range(4)))
    took = time.time() - began
    after = cpu(pid), cpu(store_pid), memory(pid), redis_memory(store)
    if time.time() > edge - 1.5:
        raise SystemExit(f"a window of {window} s is too short for {ids} ids here")
    await asyncio.sleep(edge - 1 - time.time())
    probes: list[Probe] = []
    await probe(port, edge + 3, probes)
    spent, of_redis = ((now - then) / ids * 1e6 for now, then in zip(after[:2], before[:2], strict=True))
    each, in_redis = ((now - then) / ids * 2**20 for now, then in zip(after[2:], before[2:], strict=True))
    slowest = max(waited for _, waited in probes) * 1e3
    there = f"{of_redis:.1f} | {in_redis:.0f}" if name == "redis" else " | "
    return f"{spent:.1f} | {each:.0f} | {there} | {slowest:.1f}", took / ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    os.sched_setaffinity(0, {1})
    lines = [
        "Ids in a window, pipelined; the slowest request from a second before its end to three after it.",
        "",
        "| ids | store | CPU µs | bytes an id | Redis µs | bytes an id in Redis | slowest ms |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    numbers = itertools.count(10**9, 10**7)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        store = free_port()
        arguments = ("--port", str(store), "--save", "", "--dir", folder)
        redis = stack.enter_context(started("1", "redis-server", *arguments, port=store))
        for name in "memory", "redis":
            each = 0.0
            for ids in IDS:
                window = max(SHORTEST, math.ceil(ids * each * 1.6 + 3))  # more ids take a little longer each
                print(f"{ids:,} ids, {name}, a window of {window} s", file=sys.stderr)
                port = free_port()
                with started("0", *command(name, port, store, folder, window), port=port) as server:
                    figures, each = uvloop.run(one(name, port, server.pid, store, redis.pid, ids, window))
                lines.append(f"| {ids:,} | {name} | {figures} |")
        lines += ["", f"Connections, a new id in each request, {DIFFER}.", ""]
        lines += [
            "| connections | store | requests/s | CPU µs | p99 ms | MiB |",
            "| ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        files = write(folder, "differ")
        for name in "memory", "redis":
            for connections in CONNECTIONS:
                print(f"{connections:,} connections, {name}", file=sys.stderr)
                port = free_port()
                with started("0", *command(name, port, store, folder), port=port) as server:
                    before = cpu(server.pid)
                    case = CASES["users"]._replace(connections=connections)
                    sent = load(case, port, next(numbers), 3, files)
                    spent = (cpu(server.pid) - before) / sent.answered * 1e6
                    used = memory(server.pid)
                lines.append(
                    f"| {connections:,} | {name} | {sent.rate:,.0f} | {spent:.1f} | {sent.p99:.1f} | {used:.0f} |"
                )
    write_section(GROWTH, "\n".join(lines))


if __name__ == "__main__":
    main()
