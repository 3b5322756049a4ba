"""The promises of a fleet on a cluster: every id once, every window once, whatever breaks.

The first test is at random. The others are interleavings that a design can get wrong, played by hand.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import servers
from cluster_model import World
from cluster_plays import DATABASES, Play, check_model

import redis_store.parts
import redis_store.slots


@pytest.fixture(scope="module", params=servers.ENGINES)
def server(request: pytest.FixtureRequest) -> Iterator[servers.Redis]:
    with servers.Redis(request.param, *DATABASES) as server:
        yield server


@contextlib.contextmanager
def played(server: servers.Redis, instances: int = 2, into: float = 1.0, replicas: bool = True) -> Iterator[Play]:
    """Have a play by hand, on two nodes with a replica each, and see in the end that all is counted."""
    play = Play(server)
    try:
        play.begin(replicas=replicas, instances=instances, into=into)
        yield play
        play.world.quiesce()
    finally:
        play.world.close()


def counts(world: World) -> list[int]:
    return list(world.ledger.reports.values())


def test_at_random(server: servers.Redis) -> None:
    """With more of them, as `PLAYS=400`, it finds what 40 don't."""
    check_model(server, servers.dealt(int(os.environ.get("PLAYS", "40")), server.engine), 1)


def test_a_part_waits_for_who_comes_back_late_after_a_failover_that_lost_its_ids(server: servers.Redis) -> None:
    with played(server) as play:
        play.send(pick=0, count=6, at_once=True)
        play.reach_edge(past=-0.2)
        play.hold(pick=0, node=4)  # the other one notices first
        play.lose(pick=1, how="failover")
        play.let_pass(seconds=4.0)
        play.let_pass(seconds=4.0)
        assert counts(play.world)[0] == 6


def test_a_stale_primary_closes_nothing(server: servers.Redis) -> None:
    with played(server) as play:
        play.send(pick=0, count=6, at_once=True)
        play.save(pick=0)
        play.save(pick=1)
        play.reach_edge(past=-0.2)
        play.lose(pick=1, how="takeover")
        play.creep(seconds=0.2)
        play.flow()  # all of it goes to the one that was replaced
        play.let_pass(seconds=4.0)
        play.let_pass(seconds=4.0)
        assert counts(play.world)[0] == 6


def test_home_that_restarts_with_an_older_stream_is_told_what_it_had(server: servers.Redis) -> None:
    with played(server) as play:
        play.save(pick=0)
        play.send(pick=0, count=6, at_once=True)
        play.reach_edge(past=0.03)
        play.let_pass(seconds=1.2)
        assert counts(play.world) == [6]
        play.lose(pick=0, how="saved")
        play.let_pass(seconds=4.0)
        play.let_pass(seconds=4.0)
        assert counts(play.world)[0] == 6
        assert next(iter(play.world.ledger.stream().values())) == 6


def test_who_stops_waits_until_home_knows_its_windows_again(server: servers.Redis) -> None:
    with played(server, instances=1) as play:
        world = play.world
        play.move(unit="p1", pick=0)
        play.move(unit="home", pick=1)
        if world.nodes.home is world.nodes.of_part(0):
            world.nodes.move("home", world.nodes.all[1])
        play.let_pass(seconds=4.0)
        play.send(pick=0, count=6, at_once=True)
        world.nodes.flush(world.nodes.home)
        world.stop(world.instances[0])


def test_home_may_move_while_the_marks_are_looked_at(server: servers.Redis) -> None:
    with played(server, into=0.0) as play:
        play.lose(pick=0, how="takeover")  # what was not foreseen is noted by the model


def test_a_roll_does_not_reach_a_server_that_took_the_place_of_home(server: servers.Redis) -> None:
    with played(server, instances=3, into=0.0) as play:
        play.reach_edge(past=-0.2)
        play.send(pick=2, count=4, at_once=True)
        play.save(pick=0)
        play.reach_edge(past=0.03)
        play.send(pick=1, count=2, at_once=True)
        play.let_pass(seconds=4.0)
        play.reach_edge(past=0.0)
        play.send(pick=0, count=1, at_once=True)
        play.lose(pick=0, how="saved")  # just as they roll


def test_who_stops_does_not_take_a_silent_link_for_a_good_one(server: servers.Redis) -> None:
    with played(server, into=0.0, replicas=False) as play:
        play.let_pass(seconds=1.2)
        play.send(pick=0, count=8, at_once=True)
        play.hold(pick=0, node=4)
        play.lose(pick=1, how="flush")
        play.stop(pick=0)


