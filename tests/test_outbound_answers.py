"""What the outbound client makes of the bytes that receivers answer with, and of those that they do not."""

import asyncio
import re

import pytest
import trustme
from peers import (
    CUT,
    NOT_HTTP,
    OK,
    SHORT,
    Net,
    Peer,
    Play,
    answer,
    endless,
    hang,
    hang_after,
    hold,
    last_words,
    serving,
    slowly,
)

import outbound
from outbound import OutboundError, Response

# What is answered


@pytest.mark.parametrize(
    ("data", "status", "kept"),
    [
        pytest.param(OK, 200, True, id="content-length"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, True, id="empty"),
        pytest.param(b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", 200, True, id="no-reason"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", 204, True, id="204"),
        pytest.param(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n", 304, True, id="304"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0\r\nA: b\r\nC: d\r\n\r\n",
            200,
            True,
            id="chunked-trailers",
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, Chunked\r\n\r\n0\r\n\r\n", 200, True, id="two-codings"
        ),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, True, id="100"),
        pytest.param(
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK, 200, True, id="103"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nUpgrade: h2c\r\nConnection: Upgrade, Keep-Alive\r\nContent-Length: 0\r\n\r\n",
            200,
            True,
            id="offers-upgrade",
        ),
        pytest.param(
            b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", 200, True, id="1.0-keep-alive"
        ),
        pytest.param(b"HTTP/1.1 500 Oh\r\nContent-Length: 3\r\n\r\nno!", 500, True, id="500"),
        pytest.param(b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n", 302, True, id="redirect"),
        pytest.param(b"HTTP/1.1 429 Wait\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n", 429, True, id="429"),
        pytest.param(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, False, id="1.0"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", 200, False, id="connection-close"
        ),
        pytest.param(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", 204, False, id="204-close"),
        pytest.param(OK + b"HTTP/1.1 200 OK\r\n", 200, False, id="more-than-asked"),
        pytest.param(OK + OK, 200, False, id="twice"),
        pytest.param(OK + b"H", 200, False, id="one-byte-more"),
        pytest.param(OK + b"\0garbage", 200, False, id="garbage-behind"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok..", 200, False, id="behind-close"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n"
            + b"x" * 70000,
            200,
            False,
            id="much-more-than-asked",
        ),
    ],
)
@pytest.mark.parametrize("bytewise", [False, True])
def test_answers_in_every_framing_are_understood(
    net: Net, data: bytes, status: int, kept: bool, bytewise: bool
) -> None:
    size = 1 if bytewise and len(data) < 1000 else len(data)
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    receiver = net.receiver(answer(*pieces))
    for _ in range(3):
        assert net.status(receiver.url("/a?b=c")) == status
        if not kept:
            net.until(lambda: net.plain.connections == 0)
    assert receiver.accepted == (1 if kept else 3)
    assert [request.partition(b"\r\n")[0] for request in receiver.requests] == [b"GET /a?b=c HTTP/1.1"] * 3


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\nuntil the end", id="1.1"),
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\n", id="1.0"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nuntil the end", id="not-chunked"),
        pytest.param(
            b"HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\nHTTP/1.1 200 OK\r\n\r\n..", id="after-interim"
        ),
    ],
)
def test_a_body_may_end_with_the_connection(net: Net, data: bytes) -> None:
    receiver = net.receiver(last_words(data))
    assert [net.status(receiver.url()) for _ in range(2)] == [200, 200]
    assert receiver.accepted == 2


def test_the_time_to_try_again_is_passed_on(net: Net) -> None:
    head = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n"
    receiver = net.receiver(answer(head + b"Retry-After:  120 \r\n\r\n"))
    assert net.ask(receiver.url()) == [Response(503, "120")]
    assert net.ask(net.receiver(answer(head + b"\r\n")).url()) == [Response(503, "")]
    long = net.ask(net.receiver(answer(head + b"retry-after: " + b"9" * 999 + b"\r\n\r\n")).url())[0]
    assert isinstance(long, Response)
    assert len(long.retry_after) <= 64


def test_the_time_to_try_again_is_that_of_the_answer_and_not_of_the_last(net: Net) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n")
        await answer()(peer)

    receiver = net.receiver(play)
    assert [net.ask(receiver.url()) for _ in range(2)] == [[Response(503, "7")], [Response(200, "")]]
    assert receiver.accepted == 1


