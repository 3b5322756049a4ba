"""Callbacks: the request to the endpoint that a client named, with the count of an id that is new in its window.

Most tests run the whole program, with a receiver on this machine that `--callback-allow` lets it reach. What must not
come is known when the program has stopped, since it delivers first what waits. The rest is about logic in time: there
the clock and the client are stand-ins. No test asks a resolver or reaches another machine.
"""

import asyncio
import itertools
import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_address
from types import SimpleNamespace
from typing import cast
from urllib.parse import quote

import pytest
import servers
import support
from receivers import HANG, RESET, Answer, Receiver, Request
from stores import Log, ask, ids, long_window, opened, play, until

import dedup
import outbound
import reporter

ALLOW = ("--callback-allow", "127.0.0.0/8,::1")
LONG = ("--window", str(long_window()))  # does not end while the tests run
STOP = 20.0  # seconds that a stopping process takes at most on a busy machine, where it would be a minute if it hung


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


def request(number: int, endpoint: str | bytes, method: str = "GET") -> bytes:
    """Return the request that has an id counted and names an endpoint."""
    target = f"{support.PATH}?id={number}&endpoint={quote(endpoint, safe='')}"
    return support.get(target).replace(b"GET", method.encode(), 1)


def count_of(found: Request) -> int:
    match = re.search(r"[?&]count=([0-9]+)$", found.target)
    assert match, found.target
    return int(match[1])


def stop(program: support.Program) -> None:
    """Stop the program; what waited is delivered then."""
    assert program.stop() == 0


def from_log(program: support.Program, pattern: str) -> list[str]:
    return [line for line in program.log.all if re.search(pattern, line)]


@dataclass
class Spy:
    """A program and a receiver, and how many ids were counted so far."""

    program: support.Program
    receiver: Receiver
    count: int = 0

    def call(self, endpoint: str | bytes) -> Request:
        """Have a new id counted; return the callback, which must tell the count."""
        before = len(self.receiver.requests)
        self.count += 1
        with support.Client(self.program.address) as client:
            assert client.ask(request(self.count, endpoint))[::2] == (200, b"ok")
        *_, last = self.receiver.wait_for(before + 1)
        return last


@pytest.fixture(scope="module")
def spy() -> Iterator[Spy]:
    talkative = support.patched("reporter.LINES = 1000")
    with Receiver() as receiver, support.verve(*LONG, *ALLOW, prefix=talkative) as program:
        yield Spy(program, receiver)


# What is sent


@pytest.mark.parametrize(
    ("endpoint", "target"),
    [
        ("", "/?count=N"),
        ("/", "/?count=N"),
        ("/seen", "/seen?count=N"),
        ("/seen?", "/seen?count=N"),
        ("?", "/?count=N"),
        ("/seen?a=b", "/seen?a=b&count=N"),
        ("?a=b", "/?a=b&count=N"),
        ("?a", "/?a&count=N"),
        ("/seen?a=b&c=d%26e", "/seen?a=b&c=d%26e&count=N"),
        ("/seen?count=9", "/seen?count=9&count=N"),
        ("/seen?a=/?", "/seen?a=/?&count=N"),
        ("/seen#part", "/seen?count=N"),
        ("#part", "/?count=N"),
        ("?#part", "/?count=N"),
        ("/seen?a=b#part?c=d&e", "/seen?a=b&count=N"),
    ],
)
def test_the_count_joins_the_query(spy: Spy, endpoint: str, target: str) -> None:
    found = spy.call(spy.receiver.url + endpoint)
    target = target.replace("N", str(spy.count))
    host = f"127.0.0.1:{spy.receiver.port}"
    assert found.head == f"GET {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: verve\r\n\r\n"
    assert found.body == b""


def test_post_tells_count_and_window(receiver: Receiver) -> None:
    with support.verve(*LONG, *ALLOW, "--callback-method", "POST") as program:
        with support.Client(program.address) as client:
            for number in 5, 6:
                assert client.ask(request(number, f"{receiver.url}/seen?a=b#part")).status == 200
                receiver.wait_for(number - 4)
        stop(program)
    windows = re.findall(r"unique ids in (\S+): 2", "\n".join(program.log.all))
    for count, found in enumerate(receiver.requests, 1):
        assert (found.method, found.target) == ("POST", "/seen?a=b")
        assert found.fields["content-type"] == "application/json"
        assert [json.loads(found.body)] == [{"count": count, "window": window} for window in windows]


def test_connections_are_kept(spy: Spy) -> None:
    spy.call(spy.receiver.url)
    spy.call(spy.receiver.url)
    before = spy.receiver.connections
    for _ in range(5):
        spy.call(spy.receiver.url)
    assert spy.receiver.connections <= before + 1  # one may have been let go meanwhile


# What makes one


@pytest.mark.parametrize("stored", ["memory", "redis"])
def test_one_for_each_new_id(server: servers.Redis, receiver: Receiver, stored: str) -> None:
    flags = ("--redis-url", server.url) if stored == "redis" else ()
    with support.verve(*LONG, *ALLOW, *flags) as program:
        with support.Client(program.address) as client, support.Client(program.address) as other:
            for number in 1, 1, 2, 1:
                assert client.ask(request(number, f"{receiver.url}/{number}")).body == b"ok"
            assert other.ask(request(2, f"{receiver.url}/2")).body == b"ok"
            assert client.ask(request(3, f"{receiver.url}/3", "HEAD"), head=True).status == 200
            assert client.ask(request(3, f"{receiver.url}/3", "HEAD"), head=True).status == 200
            assert client.ask(request(3, f"{receiver.url}/3")).status == 200
            piece = b"".join(request(number, f"{receiver.url}/{number}") for number in (4, 4, 5, 4, 1, 5))
            client.send(piece)
            assert {response.status for response in client.receive(6)} == {200}
        stop(program)
    assert sorted(found.target for found in receiver.requests) == [f"/{n}?count={n}" for n in range(1, 6)]


