"""Where a request begins and ends: what is malformed, odd but valid, or the last; however the bytes were cut."""

import pytest
from http_corpus import CASES, EXPECT, EXPECTING, LAST, MALFORMED, ODD, STREAMS
from http_peers import HOST, NEXT, Memory, Socket, Waiting, cut, drain, framed, get, line, replies, statuses


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_is_400_and_nothing_behind_it_is_read(memory: Memory, case: str) -> None:
    stream = MALFORMED[case] + NEXT
    before = get(1)
    for pieces in ([stream], cut(stream, 1), [before + stream], [before, stream], cut(before + stream, 3)):
        memory.store.added.clear()
        *others, reply = replies(memory.talk(*pieces, finish=False))
        assert (reply.status, reply.body, reply.closes) == (400, b"failed", True)
        assert [other.status for other in others] == [200] * (b"".join(pieces) != stream)
        assert memory.store.added == [1] * len(others)


def test_malformed_over_a_socket() -> None:
    assert len(MALFORMED) == len(CASES) > 250
    with Socket() as world:
        for case, request in MALFORMED.items():
            assert statuses(world.talk(get(1) + request + NEXT, finish=False)) == [200, 400], case
        assert set(world.store.added) == {1}


@pytest.mark.parametrize("case", ODD)
def test_odd_but_valid(memory: Memory, case: str) -> None:
    request, status = ODD[case]
    for before in (b"", get(1), request):
        stream = before + request + get(2, HOST + b"Connection: close\r\n") + NEXT
        for pieces in ([stream], cut(stream, 1), [before, request, get(2, HOST + b"Connection: close\r\n"), NEXT]):
            *others, reply, last = replies(memory.talk(*filter(None, pieces), finish=False))
            assert [other.status for other in others] == [[], [200], [status]][[b"", get(1), request].index(before)]
            assert (reply.status, last.status) == (status, 200)
            assert reply.fields.get("connection") == ("keep-alive" if "1.0" in case else None)
            assert last.closes


def test_odd_but_valid_over_a_socket() -> None:
    with Socket() as world:
        for case, (request, status) in ODD.items():
            assert statuses(world.talk(request + get(2))) == [status, 200], case


@pytest.mark.parametrize("case", LAST)
def test_last_request(world: Memory | Socket, case: str) -> None:
    for stream in (LAST[case] + NEXT, get(1) + LAST[case] + NEXT):
        *_, reply = replies(world.talk(stream, finish=False))
        assert (reply.status, reply.closes) == (200, True)
    assert world.store.added == [7, 1, 7]


