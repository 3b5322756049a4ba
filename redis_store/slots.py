"""The map of a cluster's slots, as its nodes tell it (CLUSTER SLOTS).

CLUSTER SHARDS says more, and Redis 6.2 does not have it. What one node tells may be old, which costs a redirection.

A node is reached at the address that it announces to the others. It may announce none: then it is where the node that
was asked is. With TLS its host name goes before its IP address, which few certificates are for. One that is told to
announce a host name (`cluster-preferred-endpoint-type`) and has none is at `?`, which leads nowhere.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, NamedTuple

import redis

from redis_store.advice import advice_in, advise
from redis_store.scripts import Command
from redis_store.wire import Address, connect, good

MAP: Command = ("CLUSTER", "SLOTS")


class Range(NamedTuple):
    """Slots that follow each other, and the node that serves them."""

    first: int
    last: int
    host: str  # "" if nobody knows
    port: int
    replicas: int


def ranges(slots: list[Any], asked: Address) -> list[Range]:
    """Return what a reply to CLUSTER SLOTS says; `asked` is the server that it came from."""
    found = []
    for first, last, primary, *replicas in slots:
        announced, port, *rest = primary
        metadata = rest[1] if len(rest) > 1 else []
        named = dict(zip(metadata[::2], metadata[1::2], strict=True)).get(b"hostname") if asked.tls else None
        host = (named or announced or b"").decode() or asked.host
        found.append(Range(first, last, "" if host == "?" else host, port, len(replicas)))
    return found


def moved_to(error: redis.ResponseError, asked: Address) -> tuple[str, int] | None:
    """Return host and port of the node that has a slot by an error of `asked` (MOVED); None if it does not tell."""
    _, *rest = str(error).split()
    host, _, port = rest[-1].rpartition(":") if len(rest) == 2 else ("?", "", "")
    return (host or asked.host, int(port)) if host != "?" and port.isdigit() else None


def lacking(owners: Iterable[Range | None]) -> str:
    """Return what the map lacks, in words, of the nodes that have some slots; "" if it lacks nothing."""
    for owner in owners:
        if owner is None:
            return "slots of the cluster are on no node"
        if not owner.host:
            return f"a node with port {owner.port} announces no address"
    return ""


async def ask_all_for_map(addresses: Iterable[Address], timeout: float) -> list[Range]:
    """Return the map of the node that answers first; all are asked at the same time, so that none holds others up.

    Raises TimeoutError, redis.RedisError if none tells it in `timeout` seconds: one that says what to do, if any does.
    """
    asking = [asyncio.create_task(ask_for_map(address, timeout)) for address in dict.fromkeys(addresses)]
    errors: list[Exception] = []
    try:
        for answer in asyncio.as_completed(asking):
            try:
                return await answer
            except (redis.RedisError, TimeoutError, OSError) as error:
                errors.append(error)
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    raise next((error for error in errors if advice_in(advise(error))), errors[0])


async def ask_for_map(address: Address, timeout: float) -> list[Range]:
    """Return the map, as a node tells it over a connection of its own; `timeout` is in seconds.

    Raises TimeoutError, redis.RedisError.
    """
    wire = await connect(address, timeout)
    try:
        (slots,) = good(await wire.ask([MAP], asyncio.get_running_loop().time() + timeout))
        return ranges(slots, address)
    finally:
        wire.abort(redis.ConnectionError("closed"))
