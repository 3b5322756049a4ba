"""The map of a cluster: what follows from it, and from what nodes say that it does not know yet.

No node is there: connections are not made, so each test says which of them stand.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import redis
import stores

import dedup
import redis_store.cluster
import redis_store.parts
from redis_store.batches import Batches, Counting, Refusals
from redis_store.cluster import Cluster
from redis_store.held import Held
from redis_store.member import Member
from redis_store.scripts import Keys, slot_of
from redis_store.slots import Range
from redis_store.wire import Address

KEYS = Keys("v", 60, 2)
HOME = slot_of(KEYS.stream)
W = 999_999_960  # start of a window


def on(host: str, *slots: int, replicas: int = 0) -> list[Range]:
    return [Range(slot, slot, host, 1, replicas) for slot in slots]


class Nodes:
    """A cluster as an instance has it."""

    def __init__(self, tls: bool) -> None:
        self.parts = [redis_store.parts.Part(number, keys) for number, keys in enumerate(KEYS.parts(2))]
        self.slots = [slot_of(part.keys.mark) for part in self.parts]
        self.held = Held(10**6, 2)
        self.counting = Counting(self.parts, self.held, dedup.Meters(), 0.5)
        self.ready = asyncio.Event()
        self.cluster = Cluster([Address("a", 1, tls=tls)], KEYS, self.counting, self.ready, 0, lambda: 1000.0)
        self.held.open(W)

    def say(self, *nodes: list[Range]) -> str:
        """Have the map say where slots are; return why it names no node for some."""
        return self.cluster._assign([each for ranges in nodes for each in ranges])

    def say_usual(self, replicas: int = 0) -> None:
        """Have each part and home on a node of its own."""
        self.say(on("a", self.slots[0], replicas=replicas), on("b", self.slots[1]), on("c", HOME, replicas=replicas))

    def node(self, host: str) -> Member:
        return self.cluster.members[host, 1]

    def connect(self, host: str) -> None:
        """Have the connection to a node stand, and its parts be taken."""
        node = self.node(host)
        wire: Any = Wire()
        node._wire = wire
        node.batches = Batches(wire, self.counting, self.cluster.windows, Refusals())
        for part in node.parts:
            part.batches, part.mark, part.seen = node.batches, b"one 1.0", b"one 1.0"
        self.cluster.note()

    @property
    def stale(self) -> bool:
        """Whether the map will be asked for soon; forgets it."""
        found = self.cluster._stale.is_set()
        self.cluster._stale.clear()
        return found


class Wire:
    """A connection that says nothing."""

    def __init__(self) -> None:
        self.done: Callable[[Any], None] = print

    def send(self, packed: bytes, count: int, deadline: float, done: Callable[[Any], None]) -> None:
        self.done = done

    async def ask(self, commands: Any, deadline: float) -> list[Any]:
        return [b"one 1.0" if command[0] == "GET" else b"" for command in commands]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    async def rest(_: Cluster) -> None: ...

    def start(_: Member) -> Any:
        return asyncio.get_running_loop().create_future()

    monkeypatch.setattr(Cluster, "_follow", rest)
    monkeypatch.setattr(Member, "start", start)

    def run(test: Callable[[Nodes], Coroutine[Any, Any, None]], tls: bool = False) -> None:
        async def with_nodes() -> None:
            await test(Nodes(tls))

        stores.play(with_nodes())

    return run


Play = Callable[..., None]


# What the map says


def test_each_part_and_home_is_where_the_map_says(play: Play) -> None:
    async def test(nodes: Nodes) -> None:
        nodes.say_usual(replicas=2)
        assert {host: node.parts for (host, _), node in nodes.cluster.members.items()} == {
            "a": {nodes.parts[0]},
            "b": {nodes.parts[1]},
            "c": set(),
        }
        assert [nodes.node(host).hosts_home for host in "abc"] == [False, False, True]
        assert [nodes.node(host).replicas for host in "abc"] == [2, 0, 2]
        assert all(nodes.node(host)._wake.is_set() for host in "abc"), "they see to it at once"
        assert nodes.counting.nodes == 2, "of which ids are on"
        nodes.say_usual()
        assert [nodes.node(host).replicas for host in "abc"] == [0, 0, 0], "or nothing would ever be acknowledged"

    play(test)


def test_what_the_map_lacks_stays_where_it_was(play: Play) -> None:
    async def test(nodes: Nodes) -> None:
        nodes.say_usual()
        assert nodes.say(on("a", nodes.slots[0])) == "slots of the cluster are on no node"
        assert nodes.node("b").parts == {nodes.parts[1]}
        assert nodes.node("c").hosts_home

    play(test)


def test_a_node_that_has_nothing_any_more_is_let_go_when_nothing_is_under_way(play: Play) -> None:
    async def test(nodes: Nodes) -> None:
        nodes.say_usual()
        nodes.connect("a")
        batches = nodes.parts[0].batches
        assert batches is not None
        batches.add(0, lambda _: None, None)
        await asyncio.sleep(0.01)
        nodes.say(on("b", *nodes.slots), on("c", HOME))
        assert {host for host, _ in nodes.cluster.members} == {"a", "b", "c"}
        wire: Any = nodes.node("a")._wire
        wire.done([1])
        nodes.say(on("b", *nodes.slots, HOME))
        assert {host for host, _ in nodes.cluster.members} == {"b"}

    play(test)


def test_the_map_is_asked_of_all_nodes_that_are_known(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is connected to; those that were named at the start may be gone."""

    async def all_of(addresses: list[Address], _: float) -> list[Any]:
        return [each.host for each in addresses]

    monkeypatch.setattr(redis_store.cluster, "ask_all_for_map", all_of)

    async def test(nodes: Nodes) -> None:
        nodes.say_usual()
        found: Any = await redis_store.cluster.ask_map([*nodes.cluster.members.values()], [Address("seed", 1)])
        assert found == ["seed", "a", "b", "c"]

    play(test)