@pytest.mark.parametrize("stored", ["memory", "redis"])
def test_ids_without_endpoint_count_and_make_none(server: servers.Redis, receiver: Receiver, stored: str) -> None:
    flags = ("--redis-url", server.url) if stored == "redis" else ()
    with support.verve(*LONG, *ALLOW, *flags) as program:
        with support.Client(program.address) as client:
            for number in range(10):
                assert client.ask(support.accept(number)).status == 200
            assert client.ask(request(3, receiver.url)).status == 200
            assert client.ask(request(10, receiver.url)).status == 200
            assert client.ask(support.accept(11)).status == 200
            assert client.ask(request(12, receiver.url)).status == 200
        stop(program)
    assert sorted(map(count_of, receiver.requests)) == [11, 13]


def test_none_for_what_was_not_stored(receiver: Receiver) -> None:
    with support.verve(*LONG, *ALLOW, "--max-ids", "1") as program:
        with support.Client(program.address) as client:
            assert client.ask(request(1, receiver.url)).status == 200
            assert client.ask(request(2, receiver.url)).status == 503
            for target in ("?id=x&endpoint=", "?endpoint=", "?id=1&id=2&endpoint="):
                assert client.ask(support.get(support.PATH + target + quote(receiver.url, safe=""))).status == 400
        stop(program)
    assert len(receiver.requests) == 1


def test_the_endpoint_of_a_pipelined_request_is_told_though_others_follow(
    server: servers.Redis, receiver: Receiver
) -> None:
    with support.verve(*LONG, *ALLOW, "--redis-url", server.url) as program:
        with support.Client(program.address) as client:
            for number in range(20):
                client.send(request(number, receiver.url), support.accept(number), request(number, receiver.url))
                assert [response.status for response in client.receive(3)] == [200] * 3
        stop(program)
    assert sorted(map(count_of, receiver.requests)) == [*range(1, 21)]


def storm(addresses: Sequence[support.Address], count: int, endpoint: str) -> None:
    """Have the same ids counted on connections to all addresses at once."""
    ready = threading.Barrier(len(addresses))
    failures: list[object] = []

    def work(address: support.Address) -> None:
        try:
            with support.Client(address) as client:
                ready.wait(support.DEADLINE)
                for start in range(0, count, 10):
                    numbers = range(start, start + 10)
                    client.send(*[request(number, f"{endpoint}/{number}") for number in numbers])
                    failures.extend(response for response in client.receive(10) if response.status != 200)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(address,)) for address in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(support.DEADLINE)
    assert failures == []


def told_once(receiver: Receiver, count: int) -> None:
    """See that each id made one callback, and each with a count of its own."""
    assert Counter(found.target.partition("?")[0] for found in receiver.requests) == {f"/{n}": 1 for n in range(count)}
    assert sorted(map(count_of, receiver.requests)) == [*range(1, count + 1)]


def test_two_instances_tell_an_id_once(server: servers.Redis, receiver: Receiver) -> None:
    flags = (*LONG, *ALLOW, "--redis-url", server.url)
    with support.verve(*flags) as one, support.verve(*flags) as other:
        storm([one.address, other.address, other.address, one.address], 200, receiver.url)
        stop(one)
        stop(other)
    told_once(receiver, 200)


def test_workers_tell_an_id_once(server: servers.Redis, receiver: Receiver) -> None:
    with support.verve(*LONG, *ALLOW, "--redis-url", server.url, "--workers", "2") as program:
        storm([program.address] * 8, 100, receiver.url)
        stop(program)
    told_once(receiver, 100)


@pytest.mark.parametrize("stored", ["memory", "redis"])
def test_a_new_window_makes_an_id_new(server: servers.Redis, receiver: Receiver, stored: str) -> None:
    flags = ("--redis-url", server.url) if stored == "redis" else ()
    with support.verve("--window", "1", *ALLOW, *flags, "--callback-method", "POST") as program:
        with support.Client(program.address) as client:
            for _ in range(2):
                said = len(program.log.all)
                assert client.ask(request(7, receiver.url)).status == 200
                program.log.wait_for("unique ids in .*: 1$", said)  # and not the line of the window before
        stop(program)
    bodies = [json.loads(found.body) for found in receiver.requests]
    assert [body["count"] for body in bodies] == [1, 1]
    counts = dict(re.findall(r"unique ids in (\S+): ([0-9]+)", "\n".join(program.log.all)))
    assert {body["window"] for body in bodies} == {window for window, count in counts.items() if count == "1"}
    assert len({body["window"] for body in bodies}) == 2


@pytest.mark.parametrize("engine", servers.ENGINES)
def test_an_id_that_comes_too_late_is_told_with_the_window_it_is_in(engine: str) -> None:
    async def test(server: servers.Redis, proxy: servers.Proxy) -> None:
        async with opened(proxy.url, seconds=1) as late, opened(server.url, seconds=1) as other:
            told: list[tuple[int, int]] = []
            outcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            closed: list[tuple[int, int]] = []
            assert late.add(1, print, lambda *_: None) is None  # opens the window
            await until(lambda: late.count == 1)
            window = late.window
            proxy.hold()
            assert late.add(2, outcome.set_result, lambda *count: told.append(count)) is None
            while window not in dict(closed):
                await asyncio.sleep(max(0.01, other.remaining()))
                closed += await other.roll()
            proxy.release()
            assert await outcome == dedup.STORED
            await until(lambda: told)
            ((start, count),) = told
            assert start > window
            assert count == 1
            assert dict(closed)[window] == 1

    with servers.Redis(engine) as server, servers.Proxy(server.port) as proxy:
        play(test(server, proxy))


