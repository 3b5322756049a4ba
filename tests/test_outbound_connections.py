"""Connections of the outbound client: when they are opened, used again, given up, and what becomes of their work."""

import asyncio
import socket
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from peers import CUT, GUARD_TIME, NOT_HTTP, OK, SHORT, Names, Net, Peer, answer, hang, hang_after, hold, last_words

import outbound
from outbound import Guard, OutboundError, Response, Url, parse, request

# Connections


def test_at_most_so_many_connections_to_an_origin_are_opened_and_used_again(net: Net) -> None:
    client = net.client(per_origin=3)
    gate = asyncio.Event()
    receiver = net.receiver(hold(gate))
    calls = [net.send(receiver.url(f"/{number}"), client) for number in range(50)]
    net.until(lambda: len(receiver.requests) == 3)
    net.spin()
    assert (len(receiver.requests), client.pending, client.waiting(receiver.url())) == (3, 50, 50)
    assert client.connections == 3
    gate.set()
    net.finish(*calls)
    assert {call.status for call in calls} == {200}
    assert receiver.accepted == receiver.most == 3
    assert len(set(receiver.requests)) == 50
    assert client.waiting(receiver.url()) == 0


def test_one_after_the_other_takes_one_connection(net: Net) -> None:
    receiver = net.receiver(answer())
    assert [net.status(receiver.url()) for _ in range(20)] == [200] * 20
    assert receiver.accepted == 1


def test_an_idle_connection_is_closed_after_a_while(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "IDLE_TIME", SHORT)
    receiver = net.receiver(answer())
    assert net.status(receiver.url()) == 200
    net.until(lambda: receiver.open == 0)
    assert net.status(receiver.url()) == 200
    assert receiver.accepted == 2


def test_hosts_and_ports_and_schemes_are_origins_of_their_own(net: Net) -> None:
    here, there = net.receiver(answer()), net.receiver(answer(), "127.0.0.2")
    net.ask(here.url(), there.url(), here.url(), there.url())
    net.until(lambda: net.plain.connections == here.accepted + there.accepted)
    assert (len(here.requests), len(there.requests)) == (2, 2)
    assert f"Host: 127.0.0.2:{there.port}\r\n".encode() in there.requests[0]


def test_a_connection_that_says_something_unasked_is_not_used_again(net: Net) -> None:
    gate = asyncio.Event()

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await gate.wait()
        await peer.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        await peer.closed()

    receiver = net.receiver(play)
    assert net.status(receiver.url()) == 200
    gate.set()
    net.until(lambda: net.plain.connections == 0)
    assert net.status(receiver.url()) == 200
    assert receiver.accepted == 2


def test_an_idle_connection_that_the_peer_closes_is_forgotten(net: Net) -> None:
    receiver = net.receiver(last_words(OK))
    for _ in range(3):
        assert net.status(receiver.url()) == 200
        net.until(lambda: net.plain.connections == 0)
    assert (receiver.accepted, len(receiver.requests)) == (3, 3)


@pytest.mark.parametrize("force", [False, True])
def test_a_connection_closed_under_a_request_is_replaced_once(net: Net, force: bool) -> None:
    """The first connection answers once and closes when it is asked again; the second is good."""

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        if peer.number > 1:
            await peer.send(OK)
            await peer.closed()
        elif force:
            await peer.reset()

    receiver = net.receiver(play)
    assert [net.status(receiver.url(f"/{number}")) for number in (1, 2, 3)] == [200, 200, 200]
    assert receiver.accepted == 2
    targets = [request.split()[1] for request in receiver.requests]
    assert targets == [b"/1", b"/2", b"/2", b"/3"]


def test_a_request_is_tried_again_only_once(net: Net) -> None:
    async def play(peer: Peer) -> None:
        if peer.number == 1:
            await peer.request()
            await peer.send(OK)
        await peer.request()

    receiver = net.receiver(play)
    assert net.status(receiver.url()) == 200
    assert CUT in net.error(receiver.url())
    assert (receiver.accepted, len(receiver.requests)) == (2, 3)


