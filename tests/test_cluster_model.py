"""The promises of a fleet on a cluster: every id once, every window once, whatever breaks.

The first test is at random. The others are interleavings that a design can get wrong, played by hand.
"""

import contextlib
from collections.abc import Iterator

import pytest
import servers
from cluster_model import World
from cluster_plays import DATABASES, Play, check_model


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
    check_model(server, 40, 1)


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
