"""What a client may ask for at most: bytes, time, connections; each limit at it and one past it."""

import contextlib
import socket

import pytest
from http_peers import (
    HOST,
    NOW,
    PATH,
    START,
    Memory,
    Socket,
    Waiting,
    chunked,
    cut,
    framed,
    get,
    line,
    replies,
    rest,
    statuses,
)

import http1

# Limits: at each, and one past it

ASKED = len(PATH + b"?id=")
SPARE = len(b"Host: a\r\nX: \r\n")  # what frames the value that fills a header section
BY_ONE = b"1\r\nx\r\n"
LIMITS = {  # request, status; 8 KiB = 8192, 32 KiB = 32768, 64 KiB = 65536
    "target at": (get(b"7&".ljust(8192 - ASKED, b"x")), 200),
    "target past": (get(b"7&".ljust(8193 - ASKED, b"x")), 414),
    "target far past": (get(b"7&".ljust(70_000, b"x")), 414),
    "absolute target at": (line(b"GET http://%b/ HTTP/1.1" % (b"x" * (8192 - len("http:///")))), 404),
    "absolute target past": (line(b"GET http://%b/ HTTP/1.1" % (b"x" * (8193 - len("http:///")))), 414),
    "section at": (framed(b"X: %b\r\n" % (b"x" * (32768 - SPARE))), 200),
    "section past": (framed(b"X: %b\r\n" % (b"x" * (32769 - SPARE))), 431),
    "section far past": (framed(b"X: %b\r\n" % (b"x" * 300_000)), 431),
    "section at, of a name": (framed(b"X%b: \r\n" % (b"x" * (32768 - SPARE))), 200),
    "section past, of a name": (framed(b"X%b: \r\n" % (b"x" * (32769 - SPARE))), 431),
    "both at": (get(b"7&".ljust(8192 - ASKED, b"x"), HOST + b"X: %b\r\n" % (b"x" * (32768 - SPARE))), 200),
    "fields at": (framed(b"X: y\r\n" * 99), 200),
    "fields past": (framed(b"X: y\r\n" * 100), 431),
    "fields far past": (framed(b"X: y\r\n" * 5000), 431),
    "length at": (framed(b"Content-Length: 65536\r\n", b"x" * 65536), 200),
    "length past": (framed(b"Content-Length: 65537\r\n", b"x" * 65537), 413),
    "length of ten digits": (framed(b"Content-Length: 1000000005\r\n", b"hello"), 413),
    "length of 2**63": (framed(b"Content-Length: 9223372036854775808\r\n"), 413),
    "length of 2**64": (framed(b"Content-Length: 18446744073709551616\r\n"), 413),
    "length of 5000 zeros": (framed(b"Content-Length: %b5\r\n" % (b"0" * 5000), b"hello"), 200),
    "one chunk at": (chunked(b"10000\r\n%b\r\n0\r\n\r\n" % (b"x" * 65536)), 200),
    "one chunk past": (chunked(b"10001\r\n%b\r\n0\r\n\r\n" % (b"x" * 65537)), 413),
    "two chunks past": (chunked(b"10000\r\n%b\r\n%b0\r\n\r\n" % (b"x" * 65536, BY_ONE)), 413),
    "chunks of one at": (chunked(BY_ONE * 65536 + b"0\r\n\r\n"), 200),
    "chunks of one past": (chunked(BY_ONE * 65537 + b"0\r\n\r\n"), 413),
    "chunks of CRLF at": (chunked(b"4\r\n\r\n\r\n\r\n" * 16384 + b"0\r\n\r\n"), 200),
}


@pytest.mark.parametrize("size", [10_000_000, 10], ids=["whole", "in tens"])
@pytest.mark.parametrize("case", LIMITS)
def test_limit(memory: Memory, case: str, size: int) -> None:
    request, status = LIMITS[case]
    first, *others = replies(memory.talk(*cut(request + get(8), size), finish=status < 405))
    assert first.status == status
    assert first.closes is (status > 404)
    assert [reply.status for reply in others] == [200] * (status < 405)  # what follows is read, or is not
    assert memory.store.added == ([7, 8] if status == 200 else [8] if status == 404 else [])


