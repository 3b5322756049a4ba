"""Home, the nodes of a cluster and what is said to them, one answer at a time.

Two things that happen between a question and its answer are seldom played by the model, so nodes are made here that
answer when a test says what happens meanwhile.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import redis
import stores

import dedup
import redis_store.member
import redis_store.node
import redis_store.parts
import redis_store.replay
from redis_store.batches import AGAIN, Batches, Counting, Refusals
from redis_store.held import Held
from redis_store.home import ClusterHome
from redis_store.member import Member
from redis_store.parts import Part, part_of
from redis_store.scripts import Command, Keys
from redis_store.sizes import Sizes
from redis_store.wire import Address, Outcome

W = 999_999_960  # start of a window
KEYS = Keys("v", 60, 2)
TIMEOUT = 0.5  # seconds that an id may wait

Answer = Callable[[Command], Any]  # gives the reply to a command


class Windows:
    """What an instance knows of windows; `meanwhile` happens while it learns more."""

    def __init__(self) -> None:
        self.meanwhile: Callable[[], object] = lambda: None
        self.learned = 0
        self.closed: list[int] = []

    async def arrived(self, settles: bool) -> None:
        await self.learn()

    async def learn(self) -> None:
        self.learned += 1
        self.meanwhile()

    def turn(self) -> int:
        return W

    async def roll(self, deadline: float) -> None: ...

    def met_closed(self, window: int) -> None:
        self.closed.append(window)


class Wire:
    """A connection to a node that answers at once."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.closed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.sent: list[Callable[[Outcome], None]] = []  # batches, to be answered by the test

    async def ask(self, commands: Sequence[Command], deadline: float) -> list[Any]:
        return [self.answer(command) for command in commands]

    def send(self, packed: bytes, count: int, deadline: float, done: Callable[[Outcome], None]) -> None:
        self.sent.append(done)

    def abort(self, why: Exception) -> None:
        if not self.closed.done():
            self.closed.set_result(why)


class Owner:
    """The cluster, which is told what a node found."""

    def __init__(self) -> None:
        self.known = self.told_away = False
        self.elsewhere: list[Part] = []
        self.noted: list[int] = []

    def moved(self, part: Part, error: redis.ResponseError) -> None:
        self.elsewhere.append(part)

    def note(self, stored_again: int = 0) -> None:
        self.noted.append(stored_again)


class World:
    """An instance, and one node or another that it asks."""

    def __init__(self) -> None:
        self.stale = 0  # how often the map was said to be wrong
        self.windows = Windows()
        self.home = ClusterHome(KEYS, TIMEOUT, self.is_stale, lambda: None)
        self.home.windows = self.windows  # type: ignore[assignment]
        self.parts = [Part(number, keys) for number, keys in enumerate(KEYS.parts(2))]
        self.held = Held(10**6, 2)
        self.held.open(W)
        self.counting = Counting(self.parts, self.held, dedup.Meters(), TIMEOUT, self.tell)
        self.owner = Owner()
        self.said: list[int] = []  # what became of ids

    def is_stale(self) -> None:
        self.stale += 1

    def tell(self, dones: Sequence[dedup.Done], outcome: int) -> None:
        self.said += [outcome] * len(dones)

    def node(self, answer: Answer, *parts: Part) -> Member:
        """Return a node that is connected to, and has some parts by the map."""
        member = Member(Address("127.0.0.1", 1), False, self.owner, self.home, KEYS.mark, self.counting)
        wire: Any = Wire(answer)
        member._wire = wire
        windows: Any = self.windows
        member.batches = Batches(wire, self.counting, windows, Refusals())
        member.parts = {*parts}
        return member


