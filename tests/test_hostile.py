"""Clients that mean harm: attacks by the many."""

import contextlib

import fuzz
import pytest
import support
from test_http1 import Memory, chunked, cut, framed, get, replies

import http1

END = b"0\r\n\r\n"

# By fuzz.py: an outcome that depended on how the bytes were cut
FOUND = {
    "a line past its bound, and then malformed": (b"GET /" + b"a" * 9000 + b"  \x01 HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    "fields past their bound, and then malformed": (framed(b"X: y\r\n" * 150 + b"X : y\r\n"), 431),
    "a section past its bound, and then malformed": (framed(b"X: " + b"y" * 33_000 + b"\0\r\n"), 431),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_at_random(case: str) -> None:
    stream, status = FOUND[case]
    with contextlib.closing(fuzz.Checker()) as checker:
        whole = checker.said([stream])
        for size in (1, 7, 1000, 8191, 8192, 20_000):
            assert checker.said(cut(stream, size)) == whole
        assert checker.check(stream) == [status]


def test_a_read_of_many_requests_takes_turns_with_others() -> None:
    with Memory() as memory:
        greedy, other = memory.connect(), memory.connect()
        greedy.send(get(b"x") * 5000)
        assert len(replies(greedy.sent)) == http1.TURN
        assert not greedy.reading
        other.send(get(1))
        assert len(replies(other.sent)) == 1
        memory.settle()
        assert len(replies(greedy.sent)) == 5000
        assert greedy.reading
        greedy.send(get(2) + get(3) * 5000)  # plain ones, which cost a quarter
        assert http1.TURN < len(replies(greedy.sent)) - 5000 <= 5 * http1.TURN
        memory.settle()
        assert len(replies(greedy.sent)) == 10_001


def test_a_body_of_many_chunks_takes_turns_with_others() -> None:
    with Memory() as memory:
        greedy, other = memory.connect(), memory.connect()
        greedy.send(chunked(b"1\r\nx\r\n" * 40_000 + END) + get(2))
        assert greedy.sent == b""
        other.send(get(1))
        assert len(replies(other.sent)) == 1
        memory.settle()
        assert [reply.status for reply in replies(greedy.sent)] == [200, 200]


def test_many_that_want_turns_have_them_in_order() -> None:
    with Memory() as memory:
        peers = [memory.connect() for _ in range(3 * http1.TURNS)]
        for peer in peers:
            peer.send(get(b"x") * 3 * http1.TURN)
        while memory.server._queue:
            memory.advance()
            said = [len(peer.sent) for peer in peers]
            assert max(said) <= min(said) + 6 * len(peers[0].sent)
        assert [len(replies(peer.sent)) for peer in peers] == [3 * http1.TURN] * len(peers)


def test_an_idle_connection_keeps_little() -> None:
    request = get(b"7&".ljust(8000, b"x"), b"Host: %b\r\nX: %b\r\n" % (b"a" * 12_000, b"x" * 20_000))
    with Memory() as memory:
        peer = memory.connect()
        peer.send(request)
        assert [reply.status for reply in replies(peer.sent)] == [200]
        kept = [getattr(peer.protocol, name, b"") for name in http1.Connection.__slots__]
        assert sum(len(value) for value in kept if isinstance(value, bytes)) < 3 * http1.MAX_KNOWN
        assert sum(map(len, peer.protocol._host or ())) < 2 * http1.MAX_KNOWN


def test_files_run_out_and_are_free_again() -> None:
    with support.verve(prefix=["sh", "-c", 'ulimit -n 256 && exec "$@"', "sh"]) as program:
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(support.Client(program.address)) for _ in range(300)]
                program.log.wait_for("can't take connections: Too many open files")
                assert clients[0].ask(support.accept(1)).status == 200  # those that are served are served on
                told = [client.receive()[0].status for client in clients[200:]]  # as soon as files are free
                assert set(told) == {503}
            status = 503
            while status == 503:  # until the server has seen them leave
                with support.Client(program.address) as client:
                    status = client.ask(support.accept(2)).status
            assert status == 200
        assert len([line for line in program.log.all if "can't take" in line]) == 1
        assert len(program.log.all) < 6
