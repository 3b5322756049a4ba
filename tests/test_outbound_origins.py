"""Many origins at once: none holds up another, what they share is bounded, and every exchange ends once."""

import asyncio
import random

import pytest
from peers import GUARD_TIME, OK, SHORT, Call, Net, Peer, Result, answer, hold, last_words

import outbound
from outbound import DroppedError, Response, parse, request


def test_a_hanging_origin_holds_up_no_other(net: Net) -> None:
    gate = asyncio.Event()
    bad, good = net.receiver(hold(gate)), net.receiver(answer(), "127.0.0.2")
    stuck = [net.send(bad.url()) for _ in range(200)]
    assert net.ask(*[good.url()] * 200) == [Response(200, "")] * 200
    assert not any(call.results for call in stuck)
    gate.set()
    net.finish(*stuck)
    assert bad.most <= outbound.CONNECTIONS


def test_all_origins_share_a_bound_and_half_of_it_is_for_newcomers(net: Net) -> None:
    net.plain = net.client(in_all=4)
    greedy_gate, gate = asyncio.Event(), asyncio.Event()
    greedy = net.receiver(hold(greedy_gate))
    stuck = [net.send(greedy.url()) for _ in range(10)]
    net.until(lambda: len(greedy.requests) == 2)
    others = [net.receiver(hold(gate), f"127.0.0.{number}") for number in (2, 3, 4)]
    calls = [net.send(other.url()) for other in others for _ in range(2)]
    net.until(lambda: others[0].requests and others[1].requests)
    net.spin()
    assert net.plain.connections == 4
    assert [receiver.accepted for receiver in (greedy, *others)] == [2, 1, 1, 0]
    gate.set()
    net.finish(*calls)  # the third had to wait for the place of another, but not for the greedy one
    assert not any(call.results for call in stuck)
    greedy_gate.set()
    net.finish(*stuck)
    assert {call.status for call in stuck + calls} == {200}


def test_an_idle_connection_makes_room_for_another_origin(net: Net) -> None:
    net.plain = net.client(in_all=3)
    full = [net.receiver(answer(), f"127.0.0.{number}") for number in (1, 2, 3)]
    assert net.ask(*(receiver.url() for receiver in full)) == [Response(200, "")] * 3
    late = net.receiver(answer(), "127.0.0.4")
    assert net.ask(*[late.url()] * 5) == [Response(200, "")] * 5
    assert net.plain.connections <= 3
    net.until(lambda: sum(receiver.open for receiver in full) == 2)
    net.spin()
    assert sum(receiver.open for receiver in full) == 2, "more than one made room"
    assert late.most == 1


def test_a_busy_origin_gives_a_place_to_one_that_has_none(net: Net) -> None:
    net.plain = net.client(in_all=4)
    tick, never = asyncio.Semaphore(0), asyncio.Event()

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            await tick.acquire()
            await peer.send(OK)

    busy = net.receiver(play)
    work = [net.send(busy.url()) for _ in range(9)]
    net.until(lambda: len(busy.requests) == 2)
    held = [net.receiver(hold(never), f"127.0.0.{number}") for number in (2, 3)]
    stuck = [net.send(receiver.url()) for receiver in held]
    net.until(lambda: all(receiver.requests for receiver in held))
    late = net.receiver(answer(), "127.0.0.4")
    call = net.send(late.url())
    net.spin()
    assert call.results == []
    tick.release()
    net.finish(call)
    assert call.status == 200
    net.until(lambda: busy.open == 1)
    assert sum(bool(other.results) for other in work) == 1
    never.set()
    for _ in work:
        tick.release()
    net.finish(*work, *stuck)


def test_with_more_origins_than_connections_all_are_served(net: Net) -> None:
    net.plain = net.client(in_all=2)
    receivers = [net.receiver(answer(), f"127.0.0.{number}") for number in range(1, 13)]
    urls = [receiver.url() for receiver in receivers for _ in range(5)]
    assert net.ask(*urls) == [Response(200, "")] * 60