def test_who_stops_brings_back_what_is_lost_first_though_home_is_away_for_a_while(server: servers.Redis) -> None:
    with played(server, instances=1, replicas=False) as play:
        world = play.world
        play.send(pick=0, count=6, at_once=True)
        world.nodes.home.frozen = True
        world.nodes.flush(world.nodes.of_part(1))
        world.flow(1.0)
        assert world.stop(world.instances[0], thaw=world.nodes.home) == 0


def test_ids_of_a_node_that_takes_none_fail_at_once(server: servers.Redis) -> None:
    with played(server) as play:
        world = play.world
        play.hinder(pick=1, what="minority")
        play.send(pick=0, count=6, at_once=True)
        world.flow(0.1)
        world.next = next(number for number in range(world.next, 100) if redis_store.parts.part_of(number) == 1)
        play.send(pick=0, count=1, at_once=False)
        assert world.next - 1 in world.ledger.refused


def test_a_map_that_is_older_than_what_a_node_said_changes_nothing(server: servers.Redis) -> None:
    with played(server, instances=1) as play:
        nodes = play.world.nodes
        cluster: Any = play.world.instances[0]._servers
        (part,) = (part for part in cluster._owners if part.number == 1)
        old = redis_store.slots.ranges(
            [nodes.range_of(unit, nodes.all[1]) for unit in nodes.owners], cluster._owners[part].own
        )
        nodes.move("p1", nodes.all[0])

        async def told() -> None:
            cluster.moved(part, redis.ResponseError(f"MOVED {nodes.slots['p1']} n0:7000"))
            cluster._assign(old)

        play.world.run(told())
        assert cluster._owners[part].own.host == "n0"


# A window's end


def test_a_part_that_was_flushed_is_not_closed_by_who_holds_nothing_of_it(server: servers.Redis) -> None:
    with played(server, replicas=False) as play:
        play.send(pick=0, count=6, at_once=True)
        play.reach_edge(past=-0.01)
        play.hold(pick=0, node=4)
        play.lose(pick=1, how="flush")
        play.world.flow(0.1)  # the other one rolls, and has not looked at the marks yet
        play.let_pass(seconds=4.0)
        play.let_pass(seconds=4.0)
        assert counts(play.world)[0] == 6


def test_a_part_is_not_closed_while_it_settles(server: servers.Redis) -> None:
    with played(server, instances=3, replicas=False) as play:
        play.send(pick=0, count=6, at_once=True)
        play.reach_edge(past=-0.2)
        play.hold(pick=0, node=4)
        play.lose(pick=1, how="flush")
        play.world.flow(1.0)  # the others have arrived again, and would close it
        play.let_pass(seconds=4.0)
        play.let_pass(seconds=4.0)
        assert counts(play.world)[0] == 6


@pytest.mark.parametrize("begun_anew", [False, True])
def test_a_set_that_is_deleted_by_hand(server: servers.Redis, begun_anew: bool) -> None:
    """Or evicted, though others have stored more in its place than who closes it holds."""
    with played(server, replicas=False) as play:
        world = play.world
        for pick, count in ((0, 6), (1, 4)):
            play.send(pick=pick, count=count, at_once=True)
        world.delete_ids(1)
        if begun_anew:
            play.send(pick=0, count=20, at_once=True)
        play.reach_edge(past=-0.01)
        play.hold(pick=0, node=4)
        world.flow(0.1)
        play.let_pass(seconds=4.0)
        play.let_pass(seconds=4.0)
        assert counts(world)[0] == 10 + 20 * begun_anew


def test_a_count_of_a_stale_primary_is_not_taken(server: servers.Redis) -> None:
    """One instance has not heard of the new primary, which another one stores ids on."""
    with played(server) as play:
        world = play.world
        play.send(pick=0, count=6, at_once=True)
        play.save(pick=1)
        play.reach_edge(past=-0.3)
        play.lose(pick=1, how="takeover")
        world.refresh(world.instances[0])
        world.flow(0.2)
        play.send(pick=0, count=6, at_once=True)
        world.flow(0.3)
        play.let_pass(seconds=4.0)
        play.let_pass(seconds=4.0)
        assert counts(world)[0] == 12


