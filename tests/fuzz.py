"""Mutated requests by the million against `http1`. `python tests/fuzz.py --requests 1000000 --seed 1`, minutes.

Each stream is made of the requests of http_corpus.py (well-formed, malformed, cut, doubled), joined and changed: bits,
bytes, tokens of HTTP, pieces of other requests, repetitions up to past the limits. It is given to the real connection
and the real endpoint whole, cut at random places, and, if it is short, byte by byte. Required of each: no error, in
the loop or out of it; answers in good form, none behind one that closes, no more than there can be requests; the same
bytes said and the same ids counted however the stream was cut. Some also go to a store that answers later. A stream
takes at most HANG seconds, and memory must not grow from the first tenth of the streams to the last.

Where atheris is installed (`pip install atheris`, a wheel for Linux), it guides: what reaches lines of `http1` or
`request_reader` not
reached before is changed further. Else changes are made at random. Either way a seed repeats the run. A stream that
fails is printed, and becomes an example of test_hostile.py, which also runs a few thousand streams each time.
"""

import argparse
import contextlib
import importlib
import os
import random
import re
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

HANG = 5  # seconds
GROWTH = 32 * 2**20  # bytes of memory, between the first tenth of the streams and the last
SHORT = 300  # bytes of a stream of which every fourth is also read byte by byte
LONG = 100_000  # bytes at which no stream is made longer

try:
    atheris: Any = importlib.import_module("atheris") if __name__ == "__main__" else None
except ImportError:
    atheris = None
with atheris.instrument_imports(include=["http1", "request_reader"]) if atheris else contextlib.nullcontext():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import request_reader
import http_peers  # noqa: E402
from http_corpus import EXPECTING, LAST, MALFORMED, ODD, STREAMS  # noqa: E402
from http_peers import Memory, Mixed, Telling, get  # noqa: E402

GOOD = [*(request for request, _ in ODD.values()), *STREAMS.values(), *LAST.values(), EXPECTING]
BAD = list(MALFORMED.values())
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"  # which is said only to a client whose body is still to come
TOKENS = http_peers.words(
    r"\r\n|\r|\n|\0| |\t|:|,|;|\x22|%|/|0|5|ffff|\x7f|\x80|\xff|\r\n\r\n|0\r\n\r\n|1\r\nx\r\n|\r\n |HTTP/1.1|HTTP/1.0"
    r"|HTTP/1.1\r\nHost: a\r\n\r\n|Host: a\r\n|Content-Length: 5\r\n|Content-Length: |Transfer-Encoding: chunked\r\n"
    r"|Transfer-Encoding: |Connection: close\r\n|Connection: keep-alive\r\n|Upgrade: h2c\r\nConnection: Upgrade\r\n"
    r"|Expect: 100-continue\r\n|GET |HEAD |POST |CONNECT |PRI * HTTP/2.0\r\n|GET /api/verve/accept?id=|&id=|chunked"
)
_answers = re.compile(
    rb"HTTP/1\.1 (?:200 OK|[45][0-9][0-9] [A-Za-z -]+)\r\n(?:[A-Za-z-]+: [ -~]+\r\n)+\r\n(?:ok|failed)?"
).findall


def first(chance: random.Random) -> bytes:
    """Return something to begin with: one time in five it is refused already."""
    return chance.choice(BAD if chance.random() < 0.2 else GOOD)


def mutate(stream: bytes, chance: random.Random) -> bytes:
    """Return a stream that is changed in one to six places."""
    for _ in range(chance.choice((1, 1, 2, 3, 6))):
        start = chance.randrange(len(stream) + 1)
        end = start + chance.choice((0, 1, 1, 2, 4, 40))
        old = stream[start:end]
        how = chance.randrange(9)
        if how == 0 and old:
            new = bytes([old[0] ^ (1 << chance.randrange(8))]) + old[1:]
        elif how == 1:
            new = b""
        elif how == 2:
            new = bytes([chance.randrange(256)]) + old
        elif how == 3:
            new = old + old
        elif how == 4:
            new = first(chance) + old
        elif how == 5 and len(stream) < LONG and chance.random() < 0.02:
            new = chance.choice(TOKENS) * chance.randrange(1, 20_000)
        else:
            new = chance.choice(TOKENS) + (old if how < 8 else b"")
        stream = stream[:start] + new[:LONG] + stream[end:]
    return stream[: 3 * LONG] or b"\0"