@pytest.mark.parametrize("part", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n"])
def test_a_request_that_was_answered_in_part_is_not_tried_again(net: Net, part: bytes) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        await peer.send(part)

    receiver = net.receiver(play)
    assert net.status(receiver.url()) == 200
    assert CUT in net.error(receiver.url())
    assert (receiver.accepted, len(receiver.requests)) == (1, 2)


def test_a_post_is_tried_again_only_if_it_may_be(net: Net) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        if peer.number == 1:
            await peer.send(OK)
            await peer.request()
        else:
            await peer.send(OK)
            await peer.closed()

    for again, outcome in ((False, CUT), (True, "")):
        receiver = net.receiver(play)
        assert net.status(receiver.url()) == 200
        url = receiver.url()
        answers: list[outbound.Response | outbound.OutboundError] = []
        net.plain.send(url, request(url, "POST", "/", body=b"{}"), answers.append, repeatable=again)
        net.until(lambda: bool(answers))  # noqa: B023
        assert (outcome in str(answers[0])) if outcome else answers[0] == outbound.Response(200, "")
        assert len(receiver.requests) == 2 + again


def test_what_timed_out_is_not_tried_again(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await hang(peer)

    receiver = net.receiver(play)
    assert net.status(receiver.url()) == 200
    monkeypatch.setattr(outbound, "EXCHANGE_TIME", SHORT)
    assert "no response within" in net.error(receiver.url())
    assert (receiver.accepted, len(receiver.requests)) == (1, 2)


def test_a_second_try_goes_to_a_fresh_connection_and_not_to_another_old_one(
    net: Net, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "LOOKUP_TIME", -1.0)  # every connection looks the name up
    shut, slow = asyncio.Event(), asyncio.Event()
    took: list[tuple[int, bytes]] = []

    async def play(peer: Peer) -> None:
        while True:
            target = (await peer.request()).split()[1]
            took.append((peer.number, target))
            if target == b"/shut" and peer.number < 3:
                await shut.wait()
                return
            if target == b"/slow":
                await slow.wait()
            elif target == b"/warm":
                await both.wait()
            await peer.send(OK)

    both = asyncio.Event()
    receiver = net.receiver(play)
    names["a.test"] = [["127.0.0.1"]]
    client = net.client(per_origin=2)
    warm = [net.send(receiver.url("/warm", host="a.test"), client) for _ in range(2)]
    net.until(lambda: len(took) == 2)
    both.set()
    net.finish(*warm)
    names.gates["a.test"] = threading.Event()
    calls = [net.send(receiver.url(f"/{what}", host="a.test"), client) for what in ("shut", "slow")]
    net.until(lambda: len(took) == 4)
    shut.set()
    net.until(lambda: len(names.asked) == 3)  # the second try is on its way, as far as the look-up
    slow.set()
    net.finish(calls[1])
    names.gates["a.test"].set()
    net.finish(calls[0])
    assert [call.status for call in calls] == [200, 200]
    assert [number for number, target in took if target == b"/shut"][1:] == [3]


# Connecting


def test_nobody_listens(net: Net) -> None:
    receiver = net.receiver(answer())
    net.run(receiver.stop())
    results = net.ask(*[receiver.url()] * 20)
    assert {str(result) for result in results} == {"Connection refused"}
    net.until(lambda: net.plain.connections == 0)


def test_the_first_address_that_answers_is_taken(net: Net, names: Names) -> None:
    receiver = net.receiver(answer())
    names["a.test"] = [["127.0.0.9", "::1", "127.0.0.1", "127.0.0.8"]]  # nobody listens on the first two
    assert net.ask(*[receiver.url(host="a.test")] * 3) == [Response(200, "")] * 3
    assert names.asked == ["a.test"]
    assert f"Host: a.test:{receiver.port}\r\n".encode() in receiver.requests[0]


def test_an_error_when_no_address_answers(net: Net, names: Names) -> None:
    receiver = net.receiver(answer())
    names["a.test"] = [["127.0.0.9", "127.0.0.8"]]
    assert net.error(receiver.url(host="a.test")) == "Connection refused"


@pytest.fixture
def full_listener() -> Iterator[socket.socket]:
    """A listener whose queue is full: the kernel answers no further connection."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(8)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener
        for sock in waiting:
            sock.close()


def test_a_connection_that_takes_too_long_is_an_error(
    net: Net, monkeypatch: pytest.MonkeyPatch, full_listener: socket.socket
) -> None:
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)
    url = parse(b"http://127.0.0.1:%d/" % full_listener.getsockname()[1])
    assert {str(result) for result in net.ask(*[url] * 5)} == {"no connection in time"}
    net.until(lambda: net.plain.connections == 0)


def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    net: Net, names: Names, monkeypatch: pytest.MonkeyPatch, full_listener: socket.socket
) -> None:
    monkeypatch.setattr(outbound, "CONNECT_TIME", 2.0)
    port = full_listener.getsockname()[1]
    receiver = net.receiver(answer(), "127.0.0.2", port=port)
    names["a.test"] = [["127.0.0.1", "127.0.0.2"]]
    assert net.status(receiver.url(host="a.test")) == 200


def test_an_error_comes_in_time_though_more_is_asked_for_all_the_while(
    net: Net, monkeypatch: pytest.MonkeyPatch, full_listener: socket.socket
) -> None:
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)
    url = parse(b"http://127.0.0.1:%d/" % full_listener.getsockname()[1])
    first = net.send(url)
    more = []

    async def ask_on() -> None:
        while not first.results:
            more.append(net.send(url))
            await asyncio.sleep(0.02)

    net.run(ask_on())
    net.finish(*more)
    assert {call.error for call in (first, *more)} == {"no connection in time"}


def test_every_one_gets_an_error_with_one_connection_at_a_time(net: Net, full_listener: socket.socket) -> None:
    """What is asked for while an attempt is under way gets one of its own when that fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbound, "CONNECT_TIME", SHORT)
        client = net.client(per_origin=1)
        url = parse(b"http://127.0.0.1:%d/" % full_listener.getsockname()[1])
        first = net.send(url, client)
        net.run(asyncio.sleep(0.03))
        second = net.send(url, client)
        net.finish(first, second)
        assert (first.error, second.error) == ("no connection in time", "no connection in time")


def test_what_is_asked_for_later_does_not_fail_with_an_earlier_time_out(
    net: Net, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)
    monkeypatch.setattr(outbound, "LOOKUP_TIME", -1.0)  # every connection looks the name up
    receiver = net.receiver(answer())
    names["a.test"] = [["127.0.0.1"]]
    gate = names.gates["a.test"] = threading.Event()
    client = net.client(per_origin=1)
    first = net.send(receiver.url(host="a.test"), client)
    net.until(lambda: names.asked)
    del names.gates["a.test"]
    monkeypatch.setattr(outbound, "CONNECT_TIME", GUARD_TIME)  # of the next attempt
    net.run(asyncio.sleep(0.01))
    later = net.send(receiver.url(host="a.test"), client)
    net.finish(first, later)
    gate.set()
    assert first.error == "no connection in time"
    assert later.status == 200


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this host has no ::1")
def test_ipv6(net: Net, names: Names) -> None:
    receiver = net.receiver(answer(), "::1")
    names["six.test"] = [["127.0.0.1", "::1"]]
    assert net.status(receiver.url()) == 200
    assert net.status(receiver.url(host="[0:0::0:1]")) == 200
    assert net.status(receiver.url(host="six.test")) == 200
    assert f"Host: [::1]:{receiver.port}\r\n".encode() in receiver.requests[0]
    assert receiver.accepted == 2
    assert "may be reached" in net.error(receiver.url(), net.client(Guard()))


# The end


def test_settling_waits_for_all_that_is_pending(net: Net) -> None:
    gate = asyncio.Event()
    receiver = net.receiver(hold(gate))
    client = net.client(per_origin=1)
    net.run(client.settle())  # nothing is pending
    calls = [net.send(receiver.url(), client) for _ in range(5)]
    waiters = [net.loop.create_task(client.settle()) for _ in range(2)]
    net.until(lambda: receiver.requests)
    net.spin()
    assert not any(waiter.done() for waiter in waiters)
    gate.set()

    async def settle() -> None:
        await asyncio.gather(*waiters)

    net.run(settle())
    assert [call.status for call in calls] == [200] * 5


def test_closing_ends_everything_with_an_error(net: Net, names: Names, full_listener: socket.socket) -> None:
    gate = asyncio.Event()
    names["lost.test"] = [["127.0.0.1"]]
    names.gates["lost.test"] = threading.Event()
    held, idle = net.receiver(hold(gate)), net.receiver(answer(), "127.0.0.2")
    client = net.client(per_origin=2)
    assert net.ask(idle.url(), client=client) == [Response(200, "")]
    calls = [
        *(net.send(held.url(), client) for _ in range(5)),  # two under way, the others in the queue
        net.send(held.url(host="lost.test"), client),  # a look-up
        net.send(parse(b"http://127.0.0.1:%d/" % full_listener.getsockname()[1]), client),  # connecting
    ]
    net.until(lambda: len(held.requests) == 2 and names.asked)
    calls.append(net.send(held.url(host="127.0.0.1"), client))
    calls.append(net.send(parse(b"http://127.0.0.3/"), client))  # not even begun
    client.close()
    net.until(lambda: client.connections == 0 and idle.open == 0)
    assert {call.error for call in calls} == {"stopped"}
    assert client.pending == 0
    names.gates["lost.test"].set()
    net.spin()


def test_closing_does_not_take_back_a_status_that_is_known(net: Net) -> None:
    client = net.client()
    call = net.send(net.receiver(hang_after(b"HTTP/1.1 200 OK\r\n\r\nsome")).url(), client)
    net.until(lambda: any(c._status for origin in client._origins.values() for c in origin.connections))
    client.close()
    assert call.status == 200


def test_what_is_asked_for_after_closing_is_an_error(net: Net, names: Names) -> None:
    receiver = net.receiver(answer())
    names["a.test"] = [["127.0.0.1"]]
    client = net.client()
    assert net.ask(receiver.url(), client=client) == [Response(200, "")]
    client.close()
    results = net.ask(receiver.url(), receiver.url(host="a.test"), client=client)
    assert [str(result) for result in results] == ["stopped", "stopped"]
    client.close()
    assert receiver.accepted == 1


def test_an_exchange_can_be_awaited_or_left(net: Net) -> None:
    gate = asyncio.Event()
    good, held = net.receiver(answer()), net.receiver(hold(gate), "127.0.0.2")
    bad = net.receiver(last_words(b"no"), "127.0.0.3")

    def ask(url: Url) -> Coroutine[Any, Any, Response]:
        return net.plain.exchange(url, request(url, "POST", url.target, "A: b\r\n", b"{}"))

    assert net.run(ask(good.url("/x"))) == Response(200, "")
    assert good.requests[0].startswith(b"POST /x HTTP/1.1\r\n")
    assert b"\r\nA: b\r\n" in good.requests[0]
    with pytest.raises(OutboundError, match=NOT_HTTP):
        net.run(ask(bad.url()))
    left = net.loop.create_task(ask(held.url()))
    net.until(lambda: held.requests)
    left.cancel()
    gate.set()
    net.run(net.plain.settle())
    assert left.cancelled()


def test_an_origin_without_work_is_forgotten(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "IDLE_TIME", 0.0)
    receiver = net.receiver(answer())
    for number in range(1, 30):
        net.send(receiver.url(host=f"127.0.1.{number}"))  # nobody listens there
    assert net.status(receiver.url()) == 200
    net.until(lambda: not net.plain._origins)
    assert net.plain.connections == 0
    assert net.status(receiver.url()) == 200
