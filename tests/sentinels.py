"""A primary, a replica, and three sentinels that watch over them; and how soon Verve follows them.

python tests/sentinels.py --rounds 10    # on each engine: kills the primary, or asks for a failover, under load
"""

import argparse
import contextlib
import itertools
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

import processes
import redis
import servers
import support
from processes import wait_until
from redis.backoff import NoBackoff
from redis.retry import Retry

NAME = "mymaster"
DOWN = 500  # milliseconds without an answer after which a sentinel takes a server for down


class Sentinel:
    """A sentinel's process, which watches over the primary at a port of this machine."""

    def __init__(self, engine: str, primary: int, *options: str, quorum: int = 1, password: str = "") -> None:
        self.port = servers.free_port()
        self._engine = engine
        self._options = options
        self._password = password
        self._folder = tempfile.TemporaryDirectory(prefix="verve-sentinel-")
        lines = [
            *(f"port {self.port}", "bind 127.0.0.1", f"dir {self._folder.name}"),
            f"sentinel monitor {NAME} 127.0.0.1 {primary} {quorum}",
            *(f"sentinel down-after-milliseconds {NAME} {DOWN}", f"sentinel failover-timeout {NAME} 3000"),
            *([f'requirepass "{password}"'] if password else []),
        ]
        self._config = Path(self._folder.name, "sentinel.conf")
        self._config.write_text("\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with Path(self._folder.name, "log").open("ab") as log:
            self._process = subprocess.Popen(
                [servers.ENGINES[self._engine], str(self._config), "--sentinel", *self._options],
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(self._answers)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End it, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(servers.DEADLINE)
            self._process = None

    def ask(self, *words: str) -> Any:
        retry = Retry(NoBackoff(), 0)  # redis-py would try again by itself, after seconds
        with redis.Redis(
            port=self.port, password=self._password or None, decode_responses=True, socket_timeout=10, retry=retry
        ) as client:
            return client.execute_command(*words)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, Path(self._folder.name, "log").read_text()
        with contextlib.suppress(redis.ConnectionError):
            return bool(self.ask("PING"))
        return False


class Fleet:
    """All of them, seen by each other."""

    def __init__(self, engine: str) -> None:
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._begin(engine)
            self._stack = stack.pop_all()

    def _begin(self, engine: str) -> None:
        self.primary = self._stack.enter_context(servers.Redis(engine))
        self.replica = self._stack.enter_context(servers.Redis(engine))
        self.replica.follow(self.primary)
        self.sentinels = [self._stack.enter_context(Sentinel(engine, self.primary.port, quorum=2)) for _ in range(3)]
        wait_until(lambda: all(map(self._seen, self.sentinels)))
        self.url = url(*self.sentinels)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def move(self, *, killed: bool) -> None:
        """Kill the primary, or ask for a failover while both live; wait until the replica is the primary."""
        if killed:
            self.primary.kill()
        else:
            self.sentinels[0].ask("SENTINEL", "FAILOVER", NAME)
        wait_until(self._promoted)

    def _promoted(self) -> bool:
        with contextlib.suppress(redis.ConnectionError), self.replica.client() as client:
            return bool(client.info("replication")["role"] == "master")
        return False  # a sentinel ends all connections to a server that it promotes

    @staticmethod
    def _seen(sentinel: Sentinel) -> bool:
        """Whether a sentinel knows of all others, and finds all well."""
        fields = sentinel.ask("SENTINEL", "MASTER", NAME)
        return bool(
            fields["num-other-sentinels"] == "2" and fields["num-slaves"] == "1" and fields["flags"] == "master"
        )


def url(*sentinels: Sentinel) -> str:
    """Return the URL that names sentinels."""
    return f"redis+sentinel://{','.join(f'127.0.0.1:{sentinel.port}' for sentinel in sentinels)}/{NAME}"


class Load:
    """Ids sent to an instance one after the other, up to 1,000 a second, and what became of them."""

    def __init__(self, address: support.Address, first: int) -> None:
        self.ok: set[int] = set()
        self.failed: set[int] = set()
        self.again = 0.0  # monotonic time of the first ok after the last that failed
        self._address = address
        self._next = first
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(servers.DEADLINE)

    def _run(self) -> None:
        before = True
        with support.Client(self._address) as client:
            while not self._over.is_set():
                sent = time.monotonic()
                good = client.ask(support.accept(self._next)).status == 200
                (self.ok if good else self.failed).add(self._next)
                self._next += 1
                if good and not before:
                    self.again = time.monotonic()
                before = good
                self._over.wait(max(0.0, 0.001 - (time.monotonic() - sent)))


def more(*loads: Load) -> None:
    """Wait until each of them has got some more ok."""
    before = [len(load.ok) for load in loads]
    wait_until(lambda: all(len(load.ok) > number + 50 for load, number in zip(loads, before, strict=True)))


class Round(NamedTuple):
    """What a failover cost two instances."""

    promoted: float  # seconds from the promotion to the first ok of the one that was back last, from the new primary
    fault: float  # seconds from the fault to it
    apart: float  # seconds from the first ok of the other to it
    ok: int  # ids answered so
    failed: int
    there: int  # ids in the window on the new primary that were answered ok


def play(engine: str, *, killed: bool) -> Round:
    """Let a failover happen under load: while an instance moves, its ids fail."""
    with Fleet(engine) as fleet:
        flags = "--redis-url", fleet.url, "--window", processes.long_window()
        with support.verve(*flags) as one, support.verve(*flags) as two:
            with Load(one.address, 0) as first, Load(two.address, 10**9) as second:
                more(first, second)
                fault = time.monotonic()
                fleet.move(killed=killed)
                promoted = time.monotonic()
                one.log.wait_for("Redis is back")
                two.log.wait_for("Redis is back")
                more(first, second)
            ok, failed = first.ok | second.ok, first.failed | second.failed
            again = [load.again for load in (first, second) if load.again]  # of one whose move no id met there is none
            later = max(again)
            there = ok & {*processes.ids(fleet.replica)}
            return Round(later - promoted, later - fault, later - min(again), len(ok), len(failed), len(there))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    found: dict[str, list[Round]] = {}
    for engine, _, killed in itertools.product(servers.ENGINES, range(rounds), (True, False)):
        one = play(engine, killed=killed)
        what = f"{engine}, {'kill -9 of the primary' if killed else 'SENTINEL FAILOVER'}"
        found.setdefault(what, []).append(one)
        print(
            f"{what}: ok {one.promoted:.2f} s after the promotion, {one.fault:.2f} s after the fault, "
            f"{one.apart:.2f} s after the other instance; "
            f"{one.ok} answered ok, {one.there} of them counted, {one.failed} failed",
            flush=True,
        )
    for what, all_of in found.items():
        slowest, apart = max(one.promoted for one in all_of), max(one.apart for one in all_of)
        print(f"{what}, {rounds} rounds: at most {slowest:.2f} s after the promotion, {apart:.2f} s apart")
    sys.exit(any(one.ok != one.there for all_of in found.values() for one in all_of))


if __name__ == "__main__":
    main()