@pytest.mark.parametrize("case", [case for case in LIMITS if not case.startswith("chunks")])
def test_limit_over_a_socket(case: str) -> None:
    request, status = LIMITS[case]
    with Socket() as world:
        assert statuses(world.talk(request))[0] == status


ENDLESS = {  # what never comes to its end, and how that is refused
    "method": (b"X" * 70_000, 414),
    "target": (b"GET /" + b"x" * 70_000, 414),
    "fields": (START + b"\r\n" + b"X: y\r\n" * 9000, 431),
    "name": (get()[:-2] + b"x" * 40_000, 431),
    "value": (get()[:-2] + b"x: " + b"y" * 40_000, 431),
    "extension": (chunked(b"1;" + b"x" * 70_000), 413),
    "chunk size": (chunked(b"0" * 70_000), 413),
    "name in trailers": (chunked(b"0\r\n" + b"x" * 70_000), 413),
    "trailers": (chunked(b"0\r\n" + b"X: y\r\n" * 9000), 413),
}


@pytest.mark.parametrize("size", [10_000_000, 10], ids=["whole", "in tens"])
@pytest.mark.parametrize("case", ENDLESS)
def test_endless_pieces_are_refused_before_they_end(memory: Memory, case: str, size: int) -> None:
    stream, status = ENDLESS[case]
    (reply,) = replies(memory.talk(*cut(stream, size), finish=False))
    assert (reply.status, reply.closes) == (status, True)


@pytest.mark.parametrize("length", [8193, 8300, 20_000])
@pytest.mark.parametrize("size", [10_000_000, 10], ids=["whole", "in tens"])
def test_head_gets_no_body_with_414_either(memory: Memory, length: int, size: int) -> None:
    request = get(b"7&".ljust(length - ASKED, b"x"), method=b"HEAD")
    (reply,) = replies(memory.talk(*cut(request, size), finish=False))
    assert (reply.status, reply.body) == (414, b"")


# Deadlines

PARTS = {  # what comes first, and what then comes ten times a second without ever being enough
    "byte": (b"G", b""),
    "line": (START[:26], b"7"),
    "field": (get()[:-4], b"x"),
    "head": (get()[:-1], b""),
    "length": (framed(b"Content-Length: 500\r\n", b"hello"), b"x"),
    "chunked": (chunked(b"500\r\nhello"), b"x"),
    "trailers": (chunked(b"5\r\nhello\r\n0\r\nX: y"), b"y"),
    "second": (get(1) + get()[:-4], b"x"),
    "after an empty line": (b"\r\n" + get()[:-4], b"x"),
}


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "dripping"])
@pytest.mark.parametrize("part", PARTS)
def test_a_slow_request_is_408(memory: Memory, part: str, drip: bool) -> None:
    first, then = PARTS[part]
    peer = memory.connect()
    memory.advance(60.4)  # idle before; the request's first byte counts
    peer.send(first)
    before = peer.sent
    for _ in range(99):
        memory.advance(0.1)
        peer.send(then * drip)
    assert peer.sent == before  # 9.9 s: not early
    memory.advance(2.1)
    *others, reply = replies(peer.sent)
    assert others == replies(before)
    assert (reply.status, reply.body, reply.closes) == (408, b"failed", True)
    assert peer.ended
    assert set(memory.store.added) <= {1}


def test_head_and_body_have_one_deadline(memory: Memory) -> None:
    peer = memory.connect()
    request = framed(b"Content-Length: 9\r\n", b"hello")
    peer.send(request[:20])
    memory.advance(9)
    peer.send(request[20:])
    memory.advance(3)
    assert statuses(peer.sent) == [408]


