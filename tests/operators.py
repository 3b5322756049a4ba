"""What an operator does: asks the operators' listener of a running program, and reads its numbers."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import support
from processes import wait_until

import admin

NEVER = ("--request-timeout", "30")  # no request fails because the machine is busy


class Operators:
    """What an operator does: asks one thing at a time, each on a connection of its own."""

    def __init__(self, address: support.Address) -> None:
        self.address = address

    def ask(self, path: str, method: str = "GET") -> support.Response:
        request = support.get(path).replace(b"GET", method.encode(), 1)
        return self.send(request, head=method == "HEAD")

    def send(self, request: bytes, *, head: bool = False) -> support.Response:
        with support.Client(self.address) as client:
            answer = client.ask(request, head=head)
            assert client.rest() == b""
            assert answer.closes
            return answer

    def ready(self) -> tuple[int, list[str]]:
        answer = self.ask("/readyz")
        return answer.status, answer.body.decode().splitlines()

    def windows(self) -> list[dict[str, Any]]:
        found = json.loads(self.ask("/windows").body)
        assert isinstance(found, list)
        return found

    def numbers(self) -> dict[str, float]:
        """Return all samples, by name and labels as they are written."""
        answer = self.ask("/metrics")
        assert answer.status == 200
        lines = answer.body.decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def statuses(self) -> dict[int, int]:
        """Return how many requests were answered, by status, of those that were."""
        found = {name: value for name, value in self.numbers().items() if name.startswith("verve_requests_total")}
        return {int(name[-5:-2]): int(value) for name, value in found.items() if value}

    def wait_for(self, *names: str, true: Callable[..., object]) -> None:
        """Wait until something is true of numbers."""
        wait_until(lambda: (now := self.numbers()) and true(*(now[name] for name in names)))


def operators_of(program: support.Program) -> Operators:
    port = program.log.wait_for(r"for operators: http://127\.0\.0\.1:([0-9]+)$")[1]
    return Operators(("127.0.0.1", int(port)))


@contextlib.contextmanager
def watched(*flags: str, prefix: tuple[str, ...] = (), at: int = 0) -> Iterator[tuple[support.Program, Operators]]:
    """Run the program with its operators' listener."""
    with support.verve("--admin", f"127.0.0.1:{at}", *flags, prefix=prefix) as program:
        yield program, operators_of(program)


def patched(statements: str) -> tuple[str, ...]:
    return support.patched(f"import admin; {statements}")


def feed(program: support.Program, *numbers: int) -> None:
    with support.Client(program.address) as client:
        for number in numbers:
            assert client.ask(support.accept(number)).status == 200


def told(program: support.Program, *counts: int) -> list[str]:
    """Wait until windows with these counts are closed, after whichever others; return their starts."""

    def found(lines: list[str]) -> list[str] | None:
        windows = re.findall(r"unique ids in (\S+): (\d+)$", "\n".join(lines), re.MULTILINE)
        ends = [
            [*map(str, counts)] == [count for _, count in windows[at:][: len(counts)]] for at in range(len(windows))
        ]
        return [start for start, _ in windows[ends.index(True) :][: len(counts)]] if True in ends else None

    return program.log.wait_until(found, f"windows of {counts}")


def served(operators: Operators) -> bool:
    with contextlib.suppress(OSError, AssertionError):
        return operators.ready()[0] == 200
    return False


def state_of(operators: Operators) -> dict[str, Any]:
    found = json.loads(operators.ask("/state").body)
    assert isinstance(found, dict)
    return found


def rows_of(*samples: dict[str, float]) -> list[admin.Row]:
    """Return the rows of as many workers, written now; each has these numbers."""
    board = admin.Board(len(samples))
    rows = [admin.Row(board, number, lambda each=each: each) for number, each in enumerate(samples)]  # type: ignore[misc]
    for row in rows:
        row.write()
    return rows


def history_of(row: admin.Row, recent: admin.Recent) -> admin.History:
    """Return what a worker knows of the windows at first; the open one starts at 60."""
    return admin.History(row.board, lambda: (60, 60, 0), recent)


def lose(row: admin.Row) -> None:
    """Have a worker be missing: its row was written too long ago."""
    row.board.rows[row.number][0] -= admin.MISSING + 1