@pytest.mark.parametrize("engine", servers.ENGINES)
def test_those_who_want_to_be_told_come_first_among_thousands(engine: str) -> None:
    async def test(server: servers.Redis) -> None:
        async with opened(server.url) as store:
            outcomes: list[int] = []
            told: list[int] = []
            for number in range(-3000, 3000):  # all in one batch
                assert store.add(number, outcomes.append) is None
            for number in (5, 7000, 7000):
                assert store.add(number, outcomes.append, lambda _, count: told.append(count)) is None
            await until(lambda: len(outcomes) == 6003)
            assert {*outcomes} == {dedup.STORED}
            assert told == [1, 2]
            assert store.new == store.count == 6001
            assert ids(server) == {*range(-3000, 3000), 7000}

    with servers.Redis(engine) as server:
        play(test(server))


def test_none_for_an_answer_that_was_lost(server: servers.Redis) -> None:
    async def test(proxy: servers.Proxy) -> None:
        async with opened(proxy.url) as store:
            told: list[int] = []
            outcomes: list[int] = []
            proxy.set_plan("before_reply")
            assert store.add(1, outcomes.append, lambda _, count: told.append(count)) is None
            await until(lambda: outcomes)
            assert outcomes == [dedup.LOST]
            await until(lambda: store.up)
            for number in 1, 2:
                assert store.add(number, outcomes.append, lambda _, count: told.append(count)) is None
            await until(lambda: len(outcomes) == 3)
            assert outcomes[1:] == [dedup.STORED] * 2
            assert told == [2], "the first was stored, though nobody could know"

    with servers.Proxy(server.port) as proxy:
        play(test(proxy))


def test_a_refused_batch_tells_nobody(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url) as store:
            outcomes: list[int] = []
            ask(server, "CONFIG", "SET", "maxmemory", "1")
            assert store.add(1, outcomes.append, lambda *_: outcomes.append(-1)) is None
            await until(lambda: outcomes)
            ask(server, "CONFIG", "SET", "maxmemory", "0")
            assert store.add(1, outcomes.append, lambda _, count: outcomes.append(-count)) is None
            await until(lambda: len(outcomes) == 3)
            assert outcomes == [dedup.REFUSED, dedup.STORED, -1]

    with Log():
        play(test())


# What becomes of them


def test_the_answer_does_not_wait(receiver: Receiver) -> None:
    receiver.default = Answer(HANG)
    with support.verve(*LONG, *ALLOW) as program:
        with support.Client(program.address) as client:
            for number in range(100):
                assert client.ask(request(number, receiver.url))[::2] == (200, b"ok")
            receiver.wait_for(64)
            assert client.ask(support.accept(1000)).status == 200
        receiver.release()
        stop(program)
    assert sorted(map(count_of, receiver.requests)) == [*range(1, 101)]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(500), "status 500"),
        (Answer(404), "status 404"),
        (Answer(302, ("Location: /elsewhere",)), "status 302"),
        (Answer(307, ("Location: /elsewhere",)), "status 307"),
        (Answer(raw=b"SSH-2.0-OpenSSH\r\n"), "not HTTP"),
        (Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Le"), "closed"),
    ],
)
def test_what_is_not_delivered_is_warned_of(spy: Spy, answer: Answer, told: str) -> None:
    before = len(spy.receiver.requests)
    start = len(spy.program.log.all)
    spy.receiver.answers.append(answer)
    spy.call(f"{spy.receiver.url}/private?token=secret")
    line = spy.program.log.wait_for(r"WARNING verve\.reporter: callback to", start).string
    assert line.endswith(line[line.index("callback") :])
    assert f"callback to {spy.receiver.url} failed: " in line
    assert told in line
    assert "private" not in line
    assert "secret" not in line
    spy.call(spy.receiver.url)
    assert [found.target.partition("?")[0] for found in spy.receiver.requests[before:]] == ["/private", "/"]


def test_a_connection_that_is_reset_is_warned_of(spy: Spy) -> None:
    with Receiver() as receiver:
        receiver.default = Answer(RESET)
        start = len(spy.program.log.all)
        other = Spy(spy.program, receiver, spy.count)
        other.call(receiver.url)
        spy.count = other.count
        assert spy.program.log.wait_for(f"WARNING .*callback to {receiver.url} failed: .*closed", start)
        assert len(receiver.requests) == 1, "it was a fresh connection"


@pytest.mark.parametrize(("method", "times", "outcome"), [("GET", 2, ": status 200"), ("POST", 1, " failed: .*closed")])
def test_a_get_on_an_old_connection_that_is_reset_is_sent_again(
    receiver: Receiver, method: str, times: int, outcome: str
) -> None:
    receiver.answers += [Answer(), Answer(RESET)]
    flags = ("--callback-method", method, "--log-level", "debug")
    with support.verve(*LONG, *ALLOW, *flags) as program, support.Client(program.address) as client:
        assert client.ask(request(1, receiver.url)).status == 200
        program.log.wait_for(f"callback to {receiver.url}: status 200$")
        start = len(program.log.all)
        assert client.ask(request(2, receiver.url)).status == 200
        program.log.wait_for(f"callback to {receiver.url}{outcome}", start)
    assert len(receiver.requests) == 1 + times