@pytest.mark.parametrize("size", [10_000, 1])
def test_a_body_behind_an_upgrade_is_never_a_request(memory: Memory, size: int) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    for framing, body in (
        (b"Content-Length: %d\r\n" % len(NEXT), NEXT),
        (b"Content-Length: 5\r\n", b"hello"),
        (b"Transfer-Encoding: chunked\r\n", NEXT),
        (b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n"),
    ):
        (reply,) = replies(memory.talk(*cut(framed(upgrade + framing, body), size)))
        assert reply.status == (400 if body == NEXT and b"chunked" in framing else 200)
    assert memory.store.added == [7] * 3


@pytest.mark.parametrize("trailer", [b"Connection: close", b"connection: keep-alive", b"Proxy-Connection: close"])
@pytest.mark.parametrize("head", [b"", b"Connection: close\r\n"], ids=["kept", "last"])
def test_trailers_have_no_say_in_whether_the_connection_goes_on(
    world: Memory | Socket, trailer: bytes, head: bytes
) -> None:
    request = framed(head + b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n0\r\nX: y\r\n%b\r\n\r\n" % trailer)
    first, *others = replies(world.talk(get(1), request, get(2, HOST + b"X: z\r\n"), NEXT))[1:]
    assert (first.status, first.closes) == (200, bool(head))
    assert [reply.status for reply in others] == ([] if head else [200, 200])


@pytest.mark.parametrize("framing", [b"Content-Length: %d\r\nHost: a\r\n", b"Host: a\r\nContent-Length: %d\r\n"])
def test_a_head_that_resembles_the_last_one_is_judged_anew(memory: Memory, framing: bytes) -> None:
    """Only the Host is the same, or only the Host is missing."""
    post = get(1, framing % len(NEXT), b"POST") + NEXT
    for second, status in (
        (get(2, framing.replace(HOST, b"") % len(NEXT), b"POST") + NEXT, 400),
        (get(2, b"X: y\r\n"), 400),
        (get(2, HOST), 200),
        (get(2, framing % len(NEXT)) + NEXT, 200),
    ):
        for before in (post, get(1), post + get(1), get(1) + post):
            memory.store.added.clear()
            *_, last = replies(memory.talk(before, second))
            assert last.status == status
            assert 999 not in memory.store.added


@pytest.mark.parametrize("framing", [b"Content-Length: %d\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_a_body_that_comes_by_itself_and_looks_like_the_last_request_is_none(memory: Memory, framing: bytes) -> None:
    body = get(9)
    length = framing.startswith(b"Content")
    head = framed(framing % len(body) if length else framing)
    pieces = [head, body] if length else [head, b"%x\r\n" % len(body), body, b"\r\n0\r\n\r\n"]
    assert statuses(memory.talk(get(1), get(2), *pieces, get(3))) == [200] * 4
    assert memory.store.added == [1, 2, 7, 3]
    memory.store.added.clear()
    assert statuses(memory.talk(get(1), get(2)[:-1], get(3))) == [200, 400]
    assert memory.store.added == [1]


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b"GET /API/verve/accept?id=7 HTTP/1.1", 404),
        (b"PUT /api/verve/accept?id=7 HTTP/1.1", 405),
        (b"GET /api/verve/accept?ie=7 HTTP/1.1", 400),
        (b"GET\t/api/verve/accept?id=7 HTTP/1.1", 400),
    ],
)
def test_what_is_as_long_as_the_last_request_is_not_the_same(memory: Memory, start: bytes, status: int) -> None:
    for pieces in ([line(start)], [line(start) + get(2)], [get(2) + line(start)]):
        found = statuses(memory.talk(get(1), *pieces))
        assert status in found
        assert 7 not in memory.store.added


def test_connect_is_never_a_tunnel(memory: Memory) -> None:
    (reply,) = replies(memory.talk(line(b"CONNECT a:80 HTTP/1.1") + NEXT, finish=False))
    assert reply.closes
    assert reply.status in (400, 404, 405)
    assert memory.store.added == []


# Byte splits


@pytest.mark.parametrize("case", STREAMS)
def test_split_anywhere(memory: Memory, case: str) -> None:
    stream = STREAMS[case]
    whole = memory.talk(stream)
    added = memory.store.added.copy()
    assert replies(whole)
    for at in range(1, len(stream)):
        memory.store.added.clear()
        assert memory.talk(stream[:at], stream[at:]) == whole, stream[:at]
        assert memory.store.added == added
    for size in (1, 2, 3, 7):
        assert memory.talk(*cut(stream, size)) == whole


@pytest.mark.parametrize("case", STREAMS)
def test_byte_by_byte_over_a_socket(case: str) -> None:
    with Memory() as memory, Socket() as world:
        assert world.talk(*cut(STREAMS[case], 1)) == memory.talk(STREAMS[case])


# Expect: 100-continue (RFC 9110, 10.1.1)


@pytest.mark.parametrize("size", [1000, 1])
@pytest.mark.parametrize(
    ("head", "body"),
    [
        (EXPECTING, b"hello"),
        (framed(b"expect:100-Continue \r\ncontent-length: 5\r\n"), b"hello"),
        (framed(EXPECT + b"Transfer-Encoding: chunked\r\n"), b"5\r\nhello\r\n0\r\n\r\n"),
        (get(7, HOST + EXPECT + b"Content-Length: 5\r\n", b"HEAD"), b"hello"),
    ],
)
def test_100_continue(memory: Memory, head: bytes, body: bytes, size: int) -> None:
    peer = memory.connect()
    for _ in range(3):
        peer.taken.clear()
        peer.send(*cut(head, size))
        assert statuses(peer.sent) == [100]
        peer.send(*cut(body, size))
        assert statuses(peer.sent) == [100, 200]
    assert statuses(memory.talk(head + body)) == [200]  # it came along
    assert memory.store.added == [7] * 4


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        (
            get(7, HOST + EXPECT + b"Content-Length: 5\r\nConnection: keep-alive\r\n", version=b"HTTP/1.0"),
            b"hello",
            200,
        ),
        (framed(EXPECT), b"", 200),
        (framed(EXPECT + b"Content-Length: 0\r\n"), b"", 200),
        (framed(b"Expect: 200-ok\r\nContent-Length: 5\r\n"), b"hello", 200),
        (framed(EXPECT + b"Content-Length: 65537\r\n"), b"", 413),
        (framed(EXPECT + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), b"", 400),
        (get(7, EXPECT + b"Content-Length: 5\r\n"), b"", 400),
    ],
)
def test_no_100_continue(memory: Memory, head: bytes, body: bytes, status: int) -> None:
    peer = memory.connect()
    peer.send(head)
    assert statuses(peer.sent) == [status] * (not body)
    peer.send(body)
    assert statuses(peer.sent) == [status]


def test_100_continue_waits_for_its_turn(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + get(3) + EXPECTING)
    assert peer.sent == b""
    store.give(1)
    assert statuses(peer.sent) == [200]
    store.give(1)
    assert statuses(peer.sent) == [200, 200, 100]
    peer.send(b"hello")
    store.give(1)
    assert statuses(peer.sent) == [200, 200, 100, 200]


def test_after_100_continue_drain_still_answers(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + EXPECTING)
    done = drain(memory)
    store.give(1)
    memory.advance()
    peer.send(b"hello")
    store.give(len(store.waiting))
    memory.advance(4)
    assert replies(peer.sent)[-1].closes
    assert done.result() == 0
