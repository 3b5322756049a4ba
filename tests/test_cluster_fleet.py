"""The promises of a fleet on a cluster: what `cluster_fleet.py` does for as long as it is told, done once.

It is strict about counts, and generous about the machine's time.
"""

import functools

import cluster_fleet
import clusters
import pytest
import servers

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


def fits(name: str, engine: str) -> bool:
    return cluster_fleet.PLANS[name].engine in ("", engine)


@pytest.mark.parametrize("engine", servers.ENGINES)
@pytest.mark.parametrize("kind", FAULTS)
def test_nothing_is_lost_and_nothing_counted_twice(kind: str, engine: str) -> None:
    work = functools.partial(cluster_fleet.repeat, [name for name in FAULTS[kind] if fits(name, engine)], 1)
    timeout = clusters.NODE_TIMEOUT if kind in ("promoted", "emptied") else PATIENT
    cluster_fleet.run(work, 0.0, 1, engine, SLACK, SLOTS, timeout=timeout)


@pytest.mark.parametrize("engine", servers.ENGINES)
def test_ids_that_are_sent_to_all_workers_at_once_count_once(engine: str) -> None:
    cluster_fleet.run(cluster_fleet.calm, 6.0, 1, engine, SLACK, timeout=PATIENT)


@pytest.mark.parametrize("engine", servers.ENGINES)
def test_a_cluster_with_a_password_that_takes_no_ids_while_a_slot_is_away(engine: str) -> None:
    work = functools.partial(cluster_fleet.repeat, ["moved", "killed"], 1)
    # Here all ids fail when a node that lives is taken for gone, as on a busy machine.
    cluster_fleet.run(work, 0.0, 1, engine, SLACK, SLOTS, full_coverage=True, password="secret", timeout=PATIENT)


def test_every_fault_is_tried() -> None:
    assert sorted(name for names in FAULTS.values() for name in names) == sorted(cluster_fleet.PLANS)