def test_a_port_that_is_closed_is_warned_of(spy: Spy) -> None:
    with Receiver() as gone:
        pass
    start = len(spy.program.log.all)
    spy.count += 1
    with support.Client(spy.program.address) as client:
        assert client.ask(request(spy.count, gone.url)).status == 200
    assert spy.program.log.wait_for(f"WARNING .*callback to {gone.url} failed: [Cc]onn", start)


@pytest.mark.parametrize("status", [200, 202, 204])
def test_what_is_delivered_is_told_at_debug(receiver: Receiver, status: int) -> None:
    receiver.default = Answer(status)
    with support.verve(*LONG, *ALLOW, "--log-level", "debug") as program:
        with support.Client(program.address) as client:
            assert client.ask(request(1, receiver.url)).status == 200
        assert program.log.wait_for(f"DEBUG verve.reporter: callback to {receiver.url}: status {status}$")


def test_what_is_delivered_is_not_told_otherwise(receiver: Receiver) -> None:
    with support.verve(*LONG, *ALLOW) as program:
        with support.Client(program.address) as client:
            assert client.ask(request(1, receiver.url)).status == 200
        receiver.wait_for(1)
        stop(program)
    assert from_log(program, "callback") == []


@pytest.mark.parametrize("stopped", [False, True])
def test_the_log_is_not_flooded(receiver: Receiver, stopped: bool) -> None:
    receiver.default = Answer(500)
    with support.verve(*LONG, *ALLOW) as program:
        with support.Client(program.address) as client:
            for number in range(50):
                assert client.ask(request(number, receiver.url)).status == 200
        receiver.wait_for(50)
        if not stopped:
            program.log.wait_for("callbacks not delivered, besides those named, in the last second: [0-9]+$")
        stop(program)
    told = len(from_log(program, "WARNING .* callback to .* failed: status 500"))
    summed = re.findall("callbacks not delivered, besides .*: ([0-9]+)", "\n".join(program.log.all))
    assert told + sum(map(int, summed)) == 50
    assert summed
    assert told <= reporter.LINES * (len(summed) + 1)


# Origins that fail, in a time of their own


class Scripted:
    """A client that sends nothing; a test ends what was asked of it."""

    def __init__(self) -> None:
        self.guard = outbound.Guard(everything=True)
        self.sent: list[tuple[outbound.Url, Callable[[outbound.Response | outbound.OutboundError], None]]] = []
        self.dropped: list[outbound.Url] = []
        self.pending = 0

    def waiting(self, url: outbound.Url) -> int:
        return sum(other.origin == url.origin for other, _ in self.sent)

    def send(
        self,
        url: outbound.Url,
        _request: bytes,
        done: Callable[[outbound.Response | outbound.OutboundError], None],
        **_: object,
    ) -> None:
        self.sent.append((url, done))

    def drop(self, url: outbound.Url, error: outbound.OutboundError) -> None:
        self.dropped.append(url)
        waiting, self.sent = self.sent, []
        for _, done in waiting:
            done(error)

    def end(self, result: outbound.Response | outbound.OutboundError) -> None:
        _, done = self.sent.pop(0)
        done(result)


OK = outbound.Response(200, "")
FAILURE = outbound.OutboundError("the connection was closed")


@dataclass
class Stage:
    """Callbacks with a scripted client and a clock that a test sets."""

    client: Scripted
    callbacks: reporter.Callbacks
    time: float = 1000.0

    def send(self, name: str = "a", count: int = 1) -> int:
        """Send callbacks; return how many of them the client was given."""
        before = len(self.client.sent)
        for _ in range(count):
            self.callbacks.send(outbound.parse(f"http://{name}.test/".encode()), 0, 1)
        return len(self.client.sent) - before

    def fail(self, name: str = "a", count: int = 1) -> None:
        """Send callbacks that fail, one after the other."""
        for _ in range(count):
            assert self.send(name) == 1
            self.client.end(FAILURE)


def staged(monkeypatch: pytest.MonkeyPatch, test: Callable[[Stage], None]) -> None:
    async def run() -> None:
        client = Scripted()
        stage = Stage(client, reporter.Callbacks(cast(outbound.Client, client), "GET"))
        clock = SimpleNamespace(monotonic=lambda: stage.time, time=lambda: stage.time)
        monkeypatch.setattr(reporter, "time", clock)
        test(stage)

    play(run())


def test_an_origin_that_keeps_failing_is_left_alone_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def test(stage: Stage) -> None:
        stage.fail(count=reporter.FAILURES)
        assert stage.send(count=100) == 0
        stage.time += reporter.PAUSE - 0.01
        assert stage.send() == 0
        assert stage.send("b") == 1, "another origin"
        stage.client.end(OK)
        stage.time += 0.02
        assert stage.send(count=100) == reporter.FAILURES, "a few"
        stage.client.end(FAILURE)
        assert stage.send(count=100) == 0, "another pause"
        stage.time += reporter.PAUSE
        stage.client.end(OK)
        assert stage.send(count=100) == 100
        assert stage.callbacks.outcomes == {"delivered": 2, "failed": 6, "dropped": 100 + 1 + 95 + 100}

    staged(monkeypatch, test)


def test_an_origin_is_not_left_alone_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def test(stage: Stage) -> None:
        for _ in range(10):
            stage.fail(count=reporter.FAILURES - 1)
            assert stage.send() == 1
            stage.client.end(outbound.Response(500, ""))  # an answer
        for _ in range(3 * reporter.FAILURES):
            assert stage.send() == 1
            stage.client.end(outbound.ForbiddenError("x"))
        assert stage.callbacks.outcomes["dropped"] == 0

    staged(monkeypatch, test)


