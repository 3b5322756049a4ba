"""What more cores and more Redis primaries carry, computed from what was measured. `python bench/model.py`, one minute.

A request costs the service S and Redis R microseconds of CPU. Both fall as more ids share a trip to Redis: each is
taken to be a + b / k, with k ids in a trip. One worker on core 0, wrk and Redis on core 1, is measured with 8 to 256
connections, and a and b are fitted. (Redis's own statistics tell how many SADDs there were.)

Then N workers, each with a core of its own, and P primaries, each with a core of its own, carry the lesser of N / S and
P / R requests a second. Ids are spread over the primaries by their value, so a worker's trips have k / P ids, and both
S and R rise with P. For Redis that is careful: where it runs out first, ids wait, and its trips become fuller.

The fit is checked against two workers that share two cores with Redis and wrk: the CPU that all of them took for a
request against what the fit says, and the rate against what two full cores would give. That ids spread like this over
several machines is not measured here.
"""

import argparse
import contextlib
import itertools
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

import results
import users
from run import CASES, POOL, command, cpu, free_port, load, missing, started

CONNECTIONS = (8, 16, 64, 256)
FULL_LOAD = 256  # connections of a worker in the table
WORKERS = (1, 4, 16, 64)
PRIMARIES = (1, 2, 4, 8, 16)
FRAME = 66  # bytes of Ethernet, IP and TCP headers in a packet
LINK = 10e9 / 8  # bytes a second of the network that the text reckons with


class Point(NamedTuple):
    """What was measured with one number of connections, in a round or as the median of all."""

    rate: float
    server: float  # µs a request
    redis: float
    wrk: float
    ids: float  # in a trip


class Line(NamedTuple):
    """Cost in µs as a function of the ids in a trip."""

    each: float  # an id
    trip: float  # a trip

    def at(self, ids: float) -> float:
        return self.each + self.trip / ids