def test_what_waits_too_long_for_a_connection_is_dropped(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = asyncio.Event()
    receiver = net.receiver(hold(gate))
    client = net.client(per_origin=1)
    first = net.send(receiver.url(), client)
    net.until(lambda: receiver.requests)
    monkeypatch.setattr(outbound, "QUEUE_TIME", SHORT)
    late = [net.send(receiver.url(), client) for _ in range(3)]
    net.finish(*late)
    assert {type(call.result) for call in late} == {DroppedError}
    assert {call.error for call in late} == {"waited 0.15 s for a connection"}
    assert first.results == []
    gate.set()
    net.finish(first)
    assert first.status == 200
    assert len(receiver.requests) == 1


def test_what_waits_can_be_dropped(net: Net) -> None:
    gate = asyncio.Event()
    receiver, other = net.receiver(hold(gate)), net.receiver(hold(gate), "127.0.0.2")
    client = net.client(per_origin=1)
    first, kept = net.send(receiver.url(), client), net.send(other.url(), client)
    net.until(lambda: receiver.requests and other.requests)
    late, later = net.send(receiver.url(), client), net.send(other.url(), client)
    client.drop(receiver.url(), DroppedError("enough"))
    client.drop(parse(b"http://127.0.0.3/"), DroppedError("nothing to drop"))
    assert late.error == "enough"
    assert client.waiting(receiver.url()) == 1
    gate.set()
    net.finish(first, kept, later)
    assert [first.status, kept.status, later.status] == [200, 200, 200]
    assert (len(receiver.requests), len(other.requests)) == (1, 2)


def test_who_asks_again_when_told_is_not_told_for_ever(net: Net) -> None:
    gate = asyncio.Event()
    receiver = net.receiver(hold(gate))
    client = net.client(per_origin=1)
    first = net.send(receiver.url(), client)
    net.until(lambda: receiver.requests)
    again: list[Call] = []
    told: list[Result] = []

    def done(result: Result) -> None:
        told.append(result)
        again.append(net.send(receiver.url(), client))

    client.send(receiver.url(), request(receiver.url(), "GET", "/"), done, repeatable=True)
    client.drop(receiver.url(), DroppedError("enough"))
    assert [str(result) for result in told] == ["enough"]
    gate.set()
    net.finish(first, *again)
    assert [call.status for call in (first, *again)] == [200, 200]


def test_each_connection_that_ends_is_followed_by_another_while_there_is_work(net: Net) -> None:
    client = net.client(per_origin=2)
    closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    receiver = net.receiver(last_words(closing))
    assert net.ask(*[receiver.url()] * 20, client=client) == [Response(200, "")] * 20
    assert receiver.accepted == len(receiver.requests) == 20


def test_the_next_in_the_queue_goes_on_after_a_failure(net: Net) -> None:
    async def play(peer: Peer) -> None:
        while (await peer.request()).startswith(b"GET /good "):
            await peer.send(OK)
        await peer.send(b"no")

    client = net.client(per_origin=1)
    receiver = net.receiver(play)
    calls = [net.send(receiver.url(path), client) for path in ("/bad", "/good", "/bad", "/good", "/good")]
    net.finish(*calls)
    assert [isinstance(call.result, Response) for call in calls] == [False, True, False, True, True]
    assert (receiver.accepted, len(receiver.requests)) == (3, 5)


@pytest.mark.parametrize("seed", range(4))
def test_in_the_greatest_disorder_each_exchange_ends_once(net: Net, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Receivers that do at each turn one of many things, with too few connections and too little time."""
    for name, value in {"EXCHANGE_TIME": 0.1, "QUEUE_TIME": 0.5, "IDLE_TIME": 0.05}.items():
        monkeypatch.setattr(outbound, name, value)
    chance = random.Random(seed)
    turns: list[tuple[bytes, str]] = [
        *[(OK, "on")] * 6,
        *((OK, "close"), (OK, "reset"), (OK[:-1], "close"), (OK[:-1], "reset"), (OK + b"x", "on")),
        *((b"", "close"), (b"", "reset"), (b"", "hang"), (b"garbage", "on"), (OK[:20], "hang")),
    ]

    async def play(peer: Peer) -> None:
        after = "on"
        while after == "on":
            await peer.request()
            data, after = chance.choice(turns)
            await peer.send(data)
        if after == "hang":
            await peer.closed()
        elif after == "reset":
            await peer.reset()

    bad = [net.receiver(play, f"127.0.0.{number}") for number in range(1, 11)]
    client = net.client(per_origin=3, in_all=8)
    calls = []
    for _ in range(15):
        calls += [net.send(chance.choice(bad).url(), client) for _ in range(20)]
        net.run(asyncio.sleep(0.01))
        if chance.random() < 0.2:
            client.drop(chance.choice(bad).url(), DroppedError("enough"))
        assert client.connections <= 8
    net.run(client.settle())
    assert all(len(call.results) == 1 for call in calls)
    assert any(isinstance(call.result, Response) for call in calls)
    assert sum(len(receiver.requests) for receiver in bad) <= 2 * len(calls)
    assert [client.waiting(receiver.url()) for receiver in bad] == [0] * 10
    monkeypatch.setattr(outbound, "EXCHANGE_TIME", GUARD_TIME)
    monkeypatch.setattr(outbound, "QUEUE_TIME", GUARD_TIME)
    good = net.receiver(answer(), "127.0.0.20")
    assert net.status(good.url(), client) == 200


def test_who_fails_when_told_harms_no_other(net: Net) -> None:
    told: list[Result] = []

    def done(result: Result) -> None:
        told.append(result)
        raise ValueError("what they were told was too much")

    good, bad = net.receiver(answer()), parse(b"http://127.0.0.9:%d/" % net.receiver(answer()).port)
    for url in (good.url(), bad):
        for _ in range(3):
            net.plain.send(url, request(url, "GET", "/"), done, repeatable=True)
    net.run(net.plain.settle())
    assert len(told) == len(net.errors) == 6
    net.errors.clear()
    assert net.status(good.url()) == 200
