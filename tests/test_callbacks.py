"""Callbacks: the request to the endpoint that a client named, with the count of an id that is new in its window.

Most tests run the whole program, with a receiver on this machine that `--callback-allow` lets it reach. What must not
come is known when the program has stopped, since it delivers first what waits. The rest is about logic in time: there
the clock and the client are stand-ins. No test asks a resolver or reaches another machine.
"""

import asyncio
import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast
from urllib.parse import quote

import pytest
import servers
import support
from receivers import HANG, RESET, Answer, Receiver
from spies import ALLOW, LONG, Spy, count_of, from_log, request, stop
from stores import Log, ask, ids, let_settle, opened, play, start_of, until, up

import dedup
import outbound
import reporter

STOP = 20.0  # seconds that a stopping process takes at most on a busy machine, where it would be a minute if it hung


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


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
            ask(server, "DEL", "verve:settling")  # which a Redis begins with that has no mark
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


def test_a_callback_names_the_window_that_its_id_is_in_though_that_has_ended(
    server: servers.Redis, receiver: Receiver
) -> None:
    """The id is stored in time, but Redis's answer comes in a later window."""
    with servers.Proxy(server.port) as proxy:
        flags = ("--redis-url", proxy.url, "--window", "1", "--request-timeout", "20", "--callback-method", "POST")
        with support.verve(*flags, *ALLOW) as program, support.Client(program.address) as client:
            let_settle(server)
            program.log.wait_for("unique ids in")
            proxy.stall()
            client.send(request(7, receiver.url))
            with server.client() as redis:
                while not (found := [key for key in redis.scan_iter("verve:*", _type="set") if redis.smembers(key)]):
                    time.sleep(0.005)
                (start,) = {int(number) for key in found for number in re.findall("[0-9]{10}", key)}
                while redis.time()[0] < start + 2:
                    time.sleep(0.02)
            proxy.flow()
            assert client.receive()[0].status == 200
            (called,) = receiver.wait_for(1)
            name = json.loads(called.body)["window"]
            assert start_of(name) == start
            program.log.wait_for(f"unique ids in {name}: 1$")


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
            before = proxy.connections
            proxy.set_plan("before_reply")
            assert store.add(1, outcomes.append, lambda _, count: told.append(count)) is None
            await until(lambda: outcomes)
            assert outcomes == [dedup.LOST]
            await until(lambda: proxy.connections > before and up(store))
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
