"""The promises of a fleet on a cluster: what `cluster_fleet.py` does for as long as it is told, done once.

It is strict about counts, and generous about the machine's time. The kinds of faults are dealt out to the engines, as
each takes a quarter of a minute: `cluster_fleet.py --engine` does any of them on either.
"""

import functools
import itertools

import cluster_fleet
import clusters
import pytest
from stores import FIRST, LAST, first_engine, last_engine

SLACK = 30.0  # seconds that a busy machine may add to an answer
SLOTS = 60  # moved at a time
PATIENT = 5.0  # node time-out with which a busy machine has no node that lives taken for gone
FAULTS = {
    "promoted": ("killed", "failed-over", "taken-over"),
    "emptied": ("lagged", "flushed"),
    "away": ("alone",),
    "moved": ("moved", "migrated", "added", "without-replica"),
    "standing still": ("frozen", "cut"),
    "instances": ("outage", "instance-killed", "instance-frozen"),
}
DEALT = [*zip(FAULTS, itertools.cycle([FIRST, LAST]))]


def fits(name: str, engine: str) -> bool:
    return cluster_fleet.PLANS[name].engine in ("", engine)


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "engine"), DEALT)
def test_nothing_is_lost_and_nothing_counted_twice(kind: str, engine: str) -> None:
    work = functools.partial(cluster_fleet.repeat, [name for name in FAULTS[kind] if fits(name, engine)], 1)
    timeout = clusters.NODE_TIMEOUT if kind in ("promoted", "emptied") else PATIENT
    cluster_fleet.run(work, 0.0, 1, engine, SLACK, SLOTS, timeout=timeout)


@pytest.mark.soak
@last_engine
def test_ids_that_are_sent_to_all_workers_at_once_count_once(engine: str) -> None:
    cluster_fleet.run(cluster_fleet.calm, 6.0, 1, engine, SLACK, timeout=PATIENT)


@pytest.mark.soak
@first_engine
def test_a_cluster_with_a_password_that_takes_no_ids_while_a_slot_is_away(engine: str) -> None:
    work = functools.partial(cluster_fleet.repeat, ["moved", "killed"], 1)
    # Here all ids fail when a node that lives is taken for gone, as on a busy machine.
    cluster_fleet.run(work, 0.0, 1, engine, SLACK, SLOTS, full_coverage=True, password="secret", timeout=PATIENT)


def test_every_fault_is_tried() -> None:
    tried = [name for kind, engine in DEALT for name in FAULTS[kind] if fits(name, engine)]
    engines = {engine for _, engine in DEALT}
    assert sorted(tried) == sorted(name for name, plan in cluster_fleet.PLANS.items() if plan.engine in ("", *engines))