# What nodes say


def test_a_part_that_is_elsewhere_is_given_to_that_node(play: Play) -> None:
    async def test(nodes: Nodes) -> None:
        nodes.say_usual()
        nodes.connect("a")
        assert nodes.stale is True
        nodes.cluster.moved(nodes.parts[0], redis.ResponseError(f"MOVED {nodes.slots[0]} d:1"))
        assert nodes.node("d").parts == {nodes.parts[0]}
        assert nodes.parts[0].batches is None
        assert nodes.stale

    play(test)


@pytest.mark.parametrize(("tls", "place"), [(True, "d:1"), (False, "?:1")])
def test_a_part_that_is_at_a_place_nobody_knows_waits_for_the_map(play: Play, tls: bool, place: str) -> None:
    """With TLS the map may have the same node by another name, the one in its certificate."""

    async def test(nodes: Nodes) -> None:
        nodes.say_usual()
        nodes.connect("a")
        assert nodes.stale
        nodes.cluster.moved(nodes.parts[0], redis.ResponseError(f"MOVED {nodes.slots[0]} {place}"))
        assert {host for host, _ in nodes.cluster.members} == {"a", "b", "c"}
        assert nodes.node("a").parts == {nodes.parts[0]}
        assert nodes.parts[0].batches is None
        assert nodes.stale

    play(test, tls)


def test_a_part_that_may_have_lost_its_data_is_arrived_at_anew(play: Play) -> None:
    async def test(nodes: Nodes) -> None:
        nodes.say_usual()
        nodes.connect("a")
        nodes.node("a")._wake.clear()
        nodes.cluster.lose(nodes.parts[0])
        assert nodes.parts[0].batches is None
        assert nodes.node("a")._wake.is_set()
        assert nodes.stale, "it may be that it is elsewhere"

    play(test)


