"""Many requests on a connection: answers leave in order whenever they come, and what waits is bounded."""

import asyncio
import random
import socket
import threading
from typing import cast

import pytest
from http_peers import GUARD, HOST, NEXT, Memory, Socket, Telling, Waiting, chunked, cut, get, line, replies, statuses

import dedup
import http1

# Answers that come later


@pytest.mark.parametrize("seed", range(5))
def test_answers_leave_in_request_order_whenever_they_come(later: tuple[Memory, Waiting], seed: int) -> None:
    memory, store = later
    chance = random.Random(seed)
    requests = [
        *((get(number), Telling.status(number)) for number in range(40)),
        *((get(number, method=b"HEAD"), Telling.status(number)) for number in range(5)),
        *((line(b"GET / HTTP/1.1"), 404), (get(b"x"), 400), (get(method=b"POST"), 405), (chunked(b"0\r\n\r\n"), 200)),
    ]
    chance.shuffle(requests)
    requests += [(get(1, HOST + HOST), 400), (NEXT, 0)]
    expected = [status for _, status in requests[:-1]]
    peer = memory.connect()
    peer.send(*cut(b"".join(request for request, _ in requests), chance.choice([1, 100, 10_000])))
    memory.settle()
    assert len(store.waiting) == 46
    while store.waiting:
        store.give(1, chance)
        said = statuses(peer.sent)
        assert said == expected[: len(said)]
        oldest = min((store.added.index(number) for number, _ in store.waiting), default=None)
        assert len(said) >= (len(expected) if oldest is None else oldest)  # nothing is held back
        assert peer.ended is (oldest is None)
    assert statuses(peer.sent) == expected