def test_what_waits_for_an_origin_that_fails_is_dropped_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def test(stage: Stage) -> None:
        assert stage.send(count=100) == 100
        for _ in range(reporter.FAILURES):
            stage.client.end(FAILURE)
        assert [url.host for url in stage.client.dropped] == ["a.test"]
        assert stage.client.sent == []
        assert stage.callbacks.outcomes == {"failed": reporter.FAILURES, "dropped": 100 - reporter.FAILURES}

    staged(monkeypatch, test)


def test_the_memory_of_failing_origins_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def test(stage: Stage) -> None:
        stage.fail("first", reporter.FAILURES)
        for number in range(reporter.MAX_FAILING):
            stage.fail(f"h{number}")
        assert stage.send("first") == 1, "forgotten"

    staged(monkeypatch, test)


def test_a_receiver_that_is_away_is_called_again_when_it_is_back(receiver: Receiver) -> None:
    receiver.stop()
    with (
        support.verve(*LONG, *ALLOW, "--log-level", "debug", prefix=support.patched("reporter.PAUSE = 0.2")) as program,
        support.Client(program.address) as client,
    ):
        for number in range(reporter.FAILURES):
            assert client.ask(request(number, receiver.url)).status == 200
        program.log.wait_until(
            lambda lines: sum(" failed: " in line for line in lines) >= reporter.LINES or None, "failures"
        )
        receiver.start()
        number = 1000
        while not receiver.requests:
            number += 1
            assert client.ask(request(number, receiver.url)).status == 200
            assert number < 1_000_000
        program.log.wait_for(f"callback to {receiver.url}: status 200")
        assert client.ask(request(-1, f"{receiver.url}/back")).status == 200
        receiver.wait_until(lambda found: any(request.target.startswith("/back") for request in found), "the last")


# Too many


@pytest.mark.parametrize("stored", ["memory", "redis"])
def test_a_full_queue_refuses_and_stores_nothing(server: servers.Redis, receiver: Receiver, stored: str) -> None:
    flags = ("--redis-url", server.url) if stored == "redis" else ()
    receiver.default = Answer(HANG)
    small = support.patched("reporter.MAX_CALLBACKS = 2")
    with (
        support.verve(*LONG, *ALLOW, *flags, "--log-level", "debug", prefix=small) as program,
        support.Client(program.address) as client,
    ):
        for number in 1, 2:
            assert client.ask(request(number, receiver.url)).status == 200
        receiver.wait_for(2)
        refused = client.ask(request(3, receiver.url))
        assert (refused.status, refused.body) == (503, b"failed")
        assert int(refused.fields["retry-after"]) >= 1
        assert refused.fields["verve-error"] == "too many callbacks wait"
        assert client.ask(support.accept(4)).status == 200, "it has no endpoint"
        receiver.release()
        program.log.wait_until(
            lambda lines: sum("status 200" in line for line in lines) == 2 or None, "both to be delivered"
        )
        assert client.ask(request(3, receiver.url)).status == 200
        assert [count_of(found) for found in receiver.wait_for(3)][2] == 4, "it was new"


def test_one_origin_does_not_fill_the_queue_for_others(receiver: Receiver) -> None:
    receiver.default = Answer(HANG)
    small = support.patched("reporter.MAX_ORIGIN = 3")
    with (
        Receiver() as other,
        support.verve(*LONG, *ALLOW, prefix=small) as program,
        support.Client(program.address) as client,
    ):
        for number in 1, 2, 3:
            assert client.ask(request(number, receiver.url)).status == 200
        assert client.ask(request(4, receiver.url)).status == 503
        for number in 4, 5, 6:
            assert client.ask(request(number, other.url)).status == 200
        other.wait_for(3)
        receiver.release()


# Names


FORBIDDEN = [
    ["10.0.0.1"],
    ["127.0.0.1"],
    ["::1"],
    ["169.254.169.254"],
    ["192.168.1.1", "fd00::1", "fe80::1"],
    ["::ffff:10.0.0.1"],
    ["64:ff9b::7f00:1"],
    ["2002:7f00:1::"],
    ["0.0.0.0"],
    ["224.0.0.1"],
]


def test_a_name_of_a_forbidden_address_is_refused_and_logged() -> None:
    names = {f"inside{number}.test": addresses for number, addresses in enumerate(FORBIDDEN)}
    resolver = f"outbound.resolve = lambda host: [outbound.ip_address(text) for text in {names}[host]]"
    talkative = "reporter.LINES = 1000"
    with support.verve(*LONG, prefix=support.patched(f"{resolver}\n{talkative}")) as program:
        for number, name in enumerate(names):
            with support.Client(program.address) as client:
                assert client.ask(request(number, f"http://{name}:81/x")).body == b"ok"
            line = program.log.wait_for(f"callback to http://{name}:81 .*").string
            assert "WARNING" in line
            assert line.endswith("refused: the host has no address that may be reached")


def test_the_address_that_was_checked_is_the_one_that_is_called(receiver: Receiver) -> None:
    resolver = "\n".join(
        [
            "asked = []",
            "def resolve(host):",
            "    asked.append(host)",
            "    found = ['10.0.0.1', '127.0.0.1', 'fd00::1'] if len(asked) == 1 else ['10.0.0.1']",
            "    return [outbound.ip_address(text) for text in found]",
            "outbound.resolve = resolve",
        ]
    )
    with support.verve(*LONG, *ALLOW, prefix=support.patched(resolver)) as program:
        with support.Client(program.address) as client:
            assert client.ask(request(1, f"http://Name.Test.:{receiver.port}/x")).body == b"ok"
        (found,) = receiver.wait_for(1)
        assert found.fields["host"] == f"name.test.:{receiver.port}"