def play(test: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def with_world() -> None:
        await test(World())

    stores.play(with_world())


def answers(mark: bytes, settles: int = 0) -> Answer:
    """Return what a node says to who arrives."""
    return lambda _: [mark, settles, b"3"]


MOVED = redis.ResponseError("MOVED 1 127.0.0.1:2")
CLOSED = redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")


# Home


def test_home_that_moved_while_it_was_arrived_at_is_not_asked_before_it_is_there_too() -> None:
    async def test(world: World) -> None:
        first, second = (world.node(answers(mark)) for mark in (b"one 1.0", b"two 1.0"))
        world.home.move(first)
        assert first.hosts_home
        world.windows.meanwhile = lambda: world.home.move(second)
        await world.home.take(first, "one")
        assert not world.home.reachable
        assert (first.hosts_home, second.hosts_home) == (False, True)
        world.windows.meanwhile = lambda: None
        await world.home.take(second, "two")
        assert world.home.reachable
        world.home.move(first)
        assert not world.home.reachable

    play(test)


def test_home_that_lost_its_data_while_it_was_arrived_at_is_arrived_at_anew_as_before() -> None:
    async def test(world: World) -> None:
        asked: list[Command] = []

        def answer(command: Command) -> Any:
            asked.append(command)
            return [b"one 2.0" if len(asked) > 1 else b"one 1.0", 0, b"3"]

        node = world.node(answer)
        world.home.move(node)
        await world.home.take(node, "one")
        world.windows.meanwhile = lambda: setattr(world.home, "mark", b"")  # as an answer to an earlier roll has it
        await world.home.take(node, "one")
        world.windows.meanwhile = lambda: None
        await world.home.take(node, "one")
        assert ["one 1.0" in each for each in asked] == [False, True, True], "it names the mark that it knew all under"

    play(test)


def test_home_that_says_that_it_is_elsewhere_is_looked_for() -> None:
    async def test(world: World) -> None:
        node = world.node(answers(b"one 1.0"))
        world.home.move(node)
        await world.home.take(node, "one")
        node._wire.answer = lambda _: MOVED  # type: ignore[union-attr]
        with pytest.raises(redis.ConnectionError, match="MOVED"):
            await world.home.ask([("GET", KEYS.mark)])
        assert world.stale == 1
        assert not world.home.reachable
        node._wire.answer = answers(b"one 1.0")  # type: ignore[union-attr]
        await world.home.take(node, "one")
        world.home.look(MOVED)
        assert world.stale == 2
        assert not world.home.reachable

    play(test)


def test_home_is_arrived_at_anew_when_its_data_may_be_lost() -> None:
    async def test(world: World) -> None:
        node = world.node(lambda _: [b"one 1.0", 0, b"9.5"])
        world.home.move(node)
        assert node._wake.is_set()
        await world.home.take(node, "one")
        assert world.home.patience == 9.5, "the fleet's"
        world.home.move(node)  # as each map has it
        world.home.give_up(redis.ConnectionError())
        world.home.look(b"one 1.0")
        assert world.home.reachable
        node._wake.clear()
        world.home.mark = b""
        world.home.give_up(redis.ConnectionError())
        assert not world.home.reachable
        assert node._wake.is_set()

    play(test)


def test_nothing_that_home_does_on_arrival_is_taken_to_outlive_it() -> None:
    async def test(world: World) -> None:
        node = world.node(answers(b"one 1.0"))
        world.home.move(node)
        assert await world.home.ask_kept([("PING",)]) == ([[b"one 1.0", 0, b"3"]], False)
        await world.home.take(node, "one")
        assert (await world.home.ask_kept([("PING",)]))[1], "there is no replica"

    play(test)


# A node, and its parts


def test_a_part_is_taken_by_the_mark_last_seen_then_windows_are_learned_then_ids_brought_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_store.parts, "_SHIFT", 63)  # there are two

    async def test(world: World) -> None:
        part = world.parts[0]
        part.seen, part.mark = b"one 1.0", b"one 2.0"  # which a look has found
        part.opened = W
        world.held.add(W, [(part, [number for number in range(9) if part_of(number) == 0][:2])])
        said: list[str] = []

        def answer(command: Command) -> Any:
            name = {"MULTI": b"OK", "EXEC": [2, 1]}.get(str(command[0]), b"QUEUED")
            said.append(f"{command[0]!s} {'one 1.0' in command} {world.windows.learned}")
            return [b"one 2.0", 1] if command[0] == "EVAL" else name

        node = world.node(answer, part)
        world.home.reachable = True
        await node._take()
        assert said == [
            "EVAL True 0",
            "EVAL False 1",
            "MULTI False 1",
            "SADD False 1",
            "EXPIRE False 1",
            "EXEC False 1",
        ]
        assert (part.seen, part.batches, part.opened) == (b"one 2.0", node.batches, 0)
        assert world.owner.noted == [2]

    play(test)


