"""Tells the count of each window, and keeps the time at which windows end.

`roll_windows` sleeps until the open window is over, has the store roll, and tells what was closed. The end comes
from the epoch and is asked of the store anew after every nap of at most a second, so a clock that was set, or a
machine that slept, is noticed within that second, and no error adds up. What to do about it is the store's
knowledge; see there.

The log gets one line a window. A file is watched: when logrotate moves it, the next line opens it anew.
"""

import asyncio
import json
import logging
import logging.handlers
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from itertools import islice

NAP = 1.0  # seconds after which the clock is looked at again
BURST = 200  # windows told in one go; after a long sleep there may be thousands

log = logging.getLogger("verve.reporter")


def iso(start: int) -> str:
    """Return the name of the window that starts at `start` (Unix seconds), as RFC 3339 writes it in UTC."""
    return datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def tell(start: int, count: int, *, final: bool = True) -> None:
    """Log the count of a window; `final` unless the window went on without this process."""
    window = iso(start)
    note = "" if final else " (not final: stopped before the window's end)"
    log.info("unique ids in %s: %d%s", window, count, note, extra={"window": window, "count": count, "final": final})


async def roll_windows(
    remaining: Callable[[], float],
    roll: Callable[[], Awaitable[Iterable[tuple[int, int]]]],
    tell: Callable[[int, int], None] = tell,
) -> None:
    """Close each window at its end and tell its count, for ever.

    `remaining()` says how many seconds there are until `roll()` has something to close; that returns the start
    and the count of each window it closed, oldest first.
    """
    while True:
        await asyncio.sleep(min(remaining(), NAP))
        closed = iter(await roll())
        try:
            while burst := list(islice(closed, BURST)):
                for start, count in burst:
                    tell(start, count)
                await asyncio.sleep(0)
        finally:
            for start, count in closed:  # stopped amid a long list
                tell(start, count)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`, and a report's `window`, `count`, `final`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in ("window", "count", "final"):
            if name in record.__dict__:
                line[name] = record.__dict__[name]
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def log_to(file: str | None, style: str, level: str) -> None:
    """Send the log to `file`, or to stderr, as `text` or `json`. Raises OSError if the file can't be opened."""
    handler: logging.Handler
    handler = logging.handlers.WatchedFileHandler(file, encoding="utf-8") if file else logging.StreamHandler()
    if style == "json":
        handler.setFormatter(JsonFormatter())
    else:
        text = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
        text.converter = time.gmtime
        handler.setFormatter(text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