def test_one_node_that_fails_does_not_keep_the_counts_of_others_back(play: Play) -> None:
    async def test(nodes: Nodes) -> None:
        nodes.say_usual()
        for host in "ab":
            nodes.connect(host)

        async def fail(*_: Any) -> Any:
            raise redis.ConnectionError

        async def count(*_: Any) -> Any:
            return [7], True

        async def unsure(*_: Any) -> Any:
            return [7], False

        asked = [(part, ("PING",)) for part in nodes.parts]
        first: Any = nodes.node("a")
        second: Any = nodes.node("b")
        first.ask_kept, second.ask_kept = fail, count
        nodes.cluster._stale.clear()
        assert await nodes.cluster.ask_parts(asked) == [(nodes.parts[0], None), (nodes.parts[1], 7)]
        assert not nodes.stale
        first.ask_kept = unsure
        assert await nodes.cluster.ask_parts(asked) == [(nodes.parts[0], None), (nodes.parts[1], 7)]
        assert nodes.stale, "perhaps the replica is gone"

    play(test)


# What others are told


def test_what_is_said_while_parts_are_away_and_when_all_are_back(play: Play) -> None:
    async def test(nodes: Nodes) -> None:
        nodes.say_usual()
        nodes.cluster.why = ""  # there is a map
        nodes.connect("a")
        with stores.Log() as log:
            nodes.cluster.moved(nodes.parts[1], redis.ResponseError("CLUSTERDOWN The cluster is down"))
            assert "1 of 2 parts are away: the cluster takes no ids" in nodes.cluster.warnings[0]
            nodes.connect("b")
            nodes.cluster.note()
            assert len(log.found("Redis is back, all parts")) == 1
        assert nodes.ready.is_set()
        assert nodes.cluster.warnings == ["no window is closed: the node that has the reports is away"]
        nodes.cluster.home.reachable = True
        assert nodes.cluster.warnings == []
        nodes.cluster.lose(nodes.parts[1])
        assert nodes.cluster.warnings == ["1 of 2 parts are away: parts are being taken"], "not why they were before"
        assert not nodes.ready.is_set()

    play(test)


def test_why_nothing_can_be_taken_is_told_where_home_alone_is_away(play: Play) -> None:
    """Which has no parts here."""

    async def test(nodes: Nodes) -> None:
        nodes.say_usual()
        nodes.node("c").why = "can't connect"
        assert nodes.cluster.unavailable == "Redis is away: c:1: can't connect"

    play(test)


def test_ids_are_lost_while_a_part_has_another_mark_than_they_were_stored_under(play: Play) -> None:
    async def test(nodes: Nodes) -> None:
        nodes.say_usual()
        nodes.connect("a")
        nodes.parts[0].mark = b"one 2.0"
        assert not nodes.cluster.lost, "there are none"
        nodes.held.add(W, [(nodes.parts[0], [1])])
        assert nodes.cluster.lost
        nodes.parts[0].seen = b"one 2.0"
        assert not nodes.cluster.lost

    play(test)


def test_who_stops_is_not_sure_of_ids_whose_node_is_away(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store.cluster, "RETURN", -1.0)  # it is waited for no longer

    async def test(nodes: Nodes) -> None:
        nodes.say_usual()
        nodes.connect("a")
        nodes.connect("c")
        nodes.cluster.home.reachable, nodes.cluster.home.mark = True, b"one 1.0"
        assert await nodes.cluster.confirm(), "nothing is held"
        nodes.held.add(W, [(nodes.parts[1], [1])])
        assert not await nodes.cluster.confirm()
        nodes.connect("b")
        assert await nodes.cluster.confirm()

    play(test)


def test_who_stops_waits_for_what_is_under_way(play: Play) -> None:
    async def test(nodes: Nodes) -> None:
        nodes.say_usual()
        for host in "abc":
            nodes.connect(host)
        nodes.cluster.home.reachable, nodes.cluster.home.mark = True, b"one 1.0"
        batches = nodes.parts[0].batches
        assert batches is not None
        batches.add(0, lambda _: None, None)
        confirmed = asyncio.create_task(nodes.cluster.confirm())
        await asyncio.sleep(0.01)
        assert not confirmed.done()
        wire: Any = nodes.node("a")._wire
        nodes.parts[0].opened = W
        wire.done([b"OK", b"QUEUED", b"QUEUED", [1, 1]])
        assert await confirmed

    play(test)
