"""Time that jumps to the next timer, so that no test waits: hours pass in no time, and the clock can be set meanwhile.

`VirtualLoop` is asyncio's own loop. Where others would wait for a timer, it moves its own time to it, and takes along
a `Clock`, which is the time of day and otherwise stands where it is put.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class Clock:
    """A wall clock that somebody sets."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's loop; instead of waiting for a timer it moves `clock`, and its own time, to it."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock(0.0)
        self.late = 0.0  # seconds by which every waking is late, as on a busy machine
        self.tick = 0.0  # seconds that go by from one look at the time to the next
        self.naps: list[float] = []  # how long it waited each time
        self.errors: list[dict[str, Any]] = []  # what nobody caught
        self._elapsed = 0.0
        super().__init__(_Timeless(self))
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        self._elapsed += self.tick
        return self._elapsed

    def jump(self, seconds: float) -> None:
        self.naps.append(seconds)
        self._elapsed += seconds + self.late
        self.clock.now += seconds + self.late

    def run(self, main: Coroutine[Any, Any, Result]) -> Result:
        return self.run_until_complete(main)

    def advance(self, seconds: float = 0) -> None:
        """Let `seconds` pass, with what is due at that very moment and what follows from it."""

        async def wait() -> None:
            await asyncio.sleep(seconds)
            for _ in range(5):
                await asyncio.sleep(0)

        self.run(wait())


class _Timeless(selectors.SelectSelector):
    """Waits for nothing and says so to its loop."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for what cannot happen"
            if timeout > 0:
                self._loop.jump(timeout)
        return ready
