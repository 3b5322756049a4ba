"""A worker that hangs: it is found, told of, killed and replaced; nobody else is, and operators get answers meanwhile.

What is decided by counting is tested without a process and without a clock; the rest with the real program, whose
workers are stopped in their tracks.
"""

import contextlib
import itertools
import os
import re
import signal
import socket
import time
from collections.abc import Iterator

import pytest
import servers
import support
from operators import patched, watched
from processes import at_work, freeze, listeners, long_window, one_of_each, started, state, wait_until, workers

import workers as room

SHORT = ("--worker-timeout", "2")


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


def complaints(program: support.Program) -> list[str]:
    return [line.partition("Z ")[2] for line in program.log.all if re.search(" (WARNING|ERROR) ", line)]


# Who hangs


def hang_after(watch: room.Watch, number: int, step: float, beats: list[int], alive: tuple[int, ...] = ()) -> int:
    """Return the look, from 1, at which a worker is found to hang; the `alive` give a sign of life before each."""
    for look in range(1, 1000):
        for each in alive:
            beats[each] += 1
        hanging = watch.hanging(look * step)
        assert set(hanging) <= {number}
        if hanging:
            return look
    raise AssertionError("not found")


@pytest.mark.parametrize(("timeout", "tick", "ticks"), [(10, 1, 10), (1, 0.1, 10), (2.5, 0.25, 10), (90.5, 1, 91)])
def test_who_gives_no_sign_of_life_for_so_many_ticks_hangs(timeout: float, tick: float, ticks: int) -> None:
    beats = [5, 5, 5]
    watch = room.Watch(beats, timeout)
    assert watch.tick == tick
    assert hang_after(watch, 1, 1.01 * tick, beats, alive=(0, 2)) == ticks + 1


def test_one_sign_of_life_is_enough() -> None:
    beats = [0]
    watch = room.Watch(beats, 10)
    for look in range(100):
        beats[0] += look % 9 == 0
        assert watch.hanging(look) == []


def test_a_parent_that_is_woken_often_does_not_count_faster() -> None:
    watch = room.Watch([0], 10)
    assert not any(watch.hanging(0.01 * look) for look in range(900))


def test_a_parent_that_was_stopped_has_seen_a_single_tick() -> None:
    beats = [0, 0]
    watch = room.Watch(beats, 10)
    for look in range(9):
        beats[0] += 1
        beats[1] += 1
        assert watch.hanging(look) == []
    assert watch.hanging(9 + 86_400) == []
    assert watch.hanging(10 + 86_400) == []
    assert hang_after(watch, 1, 1e6, beats, alive=(0,)) == 9


def test_a_successor_begins_anew() -> None:
    watch = room.Watch([0], 10)
    for look in range(9):
        assert watch.hanging(look) == []
    watch.start(0)
    assert [watch.hanging(look) for look in range(9, 20)] == [[]] * 10 + [[0]]


def test_pauses_between_successors_grow_and_end_with_one_that_works() -> None:
    with socket.socket() as sock:
        parent = room.Parent([sock, sock], None, lambda: True, lambda worker: 0, timeout=10, delay=0)
        pauses = []
        now = 1000.0
        for _ in range(8):
            parent.schedule(room.Child(1, now), now)  # one that ends as soon as it is started
            pauses.append(round(parent.due[1] - now, 3))
            now += pauses[-1]
        assert pauses == [0, 0.1, 0.3, 0.7, 1.5, 3.1, 5, 5]
        assert parent.due[0] == 0
        parent.schedule(room.Child(1, now), now + 10)
        assert parent.due[1] == now + 15
        parent.schedule(room.Child(1, now), now + 10.1)
        assert parent.due[1] == now + 10.1
        parent.schedule(room.Child(1, now), now)
        assert round(parent.due[1] - now, 3) == 0.1
        for end in parent.pipe:
            os.close(end)


# The real program


@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_that_hangs_is_killed_and_replaced(server: servers.Redis, which: int) -> None:
    flags = "--redis-url", server.url, "--workers", "2", "--window", long_window(), *SHORT
    with watched(*flags) as (program, operators):
        at_work(program, server, 2)
        wait_until(lambda: operators.ready() == (200, ["ready"]))
        hung = workers(program)[which]
        other = workers(program)[1 - which]
        freeze(hung)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(support.Client(program.address)) for _ in range(20)]
            for number, client in enumerate(clients):
                client.send(support.accept(number))
            assert [client.receive()[0].status for client in clients] == [200] * 20
        wait_until(lambda: state(hung) == "")
        at_work(program, server, 2)
        assert other in workers(program)
        wait_until(lambda: operators.ready() == (200, ["ready"]))
        assert complaints(program) == [
            f"ERROR verve: worker {which + 1} gave no sign of life for 2 s: it is killed and replaced"
        ]


