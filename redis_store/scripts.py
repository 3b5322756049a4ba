"""The Lua scripts, each in a file of its own that opens with its keys, arguments and result; and the names of the keys.

All keys begin with `--key-prefix`. What the fleet agrees on stands in eight of them, which every script at home gets
in the same order (see common.lua); a window's ids are a set of their own.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import redis

KEEP = 2 * 86_400  # seconds after which Redis may forget a window's keys, two windows at least
AGREED = 60  # seconds, and two windows, that an agreement of the fleet outlives the last one who was part of it


def _read(name: str) -> str:
    return Path(__file__).with_name(f"{name}.lua").read_text(encoding="utf-8")


_COMMON = _read("common")
ARRIVE: Final = _COMMON + _read("arrive")
BRING: Final = _COMMON + _read("bring")
OPEN: Final = _COMMON + _read("open")
ROLL: Final = _COMMON + _read("roll")
COUNT: Final = _read("count")
HOLD: Final = _read("hold")
RELEASE: Final = _read("release")

Command = tuple[str | bytes, ...]


class Keys:
    """The keys of one prefix, and the commands that run scripts on them."""

    def __init__(self, prefix: str, seconds: int) -> None:
        """`seconds` is the length of a window."""
        self.prefix = prefix
        self.seconds = seconds
        self.stream = f"{prefix}:reports"
        self.mark = f"{prefix}:mark"
        self.lease = f"{prefix}:webhook"
        names = ("open", "reports", "reported", "mark", "settling", "window", "patience", "returned")
        self._home = tuple(f"{prefix}:{name}" for name in names)
        self.keep = str(max(KEEP, 2 * seconds))
        self._agreed = str(AGREED + 2 * seconds)

    def ids(self, start: int) -> str:
        """Return the key of the set of a window."""
        return f"{self.prefix}:{{{start}}}:ids"

    def member(self, start: int) -> str:
        """Return what stands for a window in the index: its name and its length."""
        return f"{datetime.fromtimestamp(start, UTC):%Y-%m-%dT%H:%M:%SZ} {self.seconds}"

    def run(self, script: str, *arguments: str) -> Command:
        """Return the command that runs a script at home."""
        return ("EVAL", script, "8", *self._home, self.keep, self._agreed, *arguments)

    def opening(self, start: int) -> tuple[tuple[Command, ...], tuple[Command, ...]]:
        """Return what goes before and behind a command that stores ids in a window that may not be open yet.

        It is a transaction, so that no ROLL finds a set without a time to live, and a link that breaks leaves none.
        """
        key = self.ids(start)
        before = ("EVAL", OPEN, "9", *self._home, key, self.keep, self._agreed, str(start), self.member(start))
        return (("MULTI",), before), (("EXPIRE", key, self.keep), ("EXEC",))


OPENING = 5  # replies to a command and what `Keys.opening` puts around it


def opened(replies: list[Any]) -> Any:
    """Return the reply to the command that stood in an opening; or the error for which it stored nothing."""
    *queued, done = replies
    if isinstance(done, list):
        before, reply, _ = done
        return before if isinstance(before, redis.ResponseError) else reply
    return next((reply for reply in queued if isinstance(reply, redis.ResponseError)), done)
