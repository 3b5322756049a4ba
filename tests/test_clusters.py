"""The clusters of `clusters.py`: that they come up, and that what is done to them happens."""

from collections.abc import Iterator
from typing import Any

import clusters
import pytest
import redis
import servers
from clusters import SLOTS, slot_of

KEYS = [f"key:{number}" for number in range(40)]


@pytest.fixture(scope="module", params=servers.ENGINES)
def cluster(request: pytest.FixtureRequest) -> Iterator[clusters.Cluster]:
    """A cluster that each test leaves at rest, though not as it found it."""
    with clusters.Cluster(request.param, password="secret") as cluster:
        yield cluster


def write(cluster: clusters.Cluster, *keys: str) -> None:
    for node, slots in cluster.primaries().items():
        for key in keys:
            if slot_of(key) in slots:
                node.tell("SET", key, key)


def read(cluster: clusters.Cluster, *keys: str) -> list[str]:
    """Return those that are there, in order."""
    nodes = {slot: node for node, slots in cluster.primaries().items() for slot in slots}
    return [key for key in keys if nodes[slot_of(key)].tell("GET", key) == key]


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        ("foo", 12182),
        ("{foo}:bar", 12182),
        ("bar{foo}{x}", 12182),
        ("{}foo", slot_of("{}foo")),
        ("{verve:reports}:index", slot_of("verve:reports")),
    ],
)
def test_slots(cluster: clusters.Cluster, key: str, slot: int) -> None:
    assert slot_of(key) == slot == cluster.nodes[0].tell("CLUSTER", "KEYSLOT", key)


def test_a_cluster_is_three_primaries_with_a_replica_each(cluster: clusters.Cluster) -> None:
    primaries = cluster.primaries()
    assert len(cluster.nodes) == 6
    assert sorted(map(len, primaries.values())) == [SLOTS // 3, SLOTS // 3, SLOTS // 3 + 1]
    assert {len(cluster.replicas_of(primary)) for primary in primaries} == {1}
    assert cluster.url.startswith("redis://:secret@127.0.0.1:")
    assert cluster.url.count(",127.0.0.1:") == 5
    write(cluster, *KEYS)
    assert read(cluster, *KEYS) == KEYS


def test_a_killed_primary_is_replaced(cluster: clusters.Cluster) -> None:
    home = cluster.primary_of("verve:reports")
    (replica,) = cluster.replicas_of(home)
    write(cluster, "verve:reports")
    home.tell("WAIT", 1, 1000)
    cluster.rest()
    home.kill()
    cluster.wait_until_promoted(replica)
    home.start()
    cluster.settle()
    assert cluster.primary_of("verve:reports") == replica
    assert cluster.replicas_of(replica) == [home]
    assert read(cluster, "verve:reports") == ["verve:reports"]


@pytest.mark.parametrize("how", ["", "FORCE", "TAKEOVER"])
def test_a_failover_that_is_asked_for(cluster: clusters.Cluster, how: str) -> None:
    primary = cluster.primary_of("foo")
    (replica,) = cluster.replicas_of(primary)
    cluster.fail_over(replica, how)
    cluster.settle()
    assert cluster.primary_of("foo") == replica
    assert cluster.replicas_of(replica) == [primary]


def test_a_replica_that_lags_loses_the_tail_for_certain(cluster: clusters.Cluster) -> None:
    primary = cluster.primary_of("foo")
    (replica,) = cluster.replicas_of(primary)
    write(cluster, "foo")
    primary.tell("DEL", "{foo}lost")
    primary.tell("WAIT", 1, 1000)
    cluster.rest()
    cluster.lag(primary)
    write(cluster, "{foo}lost")
    assert cluster.lose_tail(primary) == replica
    primary.start()
    cluster.settle()
    assert cluster.primary_of("foo") == replica
    assert read(cluster, "foo", "{foo}lost") == ["foo"]


def test_slots_move_with_their_keys_and_to_a_node_that_is_added(cluster: clusters.Cluster) -> None:
    write(cluster, *KEYS)
    source, target, _ = cluster.primaries()
    slots = sorted(cluster.primaries()[source])[:60]
    for number in slots[:3]:
        source.tell("SET", _key_in(number), "moves")
    cluster.move(slots, source, target)
    assert [target.tell("GET", _key_in(number)) for number in slots[:3]] == ["moves"] * 3
    node = cluster.add()
    move: Any = cluster.migrate if cluster.engine == "valkey" else cluster.move
    move(slots, target, node)
    assert cluster.primaries()[node] == set(slots)
    assert [node.tell("GET", _key_in(number)) for number in slots[:3]] == ["moves"] * 3
    assert read(cluster, *KEYS) == KEYS


def _key_in(slot: int) -> str:
    return next(key for number in range(10**6) if slot_of(key := f"any:{number}") == slot)


@pytest.mark.parametrize("engine", servers.ENGINES)
def test_primaries_without_a_replica_come_back_with_their_data_or_empty(engine: str) -> None:
    with clusters.Cluster(engine, replicas=0, persist=True, full_coverage=True) as cluster:
        one, other, _ = cluster.primaries()
        first, second = (_key_in(min(cluster.primaries()[node])) for node in (one, other))
        write(cluster, first, second)
        one.kill()
        with pytest.raises(LookupError):
            cluster.primary_of(first)
        clusters.wait_until(lambda: not other.is_well(3), "away as a whole")
        with pytest.raises(redis.exceptions.ClusterDownError):
            other.tell("SET", second, second)
        one.start()
        cluster.settle()
        other.kill()
        other.start_empty()
        cluster.settle()
        assert read(cluster, first, second) == [first]
