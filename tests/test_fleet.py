"""The promises of a fleet: every id once, every window once, whatever breaks.

Two kinds of test. Those of `fleet_model.py` drive several stores through faults, at random and by hand, with all clocks
and links in their hands. The others run real instances and do to them, for a few seconds each, what `fleet.py` does for
as long as it is told.
"""

import contextlib
from collections.abc import Iterator

import fleet
import pytest
import servers
from fleet_model import EPOCH, LENGTH, TICK, Fleet, check_model, small_world


@pytest.mark.soak
@pytest.mark.parametrize("engine", servers.ENGINES)
def test_model(engine: str) -> None:
    with servers.Redis(engine) as server:
        check_model(server, servers.dealt(60, engine), 1)


@pytest.fixture(scope="module")
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


@contextlib.contextmanager
def played(server: servers.Redis, instances: int) -> Iterator[Fleet]:
    """Have the model played by hand."""
    with small_world():
        world = Fleet(server)
        try:
            world.begin(instances=instances, into=0.0)
            yield world
        finally:
            world.close()


def test_a_window_is_not_left_out_by_a_clock_that_is_slow_by_half_a_millisecond(server: servers.Redis) -> None:
    with played(server, 1) as world:
        world.set_wrong(pick=0, seconds=-TICK)
        world.pass_edge(past=TICK / 2, rolls=1)  # by its own clock, it rolls before the end of the window
        world.check()
        world.pass_edge(past=0.0, rolls=1)
        assert world.look() == {EPOCH: 0, EPOCH + LENGTH: 0}


def test_ids_of_a_window_that_ended_while_redis_was_away_empty_are_not_lost(server: servers.Redis) -> None:
    with played(server, 1) as world:
        world.send_new(pick=0, count=9)
        world.cut(pick=0, noticed=True, away=True)
        world.lose_data(noticed=False)
        world.pass_edge(past=TICK, rolls=1)  # while it is away, as the timer does
        world.check()
        world.let_go(pick=0)
        world.pass_edge(past=TICK, rolls=1)
        assert world.look() == {EPOCH: 9, EPOCH + LENGTH: 0}


def test_a_window_reported_before_redis_lost_its_data_is_not_told_otherwise(server: servers.Redis) -> None:
    with played(server, 2) as world:
        world.send_new(pick=0, count=9)
        world.pass_edge(past=0.0, rolls=0b01)
        assert world.look() == {EPOCH: 9}
        world.lose_data(noticed=True)  # before the other has rolled
        world.pass_edge(past=0.0, rolls=0b11)
        world.check()
        assert world.reports == {EPOCH: {9}, EPOCH + LENGTH: {0}}


def test_a_link_that_breaks_amid_a_first_batch_stores_nothing_of_it(server: servers.Redis) -> None:
    """Nor does it leave a set without a time to live, which would be taken for one that was deleted."""
    with played(server, 2) as world:
        world.pass_edge(past=4.0, rolls=0b11)
        world.send_any(pick=0, numbers=[-3, -5], trouble=4)  # of MULTI, OPEN, SADD, EXPIRE, EXEC
        world.leave(pick=0)
        for _ in range(3):
            world.pass_edge(past=4.0, rolls=1)
            world.check()
        assert world.look()[EPOCH + LENGTH] == 0


# Real instances

SHORT = {
    "killed": 4.0,
    "frozen": 2.5,
    "redis-frozen": 2.0,
    "redis-killed": 2.0,
    "redis-emptied": 0.0,
    "outage": 0.0,
    "full-and-cut": 0.0,
    "swapped": 0.0,
    "flushed-and-stopped": 0.0,
    "barred": 0.0,
    "failed-back": 0.0,
    "promoted": 0.0,
    "waves": 8.0,
}


@pytest.mark.parametrize("name", fleet.PLANS)
def test_scenario(name: str) -> None:
    fleet.run(name, SHORT[name], 1, next(iter(servers.ENGINES)))