def test_a_name_that_does_not_resolve_is_logged() -> None:
    resolver = "import socket\ndef resolve(host):\n    raise socket.gaierror(-2, 'Name or service not known')\n"
    with support.verve(*LONG, prefix=support.patched(resolver + "outbound.resolve = resolve")) as program:
        with support.Client(program.address) as client:
            assert client.ask(request(1, "http://nowhere.test/")).body == b"ok"
        assert program.log.wait_for("callback to http://nowhere.test:80 failed: Name or service not known")


# The end


def test_what_waits_is_delivered_before_the_end(receiver: Receiver) -> None:
    receiver.answers.append(Answer(HANG))
    one = support.patched("outbound.CONNECTIONS = 1")
    with support.verve(*LONG, *ALLOW, prefix=one) as program:
        with support.Client(program.address) as client:
            for number in range(30):
                assert client.ask(request(number, receiver.url)).status == 200
            receiver.wait_for(1)
        program.send(signal.SIGTERM)
        program.log.wait_for("stopping")
        assert len(receiver.requests) == 1
        receiver.release()
        assert program.wait() == 0
    assert sorted(map(count_of, receiver.requests)) == [*range(1, 31)]


def test_a_request_that_was_pipelined_at_the_end_is_told(server: servers.Redis, receiver: Receiver) -> None:
    with support.verve(*LONG, *ALLOW, "--redis-url", server.url) as program:
        with support.Client(program.address) as client:
            client.send(*[request(number, receiver.url) for number in range(50)])
            program.send(signal.SIGTERM)
            told = sum(response.status == 200 for response in client.receive_all())
        assert program.wait() == 0
    assert sorted(map(count_of, receiver.requests)) == [*range(1, told + 1)]


def test_a_receiver_that_hangs_does_not_hold_the_exit(receiver: Receiver) -> None:
    receiver.default = Answer(HANG)
    slow = support.patched("outbound.EXCHANGE_TIME = 60.0")
    with support.verve(*LONG, *ALLOW, "--drain-timeout", "0.5", prefix=slow) as program:
        with support.Client(program.address) as client:
            for number in range(10):
                assert client.ask(request(number, receiver.url)).status == 200
        receiver.wait_for(10)
        since = time.monotonic()
        stop(program)
        assert time.monotonic() - since < STOP
    assert from_log(program, "WARNING verve: not everything that waited was told within 0.5 s")
    assert len(from_log(program, "callback to .* failed: stopped")) == reporter.LINES
    assert from_log(program, f"besides those named, .*: {10 - reporter.LINES}$")


def test_a_name_server_that_hangs_holds_up_no_other_name_and_not_the_exit(receiver: Receiver) -> None:
    """Threads that wait for a name server outlive everything but the process."""
    resolver = "\n".join(
        [
            "import threading",
            "def resolve(host):",
            "    if host == 'lost.test':",
            "        threading.Event().wait()",
            "    return [outbound.ip_address('127.0.0.1')]",
            "outbound.resolve = resolve",
        ]
    )
    with support.verve(*LONG, *ALLOW, "--drain-timeout", "0.5", prefix=support.patched(resolver)) as program:
        with support.Client(program.address) as client:
            for number, host in enumerate(("lost.test", "other.test")):
                assert client.ask(request(number, f"http://{host}:{receiver.port}/{host}")).status == 200
        (found,) = receiver.wait_for(1)
        assert found.target.startswith("/other.test?")
        since = time.monotonic()
        stop(program)
        assert time.monotonic() - since < STOP
    assert from_log(program, f"callback to http://lost.test:{receiver.port} failed: stopped")


# Hostile endpoints
# ruff: noqa: RUF001, SIM905
# ruff: noqa: RUF001, SIM905

LOCALS = """
http://127.0.0.1/ http://127.1.2.3:9/ HTTP://127.0.0.1/ https://127.0.0.1/ http://0.0.0.0/ http://0.1.2.3/
http://10.0.0.1/ http://172.16.0.1/ http://172.31.255.255/ http://192.168.0.1/ http://100.64.0.1/ http://198.18.0.1/
http://192.0.0.1/ http://192.0.2.1/ http://224.0.0.1/ http://239.1.1.1/ http://240.0.0.1/ http://255.255.255.255/
http://169.254.169.254/latest/meta-data/ http://169.254.0.1/ http://[fd00:ec2::254]/ http://169.254.169.254.:80/
http://[::1]/ http://[0:0:0:0:0:0:0:1]/ http://[::]/ http://[::ffff:127.0.0.1]/ http://[::ffff:7f00:1]/
http://[::127.0.0.1]/ http://[::ffff:0:127.0.0.1]/ http://[::ffff:169.254.169.254]/ http://[64:ff9b::127.0.0.1]/
http://[64:ff9b::a9fe:a9fe]/ http://[64:ff9b:1::1]/ http://[2002:7f00:1::]/ http://[2002:a9fe:a9fe::1]/
http://[2001::1]/ http://[2001:db8::1]/ http://[fe80::1]/ http://[fec0::1]/ http://[fc00::1]/ http://[ff02::1]/
http://[3fff::1]/ http://[100::1]/ http://localhost/ http://LOCALHOST/ http://localhost./ http://a.localhost/
http://localhost:8080/ http://127.0.0.1:65535/
""".split()

