"""A stop while Redis may have lost what was acknowledged: it is brought back first, or its loss is told."""

import asyncio
import contextlib
import random
import re
import signal
import time
from collections.abc import Iterator

import pytest
import servers
import support
from stores import SLACK, ask, at, first_engine, ids, last_engine, let_settle, long_window, name_of, seeds, sets

LOST = 3  # the exit status of a process that could not bring back what it had acknowledged
MANY = 1050


@contextlib.contextmanager
def counting(url: str, *flags: str, window: int = 0) -> Iterator[support.Program]:
    """Run the program with MANY ids stored."""
    program = support.Program(["--redis-url", url, "--window", str(window or long_window()), *flags], ())
    try:
        program.listening(program.log.wait_for("listening on .*")[0])
        with support.Client(program.address) as client:
            client.send(*map(support.accept, range(MANY)))
            assert {answer.status for answer in client.receive(MANY)} == {200}
        yield program
    except BaseException as error:
        error.add_note("\n".join(["the program's stderr:", *program.log.all]))
        raise
    finally:
        program.end()


def told_as_lost(program: support.Program) -> list[str]:
    return [
        line
        for line in program.log.all
        if re.search(r" ERROR verve: (worker [0-9]+: )?ids that were answered ok.*: [0-9]+$", line)
    ]


@seeds
@pytest.mark.parametrize("wait", [0.0, 0.2, 0.7])
def test_a_stop_soon_after_redis_was_emptied(server: servers.Redis, seed: int, wait: float) -> None:
    """The ids are there again when the process has ended."""
    dice = random.Random(f"{seed} {server.engine} {wait}")
    with counting(server.url) as program:
        ask(server, "FLUSHALL")
        time.sleep(wait + dice.uniform(0, 0.2))
        assert program.stop(dice.choice([signal.SIGTERM, signal.SIGINT])) == 0
        assert ids(server) == {*range(MANY)}
        assert not told_as_lost(program)


@first_engine
def test_a_stop_of_workers_soon_after_redis_was_emptied(server: servers.Redis) -> None:
    with counting(server.url, "--workers", "2") as program:
        ask(server, "FLUSHALL")
        assert program.stop() == 0
        assert ids(server) == {*range(MANY)}


@last_engine
def test_a_stop_soon_after_a_window_was_deleted(server: servers.Redis) -> None:
    with counting(server.url) as program:
        (key,) = sets(server)
        let_settle(server)
        ask(server, "DEL", key)
        with support.Client(program.address) as client:
            assert client.ask(support.accept(-1)).status == 200
        assert program.stop() == 0
        assert ids(server) == {-1, *range(MANY)}


@last_engine
def test_a_stop_while_redis_restarts_empty(server: servers.Redis) -> None:
    """It waits, within the time that it has."""
    with counting(server.url) as program:
        server.kill()
        program.log.wait_for("Redis is away")
        program.send(signal.SIGTERM)
        program.log.wait_for("stopping")
        server.start()
        assert program.wait() == 0
        assert ids(server) == {*range(MANY)}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_without_redis_says_how_many_ids_are_in_its_care(server: servers.Redis, workers: str) -> None:
    """Nothing says that they are lost: it may be back with all of them."""
    with counting(server.url, "--drain-timeout", "4", "--workers", workers) as program:
        server.kill()
        program.log.wait_for("Redis is away")
        since = time.monotonic()
        assert program.stop() == 0
        assert time.monotonic() - since < 4 + SLACK
        (line,) = [line for line in program.log.all if "stopped without Redis" in line]
        assert re.search(rf" WARNING verve.store: .*: {MANY}$", line)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_that_knows_of_a_loss_and_can_not_mend_it_says_so(
    server: servers.Redis, proxy: servers.Proxy, workers: str
) -> None:
    with counting(proxy.url, "--drain-timeout", "2", "--workers", workers) as program:
        proxy.refuse = True
        ask(server, "FLUSHALL")
        program.log.wait_for("it has lost its data")
        since = time.monotonic()
        assert program.stop() == LOST
        assert time.monotonic() - since < 2 + SLACK
        (line,) = told_as_lost(program)
        assert line.endswith(f": {MANY}")


@first_engine
def test_a_stop_without_redis_and_without_ids_loses_nothing(server: servers.Redis) -> None:
    with support.verve("--redis-url", server.url, "--drain-timeout", "2") as program:
        server.kill()
        program.log.wait_for("Redis is away")
        assert program.stop() == 0
        assert not [line for line in program.log.all if " ERROR " in line]


@last_engine
def test_a_stop_that_finds_no_memory_for_its_ids_says_what_is_lost(server: servers.Redis) -> None:
    with counting(server.url, "--drain-timeout", "2") as program:
        ask(server, "FLUSHALL")
        ask(server, "CONFIG", "SET", "maxmemory", 1)
        assert program.stop() == LOST
        assert len(told_as_lost(program)) == 1


@first_engine
def test_a_second_signal_ends_a_stop_that_waits_for_redis(server: servers.Redis) -> None:
    with counting(server.url, "--drain-timeout", "20") as program:
        server.kill()
        program.log.wait_for("Redis is away")
        program.send(signal.SIGTERM)
        program.log.wait_for("stopping")
        assert program.stop() == -signal.SIGTERM


@last_engine
def test_a_stop_at_the_end_of_a_window_leaves_it_to_be_told(server: servers.Redis) -> None:
    """Redis is emptied just before the end, and another instance tells the whole count."""
    with support.verve("--redis-url", server.url, "--window", "2") as other:
        with counting(server.url, window=2) as program:
            window = int(time.time()) // 2 * 2
            asyncio.run(at(window + 1.9))
            ask(server, "FLUSHALL")
            assert program.stop() == 0
        other.log.wait_for(f"unique ids in {name_of(window + 2)}: ")
        assert sum(server.reports().values()) == MANY
