"""Parts: fixed shares of all ids, each of which lies on one server as a whole.

Where there is one server there is one part. In a cluster there are PARTS; an id's part follows from its value alone, is
the same in every process, and never changes, so that the same id always meets itself. Slots of a cluster may move from
node to node: a part goes with its slot.
"""

from collections.abc import Sequence
from typing import Any, Final, Protocol

from dedup import Counted, Done
from redis_store.scripts import Keys, PartKeys

PARTS: Final = 64  # of a cluster
_SPREAD: Final = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: ids that go up one by one are spread evenly
_WHOLE: Final = 2**64 - 1
_SHIFT: Final = 58  # 64 less the 6 bits that tell 64 parts apart


class Queue(Protocol):
    """What takes the ids of a part, while a connection to its server stands."""

    @property
    def queued(self) -> int:
        """Ids that wait to be sent."""

    def add(self, number: int, done: Done, counted: Counted | None) -> int | None:
        """Have an id stored in the open window; return BUSY, or None: `done` will be told."""

    def again(self, batch: Any) -> None:
        """Send a batch that another connection did not carry out."""


class Part:
    """What this process knows of a part."""

    def __init__(self, number: int, keys: Keys | PartKeys) -> None:
        self.number = number
        self.keys = keys
        self.mark = b""  # found last; none if the data may have been lost since
        self.seen = b""  # the mark under which all ids held of it were stored
        self.opened = 0  # the newest window that a batch was stored in over the connection of now
        self.batches: Queue | None = None  # while ids of it are taken


def part_of(number: int) -> int:
    """Return the part of a cluster that an id is in."""
    return ((number * _SPREAD) & _WHOLE) >> _SHIFT


Shares = list[tuple[Part, list[int]]]  # ids by part


def split(numbers: list[int], parts: Sequence[Part]) -> Shares:
    """Return ids by part, of `parts`, which are all that there are."""
    if len(parts) == 1:
        return [(parts[0], numbers)]
    found: dict[int, list[int]] = {}
    for number in numbers:
        part = ((number * _SPREAD) & _WHOLE) >> _SHIFT  # part_of
        if part in found:
            found[part].append(number)
        else:
            found[part] = [number]
    return [(parts[part], ids) for part, ids in found.items()]