class Checker:
    """Gives streams to connections and compares what is said. Raises AssertionError."""

    def __init__(self) -> None:
        self.memory = Memory(Telling())
        self.mixed = Memory(Mixed())
        self.count = 0

    def close(self) -> None:
        for memory in (self.memory, self.mixed):
            memory.__exit__()

    def said(self, pieces: list[bytes]) -> tuple[bytes, list[int]]:
        """Return the answers to a stream that comes in pieces, and the ids that were counted."""
        memory = self.memory
        memory.store.added.clear()
        peer = memory.connect()
        peer.send(*pieces)
        while peer.protocol._unread:
            memory.advance()
        peer.lose()
        assert not memory.server.connections
        assert not memory.loop.errors
        return peer.sent.replace(GO_ON, b""), memory.store.added.copy()

    def check(self, stream: bytes) -> list[int]:
        """Give a stream in several ways; return the statuses of its answers."""
        self.count += 1
        key = zlib.crc32(stream)
        chance = random.Random(key)
        answer, added = self.said([stream])
        cuts = [chance.randrange(len(stream)) for _ in range(chance.randrange(1, 5))]
        assert self.said(http_peers.cut_at(stream, cuts)) == (answer, added), "it matters how the bytes were cut"
        if len(stream) <= SHORT and key % 4 == 0:
            assert self.said(http_peers.cut(stream, 1)) == (answer, added), "it matters that bytes came one by one"
        found = _answers(answer)
        assert b"".join(found) == answer, "an answer is not in good form"
        assert len(found) <= stream.count(b"\n") + len(stream) // request_reader.MAX_LINE + 1, (
            "more answers than requests"
        )
        assert len(added) <= len(found), "an id was counted and not answered"
        assert not any(b"\r\nConnection: close\r\n" in head for head in found[:-1]), "an answer behind the last"
        if key % 32 == 0:
            http_peers.replies(answer)
            self.mixed.store.added.clear()
            later = self.mixed.talk(*http_peers.cut_at(stream, cuts))
            http_peers.replies(later)
            assert self.mixed.store.added == added, "it matters that answers come later"
            assert http_peers.statuses(self.memory.talk(get(3))) == [200]
        return [int(head[9:12]) for head in found]


def resident() -> int:
    """Return the bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Run:
    """A run of so many streams: checks each, keeps an eye on time and memory, and says what it was."""

    def __init__(self, total: int, seed: int) -> None:
        self.total = total
        self.seed = seed
        self.checker = Checker()
        self.statuses: dict[int, int] = {}
        self.memory = 0
        self.start = time.monotonic()

    def one(self, stream: bytes) -> bool:
        """Check a stream; return whether it was the last."""
        signal.setitimer(signal.ITIMER_REAL, HANG)  # whose default action ends the process
        try:
            for status in self.checker.check(stream):
                self.statuses[status] = self.statuses.get(status, 0) + 1
        except BaseException:
            print(f"seed {self.seed}, stream {self.checker.count:,}, which fails:\n{stream!r}", file=sys.stderr)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.checker.count == self.total // 10:
            self.memory = resident()
        return self.checker.count >= self.total

    def end(self) -> None:
        """Say what the run was, after the last stream."""
        grown = resident() - self.memory
        found = ", ".join(f"{status}: {count:,}" for status, count in sorted(self.statuses.items()))
        print(
            f"{self.checker.count:,} streams ({'guided by atheris' if atheris else 'at random'}, seed {self.seed}) in "
            f"{time.monotonic() - self.start:.0f} s: no error; answers {found}; memory grew by {grown / 2**20:.1f} MiB",
            flush=True,
        )
        assert grown < GROWTH, "memory grows"


def run(total: int, seed: int) -> None:
    """Check so many streams, changed at random."""
    chance = random.Random(seed)
    current = Run(total, seed)
    with contextlib.closing(current.checker):
        while not current.one(mutate(first(chance), chance)):
            pass
    current.end()


def run_guided(total: int, seed: int) -> None:
    """Check so many streams, chosen by the lines that they reach; does not return."""
    current = Run(total, seed)

    def one(stream: bytes) -> None:
        if current.one(stream or b"\0"):
            current.end()
            os._exit(0)

    def change(stream: bytes, _: int, seed: int) -> bytes:
        chance = random.Random(seed)
        return mutate(stream if chance.random() < 0.9 else first(chance), chance)

    arguments = [sys.argv[0], f"-seed={seed}", f"-max_len={3 * LONG}", "-verbosity=0", "-rss_limit_mb=0"]
    atheris.Setup(arguments, one, custom_mutator=change)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--requests", type=int, default=1_000_000, help="mutated streams (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1, 2**31), help="default: a new one, printed")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    (run_guided if atheris else run)(options.requests, options.seed)


if __name__ == "__main__":
    main()