def test_a_redirect_is_not_followed(net: Net) -> None:
    other = net.receiver(answer())
    place = f"http://127.0.0.1:{other.port}/".encode()
    receiver = net.receiver(answer(b"HTTP/1.1 307 Go\r\nContent-Length: 0\r\nLocation: " + place + b"\r\n\r\n"))
    assert net.status(receiver.url()) == 307
    assert (other.accepted, len(receiver.requests)) == (0, 1)


def test_a_post_carries_its_body(net: Net) -> None:
    receiver = net.receiver(answer())
    call = net.send(receiver.url("/in"), method="POST", body=b'{"count": 7}')
    empty = net.send(receiver.url("/in"), method="POST")
    net.finish(call, empty)
    assert [call.status, empty.status] == [200, 200]
    bodies = {request.partition(b"\r\n\r\n")[2] for request in receiver.requests}
    assert bodies == {b'{"count": 7}', b""}
    assert all(b"\r\nContent-Type: application/json\r\n" in request for request in receiver.requests)


def of_size(size: int) -> bytes:
    """Return an answer of that many bytes."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %5d\r\n\r\n"
    length = size - len(head % size)
    return head % length + b"x" * length


def test_a_large_answer_within_the_bound_is_read(net: Net) -> None:
    receiver = net.receiver(answer(of_size(outbound.MAX_RESPONSE)))
    assert [net.status(receiver.url()) for _ in range(4)] == [200] * 4
    assert receiver.accepted == 1


def test_a_slow_answer_is_awaited(net: Net) -> None:
    gate = asyncio.Event()
    receiver = net.receiver(hold(gate))
    call = net.send(receiver.url())
    net.until(lambda: receiver.requests)
    net.spin()
    assert call.results == []
    gate.set()
    net.finish(call)
    assert call.status == 200


# What is not answered, or not with HTTP


@pytest.mark.parametrize(
    ("data", "error"),
    [
        pytest.param(b"", CUT, id="nothing"),
        pytest.param(b"HTTP/1.1 2", CUT, id="amid-start-line"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Le", CUT, id="amid-field"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", CUT, id="amid-head"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n", CUT, id="interim-only"),
        pytest.param(b"HTTP/1.1 000 None\r\nContent-Length: 0\r\n\r\n", CUT, id="status-0"),
        pytest.param(b"SSH-2.0-OpenSSH_9.9\r\n", NOT_HTTP, id="ssh"),
        pytest.param(b"\x15\x03\x03\x00\x02\x02\x46", NOT_HTTP, id="tls-alert"),
        pytest.param(b"<html>sorry</html>", NOT_HTTP, id="html"),
        pytest.param(b"\0" * 100, NOT_HTTP, id="nul"),
        pytest.param(b"HTTP/1.1 2x0 OK\r\n\r\n", NOT_HTTP, id="bad-status"),
        pytest.param(b"HTTP/7.5 200 OK\r\n\r\n", NOT_HTTP, id="bad-version"),
        pytest.param(b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", NOT_HTTP, id="bare-lf"),
        pytest.param(b"HTTP/1.1 200 OK\r\nBad Field: 0\r\n\r\n", NOT_HTTP, id="bad-field"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", NOT_HTTP, id="negative-length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", NOT_HTTP, id="two-lengths"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", NOT_HTTP, id="both"
        ),
        pytest.param(
            b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc", "change of protocol", id="101"
        ),
    ],
)
def test_a_bad_answer_is_an_error(net: Net, data: bytes, error: str) -> None:
    receiver = net.receiver(last_words(data))
    assert error in net.error(receiver.url())
    net.until(lambda: net.plain.connections == 0)
    assert len(receiver.requests) == receiver.accepted == 1, "sent again"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", id="no-body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nshor", id="wrong-length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", id="amid-chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", id="no-last-chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: b", id="amid-trailer"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", id="bad-chunk"),
    ],
)
def test_a_status_holds_whatever_becomes_of_the_body(net: Net, data: bytes) -> None:
    receiver = net.receiver(last_words(data))
    assert net.status(receiver.url()) == 200
    net.until(lambda: net.plain.connections == 0)
    assert len(receiver.requests) == receiver.accepted == 1, "sent again"


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_a_reset_is_an_error_at_every_stage(net: Net, data: bytes) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(data)
        await asyncio.sleep(0.03)  # what was sent is to get there before the reset, which may overtake it
        await peer.reset()

    receiver = net.receiver(play)
    assert CUT in net.error(receiver.url())
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("force", [False, True])
def test_a_receiver_that_closes_at_once_is_an_error(net: Net, force: bool) -> None:
    async def play(peer: Peer) -> None:
        if force:
            await peer.reset()

    receiver = net.receiver(play)
    results = net.ask(*[receiver.url()] * 20)
    assert all(isinstance(result, OutboundError) for result in results)
    assert receiver.requests == []


@pytest.mark.parametrize("secure", [False, True])
def test_a_receiver_that_speaks_first_does_no_harm(net: Net, trusted: trustme.CA, secure: bool) -> None:
    async def play(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    receiver = net.receiver(play, tls=serving(trusted, "127.0.0.1") if secure else None)
    for _ in range(5):
        net.ask(receiver.url())  # whether it is taken for the answer is a matter of time


@pytest.mark.parametrize(
    ("play", "error"),
    [
        pytest.param(endless(b"HTTP/1.1 200 OK\r\n", b"A: " + b"x" * 1000 + b"\r\n"), "head is over", id="fields"),
        pytest.param(endless(b"HTTP/1.1 200 OK\r\nA: ", b"x" * 1000), "head is over", id="field"),
        pytest.param(endless(b"HTTP/1.1 200 ", b"x" * 1000), "head is over", id="reason"),
        pytest.param(endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "head is over", id="interim"),
    ],
)
def test_an_endless_answer_is_cut(net: Net, play: Play, error: str) -> None:
    receiver = net.receiver(play)
    assert error in net.error(receiver.url())
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(("more", "error"), [(0, CUT), (1, f"the response's head is over {outbound.MAX_HEAD} bytes")])
def test_a_head_without_end_is_read_up_to_the_bound(net: Net, more: int, error: str) -> None:
    start = b"HTTP/1.1 200 OK\r\nA: "
    receiver = net.receiver(last_words(start + b"x" * (outbound.MAX_HEAD - len(start) + more)))
    assert error in net.error(receiver.url())


@pytest.mark.parametrize(
    "play",
    [
        pytest.param(endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 9999), id="body"),
        pytest.param(endless(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 9999), id="length"),
        pytest.param(
            endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"3e8\r\n" + b"x" * 1000 + b"\r\n"),
            id="chunks",
        ),
        pytest.param(
            endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n", b"x" * 9999),
            id="chunk",
        ),
        pytest.param(
            endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;a=", b"x" * 9999),
            id="chunk-extension",
        ),
        pytest.param(
            endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: " + b"x" * 1000 + b"\r\n"),
            id="trailers",
        ),
    ],
)
def test_an_endless_body_is_cut_and_its_status_holds(net: Net, play: Play) -> None:
    receiver = net.receiver(play)
    assert net.status(receiver.url()) == 200
    net.until(lambda: receiver.open == 0)
    assert len(receiver.requests) == 1


def test_an_answer_over_the_bound_ends_the_connection_however_it_comes(net: Net) -> None:
    data = of_size(outbound.MAX_RESPONSE + 1)
    for pieces in ([data], [data[:9000], data[9000:]], [data[at : at + 4096] for at in range(0, len(data), 4096)]):
        receiver = net.receiver(answer(*pieces))
        assert [net.status(receiver.url()) for _ in range(2)] == [200, 200]
        assert receiver.accepted == 2


@pytest.mark.parametrize(
    "play",
    [
        pytest.param(hang, id="hanging"),
        pytest.param(slowly(b"HTTP/1.1 100 Continue\r\n\r\n"), id="dripping-interim"),
        pytest.param(slowly(b"HTTP/1.1 200 OK and so on and so on"), id="dripping-head"),
    ],
)
def test_an_answer_that_takes_too_long_is_an_error(net: Net, monkeypatch: pytest.MonkeyPatch, play: Play) -> None:
    monkeypatch.setattr(outbound, "EXCHANGE_TIME", SHORT)
    receiver = net.receiver(play)
    assert re.fullmatch(r"no response within 0\.15 s", net.error(receiver.url()))
    net.until(lambda: receiver.open == 0)
    assert len(receiver.requests) == 1


def test_a_body_that_takes_too_long_is_not_waited_for(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "EXCHANGE_TIME", SHORT)
    receiver = net.receiver(hang_after(b"HTTP/1.1 200 OK\r\n\r\nsome"))
    assert net.status(receiver.url()) == 200
    net.until(lambda: receiver.open == 0)
