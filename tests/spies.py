"""The program with a receiver on this machine that its callbacks may reach: requests that make them, and what came."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

import support
from receivers import Receiver, Request
from stores import long_window

ALLOW = ("--callback-allow", "127.0.0.0/8,::1")
LONG = ("--window", str(long_window()))  # does not end while the tests run


def request(number: int, endpoint: str | bytes, method: str = "GET") -> bytes:
    """Return the request that has an id counted and names an endpoint."""
    target = f"{support.PATH}?id={number}&endpoint={quote(endpoint, safe='')}"
    return support.get(target).replace(b"GET", method.encode(), 1)


def count_of(found: Request) -> int:
    match = re.search(r"[?&]count=([0-9]+)$", found.target)
    assert match, found.target
    return int(match[1])


def stop(program: support.Program) -> None:
    """Stop the program; what waited is delivered then."""
    assert program.stop() == 0


def from_log(program: support.Program, pattern: str) -> list[str]:
    return [line for line in program.log.all if re.search(pattern, line)]


@dataclass
class Spy:
    """A program and a receiver, and how many ids were counted so far."""

    program: support.Program
    receiver: Receiver
    count: int = 0

    def call(self, endpoint: str | bytes) -> Request:
        """Have a new id counted; return the callback, which must tell the count."""
        before = len(self.receiver.requests)
        self.count += 1
        with support.Client(self.program.address) as client:
            assert client.ask(request(self.count, endpoint))[::2] == (200, b"ok")
        *_, last = self.receiver.wait_for(before + 1)
        return last


@contextlib.contextmanager
def watching() -> Iterator[Spy]:
    talkative = support.patched("reporter.LINES = 1000")
    with Receiver() as receiver, support.verve(*LONG, *ALLOW, prefix=talkative) as program:
        yield Spy(program, receiver)