def test_a_count_stands_though_its_part_is_lost_before_the_window_is_reported(server: servers.Redis) -> None:
    with played(server, instances=1, replicas=False) as play:
        world = play.world
        world.nodes.move("p0", away := world.nodes.all[2])
        play.let_pass(seconds=4.0)
        play.reach_edge(past=0.3)
        play.send(pick=0, count=6, at_once=True)
        play.reach_edge(past=-0.1)
        away.frozen = True
        world.flow(1.5)
        world.crash(world.instances[0])
        world.nodes.flush(world.nodes.all[1])
        world.start()
        world.flow(4.0)
        away.frozen = False
        play.let_pass(seconds=4.0)
        play.let_pass(seconds=4.0)
        assert 6 in counts(world)


# Home away


def test_home_is_away_over_the_end_of_a_window(server: servers.Redis) -> None:
    """Ids are taken in the next one, and counted though whoever took them dies; in those after it they are not."""
    with played(server, instances=1, replicas=False) as play:
        world = play.world
        play.reach_edge(past=-0.1)
        world.nodes.home.frozen = True
        world.flow(0.3)
        play.send(pick=0, count=6, at_once=True)
        taken = set(world.instances[0].acked)
        assert taken
        world.flow(4.0)
        play.send(pick=0, count=6, at_once=True)
        assert world.instances[0].acked == taken
        world.crash(world.instances[0])
        world.nodes.home.frozen = False
        world.start()
        play.let_pass(seconds=4.0)
        play.let_pass(seconds=4.0)
        assert sum(counts(world)) == len(taken)


def test_who_cannot_reach_home_is_waited_for(server: servers.Redis) -> None:
    with played(server, replicas=False) as play:
        world = play.world
        play.send(pick=0, count=6, at_once=True)
        play.reach_edge(past=-0.3)
        play.hold(pick=0, node=4)
        play.lose(pick=1, how="flush")
        world.flow(0.7)  # the other one has arrived again
        world.nodes.home.minority = True
        world.give_voice(world.instances[0])
        world.flow(6.0)
        world.silence(world.instances[0])
        world.nodes.home.minority = False
        world.flow(0.4)
        play.let_pass(seconds=4.0)
        play.let_pass(seconds=4.0)
        assert counts(world)[0] == 6


# Who lived through a window


def test_an_empty_window_is_told_though_a_newcomer_is_the_first_to_ask(server: servers.Redis) -> None:
    with played(server, instances=1, replicas=False) as play:
        world = play.world
        play.reach_edge(past=-0.01)
        play.hold(pick=0, node=4)
        world.flow(0.02)
        world.start()
        world.flow(0.2)
        world.loop.create_task(world.instances[1].roll())
        world.flow(0.2)
        play.let_pass(seconds=4.0)
        play.let_pass(seconds=4.0)
        assert counts(world)[0] == 0


def test_a_window_that_was_opened_and_that_nobody_lived_through_is_not_told(server: servers.Redis) -> None:
    with played(server, instances=1, replicas=False) as play:
        world = play.world
        play.let_pass(seconds=4.0)
        world.crash(world.instances[0])
        told = max(world.ledger.stream())
        world.flow(11.0)
        world.start()
        play.let_pass(seconds=4.0)
        play.let_pass(seconds=4.0)
        assert not {told + 8, told + 12} & {*world.ledger.stream()}


# A link's end


def test_what_an_old_primary_says_of_an_id_is_not_believed_once_its_part_is_elsewhere(server: servers.Redis) -> None:
    with played(server, into=0.3) as play:
        world, late = play.world, play.world.instances[0]
        play.send(pick=0, count=6, at_once=False)
        (old,) = [link for link in world.links if link.owner is late and link.unsent and link.node.number == 1]
        play.lose(pick=1, how="takeover")
        old.execute(1 << 30)
        old.held = True
        world.refresh(late)
        world.flow(0.3)
        old.answer()
        play.reach_edge(past=-0.1)
        play.hold(pick=0, node=4)
        world.flow(0.3)
        play.let_pass(seconds=4.0)


def test_an_id_whose_slot_moves_is_sent_again(server: servers.Redis) -> None:
    with played(server, into=0.3, replicas=False) as play:
        world = play.world
        play.send(pick=0, count=6, at_once=False)
        world.nodes.move("p1", world.nodes.all[2])
        world.flow(0.4)
        assert world.instances[0].acked == {1, 2, 3, 4, 5, 6}


def test_an_id_whose_slot_moves_to_a_node_that_is_away_fails_in_time(server: servers.Redis) -> None:
    with played(server, into=0.3, replicas=False) as play:
        world = play.world
        play.send(pick=0, count=6, at_once=False)
        world.nodes.move("p1", away := world.nodes.all[2])
        away.up = False
        world.flow(0.7)
        assert world.instances[0].acked | world.ledger.refused == {1, 2, 3, 4, 5, 6}