def test_reading_pauses_at_max_owed_and_goes_on(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    for number in range(http1.MAX_OWED - 1):
        peer.send(get(number))
    assert peer.reading
    peer.send(get(63) + get(64) + get(65), get(66))
    assert len(store.waiting) == http1.MAX_OWED == 64
    peer.send(get(67))
    memory.advance()
    assert not peer.reading
    assert store.added == list(range(64))
    store.give(64)
    memory.advance()
    assert peer.reading
    assert store.added == list(range(68))
    store.give(4)
    assert statuses(peer.sent) == [Telling.status(number) for number in range(68)]


def test_reading_goes_on_when_half_of_the_most_are_given(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(b"".join(map(get, range(100))))
    memory.settle()
    assert len(store.waiting) == http1.MAX_OWED
    store.give(http1.MAX_OWED // 2 - 1)
    memory.settle()
    assert len(store.added) == http1.MAX_OWED
    store.give(1)
    memory.settle()
    assert len(store.added) == 100 - (100 - http1.MAX_OWED - http1.MAX_OWED // 2)


@pytest.mark.parametrize("seed", range(5))
def test_answers_that_come_together_leave_in_request_order_and_are_counted(
    later: tuple[Memory, Waiting], seed: int
) -> None:
    memory, store = later
    chance = random.Random(seed)
    peers = [memory.connect() for _ in range(10)]
    for number, peer in enumerate(peers):
        for _ in range(chance.choice((1, 1, 2, 5))):
            peer.send(get(number, method=chance.choice((b"GET", b"GET", b"HEAD"))))
    total = len(store.waiting)
    slots = [cast(http1.Slot, done) for _, done in store.waiting]
    chance.shuffle(slots)
    owed = {id(peer): len(peer.protocol.replies.slots) for peer in peers}
    for at in range(0, total, 3):
        memory.server.give(slots[at : at + 3], dedup.NEW)
    assert [len(replies(peer.sent)) for peer in peers] == [owed[id(peer)] for peer in peers]
    assert memory.server.answered()[200] == total
    for peer in peers:
        peer.send(get(1))
    store.waiting = store.waiting[total:]
    store.give(len(store.waiting))
    assert memory.server.answered()[200] == total + len(peers)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_10000_pipelined_in_one_write(later: tuple[Memory, Waiting], seed: int | None) -> None:
    memory, store = later
    with Memory(Telling()) as other:
        answers = {number % 3: other.talk(get(number)) for number in range(3)}
    peer = memory.connect()
    peer.send(b"".join(map(get, range(10_000))))
    while store.waiting:
        store.give(1, None if seed is None else random.Random(seed))
        assert len(peer.protocol.replies.slots) <= http1.MAX_OWED
        if not store.waiting:
            memory.advance()
    assert store.peak == http1.MAX_OWED
    assert store.added == list(range(10_000))
    assert peer.sent == b"".join(answers[number % 3] for number in range(10_000))


class Shuffled(Waiting):
    """Gives one answer, any of those that wait, in the loop's next turn."""

    chance = random.Random(1)

    def add(self, number: int, done: dedup.Done, counted: dedup.Counted | None = None) -> int | None:
        asyncio.get_running_loop().call_soon(self.give, 1, self.chance)
        return super().add(number, done, counted)


def test_10000_pipelined_over_a_socket() -> None:
    with Memory(Telling()) as other:
        answers = {number % 3: other.talk(get(number)) for number in range(3)}
    store = Shuffled()
    with Socket(store) as world:
        said = world.talk(b"".join(map(get, range(10_000))))
    expected = b"".join(answers[number % 3] for number in range(10_000))
    assert said.replace(b"\r\nConnection: close", b"") == expected  # the last may say so, having seen the peer's FIN
    assert store.peak <= http1.MAX_OWED


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
@pytest.mark.parametrize("tail", [b"", get(9)[:-1], b"\0", get(9) * 100])
def test_a_lost_connection_takes_no_answers(
    later: tuple[Memory, Waiting], tail: bytes, error: Exception | None
) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + get(2) + get(3) + tail)
    store.give(1)
    said = peer.sent
    peer.lose(error)
    lone = memory.connect()
    lone.send(get(4))
    lone.lose(error)
    _, done = store.waiting.pop()
    memory.server.give([cast(http1.Slot, done)], dedup.NEW)
    store.give(len(store.waiting), random.Random(1))
    memory.advance(100)
    assert lone.sent == b""
    assert peer.sent == said
    assert store.waiting == []
    assert not memory.server.connections


def test_answers_after_an_abort_are_harmless(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + get(2))
    peer.protocol.abort()
    store.give(2)  # before connection_lost was called
    memory.advance()
    assert peer.lost


def test_a_half_closed_peer_gets_what_it_asked_for(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + get(3) + get(4)[:-1])
    peer.finish()
    memory.advance(1)
    assert not peer.closing
    store.give(2)
    memory.advance()
    first, last = replies(peer.sent)
    assert (first.closes, last.closes) == (False, True)
    assert peer.lost
    assert not peer.aborted


# Back-pressure


def test_a_peer_that_does_not_read_is_not_read_from(memory: Memory) -> None:
    peer = memory.connect()
    peer.taking = False
    count = 20_000
    peer.send(get() * count)
    memory.settle()
    once = len(memory.talk(get()))
    assert not peer.reading
    assert peer.choked
    bound = peer.HIGH + http1.QUANTUM * once  # at the mark, and then the answers of one turn
    while peer.choked:
        assert len(peer.buffer) <= bound
        assert not peer.reading
        left = len(peer.inbox) + len(peer.protocol._unread)
        memory.advance(1)
        assert left == len(peer.inbox) + len(peer.protocol._unread)
        peer.take()
        peer.taking = False
        memory.settle()
    peer.take()
    assert peer.reading
    assert memory.store.added == [7] * (count + 1)
    assert len(peer.sent) == count * once


def test_reading_goes_on_after_both_bounds_were_met(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.taking = False
    peer.send(*map(get, range(41)))
    store.give(1)
    while not peer.choked:
        peer.send(get())
        store.give(1)
    assert not peer.reading
    peer.take()  # while 40 answers wait: more than those at which reading goes on
    store.give(40)
    memory.advance()
    assert peer.reading
    peer.send(get(1000))
    assert store.added[-1] == 1000


@pytest.mark.parametrize("waiting", [1, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("unread", [0, 1, 100])
def test_reading_goes_on_whatever_was_put_by(later: tuple[Memory, Waiting], waiting: int, unread: int) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(0) * waiting)
    peer.protocol.pause_writing()  # as a transport may at any time
    peer.send(get(0) * unread)
    memory.advance()
    assert not peer.reading
    store.give(waiting // 2)
    peer.protocol.resume_writing()
    memory.advance()
    while store.waiting:
        store.give(1)
        memory.advance()
    assert len(store.added) == waiting + unread
    assert peer.reading
    peer.send(get(1))
    assert store.added[-1] == 1


class Watched(http1.Connection):
    """Notes how much it keeps for a peer at most."""

    peak = 0
    full = threading.Event()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if isinstance(self.transport, asyncio.WriteTransport):
            Watched.peak = max(Watched.peak, self.transport.get_write_buffer_size() + len(self._unread))

    def pause_writing(self) -> None:
        super().pause_writing()
        self.full.set()


def test_100000_pipelined_by_a_peer_that_does_not_read() -> None:
    requests = [get() if number % 1000 else line(b"GET /%d HTTP/1.1" % number) for number in range(100_000)]
    with Socket(connection=Watched) as world:
        ok, not_found = world.talk(get()), world.talk(line(b"GET / HTTP/1.1"))
        with world.connect() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            sender = threading.Thread(target=peer.sendall, args=(b"".join(requests),))
            sender.start()
            assert Watched.full.wait(GUARD)
            expected = b"".join(ok if number % 1000 else not_found for number in range(100_000))
            received = bytearray()
            while len(received) < len(expected):
                data = peer.recv(1 << 20)
                assert data
                received += data
            sender.join(GUARD)
            assert received == expected
            peer.sendall(get())
            assert peer.recv(65536) == ok
    # uvloop pauses at 64 KiB, and then the answers to one read of 256 KiB may still come, and the read be put by.
    assert Watched.peak <= 65536 + 262144 // len(get()) * len(ok) + 262144 < len(expected) // 8
