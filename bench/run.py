"""Verve beside nginx, the floor of its stack, and peers. `python bench/run.py`, about five minutes.

Each server is on core 0, wrk and Redis on core 1 (but where it says unpinned). The servers take turns, in rounds,
so that what else the machine does falls on all of them; each figure is the median of the rounds, and each ratio is
taken within a round and given with its lowest and highest. CPU is user and system time of the server's processes (and
of Redis) from /proc, over the requests that wrk counted. Ratios are what to look at: to nginx's static reply, which
does no work, and to a bare uvloop and httptools server with a fixed reply, each under the same load.

wrk's own CPU is in the tables, too: where wrk's core is busier than the server's, the figure is wrk's limit, and the
table says so. Every id is sent once in the cases that say so, over all runs; in the end the counts that the service
told must add up to what was answered, plus at most what was under way when wrk stopped.
"""

import argparse
import contextlib
import importlib.util
import itertools
import os
import re
import resource
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
import clusters  # noqa: E402

LOAD = ROOT / "bench" / "load.lua"
TICKS = os.sysconf("SC_CLK_TCK")
WINDOW = 5  # seconds, so that rolls are measured too
POOL = 1000  # ids that duplicates are taken from, as in load.lua
FULL = 95  # per cent of a core that count as all of it
NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 2048; }}
http {{
  access_log off; keepalive_requests 1000000000;
  client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
  uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  server {{ listen 127.0.0.1:{port}; location / {{ default_type "text/plain; charset=utf-8"; return 200 "ok"; }} }}
}}
"""


class Case(NamedTuple):
    """What is sent, and how."""

    title: str
    servers: str = "nginx floor memory redis"
    connections: int = 64
    fresh: float = 1.0  # share of requests with a new id
    depth: int = 1  # requests in one write
    headers: str = "differ"  # the kind, as users.halves has it
    pinned: bool = True


PEERS = "nginx floor memory redis aiohttp+redis fastapi+redis"
CASES = {
    "users": Case("a new id each time", PEERS),
    "users256": Case("a new id each time, 256 connections", connections=256),
    "duplicates": Case("9 in 10 duplicates", fresh=0.1),
    "cluster": Case("a new id each time, a cluster of 3", "nginx floor redis cluster"),
    "cluster256": Case("a new id each time, a cluster of 3, 256 connections", "nginx floor redis cluster", 256),
    "workers": Case("a new id each time, unpinned", "nginx redis redis*2", pinned=False),
    "same": Case("a new id each time, the same twelve fields", headers="same"),
    "host": Case("a new id each time, one field, Host", headers="host"),
    "host256": Case("a new id each time, one field, Host, 256 connections", connections=256, headers="host"),
    "pipelined": Case("a new id each time, one field, Host, 16 requests in one write", depth=16, headers="host"),
}


class Load(NamedTuple):
    """What one run of wrk gave."""

    answered: int  # requests
    rate: float  # a second
    p50: float  # ms
    p99: float
    cpu: float  # of wrk, µs a request


class Run(NamedTuple):
    """What one run showed of the server."""

    rate: float  # requests a second
    p50: float  # ms
    p99: float
    cpu: float  # µs a request
    redis: float
    wrk: float
    memory: float  # MiB, of the server


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def family(pid: int) -> list[str]:
    """Return a process and its children."""
    return [str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu(pid: int) -> float:
    """Return the CPU seconds of a process and its children."""
    total = 0.0
    for process in family(pid):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def memory(pid: int) -> float:
    """Return the resident MiB of a process and its children."""
    texts = (Path(f"/proc/{process}/status").read_text() for process in family(pid))
    return sum(int(text.partition("VmRSS:")[2].split()[0]) for text in texts) / 1024


@contextlib.contextmanager
def started(cores: str, *command: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server on some cores until the block ends, from when it listens on."""
    process = subprocess.Popen(["taskset", "-c", cores, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{' '.join(command)} did not start")
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.wait()


class Stores(contextlib.ExitStack):
    """The Redis of a case, and the cluster if there is one, on the core that is theirs."""

    def __init__(self, core: str, folder: str) -> None:
        super().__init__()
        self._core = core
        self.port = free_port()
        options = ("--port", str(self.port), "--save", "", "--dir", folder)
        self._pids = [self.enter_context(started(core, "redis-server", *options, port=self.port)).pid]
        self._cluster: clusters.Cluster | None = None

    def of(self, name: str) -> int:
        """Return a port at which a server finds what it counts in."""
        if name != "cluster":
            return self.port
        if self._cluster is None:
            self._cluster = self.enter_context(clusters.Cluster("redis", replicas=0))
            for pid in self._pids_of(name):
                subprocess.run(["taskset", "-apc", self._core, str(pid)], check=True, stdout=subprocess.DEVNULL)
        return self._cluster.nodes[0].port

    def home(self, name: str, prefix: str) -> int:
        """Return the port of the server that has the reports."""
        return self._cluster.primary_of(f"{prefix}:reports").port if name == "cluster" and self._cluster else self.port

    def cpu(self, name: str) -> float:
        """Return the CPU seconds of what a server counts in."""
        return sum(map(cpu, self._pids_of(name))) if name.startswith(("redis", "cluster")) or "+redis" in name else 0.0

    def _pids_of(self, name: str) -> list[int]:
        if name != "cluster" or self._cluster is None:
            return self._pids
        return [node.process.pid for node in self._cluster.nodes if node.process is not None]


def command(name: str, port: int, store: int, folder: str, window: int = WINDOW) -> list[str]:
    """Return what starts a server: what its name says before `+redis` or `*workers`."""
    url = f"redis://127.0.0.1:{store}"
    program, _, workers = name.partition("*")
    if program == "nginx":
        Path(folder, "nginx.conf").write_text(NGINX.format(folder=folder, port=port))
        return ["nginx", "-c", f"{folder}/nginx.conf"]
    if program in ("memory", "redis", "cluster"):
        verve = [sys.executable, str(ROOT / "verve_server.py"), "--admin", "off", "--port", str(port)]
        where = ["--redis-url", "" if program == "memory" else url, "--workers", workers or "1"]
        return [*verve, *where, "--window", str(window), "--key-prefix", f"bench{port}"]
    peer, _, with_redis = program.partition("+")
    file = "floor.py" if peer == "floor" else f"peer_{peer}.py"
    return [sys.executable, str(ROOT / "bench" / file), str(port), *([url] if with_redis else [])]


def load(case: Case, port: int, first: int, seconds: int, files: str) -> Load:
    """Run wrk. `first` is the first id, `files` the path of the prepared requests."""
    wrk = ["wrk", "--latency", "-t1", f"-c{case.connections}", f"-d{seconds}s", "-s", str(LOAD)]
    wrk = [*(["taskset", "-c", "1"] if case.pinned else []), *wrk, f"http://127.0.0.1:{port}/", "--"]
    wrk += [str(first), str(case.fresh), str(case.depth), files]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = subprocess.run(wrk, capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(f"failed requests:\n{text}")
    late = (found(rf"{mark}%\s+([\d.]+(?:us|ms|s))", text) for mark in (50, 99))
    p50, p99 = (
        float(each.rstrip("ums")) * {"u": 1e-3, "m": 1, "s": 1e3}[each.lstrip("0123456789.")[0]] for each in late
    )
    count = int(found(r"(\d+) requests in", text))
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Load(count, float(found(r"Requests/sec:\s+([\d.]+)", text)), p50, p99, spent / count * 1e6)


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"wrk said something unexpected:\n{text}")
    return match[1]


def measure(case: Case, names: list[str], rounds: int, seconds: int, ids: Iterator[int]) -> dict[str, list[Run]]:
    """Have the servers take turns; return their runs. Ends the program if a count is wrong."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    answered = dict.fromkeys(names, 0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = users.write(folder, case.headers)
        everywhere = f"0-{(os.cpu_count() or 1) - 1}"
        stores = stack.enter_context(Stores("1" if case.pinned else everywhere, folder))
        ports = {name: free_port() for name in names}
        servers = {
            name: stack.enter_context(
                started("0" if case.pinned else everywhere, *command(name, port, stores.of(name), folder), port=port)
            )
            for name, port in ports.items()
        }
        for number in range(rounds):
            for name, server in servers.items():
                print(f"{case.title}: round {number + 1} of {rounds}, {name}", file=sys.stderr)
                before = cpu(server.pid), stores.cpu(name)
                sent = load(case, ports[name], next(ids), seconds, files)
                spent = (cpu(server.pid) - before[0]) / sent.answered * 1e6
                of_redis = (stores.cpu(name) - before[1]) / sent.answered * 1e6
                answered[name] += sent.answered
                runs[name].append(Run(sent.rate, sent.p50, sent.p99, spent, of_redis, sent.cpu, memory(server.pid)))
        under_way = rounds * case.connections * case.depth
        for name in names:
            if name.startswith(("redis", "cluster")):
                prefix = f"bench{ports[name]}"
                check(case, counted(stores.home(name, prefix), prefix), answered[name], under_way)
    return runs


def counted(port: int, prefix: str) -> list[int]:
    """Return the counts of all windows, the one that is open now as the last."""
    cli = ["redis-cli", "-p", str(port)]
    last = int(time.time()) // WINDOW * WINDOW
    while True:
        text = subprocess.run(
            [*cli, "XRANGE", f"{prefix}:reports", "-", "+"], capture_output=True, text=True, check=True
        ).stdout
        lines = text.split()
        if f"{last}000-0" in lines:
            return [int(lines[at + 1]) for at, line in enumerate(lines) if line == "count"]
        time.sleep(0.2)


def check(case: Case, counts: list[int], answered: int, under_way: int) -> None:
    """End the program if the counts don't fit what was answered."""
    least, most = answered, answered + under_way
    if case.fresh < 1:
        least = int(case.fresh * answered) - under_way
        most = int(case.fresh * (answered + under_way)) + under_way + POOL * len(counts)
    print(f"{case.title}: {answered:,} answered, {sum(counts):,} counted", file=sys.stderr)
    if not least <= sum(counts) <= most:
        raise SystemExit(f"{sum(counts)} ids were counted, expected from {least} to {most}")


def table(case: Case, runs: dict[str, list[Run]]) -> str:
    """Return the medians and the ratios, as Markdown."""
    where = "" if case.pinned else ", all processes on all cores"
    rows = []
    for name, of_server in runs.items():
        run = Run(*map(statistics.median, zip(*of_server, strict=True)))
        of_nginx = [each.rate / nginx.rate for each, nginx in zip(of_server, runs.get("nginx", []), strict=False)]
        of_floor = [each.cpu / floor.cpu for each, floor in zip(of_server, runs.get("floor", []), strict=False)]
        late = [f"{run.p50:.2f}", f"{run.p99:.1f}"] if case.depth == 1 else ["", ""]  # wrk does not tell these
        row = [LABELS.get(name, name), f"{run.rate:,.0f}", results.spread(of_nginx) if of_nginx else "", *late]
        row += [f"{run.cpu:.1f}", results.spread(of_floor) if of_floor else "", f"{run.redis:.2f}" if run.redis else ""]
        rows.append([*row, f"{run.wrk:.1f}", busy(run) if case.pinned else "", f"{run.memory:.0f}"])
    heads = "server|requests/s|of nginx|p50 ms|p99 ms|CPU µs|of floor|Redis µs|wrk µs|cores busy|MiB"
    title = f"**{case.title[0].upper()}{case.title[1:]}**"
    lines = [title, "", f"{case.connections} connections{where}.", "", *results.table(heads, rows), ""]
    if case.pinned and "nginx" in runs:
        lines += clients_limit(runs)
    return "\n".join(lines)


def busy(run: Run) -> str:
    """Return in per cent how busy the server's core was, and the one of Redis and wrk."""
    return f"{run.rate * run.cpu / 1e4:.0f}, {run.rate * (run.redis + run.wrk) / 1e4:.0f}"


def clients_limit(runs: dict[str, list[Run]]) -> list[str]:
    """Return lines about the ratio of CPU, if nginx's core was not the limit of nginx's figure."""
    nginx = runs["nginx"]
    ours = statistics.median(run.rate * run.cpu / 1e4 for run in nginx)
    clients = statistics.median(run.rate * run.wrk / 1e4 for run in nginx)
    if ours >= FULL and ours >= clients:
        return []
    ratios = {
        name: [theirs.cpu / our.cpu for theirs, our in zip(nginx, runs[name], strict=True)]
        for name in ("memory", "redis")
        if name in runs
    }
    by_cpu = ", ".join(f"{LABELS[name].strip('*')} {results.spread(each)}" for name, each in ratios.items())
    which = "wrk" if clients >= FULL else "neither"
    return [
        f"In nginx's runs wrk's core was {clients:.0f} % busy and nginx's {ours:.0f} %, so {which} was the limit."
        f" By CPU a request, of nginx: {by_cpu}.",
        "",
    ]


LABELS = {
    "nginx": "nginx, static reply",
    "floor": "uvloop and httptools, fixed reply",
    "memory": "**Verve, in memory**",
    "redis": "**Verve, Redis**",
    "cluster": "**Verve, Redis Cluster**",
    "redis*2": "**Verve, Redis, 2 workers**",
    "aiohttp+redis": "aiohttp, Redis",
    "fastapi": "FastAPI",
    "fastapi+redis": "FastAPI, Redis",
}


def missing() -> str:
    """Return the command that installs the programs that are needed and not there, if any."""
    tools = {"wrk": "wrk", "nginx": "nginx-light", "redis-server": "redis-server", "redis-cli": "redis-tools"}
    packages = [package for tool, package in tools.items() if shutil.which(tool) is None]
    return f"apt-get install {' '.join(packages)}" if packages else ""


def chosen(case: Case, only: list[str]) -> list[str]:
    """Return the servers of a case that are asked for; peers that are not installed are left out."""
    names = [name for name in case.servers.split() if not only or name in only]
    peers = {name: name.partition("+")[0] for name in names if name.partition("+")[0] in ("aiohttp", "fastapi")}
    absent = [name for name, peer in peers.items() if importlib.util.find_spec(peer) is None]
    if absent:
        print(f"without {', '.join(absent)}: pip install -r bench/requirements.txt", file=sys.stderr)
    return [name for name in names if name not in absent]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=2, help="of one run [2]")
    parser.add_argument("--rounds", type=int, default=3, help="that the median is taken of [3]")
    parser.add_argument("--case", choices=CASES, help="only this one; RESULTS.md is left alone then")
    parser.add_argument("--only", default="", help="only these servers, with commas between")
    options = parser.parse_args()
    cases = [CASES[options.case]] if options.case else list(CASES.values())
    only = options.only.split(",") if options.only else []
    if needed := missing():
        raise SystemExit(f"first: {needed}")
    ids = itertools.count(POOL, 10_000_000)  # a run does not come near the next one's
    texts: dict[str, list[str]] = {"differ": [], "same": []}
    for case in cases:
        text = table(case, measure(case, chosen(case, only), options.rounds, options.seconds, ids))
        print(text, flush=True)
        texts["differ" if case.headers == "differ" else "same"].append(text)
    if not options.case and not only:
        medians = f"Medians of {options.rounds} rounds of {options.seconds} s."
        results.write_section(results.DIFFER, "\n".join([f"{medians} Sent: {users.DIFFER}.\n", *texts["differ"]]))
        results.write_section(results.SAME, "\n".join([f"{medians} {LABORATORY}\n", *texts["same"]]))


LABORATORY = (
    "No user sends this: the header bytes are those of the last request, which a server may remember. It shows what "
    "the rest of a request costs."
)


if __name__ == "__main__":
    main()
