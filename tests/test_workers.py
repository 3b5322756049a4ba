"""Several processes on one port: what they count together, and what becomes of the rest when one dies.

The program runs with real workers against a real Redis. Which worker has a connection is read from /proc, so a test
kills the one it means; what the kernel holds for a worker is made certain by stopping that worker in its tracks
before the connections are made.
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import receivers
import servers
import support
from operators import watched
from processes import (
    ask,
    at_work,
    follow,
    freeze,
    ids,
    listeners,
    long_window,
    one_of_each,
    owner,
    see_drained,
    started,
    state,
    told,
    wait_until,
    workers,
)

import verve_server
import workers as room

QUIET = 0.4  # seconds after which a stopping process may close an idle connection; it waits a little longer

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


# Together


def test_workers_count_together(server: servers.Redis) -> None:
    with started(server, 3) as program, one_of_each(program) as clients:
        assert len(clients) == 3
        for number in 7, 8, 7, -1:
            for client in clients.values():
                assert client.ask(support.accept(number)).status == 200
        assert ids(server) == [-1, 7, 8]
        assert len(ask(server, "KEYS", "*:ids")) == 1


def test_the_port_is_shared_by_the_workers_alone(server: servers.Redis) -> None:
    with started(server, 2) as program:
        for flags in ((), ("--redis-url", server.url, "--workers", "2")):
            refused = support.run("--port", str(program.address[1]), *flags)
            assert refused.returncode == 1
            (line,) = refused.stderr.splitlines()
            assert str(program.address[1]) in line or "in use" in line


def test_workers_are_refused_in_memory() -> None:
    refused = support.run("--workers", "2")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "--workers" in line
    assert "--redis-url" in line


def test_another_length_of_windows_is_refused_once(server: servers.Redis) -> None:
    with support.verve("--redis-url", server.url, "--window", "3600"):
        refused = support.run("--redis-url", server.url, "--workers", "3", "--window", "60")
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert "3600" in line


def test_another_length_of_windows_that_only_workers_find_ends_them_all() -> None:
    with servers.Redis(next(iter(servers.ENGINES)), persist=True) as server:
        with support.verve("--redis-url", server.url, "--window", "3600"):
            pass
        server.kill()
        words = ["--redis-url", server.url, "--window", "60", "--workers", "3"]
        program = support.Program(words, [])
        try:
            program.log.wait_for("listening on")
            server.start()
            assert program.wait() == 1
            assert [line for line in program.log.all if "3600" in line]
            assert not [line for line in program.log.all if "replaced" in line]
        finally:
            program.end()


def test_workers_share_the_connections_to_an_origin(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--window", long_window(), "--workers", "2", "--callback-allow", "127.0.0.0/8"
    with (
        receivers.Receiver(default=receivers.Answer(receivers.HANG)) as receiver,
        receivers.Receiver() as other,
        watched(*flags, "--drain-timeout", "0.5") as (program, operators),
    ):
        at_work(program, server, 2)
        with one_of_each(program) as clients:
            numbers = iter(range(1000))
            for client in clients.values():
                for target in [receiver.url] * 70 + [other.url]:
                    request = support.get(f"{support.PATH}?id={next(numbers)}&endpoint={target}/")
                    assert client.ask(request).status == 200
            other.wait_for(2)
            receiver.wait_for(64)
            operators.wait_for("verve_waiting_callbacks", true=lambda count: count == 140)
            assert receiver.connections == 64
            program.stop()
            program.log.all[:] = [line for line in program.log.all if "callback" not in line]


# The door


def test_what_the_kernel_holds_is_taken_before_the_door_is_shut() -> None:
    """Connections that came when the loop last looked, and those whose handshake ends meanwhile."""
    taken: list[Any] = []

    class Taken(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            taken.append(transport)

    class Busy:
        """A listener whose loop takes nothing."""

        shut = False

        def close(self) -> None:
            assert len(taken) == len(clients)
            self.shut = True

    async def test() -> None:
        sock.setblocking(False)
        clients.extend(stack.enter_context(socket.create_connection(sock.getsockname())) for _ in range(5))
        await room.close_door(Taken, busy, sock, alone=True)  # type: ignore[arg-type]
        assert busy.shut
        with pytest.raises(TimeoutError):  # the kernel says nothing to a new one
            socket.create_connection(sock.getsockname(), 0.3)
        for transport in taken:
            transport.abort()

    busy = Busy()
    clients: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        (sock,) = room.bind(stack, "127.0.0.1", 0, 1)
        sock.listen()
        asyncio.run(test())


@pytest.mark.parametrize("count", [1, 2])
def test_no_connection_begins_while_the_door_closes(server: servers.Redis, count: int) -> None:
    """It would be reset when it is shut."""
    slow = support.patched("import workers; workers.HANDSHAKE = 5.0")
    words = "--redis-url", server.url, "--workers", str(count), "--window", long_window(), "--drain-timeout", "20"
    with support.verve(*words, prefix=slow) as program:
        if count > 1:
            at_work(program, server, count)
        program.send(signal.SIGTERM)
        program.log.wait_for("stopping")
        wait_until(lambda: not_taken(program.address))
        assert not_taken(program.address)
        assert program.wait() == 0


def not_taken(address: support.Address) -> bool:
    """Whether the kernel gives no answer to who wants a connection."""
    try:
        socket.create_connection(address, 0.5).close()
    except TimeoutError:
        return True
    return False


# A worker dies


def test_a_killed_worker_is_replaced_and_others_are_not_disturbed(server: servers.Redis) -> None:
    with started(server, 2) as program, one_of_each(program) as clients:
        killed, other = clients
        os.kill(killed, signal.SIGKILL)
        assert clients[killed].rest() == b""
        assert clients[other].ask(support.accept(1)).status == 200
        at_work(program, server, 2)
        assert clients[other].ask(support.accept(2)).status == 200
        assert other in workers(program)
        assert killed not in workers(program)
        with one_of_each(program) as anew:
            for number, client in enumerate(anew.values()):
                assert client.ask(support.accept(number)).status == 200
        assert ids(server) == [0, 1, 2]
        complaints = [line for line in program.log.all if re.search(" (WARNING|ERROR) ", line)]
        assert len(complaints) == 1, complaints


def test_a_worker_is_replaced_again_and_again(server: servers.Redis) -> None:
    with started(server, 2) as program:
        for number in range(3):
            for pid in workers(program):
                os.kill(pid, signal.SIGKILL)
            with support.Client(program.address) as client:
                assert client.ask(support.accept(number)).status == 200
            at_work(program, server, 2)
        assert ids(server) == [0, 1, 2]


def test_connections_that_wait_for_a_dead_worker_are_served_by_its_successor(server: servers.Redis) -> None:
    with started(server, 2) as program, contextlib.ExitStack() as stack:
        frozen, other = workers(program)
        freeze(frozen)  # so it accepts nothing, and the kernel holds what is for it
        clients = [stack.enter_context(support.Client(program.address)) for _ in range(40)]
        for number, client in enumerate(clients):
            client.send(support.accept(number))
        os.kill(frozen, signal.SIGKILL)
        for client in clients:
            assert client.receive()[0].status == 200
        assert ids(server) == [*range(40)]
        assert [client for client in clients if owner(client, [other]) is None], "of 40, some were for each worker"


def test_workers_that_are_stopped_one_after_the_other_serve_every_connection(server: servers.Redis) -> None:
    with started(server, 2) as program:
        for turn, pid in enumerate(workers(program)):
            os.kill(pid, signal.SIGTERM)
            for number in range(20):  # of which some are for each worker
                with support.Client(program.address) as client:
                    assert client.ask(support.accept(100 * turn + number)).status == 200
            wait_until(lambda: pid not in workers(program))  # noqa: B023
            at_work(program, server, 2)
        for number in range(40):
            with support.Client(program.address) as client:
                assert client.ask(support.accept(1000 + number)).status == 200


def test_a_successor_waits_for_the_store_though_the_first_workers_found_none(server: servers.Redis) -> None:
    server.kill()
    with support.verve("--redis-url", server.url, "--workers", "2", "--window", long_window()) as program:
        server.start()
        at_work(program, server, 2)
        with one_of_each(program) as clients_of:  # the first workers don't wait for it before they answer
            wait_until(lambda: all(client.ask(support.accept(9)).status == 200 for client in clients_of.values()))
        for turn in range(2):
            frozen = workers(program)[0]
            freeze(frozen)
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(support.Client(program.address)) for _ in range(20)]
                for number, client in enumerate(clients):
                    client.send(support.accept(100 * turn + number))
                os.kill(frozen, signal.SIGKILL)
                assert [client.receive()[0].status for client in clients] == [200] * 20
            at_work(program, server, 2)


def test_no_connection_is_lost_while_workers_are_killed(server: servers.Redis) -> None:
    """But those that the killed worker itself had: at most one for each of those who ask."""
    ok: list[int] = []
    lost: list[int] = []
    unserved: list[str] = []
    stop = threading.Event()

    def load(number: int) -> None:
        while not stop.is_set():
            number += 1
            try:
                client = support.Client(program.address)
            except OSError as error:
                unserved.append(repr(error))
                return
            with client:
                try:
                    response = client.ask(support.accept(number, "Connection: close"))
                except (OSError, AssertionError):
                    lost.append(number)
                    continue
                (ok.append(number) if response.status == 200 else unserved.append(str(response)))

    kills = 4
    askers = 4
    with started(server, 2) as program:
        threads = [threading.Thread(target=load, args=(number << 40,)) for number in range(askers)]
        for thread in threads:
            thread.start()
        for turn in range(kills):
            wait_until(lambda: len(ok) > 50 * (turn + 1) or unserved)  # noqa: B023
            os.kill(workers(program)[turn % 2], signal.SIGKILL)
            at_work(program, server, 2)
        stop.set()
        for thread in threads:
            thread.join(support.DEADLINE)
            assert not thread.is_alive()
        assert unserved == []
        assert len(lost) <= kills * askers
        assert {*ok} <= {*ids(server)} <= {*ok, *lost}


def test_each_window_is_told_once_though_the_teller_dies(server: servers.Redis) -> None:
    with started(server, 2, window="1") as program:
        program.log.wait_for("unique ids in ")
        for _ in range(2):
            teller = next(pid for pid in workers(program) if pid not in others(program))
            freeze_when_told(program, teller)
            enough = len(server.reports()) + 2
            wait_until(lambda: len(server.reports()) >= enough)  # noqa: B023
            os.kill(teller, signal.SIGKILL)
            missed = max(server.reports())
            program.log.wait_for(f"unique ids in {missed}: ")
        at_work(program, server, 2)
        program.log.wait_for("unique ids in ", len(program.log.all))
    windows = told(program)
    assert follow(windows)
    assert windows == [window for window in server.reports() if windows[0] <= window <= windows[-1]]


def freeze_when_told(program: support.Program, teller: int) -> None:
    """Freeze the worker that tells, but not between its line about a window and its note that the line is written.

    So its line about the last window that has ended is there, it waits for events after that, and is frozen before
    the next window ends; on a busy machine that may be missed, and is tried again.
    """

    def between_windows() -> bool:
        last = datetime.fromtimestamp(edge - 1, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return int(time.time()) > edge or (told(program)[-1] == last and state(teller) == "S")

    while True:
        edge = int(time.time())
        wait_until(between_windows)
        freeze(teller)
        if int(time.time()) == edge:
            return
        os.kill(teller, signal.SIGCONT)


def others(program: support.Program) -> list[int]:
    """Return the workers that do not tell: those other than the first, or than the one started last in its place."""
    pids = workers(program)
    replaced = [line for line in program.log.all if "is replaced" in line]
    return pids[:-1] if replaced else pids[1:]


def test_the_first_window_is_told_though_the_teller_dies_in_it(server: servers.Redis) -> None:
    with started(server, 2, window="2") as program:
        teller = workers(program)[0]
        freeze(teller)
        first = told(program) + sorted(server.reports())
        wait_until(server.reports)
        os.kill(teller, signal.SIGKILL)
        (window, *_) = first or server.reports()
        at_work(program, server, 2)
        program.log.wait_for("unique ids in ", len(program.log.all))
        assert window in told(program)


def test_the_first_window_is_kept_for_a_successor_once_it_is_known() -> None:
    """With a Redis that came later than the workers, that is not at their start."""
    parts: Any = SimpleNamespace(shared=SimpleNamespace(untold=[0]), store=SimpleNamespace(window=0))
    for window, untold in ((0, 0), (60, 60), (120, 60)):
        parts.store.window = window
        verve_server.Parts.note_first(parts)
        assert parts.shared.untold == [untold]


@pytest.mark.parametrize("style", ["text", "json"])
def test_lines_of_workers_name_the_worker_and_counts_are_the_instances(server: servers.Redis, style: str) -> None:
    with started(server, 2, "--log-format", style, window="1") as program:
        program.log.wait_for("unique ids in ")
        server.kill()
        for number in (1, 2):
            program.log.wait_for(f"worker {number}: Redis is away")
        server.start()
        for number in (1, 2):
            program.log.wait_for(f"worker {number}: Redis is back")
        program.log.wait_for("unique ids in ", len(program.log.all))
        assert not [line for line in program.log.all if "unique ids" in line and "worker" in line]
        assert not [line for line in program.log.all if "listening on" in line and "worker " in line]


# The end


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_window_that_was_left_open_is_told_by_the_instance_that_closes_it(server: servers.Redis, count: str) -> None:
    flags = "--redis-url", server.url, "--window", "1"
    with support.verve(*flags) as program, support.Client(program.address) as client:
        program.log.wait_for("unique ids in ")  # so Redis has settled, and the next to come may close at once
        assert client.ask(support.accept(1)).status == 200
        program.end()
    (left,) = ask(server, "ZRANGE", "verve:open", "0", "-1")
    window = left.split()[0]
    wait_until(lambda: time.time() > datetime.fromisoformat(window).timestamp() + 1)
    with support.verve(*flags, "--workers", count) as program:
        program.log.wait_for(f"unique ids in {window}: 1$")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_of_all_under_load(server: servers.Redis, number: signal.Signals) -> None:
    ok: list[int] = []
    unanswered: list[str] = []
    running = threading.Barrier(9)

    def load(first: int) -> None:
        quiet = 0.0
        try:
            with support.Client(program.address) as client:
                answered = time.monotonic()
                for each in range(first, first + 10**9):
                    quiet = time.monotonic() - answered
                    response = client.ask(support.accept(each))
                    answered = time.monotonic()
                    assert response.status == 200
                    ok.append(each)
                    if response.closes:
                        return
                    if each == first + 20:
                        running.wait(support.DEADLINE)
        except (OSError, AssertionError, threading.BrokenBarrierError) as error:
            if quiet < QUIET:
                unanswered.append(repr(error))

    with started(server, 3) as program:
        pids = workers(program)
        threads = [threading.Thread(target=load, args=(index << 40,)) for index in range(8)]
        for thread in threads:
            thread.start()
        running.wait(support.DEADLINE)
        assert program.stop(number) == 0
        for thread in threads:
            thread.join(support.DEADLINE)
            assert not thread.is_alive()
        assert unanswered == []
        assert ids(server) == sorted(ok)
        assert [state(pid) for pid in pids] == ["", "", ""], "waited for, and gone"


def test_ctrl_c_at_a_terminal_lets_the_workers_drain(server: servers.Redis) -> None:
    """It is a signal to the whole group, of which the parent alone takes notice."""
    words = "--redis-url", server.url, "--workers", "2", "--window", long_window()
    with support.verve(*words, prefix=["setsid"]) as program:
        at_work(program, server, 2)
        with one_of_each(program) as clients:
            server.freeze()
            for client in clients.values():
                client.send(support.accept(7))
            os.killpg(program.pid, signal.SIGINT)
            program.log.wait_for("stopping")
            wait_until(lambda: not listeners(program.pid))  # the parent has passed it on
            server.thaw()
            for client in clients.values():
                see_drained(client)
        assert program.wait() == 0


def test_the_workers_of_a_killed_parent_end_by_themselves(server: servers.Redis) -> None:
    with started(server, 3) as program:
        pids = workers(program)
        with one_of_each(program) as clients:
            server.freeze()
            for number, client in enumerate(clients.values()):
                client.send(support.accept(number))
            program.send(signal.SIGKILL)
            program.log.wait_for("parent process is gone")
            server.thaw()
            for client in clients.values():
                see_drained(client)
        assert program.wait() == -signal.SIGKILL  # which waits for the end of the log, that the workers hold open
        wait_until(lambda: all(state(pid) in ("", "Z") for pid in pids))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(program.address).close()


@pytest.mark.parametrize("count", [1, 2])
def test_a_second_signal_ends_at_once(server: servers.Redis, count: int) -> None:
    patience = "--request-timeout", "40", "--drain-timeout", "40"  # longer than what this test waits
    words = "--redis-url", server.url, "--window", long_window(), *patience
    with support.verve(*words, "--workers", str(count)) as program, support.Client(program.address) as client:
        assert client.ask(support.accept(1)).status == 200
        server.freeze()
        client.send(support.accept(2))
        pids = workers(program)
        program.send(signal.SIGTERM)
        program.log.wait_for("stopping")
        assert program.process.poll() is None
        program.send(signal.SIGTERM)
        program.wait()
        assert all(state(pid) in ("", "Z") for pid in pids)


def test_a_stop_while_a_worker_is_to_be_replaced(server: servers.Redis) -> None:
    with started(server, 2) as program:
        for turn in range(4):  # from the second time on, the successor waits a moment
            wait_until(lambda: workers(program))
            os.kill(workers(program)[0], signal.SIGKILL)
            wait_until(lambda: sum("is replaced" in line for line in program.log.all) > turn)  # noqa: B023
        assert program.stop() == 0


def test_a_child_that_is_not_a_worker_is_no_matter(server: servers.Redis) -> None:
    """A container's first process is given every orphan."""
    prefix = ["sh", "-c", 'sleep 1 & exec "$@"', "sh"]
    with support.verve(
        "--redis-url", server.url, "--window", long_window(), "--workers", "2", prefix=prefix
    ) as program:
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
        wait_until(lambda: len(children.read_text().split()) == 2)
        with support.Client(program.address) as client:
            assert client.ask(support.accept(1)).status == 200
        assert program.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_store_is_awaited(number: signal.Signals) -> None:
    program = support.Program(["--redis-url", f"redis://127.0.0.1:{servers.free_port()}", "--workers", "2"], [])
    try:
        blocked = Path(f"/proc/{program.pid}/status")
        wait_until(lambda: int(blocked.read_text().partition("SigBlk:")[2].split()[0], 16) >> (number - 1) & 1)
        assert program.stop(number) == 0
        assert not any("Traceback" in line for line in program.log.all)
    finally:
        program.end()


@pytest.mark.parametrize("count", [1, 2])
def test_the_port_is_opened_when_the_store_was_awaited(server: servers.Redis, count: int) -> None:
    port = servers.free_port()
    server.freeze()
    start = time.monotonic()
    flags = ["--redis-url", server.url, "--workers", str(count), "--port", str(port)]
    program = support.Program(flags, [])
    try:

        def taken() -> bool:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                return True
            return False

        wait_until(taken)
        assert time.monotonic() - start > verve_server.STORE_WAIT
        server.thaw()
    finally:
        server.thaw()
        program.end()
