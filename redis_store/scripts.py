"""The Lua scripts, each in a file of its own that opens with its keys, arguments and result; and the names of the keys.

All keys begin with `--key-prefix`. What the fleet agrees on stands in some of them, which every script at home gets in
the same order (see common.lua). A window's ids are a set of their own, in a cluster one in each part. There a tag in
braces decides in which slot a key is: what the fleet agrees on is in the stream's slot.
"""

from binascii import crc_hqx
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import redis

from redis_store.wire import packed_words

KEEP = 2 * 86_400  # seconds after which Redis may forget a window's keys, two windows at least
AGREED = 60  # seconds, and two windows, that an agreement of the fleet outlives the last one who was part of it
SLOTS = 16_384  # of a cluster


def _read(name: str) -> str:
    return Path(__file__).with_name(f"{name}.lua").read_text(encoding="utf-8")


_COMMON = _read("common")
_PART = _read("part")
_MARK = _read("mark")
_STREAM = _read("stream")
ARRIVE: Final = _COMMON + _MARK + _read("arrive")
BRING: Final = _COMMON + _read("bring")
OPEN: Final = _COMMON + _read("open")
ROLL: Final = _COMMON + _MARK + _STREAM + _read("roll")
CLOSING: Final = _COMMON + _STREAM + _read("closing")
REPORT: Final = _COMMON + _STREAM + _read("report")
TAKE: Final = _PART + _MARK + _read("take")
CLOSE: Final = _PART + _MARK + _read("close")
COUNT: Final = _read("count")
HOLD: Final = _read("hold")
RELEASE: Final = _read("release")

Command = tuple[str | bytes, ...]


def slot_of(key: str) -> int:
    """Return the slot of a cluster that a key is in (Redis Cluster Specification, "Key distribution model")."""
    _, brace, rest = key.partition("{")
    tag, end, _ = rest.partition("}")
    return crc_hqx((tag if brace and end and tag else key).encode(), 0) % SLOTS


def _tag(part: int, parts: int) -> str:
    """Return the hash tag of a part: the smallest number whose slot lies in the middle quarter of the part's share."""
    share = SLOTS // parts
    middle = range(part * share + 3 * share // 8, part * share + 5 * share // 8)
    return next(str(number) for number in range(SLOTS * parts) if crc_hqx(str(number).encode(), 0) % SLOTS in middle)


class PartKeys:
    """The keys of a part, a fixed share of all ids."""

    def __init__(self, prefix: str, keep: str, number: int, parts: int) -> None:
        """A part of a cluster; `keep` is how long its keys are kept as a last resort, seconds."""
        self._root = f"{prefix}:{{{_tag(number, parts)}}}"
        self._keep = keep
        self.mark = f"{self._root}:mark"
        self._adds = lru_cache(2)(lambda start: packed_words(("SADD", self.ids(start))))
        self._home = (self.mark, f"{self._root}:settling")

    def ids(self, start: int) -> str:
        """Return the key of the set of a window."""
        return f"{self._root}:{start}"

    def adding(self, start: int) -> tuple[int, str]:
        """Return the beginning of the command that stores ids in a window, for `wire.pack_numbers`."""
        return self._adds(start)

    def opening(self, start: int) -> tuple[tuple[Command, ...], tuple[Command, ...]]:
        """Return what goes before and behind the first command of a connection that stores ids of a window.

        It is a transaction, so that nobody finds a set without a time to live, and a link that breaks leaves none.
        """
        return (("MULTI",),), (("EXPIRE", self.ids(start), self._keep), ("EXEC",))

    def run(self, script: str, *arguments: str, keys: tuple[str, ...] = ()) -> Command:
        """Return the command that runs a script on the part, on `keys` besides those of all such scripts."""
        names = (*self._home, *keys)
        return ("EVAL", script, str(len(names)), *names, self._keep, *arguments)


class Keys:
    """The keys of one prefix, and the commands that run scripts on them.

    Where there is one server, all ids are one part, and this is `PartKeys` of it as well.
    """

    def __init__(self, prefix: str, seconds: int, parts: int = 1) -> None:
        """`seconds` is the length of a window; ids are in several `parts` in a cluster alone."""
        self.prefix = prefix
        self.seconds = seconds
        self.stream = f"{prefix}:reports"
        self._root = prefix if parts == 1 else f"{prefix}:{{{self.stream}}}"  # in the stream's slot
        self.mark = f"{self._root}:mark"
        self.lease = f"{self._root}:webhook"
        self.first = f"{self.lease}:first"  # the time from which on windows are sent to the webhook
        names = ("open", "reports", "reported", "mark", "settling", "window", "patience", "returned")
        self._home = tuple(self.stream if name == "reports" else f"{self._root}:{name}" for name in names)
        self.closing = (f"{self._root}:ahead", f"{self._root}:closing")
        self.keep = str(max(KEEP, 2 * seconds))
        self._agreed = str(AGREED + 2 * seconds)
        self._adds = lru_cache(2)(lambda start: packed_words(("SADD", self.ids(start))))

    def ids(self, start: int) -> str:
        """Return the key of the set of a window."""
        return f"{self.prefix}:{{{start}}}:ids"

    def adding(self, start: int) -> tuple[int, str]:
        """Return the beginning of the command that stores ids in a window, for `wire.pack_numbers`."""
        return self._adds(start)

    def parts(self, parts: int) -> list[PartKeys]:
        """Return the keys of each part of a cluster."""
        return [PartKeys(self.prefix, self.keep, number, parts) for number in range(parts)]

    def counts(self, start: int) -> str:
        """Return the key of the counts of a window's parts."""
        return f"{self._root}:counts:{start}"

    def member(self, start: int) -> str:
        """Return what stands for a window in the index: its name, and its length."""
        return f"{datetime.fromtimestamp(start, UTC):%Y-%m-%dT%H:%M:%SZ} {self.seconds}"

    def run(self, script: str, *arguments: str, keys: tuple[str, ...] = ()) -> Command:
        """Return the command that runs a script at home, on `keys` besides those of home."""
        names = (*self._home, *keys)
        return ("EVAL", script, str(len(names)), *names, self.keep, self._agreed, *arguments)

    def opening(self, start: int) -> tuple[tuple[Command, ...], tuple[Command, ...]]:
        """Return what goes before and behind a command that stores ids in a window that may not be open yet.

        It is a transaction, so that no ROLL finds a set without a time to live, and a link that breaks leaves none.
        """
        key = self.ids(start)
        before = self.run(OPEN, str(start), self.member(start), keys=(key,))
        return (("MULTI",), before), (("EXPIRE", key, self.keep), ("EXEC",))


def opened(replies: list[Any]) -> Any:
    """Return the reply to the command that stood in an opening; or the error for which it stored nothing."""
    *queued, done = replies
    if isinstance(done, list):
        *before, reply, _ = done
        return next((each for each in before if isinstance(each, redis.ResponseError)), reply)
    return next((reply for reply in queued if isinstance(reply, redis.ResponseError)), done)