@pytest.mark.parametrize("when", ["it is asked", "windows are learned"])
def test_a_part_that_is_given_to_another_node_meanwhile_is_left_to_that(when: str) -> None:
    async def test(world: World) -> None:
        part, other = world.parts

        def answer(command: Command) -> Any:
            if when == "it is asked":
                node.drop(part)
                part.mark = b"two 1.0"
            return [b"one 1.0", 0]

        def learned() -> None:
            if when != "it is asked":
                node.drop(part)

        node = world.node(answer, part, other)
        world.home.reachable = True
        world.windows.meanwhile = learned
        await node._take()
        assert (part.batches, part.seen) == (None, b"")
        if when == "it is asked":
            assert part.mark == b"two 1.0"
        assert other.batches is node.batches

    play(test)


def test_ids_of_a_part_are_brought_back_though_the_window_is_closed_in_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_store.parts, "_SHIFT", 63)  # there are two
    monkeypatch.setattr(redis_store.replay, "CHUNK", 2)

    async def test(world: World) -> None:
        part, other = world.parts
        for number in range(20):
            world.held.add(W, [(world.parts[part_of(number)], [number])])
        brought: set[int] = set()

        def answer(command: Command) -> Any:
            if command[0] == "EVAL":
                return [b"one 1.0", 1]
            if command[0] == "SADD":
                closed = command[1] == part.keys.ids(W)
                replies[:] = [CLOSED if closed else 1, 1]
                brought.update([] if closed else map(int, command[2:]))
            return {"MULTI": b"OK", "EXEC": [*replies]}.get(str(command[0]), b"QUEUED")

        replies: list[Any] = []
        world.home.reachable = True
        await world.node(answer, part, other)._take()
        assert brought == {number for number in range(20) if part_of(number) == 1}

    play(test)


def test_a_part_that_loses_its_data_while_ids_are_brought_back_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store.parts, "_SHIFT", 63)  # there are two

    async def test(world: World) -> None:
        part = world.parts[0]
        world.held.add(W, [(part, [number for number in range(9) if part_of(number) == 0])])
        marks = iter([b"one 1.0", b"one 2.0"])

        def answer(command: Command) -> Any:
            if command[0] == "EVAL":
                return [next(marks), 1]
            return {"MULTI": b"OK", "EXEC": [2, 1]}.get(str(command[0]), b"QUEUED")

        node = world.node(answer, part)
        world.home.reachable = True
        with pytest.raises(redis.ConnectionError, match="it has lost its data"):
            await node._take()
        assert (part.batches, part.seen) == (None, b"")

    play(test)


def test_a_part_that_can_not_be_taken_says_why() -> None:
    async def test(world: World) -> None:
        part = world.parts[0]
        refused = redis.ResponseError("NOPERM this user has no permissions to run the 'eval' command")
        with pytest.raises(redis.ResponseError, match="NOPERM"):
            await world.node(lambda _: refused, part)._take()
        node = world.node(lambda _: MOVED, part)
        await node._take()
        assert world.owner.elsewhere == [part]
        await stores.until(node._wake.is_set)  # it is tried again

    play(test)


def test_a_node_goes_on_with_its_parts_when_home_fails() -> None:
    async def test(world: World) -> None:
        node = world.node(lambda _: [b"one 1.0", 0], world.parts[0])
        failed = 0

        def fail() -> None:
            nonlocal failed
            failed += 1
            raise redis.ConnectionError("home is away")

        world.windows.meanwhile = fail
        world.home.reachable = True
        watching = asyncio.create_task(node._watch())
        await stores.until(lambda: failed)
        node.wake()
        await stores.until(lambda: failed > 1 or watching.done())
        assert not watching.done()
        watching.cancel()

    play(test)


def taken(world: World, answer: Answer) -> Member:
    """Return a node whose parts are taken."""
    node = world.node(answer, *world.parts)
    for part in world.parts:
        part.mark = part.seen = b"one 1.0"
        part.batches = node.batches
    return node


def looked(marks: dict[Part, Any]) -> Answer:
    """Return what a node says when it is looked at."""
    found = {part.keys.mark: mark for part, mark in marks.items()}
    return lambda command: found[str(command[1])] if command[0] == "GET" else b""


def test_what_a_look_finds_of_parts() -> None:
    async def test(world: World) -> None:
        part, other = world.parts
        node = taken(world, looked({part: b"one 1.0", other: MOVED}))
        await node.look()
        assert world.owner.elsewhere == [other]
        assert not node._wake.is_set()
        node._wire.answer = looked({part: None, other: b"one 1.0"})  # type: ignore[union-attr]
        await node.look()
        assert (part.batches, part.mark, part.seen) == (None, b"", b"one 1.0"), "it has lost its data"
        assert other.batches is node.batches
        assert node._wake.is_set()
        assert world.owner.told_away

    play(test)


