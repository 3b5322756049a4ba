"""The program stops: nothing that was taken is lost, whatever is under way at the signal."""

import asyncio
import contextlib
import itertools
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import receivers
import servers
import support
from counted import assert_contiguous, assert_partial, counts, epoch, windows_seen
from operators import watched
from processes import at_work, one_of_each, wait_until, workers
from stores import let_settle
from support import Client, Program, accept, verve

DAY = ("--window", "86400")  # for tests that send an id twice: no window ends between
QUIET = 0.3  # seconds; after a pause this long a stopping server may well have closed an idle connection


def refused(address: support.Address) -> bool:
    """Whether a connection is turned away, rather than taken or reset."""
    try:
        socket.create_connection(address, support.DEADLINE).close()
    except ConnectionRefusedError:
        return True
    return False


# Stopping


class Load:
    """Many clients at once, each sending one request after the other as fast as they are answered.

    Every id is sent once. What an answer tells is kept: `counted` are the ids that were answered `ok`.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.counted: set[int] = set()
        self.lost: list[str] = []
        self.refused = 0
        self.enough = asyncio.Event()
        self.stop_after = 0
        self.stopped = float("inf")  # loop time at which the signal was sent
        self._ids = itertools.count()

    async def keep_alive(self, batch: int) -> None:
        """Send requests on one connection, `batch` at a time in one piece, until an answer says that it closes."""
        reader, writer = await asyncio.open_connection(*self.program.address)
        with contextlib.closing(writer):
            while await self._exchange(reader, writer, batch):
                pass
            assert await reader.read() == b""

    async def anew(self) -> None:
        """Send each request on a connection of its own, until one is refused."""
        for flags in itertools.cycle([("Connection: close",), ()]):
            try:
                reader, writer = await asyncio.open_connection(*self.program.address)
            except ConnectionRefusedError:
                self.refused += 1
                return
            with contextlib.closing(writer):
                await self._exchange(reader, writer, 1, *flags)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, batch: int, *fields: str
    ) -> bool:
        """Send `batch` requests and take their answers; return whether the connection goes on."""
        numbers = list(itertools.islice(self._ids, batch))
        sent = asyncio.get_running_loop().time()
        writer.write(b"".join(accept(number, *fields) for number in numbers))
        for number in numbers:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                body = await reader.readexactly(2)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                # A connection that was idle until after the quiet time is rightly closed.
                if sent < self.stopped + QUIET:
                    self.lost.append(f"{number} of {numbers}: {error!r}")
                return False
            assert head.startswith("HTTP/1.1 200 ")
            assert body == b"ok"
            self.counted.add(number)
            if len(self.counted) >= self.stop_after:
                self.enough.set()
            if "Connection: close" in head:
                # The requests behind it were sent before it came, in one piece with it.
                assert number == numbers[-1]
                return False
        return True

    async def run(self, number: signal.Signals, stop_after: int, idle: int) -> None:
        """Load the program; send it the signal after `stop_after` answers; return when every client has ended."""
        self.stop_after = stop_after
        loop = asyncio.get_running_loop()
        quiet = [await asyncio.open_connection(*self.program.address) for _ in range(idle)]
        async with asyncio.timeout(support.DEADLINE), asyncio.TaskGroup() as group:
            for batch in [1] * 24 + [2, 5, 16, 50]:
                group.create_task(self.keep_alive(batch))
            for _ in range(8):
                group.create_task(self.anew())
            await self.enough.wait()
            self.stopped = loop.time()
            self.program.send(number)
            for reader, _ in quiet:  # those that never sent anything are closed, not reset
                assert await reader.read() == b""
        for _, writer in quiet:
            writer.close()
            await writer.wait_closed()


@pytest.mark.parametrize(
    ("number", "stop_after", "window", "idle"),
    [
        (signal.SIGTERM, 400, 60, 0),
        (signal.SIGTERM, 1200, 60, 4),
        (signal.SIGTERM, 2500, 1, 0),
        (signal.SIGTERM, 3300, 1, 0),
        (signal.SIGTERM, 4100, 1, 4),
        (signal.SIGINT, 3000, 1, 0),
    ],
)
def test_stopping_under_load_loses_nothing(number: signal.Signals, stop_after: int, window: int, idle: int) -> None:
    with verve("--window", str(window), "--drain-timeout", "20") as program:
        load = Load(program)
        asyncio.run(load.run(number, stop_after, idle))
        assert program.wait() == 0
        assert load.lost == []
        assert load.refused == 8
        assert len(load.counted) >= stop_after
        assert_partial(program, len(load.counted))
        assert_contiguous(counts(program.log.all), window)
        assert not [line for line in program.log.all if "WARNING" in line]


def test_connections_that_the_kernel_holds_are_answered() -> None:
    """A frozen process is a busy one: connections and requests that come meanwhile wait in the kernel."""
    with verve() as program, contextlib.ExitStack() as stack:
        old = [stack.enter_context(Client(program.address)) for _ in range(10)]
        for number, client in enumerate(old):
            assert client.ask(accept(number)).status == 200
        program.freeze()
        new = [stack.enter_context(Client(program.address)) for _ in range(40)]
        for number, client in enumerate(old + new):
            client.send(accept(100 + number))
        program.send(signal.SIGTERM)
        program.thaw()
        for client in old + new:
            assert client.receive()[0].body == b"ok"
            assert client.rest() == b""
            client.close()
        assert program.wait() == 0
        assert_partial(program, 60)


@pytest.mark.parametrize("fields", [(), ("Connection: close",)])
def test_a_lone_connection_that_the_kernel_holds_is_answered(fields: tuple[str, ...]) -> None:
    with verve() as program:
        program.freeze()
        with Client(program.address) as client:
            client.send(accept(1, *fields))
            program.send(signal.SIGTERM)
            program.thaw()
            assert client.receive()[0].body == b"ok"
            assert client.rest() == b""
        assert program.wait() == 0
        assert_partial(program, 1)


@pytest.mark.skipif(not hasattr(socket, "TCP_DEFER_ACCEPT"), reason="needs a way to hold back a handshake's end")
def test_a_handshake_under_way_is_not_reset() -> None:
    """To a client far away it is a connection as soon as the SYN-ACK is there; its own ACK arrives later.

    A Linux client that asks for it sends that ACK with the request, so here it can be sent as late as over a network.
    """
    trip = 0.01  # seconds
    lost: list[str] = []
    counted: set[int] = set()

    async def ask(number: int, address: support.Address) -> bool:
        """Send a request a while after the connection is there; return whether it was refused."""
        loop = asyncio.get_running_loop()
        with socket.socket() as far:
            far.setblocking(False)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
            try:
                await loop.sock_connect(far, address)
            except ConnectionRefusedError:
                return True
            connected = loop.time()
            await asyncio.sleep(trip)
            took = loop.time() - connected
            try:
                await loop.sock_sendall(far, accept(number))
                if (await loop.sock_recv(far, 1000)).startswith(b"HTTP/1.1 200 "):
                    counted.add(number)
                    return False
                lost.append("closed")
            except ConnectionError as error:
                lost.append(repr(error))
            if took > 4 * trip:
                lost.pop()  # this machine was too busy, and the server may have given up waiting
        return False

    async def main(program: Program) -> None:
        asking: list[asyncio.Task[bool]] = []
        async with asyncio.timeout(support.DEADLINE):
            while not any(task.done() and task.result() for task in asking):
                asking.append(asyncio.create_task(ask(len(asking), program.address)))
                if len(asking) == 50:
                    program.send(signal.SIGTERM)
                await asyncio.sleep(trip / 5)
            await asyncio.gather(*asking)

    with verve() as program:
        asyncio.run(main(program))
        assert program.wait() == 0
        assert lost == []
        assert len(counted) >= 40
        assert_partial(program, len(counted))


def test_an_open_request_may_end_and_no_new_connection_begins() -> None:
    request = accept(5)
    with verve(*DAY, "--drain-timeout", "20") as program, Client(program.address) as client:
        client.send(accept(4), request[:30])
        client.receive()
        program.send(signal.SIGTERM)
        program.log.wait_for("stopping")
        # One that is established as the door closes is still answered; the next is refused.
        for _ in range(3):
            try:
                with Client(program.address) as late:
                    assert late.ask(accept(4)).body == b"ok"
            except ConnectionRefusedError:
                break
        assert refused(program.address)
        client.send(request[30:])
        answer = client.receive()[0]
        assert (answer.body, answer.closes) == (b"ok", True)
        assert client.rest() == b""
        client.close()
        assert program.wait() == 0
        assert_partial(program, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_connection_gets_one_more_answer(number: signal.Signals) -> None:
    for _ in range(5):
        with verve() as program, Client(program.address) as client:
            assert client.ask(accept(1)).status == 200
            sent = time.monotonic()
            program.send(number)
            program.log.wait_for("stopping")
            with contextlib.suppress(BrokenPipeError):
                client.send(accept(2))
            if time.monotonic() - sent > QUIET:
                continue  # this machine was too busy: the connection may have been closed by now
            answer = client.receive()[0]
            assert (answer.status, answer.body) == (200, b"ok")
            assert answer.closes
            assert client.rest() == b""
            client.close()
            assert program.wait() == 0
            assert_partial(program, 2)
            return
    pytest.fail("this machine is too busy to tell")


def test_idle_connections_are_closed_and_not_cut() -> None:
    with verve(*DAY, "--drain-timeout", "20") as program, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(program.address)) for _ in range(6)]
        for client in clients[:3]:
            assert client.ask(accept(1)).status == 200
        program.send(signal.SIGTERM)
        for client in clients:
            assert client.rest() == b""
            client.close()
        assert program.wait() == 0
        assert not [line for line in program.log.all if "WARNING" in line]
        assert_partial(program, 1)


def test_a_client_that_reads_late_gets_an_answer_for_what_was_counted() -> None:
    """It has sent as much as the kernel holds; what is not taken any more is not answered, and not counted."""
    requests = [accept(number) for number in range(100_000, 112_000)]
    size = len(requests[0])
    data = memoryview(b"".join(requests))
    with verve("--drain-timeout", "20") as program, Client(program.address) as client:
        program.freeze()
        client.socket.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < len(data):
                sent += client.socket.send(data[sent:])
        client.socket.settimeout(support.DEADLINE)
        program.send(signal.SIGTERM)
        program.thaw()
        program.log.wait_for("stopping")
        client.send(data[sent : sent + -sent % size])  # the end of the last request
        answers = client.receive_all()
        client.close()
        assert {answer.body for answer in answers} == {b"ok"}
        assert not any(answer.closes for answer in answers[:-1])
        assert answers[-1].closes or len(answers) == -(-sent // size)
        assert program.wait() == 0
        assert_partial(program, len(answers))


def test_a_half_sent_request_does_not_hold_up_the_stop() -> None:
    with verve("--drain-timeout", "0.5", "--header-timeout", "3600") as program, Client(program.address) as client:
        client.send(accept(1), accept(2)[:30])
        client.receive()
        assert program.stop() == 0
        assert_partial(program, 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)],
)
def test_a_second_signal_ends_it_at_once(first: signal.Signals, second: signal.Signals) -> None:
    with (
        verve("--drain-timeout", "3600", "--header-timeout", "3600") as program,
        Client(program.address) as client,
    ):
        client.send(accept(1), accept(2)[:30])
        client.receive()
        program.send(first)
        program.log.wait_for("stopping")
        assert program.stop(second) == -second


def test_a_second_signal_ends_the_first_process_of_a_container() -> None:
    """The kernel keeps signals that are not caught from process 1 of a PID namespace, its own ones too."""
    with (
        verve(
            *("--drain-timeout", "3600", "--header-timeout", "3600"),
            prefix=support.patched("import signal; signal.raise_signal = lambda number: None"),
        ) as program,
        Client(program.address) as client,
    ):
        client.send(accept(1), accept(2)[:30])
        client.receive()
        program.send(signal.SIGTERM)
        program.log.wait_for("stopping")
        assert program.stop() == 128 + signal.SIGTERM


def test_ctrl_c_amid_the_imports_ends_it_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "import sys, time\nprint('importing', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
    (tmp_path / "uvloop.py").write_text(slow)
    kept = support.environment()
    monkeypatch.setattr(support, "environment", lambda: {**kept, "PYTHONPATH": str(tmp_path)})
    program = Program([], [])
    program.log.wait_for("importing")
    assert program.stop(signal.SIGINT) == -signal.SIGINT
    assert program.log.all == ["importing"]


# --drain-delay


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


def several(server: servers.Redis, count: int) -> list[str]:
    return ["--redis-url", server.url, "--workers", str(count), *DAY] if count > 1 else [*DAY]


@pytest.mark.parametrize("count", [1, 2])
def test_connections_are_taken_while_the_delay_lasts_and_the_instance_is_not_ready(
    server: servers.Redis, count: int
) -> None:
    with watched("--drain-delay", "3", *several(server, count)) as (program, operators):
        if count > 1:
            at_work(program, server, count)
        wait_until(lambda: operators.ready() == (200, ["ready"]))
        with Client(program.address) as old:
            assert old.ask(accept(1)).status == 200
            program.send(signal.SIGTERM)
            wait_until(lambda: operators.ready() == (503, ["not ready", "stopping"]))
            for number in range(10):
                with Client(program.address) as new:
                    answer = new.ask(accept(number))
                    assert (answer.status, answer.closes) == (200, False)
            assert not old.ask(accept(2)).closes
        assert program.wait() == 0
        delayed, stopping = (
            datetime.fromisoformat(next(line for line in program.log.all if words in line).split()[0]).timestamp()
            for words in ("stopping: connections are taken for 3 s more", "stopping: answering what was taken")
        )
        assert stopping - delayed > 2.99


@pytest.mark.parametrize("count", [1, 2])
def test_a_second_signal_ends_the_delay_at_once(server: servers.Redis, count: int) -> None:
    with verve("--drain-delay", "3600", *several(server, count)) as program:
        if count > 1:
            at_work(program, server, count)
        program.send(signal.SIGTERM)
        program.log.wait_for("connections are taken for 3600 s more")
        status = program.stop()
        assert status == (-signal.SIGTERM if count == 1 else 0)
        assert not [line for line in program.log.all if "answering" in line]


def test_a_worker_that_dies_while_the_delay_lasts_is_replaced(server: servers.Redis) -> None:
    with verve("--drain-delay", "3600", *several(server, 2)) as program:
        at_work(program, server, 2)
        program.send(signal.SIGTERM)
        program.log.wait_for("connections are taken")
        killed = workers(program)[0]
        os.kill(killed, signal.SIGKILL)
        program.log.wait_for("worker 1 ended with status -9 and is replaced")
        at_work(program, server, 2)
        for number in range(20):
            with Client(program.address) as client:
                assert client.ask(accept(number)).status == 200
        program.stop()


def test_a_worker_that_is_stopped_alone_does_not_wait(server: servers.Redis) -> None:
    with verve("--drain-delay", "3600", *several(server, 2)) as program:
        at_work(program, server, 2)
        os.kill(workers(program)[1], signal.SIGTERM)
        program.log.wait_for("worker 2: stopping: answering what was taken")
        program.log.wait_for("worker 2 ended with status 0 and is replaced")
        at_work(program, server, 2)
        program.send(signal.SIGTERM)
        program.log.wait_for("connections are taken")
        program.stop()


def test_a_window_that_ends_while_redis_is_slow_is_told_at_the_stop(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--window", "1", "--request-timeout", "20", "--drain-timeout", "20"
    with verve(*flags) as program:
        with Client(program.address) as client:
            let_settle(server)
            windows_seen(program, 1)
            assert client.ask(accept(1)).status == 200
        server.freeze()
        frozen = time.time()
        wait_until(lambda: time.time() > frozen + 1.5)  # so a window is over, and its count is asked for
        program.send(signal.SIGTERM)
        wait_until(lambda: refused(program.address))
        server.thaw()
        assert program.wait() == 0
        told = counts(program.log.all)
        assert sum(count for _, count in told) == 1
        assert [(epoch(window), count) for window, count in server.reports().items()] == told
        assert told[-1][0] + 1 >= int(frozen)


def test_operators_are_turned_away_when_the_first_worker_has_ended_before_the_others(server: servers.Redis) -> None:
    """Their connections are not kept by the kernel for nobody."""
    with watched("--drain-timeout", "60", "--header-timeout", "60", *several(server, 2)) as (program, operators):
        at_work(program, server, 2)
        first, second = workers(program)
        with one_of_each(program) as clients:
            clients[second].send(b"GET ")
            program.send(signal.SIGTERM)
            wait_until(lambda: first not in workers(program))
            assert refused(operators.address)
            clients[second].send(accept(1)[4:])
            assert clients[second].receive()[0].status == 200
        assert program.wait() == 0


def test_a_callback_under_way_is_waited_for() -> None:
    with (
        receivers.Receiver(default=receivers.Answer(receivers.HANG)) as receiver,
        verve("--callback-allow", "127.0.0.0/8", "--log-level", "debug", "--drain-timeout", "20") as program,
    ):
        with Client(program.address) as client:
            assert client.ask(support.get(f"{support.PATH}?id=1&endpoint={receiver.url}/")).status == 200
        receiver.wait_for(1)
        program.send(signal.SIGTERM)
        wait_until(lambda: refused(program.address))
        since = time.monotonic()
        wait_until(lambda: refused(program.address) and time.monotonic() > since + 0.3)
        receiver.release()
        assert program.wait() == 0
        assert [line for line in program.log.all if re.search("callback to .*: status 200", line)]
