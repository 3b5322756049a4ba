"""Several addresses in the URL of Redis: how they are read and told, and in which order they are tried."""

import asyncio
import re

import pytest
import servers
import support
from stores import AWAY, NEVER, Log, ask, complaints, failed, ids, long_window, opened, play, stored, until, up

import redis_store
from redis_store import topology
from redis_store.node import ARRIVAL, RETRY, patience


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("redis://h", "h:6379, database 0"),
        ("redis://:hunter2@h1:6379,h2", "h1:6379, h2:6379, database 0"),
        ("rediss://user:hunter2@h1,h2:1,[::1]:7000/3?ssl_ca_certs=/a/b", "h1:6379, h2:1, [::1]:7000, database 3"),
        ("REDIS://user:hunter2@h1,h2?db=2", "h1:6379, h2:6379, database 2"),
        ("unix://user:hunter2@/run/redis.sock?db=1", "/run/redis.sock, database 1"),
    ],
)
def test_where_a_url_leads_is_told_without_its_secrets(url: str, where: str) -> None:
    assert topology.place(url) == f"Redis at {where}"


def test_all_addresses_have_what_the_url_says_besides() -> None:
    found = topology.Topology("rediss://u:p%2Css@a,b:1,[::1]/0?ssl_ca_certs=/c&ssl_check_hostname=false").seeds()
    assert [(each.host, each.port) for each in found] == [("a", 6379), ("b", 1), ("::1", 6379)]
    for each in found:
        assert (each.username, each.password, each.tls, each.ca_certs) == ("u", "p,ss", True, "/c")
        assert not each.check_hostname


@pytest.mark.parametrize("url", ["redis://a,b/1", "redis://a?db=1", "redis+sentinel://a,b/main"])
def test_a_url_that_cannot_lead_to_a_cluster(url: str) -> None:
    with pytest.raises(ValueError, match="--redis-url"):
        topology.Topology(url).seeds()


def test_addresses_are_found_in_turn() -> None:
    async def test() -> None:
        places = topology.Topology("redis://a,b,c")
        order = []
        for _ in range(4):
            order.append((await places.find()).host)
            order.append((await places.find()).host)
            places.turn()
        assert order == [*"aabbccaa"]
        one = topology.Topology("unix:///run/redis.sock")
        one.turn()
        assert (await one.find()).path == "/run/redis.sock"

    asyncio.run(test())


def test_the_first_address_is_dead(server: servers.Redis) -> None:
    url = f"redis://127.0.0.1:{servers.free_port()},127.0.0.1:{server.port}"
    with (
        support.verve("--redis-url", url, "--window", str(long_window())) as program,
        support.Client(program.address) as client,
    ):
        assert not failed(client.ask(support.accept(7)))
        assert ids(server) == {7}
        away, back = complaints(program)
        assert re.search("Redis is away, requests fail: can't connect to 127.0.0.1:", away)
        assert re.search("Redis is back", back)


def test_the_address_that_worked_last_is_tried_first(server: servers.Redis) -> None:
    async def test() -> None:
        with servers.Proxy(server.port) as one, servers.Proxy(server.port) as other, Log() as log:
            one.refuse = True
            url = f"redis://127.0.0.1:{one.port},127.0.0.1:{other.port}"
            async with opened(url, timeout=NEVER) as store:
                await stored(store, 1)
                assert other.connections == 1
                one.refuse = False
                before = one.connections
                for number in (2, 3):
                    other.cut()
                    await until(lambda number=number: other.connections == number and up(store))  # type: ignore[misc]
                    await stored(store, number)
                assert one.connections == before
                other.refuse = True
                other.cut()
                await until(lambda: one.connections > before and up(store))
                await stored(store, 4)
                assert ids(server) == {1, 2, 3, 4}
            assert not log.found("ERROR")

    play(test())


def test_a_replica_is_passed_over_and_an_outage_is_told_once(engine: str) -> None:
    async def test() -> None:
        with (
            servers.Redis(engine) as replica,
            servers.Redis(engine) as primary,
            servers.Proxy(replica.port) as proxy,
            Log() as log,
        ):
            replica.follow(primary)
            primary.kill()
            url = f"redis://127.0.0.1:{proxy.port},127.0.0.1:{primary.port}"
            store = redis_store.RedisStore(url, "verve", long_window(), 10**6, NEVER)
            await until(lambda: proxy.connections > 4)
            assert len(log.lines) == 1, log.lines
            assert log.found(f"{AWAY}.*this Redis is a replica")
            primary.start()
            await until(lambda: up(store))
            await stored(store, 1)
            assert ids(primary) == {1}
            assert len(log.lines) == 2, log.lines
            await store.stop(1)

    play(test())


def test_after_a_loss_others_get_the_time_to_try_all_addresses(server: servers.Redis) -> None:
    async def test() -> None:
        dead = f"127.0.0.1:{servers.free_port()}"
        async with opened(f"{server.url},{dead},{dead}", timeout=0.5) as store:
            await stored(store, 1)
            agreed = float(ask(server, "GET", "verve:patience"))
            assert agreed == patience(0.5) + 2 * (ARRIVAL + RETRY[1])

    play(test())