def test_a_look_says_nothing_of_what_is_elsewhere_when_it_ends() -> None:
    async def test(world: World) -> None:
        part, other = world.parts
        second = world.node(answers(b"two 1.0"))

        def answer(command: Command) -> Any:
            if command == ("GET", KEYS.mark):
                world.home.move(second)
                world.home.mark, world.home.reachable = b"two 1.0", True
            elif command == ("GET", part.keys.mark):
                node.drop(part)
                part.batches, part.mark = second.batches, b"two 1.0"
            return b"one 2.0" if command[0] == "GET" and command[1] != other.keys.mark else b"one 1.0"

        node = taken(world, answer)
        world.home.move(node)
        world.home.mark, world.home.reachable = b"one 1.0", True
        await node.look()
        assert (part.batches, part.mark) == (second.batches, b"two 1.0")
        assert (world.home.reachable, world.home.mark) == (True, b"two 1.0")

    play(test)


def test_a_look_tries_to_bring_back_what_found_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store.parts, "_SHIFT", 63)  # there are two

    async def test(world: World) -> None:
        part = world.parts[0]
        world.held.missing[W, 0] = [number for number in range(9) if part_of(number) == 0]

        def answer(command: Command) -> Any:
            return {"GET": b"one 1.0", "MULTI": b"OK", "EXEC": [1, 1], "INFO": b""}.get(str(command[0]), b"QUEUED")

        node = taken(world, answer)
        part.batches = None
        await node.look()
        assert world.held.missing, "its part is not taken"
        missing = [*world.held.missing[W, 0]]
        part.batches = node.batches
        await node.look()
        assert not world.held.missing
        assert sorted(number for _, ids in world.held.windows() for shard in ids.sets for number in shard) == missing, (
            "they are held again, for the next loss"
        )

    play(test)


def test_who_loses_a_connection_loses_what_was_reached_over_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*_: object) -> Any:
        kept.append(Wire(lambda command: {"INFO": b"run_id:one\r\n", "WAIT": 1}.get(str(command[0]), b"OK")))
        return kept[-1]

    async def test(world: World) -> None:
        monkeypatch.setattr(redis_store.member, "connect", connect)
        part, other = world.parts
        node = taken(world, answers(b""))
        node._run_id, node.replicas = "one", 1
        assert await node.ask_kept([("PING",)]) == ([b"OK"], True)
        kept[0].abort(redis.ConnectionError("it was closed"))
        assert await node.ask_kept([("PING",)]) == ([b"OK"], True), "over another connection"
        other.batches = world.node(answers(b"")).batches
        batches, node.batches = node.batches, None
        node._left(batches)
        assert part.batches is None
        assert other.batches is not None
        assert world.owner.noted == [0]
        assert kept[1].closed.done()
        with contextlib.suppress(redis.ConnectionError):
            await node.ask_kept([("PING",)])
        assert kept[2].closed.done(), "a connection that was made meanwhile is not kept"

    kept: list[Wire] = []
    play(test)


def test_a_part_is_not_taken_while_home_is_away() -> None:
    async def test(world: World) -> None:
        part = world.parts[0]
        node = world.node(lambda _: [b"one 1.0", 0], part)
        await node._take()
        assert part.mark == b"one 1.0", "but it is arrived at, so it waits for all"
        assert part.batches is None

    play(test)