SPELLINGS = """
http://2130706433/ http://0x7f000001/ http://0x7f.0.0.1/ http://0x7f.1/ http://017700000001/ http://0177.0.0.1/
http://0177.0.0.01/ http://127.1/ http://127.0.1/ http://127.0.0.1./ http://127.0.0.1../ http://127.0.0.01/
http://127.0.0.256/ http://127.0.0.0x1/ http://0/ http://00/ http://0x/ http://1.2.3.4.5/ http://127.0.0.1.1/
http://a.0x7f/ http://a.1/ http://-1/ http://1e3.1/ http://127。0。0。1/ http://１２７.0.0.1/ http://①②⑦.0.0.1/
http://127.0.0.1%2f@a/ http://127.0.0.1%00/ http://%31%32%37.0.0.1/ http://[::1/ http://::1]/ http://::1/ http://[::1]]/
http://[[::1]]/ http://[]/ http://[:]/ http://[1::2::3]/ http://[::1%25lo]/ http://[::1%lo]/ http://[fe80::1%251]/
http://[fe80::1%25eth0]/ http://[::g]/ http://[127.0.0.1]/ http://[localhost]/ http://[v1.a]/ http://[::1]a/
http://[::1].a/ http://[::ffff:127.1]/
""".split()

SHAPES = [
    *("", "/", "//", "//127.0.0.1/", "//host/", "host", "host/path", "host:80/", "127.0.0.1", "127.0.0.1:80"),
    *("http", "http:", "http:/", "http://", "http:///", "http:///path", "http://?a", "http://#a", "http://:80/"),
    *("http:/127.0.0.1/", "http:127.0.0.1", "http:host", "http:///127.0.0.1/", "http:\\\\127.0.0.1\\", "http://\\a/"),
    *("http://a\\@127.0.0.1/", "http://127.0.0.1\\@a/", "http://127.0.0.1\\.a/", "\\\\127.0.0.1\\", "/\\127.0.0.1/"),
    *("ftp://127.0.0.1/", "file:///etc/passwd", "file://127.0.0.1/etc/passwd", "gopher://127.0.0.1:6379/_FLUSHALL"),
    *("dict://127.0.0.1/", "ws://127.0.0.1/", "unix:/run/x", "javascript:alert(1)", "data:text/plain,x", "httpx://a/"),
    *("http+unix://a/", "http ://a/", " http://127.0.0.1/", "http://127.0.0.1/ ", "\thttp://127.0.0.1/", "ℎttp://a/"),
    *("url:http://127.0.0.1/", "http://http://127.0.0.1/", "hTTp//127.0.0.1/", "view-source:http://127.0.0.1/"),
    # users and passwords, which say to whom the sender belongs, and hide whom the URL is about
    *("http://a@127.0.0.1/", "http://a:b@127.0.0.1/", "http://@127.0.0.1/", "http://:@127.0.0.1/", "http://a@b.test/"),
    *("http://a@b@127.0.0.1/", "http://a@b@c/", "http://b.test@127.0.0.1/", "http://127.0.0.1:80@b.test/", "http://@/"),
    *("http://a:b@/", "http://a%40b@127.0.0.1/", "http://b.test%2F@127.0.0.1/"),
    # ports
    *("http://127.0.0.1:0/", "http://a.test:0/", "http://a.test:65536/", "http://a.test:99999/", "http://a.test:80a/"),
    *("http://a.test:-1/", "http://a.test:+80/", "http://a.test:8 0/", "http://a.test:80:80/", "http://a.test:٨٠/"),
    *("http://a.test:http/", "http://a.test:0x50/", "http://a.test:000080/", "http://a.test:4294967376/"),
    *("http://a.test:%38%30/", "http://[::1]:x/", "http://[::1]:0/"),
    # characters that end a line, a word or a string somewhere
    *(
        f"http://a.test{text}"
        for text in ("\r\n/", "\n/", "\0/", " /", "\t/", "\x7f/", "\v/", "\x1f/", "\u2028/", "é/")
    ),
    *(
        f"http://a.test/{text}"
        for text in ("\r\nX: y", "\n", "\r", "\0", " ", "\t", "\x7f", "\x80", "é", "\u2028", "a b")
    ),
    *(f"http://a.test/?{text}" for text in ("\r\nX: y", "\n", "\0", " ", "é")),
    *(f"http://a.test/#{text}" for text in ("\r\nX: y", "\0", " ")),
    *(
        f"http://a{text}b.test/"
        for text in ("%0d%0a", "%00", "%20", "%2e", "%2f", "%23", "%40", "%", "%zz", "*", "$", "^")
    ),
    # names that are none, and those of other alphabets
    *("http://./", "http://../", "http://.a.test/", "http://a..test/", "http://a.test../", "http://-a.test/"),
    *("http://a-.test/", "http://bücher.test/", "http://ＥＸＡＭＰＬＥ.test/", "http://a。test/", "http://ａ.test/"),
    *("http://ⓛocalhost/", "http://loc\u00adalhost/", "http://local\u200bhost/", "http://%6cocalhost/", "http://a,b/"),
    *("http://" + "a" * 64 + ".test/", "http://" + "a." * 127 + "test/", "http://" + "a" * 254 + "/"),
    "http://a.test/" + "x" * 4083,
]


NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def guarded() -> Iterator[tuple[support.Program, servers.Redis]]:
    """A program that may reach public addresses only, and whose resolver would give none but a forbidden one."""
    never = support.patched("outbound.resolve = lambda host: [outbound.ip_address('10.0.0.1')]")
    with (
        servers.Redis(next(iter(servers.ENGINES))) as server,
        support.verve(*LONG, "--redis-url", server.url, prefix=never) as program,
    ):
        yield program, server
        assert from_log(program, "callback|ERROR|WARNING") == []


