"""What a Redis that is not next door costs. `python bench/distance.py`, about four minutes.

Between the service and Redis stands a proxy that delays every byte by 0.5, 1 or 5 ms each way (delay.c), and for
comparison one that delays nothing, and none. Each of these links has a service of its own; they take turns, in rounds.
The loads: wrk on 16, 64 and 256 connections, each of which waits for its answer (closed loop), and 10,000 requests a
second whatever the answers do (open loop), by steady.c one by one and by h2load in bursts. Each request has a new id
and header fields that differ, but for h2load: its connections all send the same ids at the same time, some 250
requests at once each 26 ms, and it sends no second request on a connection before the first is answered.

The round trip R is what a PING takes through the link while nothing else does. It has the proxy's own cost in it, some
tens of microseconds, as a proxy that does not spin wakes up late; the rows with delay 0 show that cost under load.
"Next door" is the link without a proxy. Asked of each link with a delay is, in the open loop, a p50 of at most R + 1.2
times the one next door and a p99 of at most 1.5 R + the one next door; in the closed loop on C connections at least 0.8
of C / (R + p50 next door), or of the rate next door if that is less. In the end the counts must add up to what was
answered.
"""

import argparse
import contextlib
import itertools
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import results
import users
from run import CASES, POOL, ROOT, check, command, counted, cpu, free_port, load, missing, started

NEXT_DOOR = "none"
DELAYS = {NEXT_DOOR: None, "0": 0, "0.5": 500, "1": 1000, "5": 5000}  # the link's name: µs each way
CLOSED = (16, 64, 256)  # connections
RATE = 10_000  # requests a second in the open loop
OPEN_CONNECTIONS = 256  # so many that none has two requests under way, up to a latency of 25 ms
LOADS = {
    "steady": f"{RATE:,} requests a second, open loop, evenly spaced",
    "bursts": f"{RATE:,} requests a second, open loop, in bursts (h2load)",
    **{str(each): f"{each} connections, closed loop" for each in CLOSED},
}
PINGS = 50
FIELDS = [f"--header={field}" for field in users.headers() if not field.startswith("Host")]  # for h2load


class Link(NamedTuple):
    """A way to Redis, and the service that uses it."""

    port: int  # of the service
    server: int  # its process
    store: int  # the port at which it sees Redis
    proxy: int | None  # the process that delays


class Run(NamedTuple):
    """What one run on one link showed. Times are in ms."""

    rate: float
    p50: float
    p99: float
    ping: float
    cpu: float  # of the service, µs a request
    redis: float
    proxy: float  # of a core, in per cent


Runs = dict[str, dict[str, list[Run]]]  # of each link and load


def compiled(name: str, folder: str) -> str:
    """Compile one of our C programs; return its path."""
    if shutil.which("cc") is None:
        raise SystemExit("first: apt-get install gcc libc6-dev")
    program = f"{folder}/{name}"
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", program, str(ROOT / "bench" / f"{name}.c")], check=True)
    return program


def ping(port: int) -> float:
    """Return what a PING takes, in ms: the median of some."""
    times = []
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            start = time.perf_counter()
            sock.sendall(b"PING\r\n")
            if sock.recv(100) != b"+PONG\r\n":
                raise SystemExit("Redis did not answer PING")
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def steady(program: str, port: int, first: int, seconds: int, files: str) -> tuple[int, float, float, float]:
    """Send at a constant rate; return how many were answered, how many a second, p50 and p99 in ms."""
    words = [str(port), str(RATE), str(seconds), str(OPEN_CONNECTIONS), str(first), files]
    text = subprocess.run(["taskset", "-c", "1", program, *words], capture_output=True, text=True, check=True).stdout
    answered, failed, rate, p50, p99, *_ = map(float, text.split())
    if failed:
        raise SystemExit(f"{failed:.0f} requests failed")
    return int(answered), rate, p50 / 1e3, p99 / 1e3


