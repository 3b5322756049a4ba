"""Replies of Redis as they come over the link, whole, cut anywhere, or none at all."""

import asyncio
from typing import Any, cast

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from stores import play, until

import redis_store
from redis_store import wire

# Replies

lines = st.binary(max_size=9).filter(lambda line: b"\r" not in line)
replies = st.recursive(
    st.one_of(st.none(), st.integers(), st.binary(max_size=9), lines.map(redis.ResponseError)),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=9,
)


def wire_form(reply: Any) -> bytes:
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if isinstance(reply, redis.ResponseError):
        return b"-%b\r\n" % reply.args[0]
    return b"*%d\r\n" % len(reply) + b"".join(map(wire_form, reply))


def as_read(reply: Any) -> Any:
    if isinstance(reply, redis.ResponseError):
        return str, reply.args[0].decode("utf-8", "replace") if isinstance(reply.args[0], bytes) else reply.args[0]
    return [as_read(item) for item in reply] if isinstance(reply, list) else reply


@given(replies)
def test_a_reply_is_read_when_it_is_whole(reply: Any) -> None:
    data = wire_form(reply)
    read, end = wire.parse(b"before" + data + b"behind", 6)
    assert (as_read(read), end) == (as_read(reply), 6 + len(data))
    for cut in range(len(data)):
        with pytest.raises(wire.ShortError):
            wire.parse(data[:cut], 0)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b":x\r\n",
        b"*1\r\n?\r\n",
        b":1\r\n:2\r\n:3\r\n",
        b"*1\r\n" * 100_000,
        b"*-2\r\n$-7\r\n" * 9,
    ],
    ids=["http", "no number", "no kind", "too many", "nested without end", "nothing"],
)
def test_what_is_no_reply_ends_the_link(said: bytes) -> None:
    class Peer(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.Transport, transport)

        def data_received(self, data: bytes) -> None:
            self.transport.write(said)

    async def test() -> None:
        peer = await asyncio.get_running_loop().create_server(Peer, "127.0.0.1")
        store = redis_store.RedisStore(f"redis://127.0.0.1:{peer.sockets[0].getsockname()[1]}", "verve", 60, 9, 1.0)
        await until(lambda: "not reached yet" not in store.unavailable)
        why = store.unavailable
        await store.stop(0.5)
        peer.close()
        assert why.endswith(("what came is not Redis's protocol", "a reply came that nobody waits for")), why

    play(test())