def test_408_to_head_has_no_body(memory: Memory) -> None:
    peer = memory.connect()
    peer.send(get(method=b"HEAD")[:-2])
    memory.advance(12)
    (reply,) = replies(peer.sent)
    assert (reply.status, reply.body) == (408, b"")


def test_each_request_has_its_own_time(memory: Memory) -> None:
    peer = memory.connect()
    for number in range(20):
        peer.send(get(number)[:20])
        memory.advance(9.9)
        peer.send(get(number)[20:] + framed(b"Content-Length: 9\r\n", b"hello"))
        memory.advance(9.9)
        peer.send(b"1234")
    assert statuses(peer.sent) == [200] * 40


@pytest.mark.parametrize("pause", ["an answer before it comes", "the peer does not read for a while"])
def test_the_deadline_of_a_request_outlives(later: tuple[Memory, Waiting], pause: str) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + get(2)[:-1])
    memory.advance(1)
    if pause.startswith("an answer"):
        store.give(1)
    else:
        store.give(1)
        peer.protocol.pause_writing()
        memory.advance(1)
        peer.protocol.resume_writing()
    memory.advance(13)
    assert statuses(peer.sent) == [200, 408]


@pytest.mark.parametrize("size", [1000, 1])
@pytest.mark.parametrize("before", [b"", get(), get(b"x"), get() + b"\r\n"], ids=["new", "used", "failed", "CRLF"])
def test_an_idle_connection_is_closed_silently_and_never_early(memory: Memory, before: bytes, size: int) -> None:
    memory.advance(0.3)
    peer = memory.connect()
    memory.advance(50 if before else 0)
    peer.send(*cut(before, size))
    said = peer.sent
    memory.advance(75)
    assert not peer.ended
    memory.advance(3)
    assert peer.lost
    assert not peer.aborted
    assert peer.sent == said


def test_an_idle_connection_is_not_closed_early_whenever_the_clock_ticks() -> None:
    with Memory(clock=lambda: NOW + 0.1) as memory:  # every 0.9 s
        peer = memory.connect()
        memory.advance(9.85)  # just before a tick
        peer.send(get())
        memory.advance(74.95)
        assert not peer.ended
        memory.advance(3)
        assert peer.lost


def test_who_never_takes_the_last_answer_is_cut_in_the_end(memory: Memory) -> None:
    peer = memory.connect()
    peer.taking = False
    peer.send(get(7, HOST + b"Connection: close\r\n"))
    memory.advance(70)
    assert not peer.aborted
    memory.advance(20)
    assert peer.aborted


def test_a_connection_that_answers_is_not_idle(memory: Memory) -> None:
    peers = [memory.connect() for _ in range(3)]
    for number in range(5):
        for peer, request in zip(peers, (get(number), get(b"x"), get(number, method=b"POST")), strict=True):
            peer.send(request)
        memory.advance(74)
        assert not any(peer.ended for peer in peers)