@pytest.mark.parametrize(
    ("by_map", "online", "acknowledged", "kept"),
    [(0, 0, 0, True), (1, 0, 0, False), (0, 1, 0, False), (1, 1, 1, True)],
)
def test_what_a_node_does_outlives_it_when_a_replica_has_it(
    by_map: int, online: int, acknowledged: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the map has is one, though the node says that none follows it: their link may be broken."""

    async def connect(*_: object) -> Any:
        return Wire(lambda command: {"INFO": b"run_id:one\r\n", "WAIT": acknowledged}.get(str(command[0]), b"OK"))

    async def test(world: World) -> None:
        monkeypatch.setattr(redis_store.member, "connect", connect)
        node = world.node(lambda _: b"OK")
        node._run_id, node.replicas, node._followers = "one", by_map, online
        assert await node.ask_kept([("PING",)]) == ([b"OK"], kept)

    play(test)


def test_replicas_are_known_from_the_first_answer_of_a_node_on() -> None:
    """The map knows none before the node was sent something; a window may end before the first look."""

    async def test(world: World) -> None:
        node = world.node(lambda _: b"role:master\r\nconnected_slaves:1\r\nslave0:ip=::1,port=2,state=online\r\n")
        wire: Any = node._wire
        await node._arrive(wire, redis_store.node.Server("one", "cluster"))
        assert node._followers == 1

    play(test)


# A batch, and what a node answers to it


@pytest.mark.parametrize("word", ["MOVED 1 127.0.0.1:2", "ASK 1 127.0.0.1:2", "TRYAGAIN", "CLUSTERDOWN"])
def test_ids_whose_slot_is_on_its_way_wait_for_it(word: str) -> None:
    async def test(world: World) -> None:
        part = world.parts[0]
        node = world.node(answers(b""), part)
        wire: Any = node._wire
        world.counting.moved = world.owner.moved
        part.batches, part.opened = node.batches, W
        assert node.batches is not None
        assert node.batches.add(0, lambda _: None, None) is None
        await stores.until(lambda: wire.sent)
        wire.sent[0]([redis.ResponseError(word)])
        assert world.owner.elsewhere == [part]
        await asyncio.sleep(2 * AGAIN)
        assert len(wire.sent) == 2
        wire.sent[1]([1])
        assert world.said == [dedup.STORED]

    world_has_one_part(test)


def test_a_batch_that_finds_its_window_closed_tells_of_it() -> None:
    async def test(world: World) -> None:
        part = world.parts[0]
        node = world.node(answers(b""), part)
        wire: Any = node._wire
        part.batches, part.opened = node.batches, W
        assert node.batches is not None
        node.batches.add(0, lambda _: None, None)
        await stores.until(lambda: wire.sent)
        wire.sent[0]([CLOSED])
        assert world.windows.closed == [W]
        await stores.until(lambda: world.said)

    world_has_one_part(test)


@pytest.mark.parametrize(("elsewhere", "told"), [(5, 8), (-1, -1)])
def test_a_count_that_is_told_with_an_id_is_that_of_all_parts(elsewhere: int, told: int) -> None:
    """-1 if others can't be counted."""

    async def test(world: World) -> None:
        async def others(part: Part, window: int) -> int:
            assert (part.number, window) == (0, W)
            return elsewhere

        world.counting.others = others
        part = world.parts[0]
        node = world.node(answers(b""), part)
        wire: Any = node._wire
        part.batches, part.opened = node.batches, W
        counts: list[tuple[int, int]] = []
        assert node.batches is not None
        node.batches.add(0, lambda _: None, lambda *count: counts.append(count))
        await stores.until(lambda: wire.sent)
        wire.sent[0]([[1, 1, 3]])
        await stores.until(lambda: counts)
        assert counts == [(W, told)]

    world_has_one_part(test)


def world_has_one_part(test: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    """Play with one part alone, so that all ids are in it."""

    async def alone(world: World) -> None:
        world.parts[1:] = []
        await test(world)

    play(alone)


# Counts of a moment


def sizes_of(world: World, *replies: Any) -> Sizes:
    """Return sizes of parts that are as they are told, one reply after the other."""
    found = itertools.cycle(replies)
    node = world.node(lambda command: next(found) if command[0] == "SCARD" else b"closed 7")
    for part in world.parts:
        part.batches = node.batches
    return Sizes(world.parts, dict.fromkeys(world.parts, node))


@pytest.mark.parametrize(
    ("replies", "size", "others"),
    [((3, 4), 7, 3), ((3, CLOSED), -1, 3), ((CLOSED, 4), -1, 7), ((0, 0), 0, 0)],
)
def test_the_size_of_a_window_is_that_of_all_its_parts(replies: tuple[Any, ...], size: int, others: int) -> None:
    async def test(world: World) -> None:
        assert await sizes_of(world, *replies).all(W) == size
        assert await sizes_of(world, *replies[:1]).others(world.parts[1], W) == others

    play(test)


def test_the_size_of_a_window_is_not_told_while_a_part_is_away() -> None:
    async def test(world: World) -> None:
        sizes = sizes_of(world, 3, 4)
        world.parts[0].batches = None
        with pytest.raises(redis.ConnectionError):
            await sizes.all(W)
        assert await sizes.others(world.parts[1], W) == -1
        assert await sizes.others(world.parts[0], W) == 3

    play(test)
