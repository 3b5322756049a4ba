"""Requests a second and CPU per request, beside nginx's static reply and the floor. `python bench/ratio.py`.

Each server is pinned to core 0, wrk and Redis to core 1. The servers take turns, in rounds, so that what else the
machine does falls on all of them; each figure is the median of the rounds. CPU is user and system time of the server's
process (and of Redis) from /proc, over the requests that wrk counted. Ratios are what to look at.

Needs wrk and nginx, and for the rows with Redis redis-server: `apt-get install wrk nginx-light redis-server`.
"""

import argparse
import contextlib
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
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
LUA = """
local count, fresh = 0, {fresh}
local headers = {headers}
request = function()
  count = count + 1
  local id = (fresh >= 1 or count % 10 < fresh * 10) and count or count % 1000
  return wrk.format("GET", "/api/verve/accept?id=" .. id, headers)
end
"""
LIKE_A_BALANCER = (
    '{["X-Forwarded-For"]="203.0.113.9, 198.51.100.7", ["X-Forwarded-Proto"]="https", ["X-Forwarded-Port"]="443",'
    ' ["X-Amzn-Trace-Id"]="Root=1-67891233-abcdef012345678912345678", ["User-Agent"]="Mozilla/5.0 (X11; Linux)",'
    ' ["Accept"]="*/*", ["Accept-Encoding"]="gzip, deflate, br", ["Accept-Language"]="en-GB,en;q=0.9",'
    ' ["Referer"]="https://example.com/a/page", ["Cache-Control"]="no-cache", ["Pragma"]="no-cache"}'
)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def cpu(pid: int) -> float:
    """Return the CPU seconds of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0.0
    for process in (str(pid), *children):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


@contextlib.contextmanager
def started(core: int, *command: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server on a core until the block ends, from when it listens on."""
    process = subprocess.Popen(
        ["taskset", "-c", str(core), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 10
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=4, help="of one run [4]")
    parser.add_argument("--rounds", type=int, default=3, help="that the median is taken of [3]")
    parser.add_argument("--connections", type=int, default=64, help="[64]")
    parser.add_argument("--fresh", type=float, default=1.0, help="share of requests with a new id [1.0]")
    parser.add_argument("--headers", action="store_true", help="with those that a load balancer adds")
    parser.add_argument("--only", default="nginx,floor,memory,redis", help="servers, with commas between")
    options = parser.parse_args()
    names = options.only.split(",")
    for tool in ("wrk", "nginx", *(["redis-server"] if "redis" in names else [])):
        if shutil.which(tool) is None:
            raise SystemExit(f"no {tool}: apt-get install wrk nginx-light redis-server")
    ports = {name: free_port() for name in (*names, "store")}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        Path(folder, "nginx.conf").write_text(NGINX.format(folder=folder, port=ports.get("nginx", 0)))
        headers = LIKE_A_BALANCER if options.headers else "nil"
        Path(folder, "wrk.lua").write_text(LUA.format(fresh=options.fresh, headers=headers))
        verve = [sys.executable, str(ROOT / "verve_server.py"), "--admin", "off", "--port"]
        commands = {
            "nginx": ["nginx", "-c", f"{folder}/nginx.conf"],
            "floor": [sys.executable, str(ROOT / "bench" / "floor.py"), str(ports.get("floor"))],
            "memory": [*verve, str(ports.get("memory")), "--redis-url", ""],
            "redis": [*verve, str(ports.get("redis")), "--redis-url", f"redis://127.0.0.1:{ports['store']}"],
        }
        store = None
        if "redis" in names:
            arguments = ("--port", str(ports["store"]), "--save", "", "--dir", folder)
            store = stack.enter_context(started(1, "redis-server", *arguments, port=ports["store"]))
        servers = {name: stack.enter_context(started(0, *commands[name], port=ports[name])) for name in names}
        runs: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in names}
        for number in range(options.rounds):
            for name, server in servers.items():
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
                before = cpu(server.pid), cpu(store.pid) if store else 0.0
                wrk = ["taskset", "-c", "1", "wrk", "--latency", "-t1", f"-c{options.connections}"]
                wrk += [f"-d{options.seconds}s", "-s", f"{folder}/wrk.lua", f"http://127.0.0.1:{ports[name]}/"]
                text = subprocess.run(wrk, capture_output=True, text=True, check=True).stdout
                after = cpu(server.pid), cpu(store.pid) if store else 0.0
                if "Non-2xx" in text or "Socket errors" in text:
                    raise SystemExit(f"{name} failed requests:\n{text}")
                count = int(found(r"(\d+) requests in", text))
                late, unit = re.findall(r"99%\s+([\d.]+)(us|ms|s)", text)[0]
                runs[name].append(
                    (
                        float(found(r"Requests/sec:\s+([\d.]+)", text)),
                        (after[0] - before[0]) / count * 1e6,
                        (after[1] - before[1]) / count * 1e6 if name == "redis" else 0.0,
                        float(late) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit],
                    )
                )
    middle = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in runs.items()}
    print(f"{'':8}{'requests/s':>12}{'of nginx':>10}{'CPU µs':>8}{'of floor':>10}{'Redis µs':>10}{'p99 ms':>8}")
    for name, (rate, spent, redis, late_ms) in middle.items():
        of_nginx = rate / middle["nginx"][0] if "nginx" in middle else 0.0
        of_floor = spent / middle["floor"][1] if "floor" in middle else 0.0
        print(f"{name:8}{rate:12,.0f}{of_nginx:10.2f}{spent:8.1f}{of_floor:10.2f}{redis:10.2f}{late_ms:8.1f}")


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"wrk said something unexpected:\n{text}")
    return match[1]


if __name__ == "__main__":
    main()