def test_a_connection_that_waits_for_an_answer_is_not_idle(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    for _ in range(10):
        memory.advance(74)
        peer.send(get(1))
        memory.advance(200)  # the store's time-out is the store's
        store.give(1)
    memory.advance(74)
    assert not peer.ended
    assert statuses(peer.sent) == [200] * 10


def test_a_peer_that_does_not_read_is_cut(memory: Memory) -> None:
    peer = memory.connect()
    peer.taking = False
    peer.send(get() * 1000)
    memory.advance(75)
    assert not peer.closing
    memory.advance(3)
    assert peer.aborted


def test_a_peer_that_reads_now_and_then_is_not_cut(memory: Memory) -> None:
    peer = memory.connect()
    peer.taking = False
    peer.send(get() * 50_000)
    memory.settle()
    while peer.choked:
        memory.advance(70)
        assert not peer.ended
        peer.take()
        peer.taking = False
        memory.settle()
    memory.advance(74)  # idle only now
    assert not peer.ended
    memory.advance(4)
    assert peer.ended


def test_after_an_error_the_peer_has_a_moment_to_read_it(memory: Memory) -> None:
    peer = memory.connect(polite=False)
    peer.send(get(1, b""), get(2))
    for _ in range(19):
        peer.send(get(3))
        memory.advance(0.1)
    assert peer.shut
    assert not peer.aborted
    memory.advance(2)
    assert peer.aborted
    assert statuses(peer.sent) == [400]
    assert memory.store.added == []


@pytest.mark.parametrize("count", [1000, 10])
def test_the_moment_begins_when_all_is_sent(memory: Memory, count: int) -> None:
    peer = memory.connect()
    peer.taking = False
    peer.send(get() * count + get(7, HOST + b"Connection: close\r\n"))
    memory.settle()
    assert peer.choked is (count == 1000)
    memory.advance(20)
    assert not peer.aborted
    peer.take()
    memory.settle()
    assert statuses(peer.sent) == [200] * (count + 1)
    assert peer.lost


def test_nothing_is_said_to_a_peer_that_has_shut_its_side_amid_a_request(memory: Memory) -> None:
    peer = memory.connect()
    peer.taking = False
    peer.send(get() + get()[:-1])
    peer.finish()
    memory.advance(20)
    assert peer.closing
    peer.take()
    memory.advance()
    assert statuses(peer.sent) == [200]


# The cap


def test_a_connection_past_the_cap() -> None:
    with Memory(max_connections=3) as memory:
        peers = [memory.connect() for _ in range(3)]
        for peer in peers:
            peer.send(get())
        more = memory.connect()
        more.send(get(8))
        memory.advance()
        (reply,) = replies(more.sent)
        assert (reply.status, reply.body, reply.closes, more.lost) == (503, b"failed", True, True)
        peers.pop().lose()
        peers.append(memory.connect())
        for peer in peers:
            peer.send(get(9))
            assert replies(peer.sent)[-1].status == 200
        assert 8 not in memory.store.added


def test_a_connection_past_the_cap_over_a_socket() -> None:
    with Socket(max_connections=3) as world, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(world.connect()) for _ in range(3)]
        for peer in peers:
            peer.sendall(get())
            assert statuses(peer.recv(65536)) == [200]
        (reply,) = replies(world.talk(get(8), finish=False))
        assert (reply.status, reply.closes) == (503, True)
        peers[0].shutdown(socket.SHUT_WR)
        assert rest(peers.pop(0)) == b""  # it has left
        for peer in (*peers, stack.enter_context(world.connect())):
            peer.sendall(get(9))
            assert statuses(peer.recv(65536)) == [200]
        assert 8 not in world.store.added


def test_those_turned_away_take_no_place_of_those_served() -> None:
    with Memory(max_connections=3) as memory:
        peers = [memory.connect() for _ in range(3)]
        more = memory.connect(polite=False)  # has its 503, and stays for a moment
        memory.advance()
        peers.pop().lose()
        peer = memory.connect()
        peer.send(get())
        assert statuses(peer.sent) == [200]
        more.lose()
        assert statuses(memory.connect().sent) == [503]


def test_far_past_the_cap_connections_are_just_closed() -> None:
    with Memory(max_connections=1) as memory:
        peers = [memory.connect() for _ in range(http1.OVERFLOW + 10)]
        assert {peer.sent[:12] for peer in peers[1 : http1.OVERFLOW]} == {b"HTTP/1.1 503"}
        assert peers[-1].sent == b""
        memory.advance()
        assert all(peer.lost for peer in peers[1:])
        peers[0].send(get())
        assert statuses(peers[0].sent) == [200]


def test_connections_that_are_refused_are_told_to_the_log_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    with Memory(max_connections=1) as memory:
        peer = memory.connect()
        for expected in (1, 2):
            for _ in range(5):
                memory.connect()
            memory.advance(http1.SAY_AGAIN - 5)
            memory.connect()
            assert len(caplog.messages) == expected
            assert caplog.messages[-1].startswith("1 connections are open")
            peer.send(get())  # so it is not idle
            memory.advance(5)