def sadds(port: int) -> int:
    """Return how many SADDs Redis has done."""
    words = ["redis-cli", "-p", str(port), "INFO", "commandstats"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = re.search(r"cmdstat_sadd:calls=(\d+)", text)
    return int(found[1]) if found else 0


def measure(workers: int, connections: tuple[int, ...], rounds: int, seconds: int) -> dict[int, list[Point]]:
    """Return the rounds of one service with some numbers of connections; more than one worker is not pinned."""
    ids = itertools.count(POOL, 10_000_000)
    runs: dict[int, list[Point]] = {each: [] for each in connections}
    own, other = ("0", "1") if workers == 1 else ("0,1", "0,1")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files, store, port = users.write(folder, "differ"), free_port(), free_port()
        options = ("--port", str(store), "--save", "", "--dir", folder)
        redis = stack.enter_context(started(other, "redis-server", *options, port=store)).pid
        server = stack.enter_context(started(own, *command(f"redis*{workers}", port, store, folder), port=port)).pid
        for number, each in itertools.product(range(rounds), connections):
            print(f"{workers} workers, round {number + 1} of {rounds}, {each} connections", file=sys.stderr)
            before = cpu(server), cpu(redis), sadds(store)
            case = CASES["users"]._replace(connections=each, pinned=workers == 1)
            sent = load(case, port, next(ids), seconds, files)
            ours, of_redis, trips = (
                now - then for now, then in zip((cpu(server), cpu(redis), sadds(store)), before, strict=True)
            )
            count = sent.answered
            runs[each].append(
                Point(sent.rate, ours / count * 1e6, of_redis / count * 1e6, sent.cpu, count / max(trips, 1))
            )
    return runs


def middle(rounds: list[Point]) -> Point:
    return Point(*map(statistics.median, zip(*rounds, strict=True)))


def fit(pairs: list[tuple[float, float]]) -> Line:
    """Return the line through (ids in a trip, cost) with the least squares of the relative errors."""
    weighted = [(1 / cost, 1 / ids / cost) for ids, cost in pairs]
    aa, ab, bb = (sum(x * y for x, y in zip(*each, strict=True)) for each in columns(weighted))
    a, b = sum(x for x, _ in weighted), sum(y for _, y in weighted)
    whole = aa * bb - ab * ab
    return Line((a * bb - b * ab) / whole, (aa * b - ab * a) / whole)


def columns(pairs: list[tuple[float, float]]) -> list[tuple[list[float], list[float]]]:
    first, second = [x for x, _ in pairs], [y for _, y in pairs]
    return [(first, first), (first, second), (second, second)]


def cell(workers: int, primaries: int, server: Line, redis: Line, ids: float) -> str:
    """Return how many requests a second are carried, and what runs out first."""
    share = max(1.0, ids / primaries)
    limits = {"workers": workers / server.at(share) * 1e6, "Redis": primaries / redis.at(share) * 1e6}
    least = min(limits, key=lambda name: limits[name])
    return f"{rounded(limits[least])} {least}"


def sizes(port: int) -> tuple[int, int]:
    """Return the bytes of a request and of its answer."""
    first, second = users.halves("same")
    request = f"GET /api/verve/accept?id=1234567{first[0]}{second[0]}".encode()
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.sendall(request)
        return len(request), len(sock.recv(4096))


def text(points: dict[int, Point], both: list[Point], sent: tuple[int, int], medians: str) -> str:
    """Return the section. `both` are the rounds of two workers on two cores."""
    server = fit([(point.ids, point.server) for point in points.values()])
    redis = fit([(point.ids, point.redis) for point in points.values()])
    ids = points[FULL_LOAD].ids
    heads = "connections|requests/s|ids a trip|service µs|computed|Redis µs|computed|wrk µs"
    rows = []
    for connections, point in points.items():
        ours = [f"{point.server:.1f}", f"{server.at(point.ids):.1f}"]
        of_redis = [f"{point.redis:.2f}", f"{redis.at(point.ids):.2f}"]
        rows.append([f"{connections}", f"{point.rate:,.0f}", f"{point.ids:.1f}", *ours, *of_redis, f"{point.wrk:.1f}"])
    carried = [[f"{n}", *(cell(n, primaries, server, redis, ids) for primaries in PRIMARIES)] for n in WORKERS]
    request, answer = sent
    lines = [
        f"**Measured** ({medians}): one worker on core 0, Redis and wrk on core 1, a new id in each request,",
        f"{users.DIFFER}.",
        "",
        *results.table(heads, rows, words=0),
        "",
        f"**Fitted**: with k ids in a trip a request takes {server.each:.1f} + {server.trip:.1f} / k µs of the",
        f"service's core and {redis.each:.2f} + {redis.trip:.2f} / k µs of Redis's.",
        "",
        *checked(both, server, redis),
        "",
        "**Computed**: requests a second that full cores carry, and what runs out first. Each worker and each primary",
        f"has a core of its own; a worker has {FULL_LOAD} connections and, with one primary, {ids:.0f} ids in a trip.",
        "Plan with two thirds of it. Nothing in this table is measured.",
        "",
        *results.table("workers|1 primary|" + "|".join(f"{each} primaries" for each in PRIMARIES[1:]), carried),
        "",
        f"A request has {request} bytes and its answer {answer} (measured), so 10 Gbit/s into a machine bring at most",
        f"{rounded(LINK / (request + FRAME))} requests a second (computed): past that the network runs out first.",
    ]
    return "\n".join(lines)


def checked(rounds: list[Point], server: Line, redis: Line) -> list[str]:
    """Return what two workers on two cores did, beside what the fit says."""
    both = middle(rounds)
    heads = f"two workers, {FULL_LOAD} connections, {both.ids:.1f} ids in a trip|measured|computed|ratio"
    found: dict[str, list[tuple[float, float]]] = {"service µs": [], "Redis µs": [], "requests/s of two full cores": []}
    for each in rounds:
        ours, of_redis = server.at(each.ids), redis.at(each.ids)
        computed = ours, of_redis, 2e6 / (ours + of_redis + each.wrk)
        for name, measured, expected in zip(found, (each.server, each.redis, each.rate), computed, strict=True):
            found[name].append((measured, expected))
    rows = []
    for name, pairs in found.items():
        medians = (statistics.median(each) for each in zip(*pairs, strict=True))
        ratio = results.spread([measured / expected for measured, expected in pairs])
        rows.append([name, *(f"{each:,.0f}" if "/s" in name else f"{each:.2f}" for each in medians), ratio])
    about = "**Checked** against two workers that share two cores with Redis and wrk, which took"
    return [f"{about} {both.wrk:.1f} µs a request.", "", *results.table(heads, rows)]


def rounded(value: float) -> str:
    """Return a number with two digits that count."""
    return f"{float(f'{value:.2g}'):,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=2, help="of one run [2]")
    parser.add_argument("--rounds", type=int, default=3, help="that the median is taken of [3]")
    parser.add_argument("--print", action="store_true", help="print only, and leave RESULTS.md alone")
    options = parser.parse_args()
    if needed := missing():
        raise SystemExit(f"first: {needed}")
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("two cores are needed")
    runs = measure(1, CONNECTIONS, options.rounds, options.seconds)
    both = measure(2, (FULL_LOAD,), options.rounds, options.seconds)[FULL_LOAD]
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        with started("0", *command("memory", port, 0, folder), port=port):
            sent = sizes(port)
    points = {each: middle(rounds) for each, rounds in runs.items()}
    found = text(points, both, sent, f"medians of {options.rounds} rounds of {options.seconds} s")
    if options.print:
        print(found)
    else:
        results.write_section(results.MODEL, found)


if __name__ == "__main__":
    main()
