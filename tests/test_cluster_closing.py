"""One instance's part in closing the windows of a cluster: what it asks, in which order, and what it makes of answers.

The scripts are run by a real Redis. The nodes and their replicas are made here, since what they do at one moment can't
be provoked otherwise; so are the clocks.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any

import pytest
import redis
import servers
import stores
from cluster_model import CLOCK
from cluster_nodes import Client

import redis_store.closing
from redis_store import scripts
from redis_store.closing import ClusterWindows
from redis_store.held import Held
from redis_store.parts import Part
from redis_store.scripts import Command, Keys

LENGTH = 60  # seconds of a window
W = 999_999_960  # start of the window in which a test begins
PATIENCE = 3.0  # seconds
KEYS = Keys("v", LENGTH, 2)


def at_our_time(script: str) -> str:
    ((old, new),) = CLOCK.items()
    assert script.count(old) == 1
    return script.replace(old, new)


OF_CLOSING = ("CLOSING", "CLOSE", "REPORT")
SCRIPTS = {name: at_our_time(getattr(scripts, name)) for name in ("ARRIVE", "TAKE", "BRING", *OF_CLOSING)}


class Place:
    """Home and all parts, on one server; and an instance that asks them."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.mark = b""
        self.patience = self.own_patience = PATIENCE
        self.now = W - 10.0  # by home's clock
        self.mono = 1000.0  # by the instance's
        self.slow = 0.0  # seconds that a trip takes
        self.kept = True  # a replica acknowledges what home does
        self.moved_parts: list[Part] = []
        self.lost_parts: list[Part] = []
        self.before_report: Callable[[], object] = lambda: None
        self.closed: list[Part] = []  # parts that were asked to close
        self.elsewhere: Part | None = None  # it has moved, which the instance does not know yet
        self.parts = [Part(number, keys) for number, keys in enumerate(KEYS.parts(2))]
        self.held = Held(10**6, 2)
        self.windows = ClusterWindows(self, self, self.parts, KEYS, self.held, 0, lambda: self.mono)

    async def begin(self) -> None:
        """Have the instance arrive, in the window W."""
        fixed = ("run", "", str(PATIENCE), "10")
        self.mark = self.run(KEYS.run(SCRIPTS["ARRIVE"], *fixed))[0]
        for part in self.parts:
            self.take(part)
        self.wait(W + 1 - self.now)
        await self.windows.arrived(settles=False)
        assert self.held.window == W

    def take(self, part: Part) -> None:
        part.mark, _ = self.run(part.keys.run(SCRIPTS["TAKE"], "run", "", str(PATIENCE), "10"))
        part.batches = Any  # type: ignore[assignment]  # not None

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.mono += seconds

    def store(self, window: int, part: int, *numbers: int) -> None:
        """Have the instance's ids in a window."""
        key = self.parts[part].keys.ids(window)
        self.run(("SADD", key, *map(str, numbers)), ("EXPIRE", key, "1000"))
        self.held.add(window, [(self.parts[part], [*numbers])])

    def run(self, *commands: Command) -> Any:
        """Return the reply to the last of some commands."""
        clock = ("DEL", "clock"), ("RPUSH", "clock", str(int(self.now)), str(int(self.now % 1 * 1e6)))
        return self.client.run(0, *clock, *commands)[-1]

    def is_open(self, window: int) -> bool:
        """Whether ids are taken in a window, in all parts."""
        return all(self.run(("TYPE", part.keys.ids(window))) == b"set" for part in self.parts)

    def counts(self, window: int) -> dict[bytes, bytes]:
        """Return what home was told, part by part."""
        found = self.run(("HGETALL", KEYS.counts(window)))
        return dict(zip(found[::2], found[1::2], strict=True))

    async def told(self) -> list[tuple[int, int]]:
        """Roll; return the reports that came."""
        await self.windows.roll()
        reports, self.windows.reports = self.windows.reports, []
        return reports

    # What the instance sees of it

    async def ask(self, commands: Sequence[Command], deadline: float = 0.0) -> list[Any]:
        if SCRIPTS["REPORT"] in commands[0]:
            self.before_report()
        self.mono += self.slow
        return [self.run(command) for command in commands]

    async def ask_kept(self, commands: Sequence[Command], deadline: float = 0.0) -> tuple[list[Any], bool]:
        return await self.ask(commands, deadline), self.kept

    async def confirm_place(self) -> None: ...

    def give_up(self, why: Exception) -> None:
        raise AssertionError from why

    async def ask_parts(self, commands: Sequence[tuple[Part, Command]]) -> Iterable[tuple[Part, Any]]:
        self.closed += [part for part, _ in commands]
        moved = redis.ResponseError("MOVED 1 127.0.0.1:1")
        return [(part, moved if part is self.elsewhere else self.run(command)) for part, command in commands]

    def moved(self, part: Part, error: redis.ResponseError) -> None:
        self.moved_parts.append(part)

    def lose(self, part: Part) -> None:
        self.lost_parts.append(part)


