"""A server that stops: each connection has its last answer, which says so, and none is cut before its time."""

import asyncio
import contextlib
import random
from typing import cast

import pytest
from http_peers import GUARD, Memory, Socket, Waiting, chunked, cut, drain, framed, get, replies, rest, statuses

import http1


def test_drain_without_connections_is_over_at_once(memory: Memory) -> None:
    assert drain(memory).result() == 0


def test_drain_answers_what_waits_and_says_close(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peers = [memory.connect() for _ in range(3)]
    for count, peer in enumerate(peers):
        peer.send(get() * count + get(method=b"HEAD"))
    done = drain(memory)
    memory.advance(3)
    assert not any(peer.ended for peer in peers)
    store.give(6)
    memory.advance()
    for count, peer in enumerate(peers):
        said = [(reply.body, reply.closes) for reply in replies(peer.sent)]
        assert said == [(b"ok", False)] * count + [(b"", True)]
        assert peer.lost
        assert not peer.aborted
    assert done.result() == 0


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("before", [b"", get(0)], ids=["first", "second"])
def test_drain_has_the_one_answer_that_waits_say_close(
    later: tuple[Memory, Waiting], before: bytes, method: bytes
) -> None:
    memory, store = later
    peer = memory.connect()
    if before:
        peer.send(before)
        store.give(1)
        peer.taken.clear()
    peer.send(get(1, method=method))
    done = drain(memory)
    memory.advance(3)
    memory.server.give([cast(http1.Slot, give) for _, give in store.waiting], 1)
    memory.advance()
    (reply,) = replies(peer.sent)
    assert (reply.status, reply.closes) == (200, True)
    assert peer.lost
    assert done.result() == 0


@pytest.mark.parametrize("before", [b"", get(), get(b"x")], ids=["new", "used", "failed"])
def test_drain_gives_an_idle_connection_one_more_answer(memory: Memory, before: bytes) -> None:
    peers = [memory.connect() for _ in range(3)]
    for peer in peers:
        peer.send(before)
    done = drain(memory)
    requests = (get(1), get(2), get(2, method=b"HEAD")), [get(1), get(b"y"), get(2, method=b"POST")]
    for peer, request, last in zip(peers, *requests, strict=True):
        old = len(peer.sent)
        memory.advance(0.1)
        peer.send(request)
        (reply,) = replies(peer.sent[old:])
        assert (reply.closes, bool(reply.body)) == (True, not request.startswith(b"HEAD"))
        peer.send(last)
        memory.advance()
        assert replies(peer.sent)[-1] == reply
        assert peer.lost
    assert done.result() == 0


def test_drain_closes_an_idle_connection_after_a_quiet_time(memory: Memory) -> None:
    used, new = memory.connect(), memory.connect()
    used.send(get())
    said = bytes(used.sent)
    done = drain(memory)
    memory.advance(0.4)
    assert not used.ended
    assert not new.ended
    memory.advance(2)
    assert (used.lost, new.lost, used.aborted, new.aborted) == (True, True, False, False)
    assert (used.sent, new.sent) == (said, b"")
    assert done.result() == 0


@pytest.mark.parametrize("before", [b"", get(), get() + get()], ids=["new", "used", "used twice"])
@pytest.mark.parametrize("size", [10_000, 7, 1])
def test_a_batch_during_drain_is_answered_whole(memory: Memory, before: bytes, size: int) -> None:
    peer = memory.connect()
    peer.send(before)
    peer.taken.clear()
    done = drain(memory)
    if size == 10_000:
        peer.send(get(1) + get(2) + get(3))
    else:
        peer.send(get(1)[:-1])
        peer.send(get(1)[-1:] + get(2) + get(3)[:9])
        peer.send(*cut(get(3)[9:], size))
    memory.advance()
    assert [(reply.status, reply.closes) for reply in replies(peer.sent)] == [(200, False)] * 2 + [(200, True)]
    assert done.result() == 0


def test_drain_amid_a_long_batch(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(b"".join(map(get, range(200))))
    done = drain(memory)
    while store.waiting:
        store.give(1, random.Random(1))
        memory.advance(0.01)
    assert store.added == list(range(200))
    assert [reply.closes for reply in replies(peer.sent)] == [False] * 199 + [True]
    assert done.result() == 0


@pytest.mark.parametrize("part", ["byte", "head", "length", "chunked"])
def test_drain_waits_for_the_rest_of_a_request(memory: Memory, part: str) -> None:
    whole = {"byte": get(), "head": get(), "length": framed(b"Content-Length: 5\r\n", b"hello")}.get(part)
    whole = whole or chunked(b"5\r\nhello\r\n0\r\n\r\n")
    at = {"byte": 1, "head": len(whole) - 2}.get(part, len(whole) - 3)
    peer = memory.connect()
    peer.send(whole[:at])
    done = drain(memory)
    memory.advance(5)
    assert not done.done()
    peer.send(whole[at:])
    memory.advance()
    (reply,) = replies(peer.sent)
    assert (reply.status, reply.closes) == (200, True)
    assert done.result() == 0


def test_drain_waits_for_the_rest_of_a_request_behind_one_that_waits(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peer = memory.connect()
    peer.send(get(1) + get(3)[:-2])
    done = drain(memory)
    store.give(1)
    memory.advance(2)
    peer.send(get(3)[-2:])
    store.give(len(store.waiting))
    memory.advance()
    assert [(reply.status, reply.closes) for reply in replies(peer.sent)] == [(200, False), (200, True)]
    assert done.result() == 0


def test_drain_cuts_what_is_left_after_its_time_and_counts_it(later: tuple[Memory, Waiting]) -> None:
    memory, store = later
    peers = [memory.connect() for _ in range(4)]
    for peer, stream in zip(peers, (get(), get() * 100, get()[:-1], b""), strict=True):
        peer.send(stream)
    start = memory.loop.time()
    done = drain(memory, 3)
    memory.advance(2.9)
    assert not done.done()
    memory.advance(0.2)
    assert done.result() == 3
    assert [peer.aborted for peer in peers] == [True, True, True, False]
    assert memory.loop.time() - start == pytest.approx(3.1)
    store.give(len(store.waiting))
    assert not any(peer.sent for peer in peers)


@pytest.mark.parametrize("count", [600, 10])
def test_drain_gives_a_slow_reader_its_time(memory: Memory, count: int) -> None:
    readers = [memory.connect() for _ in range(2)]
    for peer in readers:
        peer.taking = False
        peer.send(get() * count)
        memory.settle()
        assert peer.choked is (count == 600)
    done = drain(memory)
    memory.advance(6)
    readers[0].take()
    memory.advance(1.9)
    assert statuses(readers[0].sent) == [200] * count
    memory.advance(0.2)
    assert done.result() == 1


def test_a_connection_that_the_kernel_held_gets_one_answer_during_drain(memory: Memory) -> None:
    first = memory.connect()
    done = drain(memory)
    peer, silent = memory.connect(), memory.connect()
    peer.send(get() + get(1))
    assert [reply.closes for reply in replies(peer.sent)] == [False, True]
    memory.advance(3)
    assert (first.lost, silent.lost, silent.sent) == (True, True, b"")
    assert done.result() == 0


def test_drain_over_a_socket() -> None:
    store = Waiting()
    with Socket(store) as world, contextlib.ExitStack() as stack:
        idle, first, second = (stack.enter_context(world.connect()) for _ in range(3))
        for peer in (idle, first, second):
            peer.sendall(get(b"x"))
            assert statuses(peer.recv(65536)) == [400]
        first.sendall(get(1) + get(b"x"))
        second.sendall(get(1) + get(4))
        idle.sendall(get(b"x"))
        assert statuses(idle.recv(65536)) == [400]  # so the others' requests are read too

        async def start() -> asyncio.Task[int]:
            task = asyncio.create_task(world.server.drain(3 * GUARD))
            await asyncio.sleep(0)
            idle.sendall(get(b"x"))
            return task

        async def end(task: asyncio.Task[int]) -> int:
            store.give(3)
            return await task

        done = world.run(start())
        assert [reply.closes for reply in replies(rest(idle))] == [True]
        idle.close()
        given = asyncio.run_coroutine_threadsafe(end(done), world.loop)
        for peer in (first, second):
            assert [reply.closes for reply in replies(rest(peer))] == [False, True]
            peer.close()
        assert given.result(GUARD) == 0
        answered = world.server.answered()
        assert (answered[200], answered[400]) == (3, 6)
