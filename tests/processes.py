"""The processes of an instance, looked at from outside: the parent, its workers, what each of them has open.

Which worker has a connection is read from /proc, so a test kills the one it means. What nobody tells is asked for again
and again; a guard ends that only if it never comes.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import servers
import support


def wait_until(true: Callable[[], Any]) -> None:
    """Wait for what nobody tells."""
    since = time.monotonic()
    while not true():
        assert time.monotonic() - since < support.DEADLINE
        time.sleep(0.005)


def ask(server: servers.Redis, *words: str | int) -> Any:
    """Have Redis carry out a command."""
    with server.client() as client:
        return client.execute_command(*words)


def ids(server: servers.Redis) -> list[int]:
    """Return the ids of all windows that are not closed."""
    keys = [key for key in ask(server, "KEYS", "verve:*") if ask(server, "TYPE", key) == "set"]
    return sorted(int(member) for key in keys for member in ask(server, "SMEMBERS", key))


def long_window() -> str:
    """Return the length of a window that does not end while a test runs."""
    now = time.time()
    return next(str(seconds) for seconds in (86_400, 80_000, 70_000) if seconds - now % seconds > 600)


def state(pid: int) -> str:
    """Return the letter that /proc has for a process, and nothing if there is none."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def workers(program: support.Program) -> list[int]:
    """Return the pids of the workers, in the order in which they were started."""
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if state(pid) not in ("", "Z")]


def inodes(pid: int) -> set[str]:
    """Return the sockets that a process has open."""
    found = set()
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(file))
    return found


def listeners(pid: int) -> int:
    """Return how many descriptors of listening sockets a process has."""
    listening = {
        f"socket:[{line.split()[9]}]"
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    found = 0
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(entry.path) in listening
    return found


def owner(client: support.Client, pids: list[int]) -> int | None:
    """Return the worker that has accepted a connection, if one has."""
    here, there = (f"0100007F:{sock[1]:04X}" for sock in (client.socket.getsockname(), client.socket.getpeername()))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == there and fields[2] == here:
            return next((pid for pid in pids if f"socket:[{fields[9]}]" in inodes(pid)), None)
    return None


def freeze(pid: int) -> None:
    """Stop a process that is not our child in its tracks."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state(pid) == "T")


@contextlib.contextmanager
def started(server: servers.Redis, count: int, *flags: str, window: str = "") -> Iterator[support.Program]:
    """Run the program with `count` workers, all of them at work."""
    window = window or long_window()
    words = "--redis-url", server.url, "--workers", str(count), "--window", window
    with support.verve(*words, *flags) as program:
        at_work(program, server, count)
        yield program


def at_work(program: support.Program, server: servers.Redis, count: int) -> None:
    """Wait until all workers have their link to Redis."""
    wait_until(lambda: len(workers(program)) == count)
    wait_until(lambda: len(ask(server, "CLIENT", "LIST").splitlines()) == count + 1)  # and the one that asks


@contextlib.contextmanager
def one_of_each(program: support.Program) -> Iterator[dict[int, support.Client]]:
    """Give a connection to each worker."""
    pids = workers(program)
    with contextlib.ExitStack() as stack:
        clients: dict[int, support.Client] = {}
        while len(clients) < len(pids):
            client = stack.enter_context(support.Client(program.address))
            assert client.ask(support.get("/")).status == 404
            pid = owner(client, pids)
            assert pid is not None
            clients.setdefault(pid, client)
        yield clients


def see_drained(client: support.Client) -> None:
    """Take the answer to a request, and go on asking until the connection says that it ends, or falls silent."""
    (response,) = client.receive()
    assert response.status in (200, 503)
    while not response.closes:
        try:
            response = client.ask(support.accept(7))
        except (OSError, AssertionError):
            return
        assert response.status in (200, 503)


def told(program: support.Program) -> list[str]:
    """Return the windows in the log."""
    return re.findall(r"INFO verve\.reporter: unique ids in (\S+): \d+$", "\n".join(program.log.all), re.MULTILINE)


def follow(windows: list[str]) -> bool:
    """Whether windows of a second follow each other, and none is missing or doubled."""
    starts = [int(datetime.strptime(w, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()) for w in windows]
    return starts == [*range(starts[0], starts[0] + len(starts))]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