def refused(guarded: tuple[support.Program, servers.Redis], number: int, words: bytes) -> None:
    """See that a request is refused, and its id not stored."""
    program, server = guarded
    with support.Client(program.address) as client:
        response = client.ask(words)
        assert (response.status, response.body) == (400, b"failed")
        assert re.fullmatch("[ -~]+", response.fields["verve-error"])
    assert [key for key in ask(server, "KEYS", "*:ids") if ask(server, "SISMEMBER", key, number)] == []


@pytest.mark.parametrize("endpoint", [*LOCALS, *SPELLINGS, *SHAPES], ids=lambda text: ascii(text)[1:60])
def test_a_hostile_endpoint_is_refused(guarded: tuple[support.Program, servers.Redis], endpoint: str) -> None:
    number = next(NUMBERS)
    refused(guarded, number, request(number, endpoint))


@pytest.mark.parametrize("query", ["&endpoint", "&endpoint=", "&endpoint=http://a.test/&endpoint=http://a.test/"])
def test_one_endpoint_is_expected(guarded: tuple[support.Program, servers.Redis], query: str) -> None:
    number = next(NUMBERS)
    refused(guarded, number, support.get(f"{support.PATH}?id={number}{query}"))


@pytest.mark.parametrize(
    "raw", [b"http://a.test/\0", b"http://a.test/\x7f", b"http://a.test/\t", b"http://a.test/\xff"]
)
def test_raw_bytes_are_refused(guarded: tuple[support.Program, servers.Redis], raw: bytes) -> None:
    number = next(NUMBERS)
    before, after = support.get(f"{support.PATH}?id={number}&endpoint=RAW").split(b"RAW")
    refused(guarded, number, before + raw + after)


@pytest.mark.parametrize(
    ("endpoint", "line", "host"),
    [
        ("http://127.0.0.1:PORT/a%0d%0aX:%20y", "/a%0d%0aX:%20y?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/%250d%250a", "/%250d%250a?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/%00%20%09", "/%00%20%09?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/?%0d%0a", "/?%0d%0a&count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/a\\b", "/a\\b?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/../../etc", "/../../etc?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT//10.0.0.1/", "//10.0.0.1/?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/http://10.0.0.1/", "/http://10.0.0.1/?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/@10.0.0.1/", "/@10.0.0.1/?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT?@10.0.0.1/", "/?@10.0.0.1/&count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT#@10.0.0.1/", "/?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/#\\@10.0.0.1/", "/?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/?a#b#c", "/?a&count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/a+b", "/a+b?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/'\"<>[]{}|^`", "/'\"<>[]{}|^`?count=N", "127.0.0.1:PORT"),
        (
            "http://127.0.0.1:PORT/?a=b&endpoint=http://10.0.0.1",
            "/?a=b&endpoint=http://10.0.0.1&count=N",
            "127.0.0.1:PORT",
        ),
        ("HTTP://127.0.0.1:PORT", "/?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/" + "x" * 4000, "/" + "x" * 4000 + "?count=N", "127.0.0.1:PORT"),
        ("http://[::ffff:127.0.0.1]:PORT/", "/?count=N", "[::ffff:7f00:1]:PORT"),
        ("http://[0:0:0:0:0:FFFF:7F00:1]:PORT/", "/?count=N", "[::ffff:7f00:1]:PORT"),
    ],
)
def test_an_odd_endpoint_gets_just_what_it_says(spy: Spy, endpoint: str, line: str, host: str) -> None:
    port = str(spy.receiver.port)
    found = spy.call(endpoint.replace("PORT", port))
    line = line.replace("N", str(spy.count))
    host = host.replace("PORT", port)
    assert found.head == f"GET {line} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: verve\r\n\r\n"


def test_an_ipv6_endpoint(spy: Spy) -> None:
    with Receiver("::1") as receiver:
        other = Spy(spy.program, receiver, spy.count)
        for host in "[::1]", "[0:0::1]":
            assert other.call(f"http://{host}:{receiver.port}/").fields["host"] == f"[::1]:{receiver.port}"
        spy.count = other.count


@pytest.mark.parametrize(
    ("host", "sent"),
    [
        ("name.test", "name.test"),
        ("NAME.Test", "name.test"),
        ("name.test.", "name.test."),
        ("xn--bcher-kva.test", "xn--bcher-kva.test"),
        ("under_score.test", "under_score.test"),
        ("ip6-localhost", "ip6-localhost"),
        ("127.0.0.1.test", "127.0.0.1.test"),
        ("a" * 63 + ".test", "a" * 63 + ".test"),
    ],
)
def test_a_name_is_sent_as_host(receiver: Receiver, monkeypatch: pytest.MonkeyPatch, host: str, sent: str) -> None:
    asked: list[str] = []

    def resolve(name: str) -> list[outbound.Address]:
        asked.append(name)
        return [ip_address("127.0.0.1")]

    async def test() -> None:
        monkeypatch.setattr(outbound, "resolve", resolve)
        client = outbound.Client(outbound.Guard([IPv4Network("127.0.0.0/8")]))
        callbacks = reporter.Callbacks(client, "GET")
        callbacks.send(callbacks.parse(f"http://{host}:{receiver.port}/x".encode()), 0, 7)
        await client.settle()
        callbacks.close()
        assert callbacks.outcomes == {"delivered": 1}

    play(test())
    (found,) = receiver.requests
    assert found.head.startswith(f"GET /x?count=7 HTTP/1.1\r\nHost: {sent}:{receiver.port}\r\n")
    assert asked == [sent]


def test_the_table_is_long_enough() -> None:
    assert len({*LOCALS, *SPELLINGS, *SHAPES}) >= 60