@pytest.fixture
def client(server: servers.Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    for name in OF_CLOSING:
        monkeypatch.setattr(redis_store.closing, name, SCRIPTS[name])
    client = Client(server.port)
    yield client
    client.close()


def play(client: Client, test: Callable[[Place], Coroutine[Any, Any, None]]) -> None:
    """Run a test with an instance that has arrived."""

    async def with_place() -> None:
        place = Place(client)
        await place.begin()
        await test(place)

    stores.play(with_place())


def test_no_part_is_closed_before_a_replica_knows_that_its_window_is(client: Client) -> None:
    async def test(place: Place) -> None:
        place.store(W, 0, 1, 2)
        place.store(W, 1, 3)
        place.wait(LENGTH)
        place.kept = False
        assert await place.told() == []
        assert place.is_open(W)
        place.kept = True
        assert await place.told() == [(W, 3)]
        assert not place.is_open(W)

    play(client, test)


def test_home_is_told_the_counts_again_where_it_may_have_lost_them(client: Client) -> None:
    async def test(place: Place) -> None:
        place.store(W, 0, 1, 2)
        place.parts[1].batches = None  # it is away
        place.wait(LENGTH)
        assert await place.told() == []
        assert place.counts(W) == {b"0": b"2"}
        place.run(("DEL", KEYS.counts(W)))
        assert await place.told() == []
        assert place.counts(W) == {}, "not each time that it is tried"
        assert place.windows.remaining() == redis_store.closing.PART_POLL
        assert place.closed == [place.parts[0]], "nor is it counted again"
        await place.windows.arrived(settles=False)
        assert await place.told() == []
        assert place.counts(W) == {b"0": b"2"}
        place.take(place.parts[1])
        assert await place.told() == [(W, 2)]
        assert (place.windows._counts, place.windows._brought) == ({}, {}), "nothing is kept for it"

    play(client, test)


def test_who_waits_for_an_open_window_does_not_wait_for_parts_to_be_closed(client: Client) -> None:
    async def test(place: Place) -> None:
        place.store(W, 0, 1, 2)
        place.store(W, 1, 3)
        place.wait(LENGTH)
        await place.windows.roll(asyncio.get_running_loop().time() + 5)
        assert place.held.window == W + LENGTH
        assert place.is_open(W)

    play(client, test)


def test_no_part_is_closed_of_a_window_that_somebody_may_still_name(client: Client) -> None:
    """It was opened ahead, and is over for less than a second."""

    async def test(place: Place) -> None:
        ahead = W - LENGTH
        place.run(("ZADD", KEYS.closing[0], str(ahead), f"{ahead} {LENGTH}"))
        place.now -= 0.5
        assert await place.told() == []
        assert place.closed == []
        assert place.windows.waiting == 1
        place.wait(0.5)
        await place.told()
        assert {*place.closed} == {*place.parts}
        assert place.windows.waiting == 0

    play(client, test)


def test_a_window_that_could_not_be_reported_just_then_is_reported_later(client: Client) -> None:
    """All parts' counts were brought, but another instance had brought an older report meanwhile."""

    async def test(place: Place) -> None:
        place.store(W, 0, 1, 2)
        place.wait(LENGTH)
        older = W - LENGTH
        bring = KEYS.run(SCRIPTS["BRING"], "-1", str(older), f"{KEYS.member(older)} 7")
        place.before_report = lambda: place.run(bring)
        assert await place.told() == []
        place.before_report = lambda: None
        assert await place.told() == [(W, 2)]

    play(client, test)


def test_a_window_that_is_closed_in_a_part_is_not_opened_again(client: Client) -> None:
    """Home has forgotten it, and its clock is behind."""

    async def test(place: Place) -> None:
        place.windows.met_closed(W)
        await place.windows.learn()
        assert place.held.window == W + LENGTH

    play(client, test)


def test_the_time_is_taken_from_a_trip_that_did_not_wait(client: Client) -> None:
    async def test(place: Place) -> None:
        before = place.windows.now()
        place.now += 5
        place.slow = 1.0
        await place.windows.learn()
        assert abs(place.windows.now() - before - 1) < 0.001, "it went on by its own clock"
        place.slow = 0.0
        await place.windows.learn()
        assert abs(place.windows.now() - place.now) < 0.001

    play(client, test)


def test_the_patience_of_another_that_came_later_is_known(client: Client) -> None:
    async def test(place: Place) -> None:
        place.run(KEYS.run(SCRIPTS["ARRIVE"], "run", "", "9.5", "10"))
        await place.windows.learn()
        assert place.patience == 9.5

    play(client, test)


def test_an_empty_window_that_the_timer_came_late_for_is_reported(client: Client) -> None:
    """Home has opened the one after it as well, which this instance has lived through and not named yet."""

    async def test(place: Place) -> None:
        place.wait(2 * LENGTH + 5)
        assert await place.told() == [(W, 0), (W + LENGTH, 0)]

    play(client, test)


def test_a_part_that_lost_ids_is_arrived_at_anew(client: Client) -> None:
    async def test(place: Place) -> None:
        place.store(W, 0, 1, 2)
        place.store(W, 1, 3)
        place.run(("DEL", place.parts[0].keys.ids(W)))
        place.wait(LENGTH)
        assert await place.told() == []
        assert place.lost_parts == [place.parts[0]]
        assert place.moved_parts == []
        place.take(place.parts[0])
        place.store(W, 0, 1, 2)
        place.wait(PATIENCE + 0.1)
        assert await place.told() == [(W, 3)]

    play(client, test)


def test_a_part_that_moved_is_looked_for(client: Client) -> None:
    async def test(place: Place) -> None:
        place.store(W, 0, 1, 2)
        place.elsewhere = place.parts[0]
        place.wait(LENGTH)
        assert await place.told() == []
        assert place.moved_parts == [place.parts[0]]
        assert place.lost_parts == []
        place.elsewhere = None
        assert await place.told() == [(W, 2)]

    play(client, test)