def test_a_worker_that_waits_for_redis_does_not_hang(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--workers", "2", "--window", long_window(), *SHORT
    with support.verve(*flags, "--request-timeout", "3") as program:
        at_work(program, server, 2)
        pids = workers(program)
        server.freeze()
        with one_of_each(program) as clients:
            for client in clients.values():
                client.send(support.accept(7))
            assert [client.receive()[0].status for client in clients.values()] == [503, 503]  # 3 s later
        server.thaw()
        assert workers(program) == pids


def test_a_parent_that_was_stopped_kills_nobody(server: servers.Redis) -> None:
    with started(server, 2, *SHORT) as program, one_of_each(program) as clients:
        pids = workers(program)
        program.freeze()
        until = time.monotonic() + 2.5
        number = 0
        while time.monotonic() < until:
            for client in clients.values():
                number += 1
                assert client.ask(support.accept(number)).status == 200
        program.thaw()
        os.kill(pids[0], signal.SIGKILL)  # so that the parent is seen to have looked
        program.log.wait_for("worker 1 ended with status -9 and is replaced")
        at_work(program, server, 2)
        assert len(complaints(program)) == 1
        assert pids[1] in workers(program)


def test_a_worker_that_hangs_does_not_hold_up_the_stop(server: servers.Redis) -> None:
    with started(server, 2, *SHORT) as program:
        freeze(workers(program)[1])
        assert program.stop() == 0
        assert complaints(program) == ["ERROR verve: worker 2 gave no sign of life for 2 s: it is killed"]


def test_a_second_signal_ends_a_worker_that_hangs(server: servers.Redis) -> None:
    with started(server, 2, "--worker-timeout", "3600", "--drain-timeout", "3600") as program:
        pids = workers(program)
        freeze(pids[0])
        program.send(signal.SIGTERM)
        program.log.wait_for("stopping")
        program.stop()
        assert [state(pid) for pid in pids] == ["", ""]


def test_operators_are_answered_while_the_first_worker_hangs(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--workers", "3", "--window", long_window(), "--worker-timeout", "3600"
    quick = patched("admin.MISSING = 1.5; admin.BEAT = 0.2")
    with watched(*flags, prefix=quick) as (program, operators):
        at_work(program, server, 3)
        with support.Client(program.address) as client:
            assert client.ask(support.accept(1)).status == 200
        wait_until(lambda: operators.ready() == (200, ["ready"]))
        first, second, third = workers(program)
        freeze(first)
        assert operators.ask("/healthz").body == b"alive\n"
        wait_until(lambda: operators.ready() == (503, ["not ready", "worker 1 of 3 is missing"]))
        numbers = operators.numbers()
        assert (numbers["verve_workers"], numbers["verve_store_up"]) == (2, 1)
        assert numbers['verve_ids_total{result="new"}'] == 1
        assert operators.windows()[0]["count"] == 1
        freeze(second)
        wait_until(lambda: operators.ready()[1][2:] == ["worker 2 of 3 is missing"])
        for pid in (first, second):
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: operators.ready() == (200, ["ready"]))
        wait_until(lambda: listeners(third) == listeners(second) == listeners(first) - 1)
        assert complaints(program) == []


def test_a_successor_that_crashes_again_and_again_is_started_ever_more_rarely(server: servers.Redis) -> None:
    """By the times in the log: a pause may be longer than it should on a busy machine, but never shorter."""
    broken = patched("admin.Row.keep = None")
    flags = "--redis-url", server.url, "--workers", "2", "--window", long_window()
    with support.verve(*flags, prefix=broken) as program:
        lines = program.log.wait_until(
            lambda lines: found if len(found := [at(line) for line in lines if "worker 2 ended" in line]) > 4 else None,
            "five deaths",
        )
        for (before, after), pause in zip(itertools.pairwise(lines), (0, 0.1, 0.3, 0.7), strict=False):
            assert after - before >= pause - 0.002
        program.send(signal.SIGTERM)
        assert program.wait() == 0
        program.log.all[:] = [line for line in program.log.all if "Traceback" not in line and "Error" not in line]


def at(line: str) -> float:
    """Return the time of a line in the log, within its minute and the next."""
    minutes, seconds = re.match(r"\S+T\d\d:(\d\d):(\S+)Z ", line).groups()  # type: ignore[union-attr]
    return int(minutes) % 60 * 60 + float(seconds)