def bursts(folder: str, port: int, first: int, seconds: int) -> tuple[int, float, float, float]:
    """Have h2load send; return how many were answered, how many a second, p50 and p99 in ms."""
    log, uris, each = f"{folder}/log", f"{folder}/uris", RATE / OPEN_CONNECTIONS
    numbers = range(first, first + burst_ids(seconds))
    Path(uris).write_text("".join(f"http://127.0.0.1:{port}/api/verve/accept?id={number}\n" for number in numbers))
    Path(log).unlink(missing_ok=True)
    words = ["--h1", f"-c{OPEN_CONNECTIONS}", "-m1", f"--rps={each}", f"-D{seconds}", f"--input-file={uris}"]
    subprocess.run(
        ["taskset", "-c", "1", "h2load", *words, f"--log-file={log}", *FIELDS], capture_output=True, check=True
    )
    rows = [line.split() for line in Path(log).read_text().splitlines()]
    if any(row[1] != "200" for row in rows):
        raise SystemExit("a request of h2load failed")
    late = sorted(int(row[2]) / 1e3 for row in rows)
    return len(rows), len(rows) / seconds, late[len(late) // 2], late[int(len(late) * 0.99)]


def burst_ids(seconds: int) -> int:
    """Return how many ids a run of h2load has: so many requests a connection sends."""
    return int(RATE / OPEN_CONNECTIONS * seconds) + 10


@contextlib.contextmanager
def links(names: list[str], folder: str, store: int) -> Iterator[dict[str, Link]]:
    """Start the proxies and the services."""
    delay = compiled("delay", folder)
    with contextlib.ExitStack() as stack:
        made = {}
        for name in names:
            there, proxy = store, None
            if DELAYS[name] is not None:
                there = free_port()
                words = (delay, str(there), str(store), str(DELAYS[name]))
                proxy = stack.enter_context(started("1", *words, port=there)).pid
            port = free_port()
            server = stack.enter_context(started("0", *command("redis", port, there, folder), port=port))
            made[name] = Link(port, server.pid, there, proxy)
        yield made


def measure(names: list[str], rounds: int, seconds: int) -> Runs:
    """Have the links take turns; return the runs of each link and load."""
    ids = itertools.count(POOL, 10_000_000)
    runs: Runs = {name: {load: [] for load in LOADS} for name in names}
    counts = dict.fromkeys(names, (0, 0))  # ids that must be counted, and that may be
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = users.write(folder, "differ")
        client, store = compiled("steady", folder), free_port()
        options = ("--port", str(store), "--save", "", "--dir", folder)
        redis = stack.enter_context(started("1", "redis-server", *options, port=store)).pid

        def send(kind: str, port: int) -> tuple[int, float, float, float]:
            if kind == "steady":
                return steady(client, port, next(ids), seconds, files)
            if kind == "bursts":
                return bursts(folder, port, next(ids), seconds)
            return load(CASES["users"]._replace(connections=int(kind)), port, next(ids), seconds, files)[:4]

        made = stack.enter_context(links(names, folder, store))
        for number, (name, link) in itertools.product(range(rounds), made.items()):
            print(f"round {number + 1} of {rounds}, delay {name}", file=sys.stderr)
            trip = ping(link.store)
            for kind, each in runs[name].items():
                before, start = spent(link, redis), time.perf_counter()
                count, rate, p50, p99 = send(kind, link.port)
                took = time.perf_counter() - start
                ours, of_redis, of_proxy = (now - then for now, then in zip(spent(link, redis), before, strict=True))
                each.append(
                    Run(rate, p50, p99, trip, ours / count * 1e6, of_redis / count * 1e6, of_proxy / took * 100)
                )
                least, most = counts[name]
                new = 1 if kind == "bursts" else count, burst_ids(seconds) if kind == "bursts" else count + 256
                counts[name] = least + new[0], most + new[1]
        for name, link in made.items():
            least, most = counts[name]
            check(CASES["users"], counted(store, f"bench{link.port}"), least, most - least)
    return runs


def spent(link: Link, redis: int) -> list[float]:
    """Return the CPU seconds so far of the service, Redis and the proxy."""
    return [cpu(pid) if pid else 0.0 for pid in (link.server, redis, link.proxy)]


def middle(runs: list[Run]) -> Run:
    return Run(*map(statistics.median, zip(*runs, strict=True)))


def bound(kind: str, link: Run, here: Run) -> tuple[str, bool]:
    """Return what is asked of a link in words, and whether it holds. `here` is the same load next door."""
    if kind.isdigit():
        asked = 0.8 * min(int(kind) / (link.ping + here.p50) * 1e3, here.rate)
        return f"{asked:,.0f}/s", link.rate >= asked
    p50, p99 = link.ping + 1.2 * here.p50, 1.5 * link.ping + here.p99
    return f"{p50:.2f}, {p99:.2f} ms", link.p50 <= p50 and link.p99 <= p99


def row(name: str, kind: str, runs: Runs) -> list[str]:
    """Return a row of a table."""
    run = middle(runs[name][kind])
    asked, holds = "", ""
    if DELAYS[name] and NEXT_DOOR in runs:
        asked, kept = bound(kind, run, middle(runs[NEXT_DOOR][kind]))
        holds = "yes" if kept else "**no**"
    late = [results.spread([each.p50 for each in runs[name][kind]]), results.spread([e.p99 for e in runs[name][kind]])]
    figures = [f"{run.ping:.2f}", f"{run.rate:,.0f}", *late, asked, holds, f"{run.cpu:.1f}", f"{run.redis:.2f}"]
    return [name, *figures, f"{run.proxy:.0f} %" if name != NEXT_DOOR else ""]


def text(runs: Runs, rounds: int, seconds: int) -> str:
    """Return the section."""
    lines = [
        f"Medians of {rounds} rounds of {seconds} s, behind them the lowest and the highest. A new id in each request,",
        f"{users.DIFFER} (not by h2load).",
        "The delay is each way; R is what a PING takes. What is asked of each row stands at the top of",
        "`bench/distance.py`.",
    ]
    heads = "delay ms|R ms|requests/s|p50 ms|p99 ms|asked|holds|CPU µs|Redis µs|proxy's core"
    for kind, title in LOADS.items():
        rows = [row(name, kind, runs) for name in runs]
        lines += ["", f"**{title[0].upper()}{title[1:]}**", "", *results.table(heads, rows)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=2, help="of one run [2]")
    parser.add_argument("--rounds", type=int, default=3, help="that the median is taken of [3]")
    parser.add_argument("--delays", default="", help="only these, of none, 0, 0.5, 1 and 5, with commas between")
    options = parser.parse_args()
    names = options.delays.split(",") if options.delays else list(DELAYS)
    if unknown := set(names) - set(DELAYS):
        raise SystemExit(f"no such delay: {', '.join(sorted(unknown))}")
    if shutil.which("h2load") is None:
        raise SystemExit("first: apt-get install nghttp2-client")
    if needed := missing():
        raise SystemExit(f"first: {needed}")
    os.sched_setaffinity(0, {0})  # to ping from where the service is
    found = text(measure(names, options.rounds, options.seconds), options.rounds, options.seconds)
    if options.delays:
        print(found)
    else:
        results.write_section(results.DISTANCE, found)


if __name__ == "__main__":
    main()
