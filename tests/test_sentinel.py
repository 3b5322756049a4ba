"""A primary behind sentinels: it is found, followed when another takes its place, and every ok is counted meanwhile."""

import asyncio
import contextlib
import re
import threading
from pathlib import Path

import pytest
import redis
import redis_tls
import sentinels
import servers
import stores
import support
import trustme
from operators import watched
from sentinels import NAME, Fleet, Load, Sentinel, more

import dedup
import redis_store
from redis_store import topology


@pytest.mark.parametrize(
    ("engine", "killed"), [(stores.FIRST, True), (stores.LAST, False)], ids=["killed", "asked for"]
)
def test_a_failover_is_followed_and_each_ok_is_counted_once(engine: str, killed: bool) -> None:
    """Windows end before it, meanwhile and after it. An id that was answered `failed` may be stored."""
    with Fleet(engine) as fleet, support.verve("--redis-url", fleet.url, "--window", "1") as program:
        stores.let_settle(fleet.primary)
        with Load(program.address, 0) as load:
            program.log.wait_for(r"unique ids in \S+: [1-9]")
            fleet.move(killed=killed)
            program.log.wait_for("Redis is back")
            more(load)
        wait_until_all_is_told(program, fleet.replica)
        told = counts(program)
        assert fleet.replica.reports().items() >= told.items(), "what the old primary told has been put back"
        assert len(load.ok) <= sum(told.values()) <= len(load.ok) + len(load.failed)
        away, back, *_ = stores.complaints(program)
        assert "Redis is away, requests fail: " in away
        assert killed or f"the primary {NAME} is 127.0.0.1:{fleet.replica.port} now" in away
        assert "Redis is back" in back


@stores.last_engine
def test_two_instances_follow_and_what_both_stored_is_counted(engine: str) -> None:
    """One of them leaves the old primary later than the other, which goes on acknowledging until then."""
    played = sentinels.play(engine, killed=False)
    assert played.ok == played.there > 0


def counts(program: support.Program) -> dict[str, int]:
    """Return the counts that the log tells, by window."""
    found = [re.search(r"unique ids in (\S+): (\d+)$", line) for line in program.log.all]
    counted = [(match[1], int(match[2])) for match in found if match]
    assert len(dict(counted)) == len(counted), "a window was told twice"
    return dict(counted)


def wait_until_all_is_told(program: support.Program, server: servers.Redis) -> None:
    """Wait until the window of now, by Redis's clock, is told; nobody sends ids any more."""
    with server.client() as client:
        now = stores.name_of(client.time()[0])
    program.log.wait_until(lambda _: max(counts(program), default="") >= now or None, f"the count of {now}")


@stores.first_engine
def test_a_new_primary_waits_for_all_to_hear_of_it_however_short_the_time_of_a_request(engine: str) -> None:
    with servers.Redis(engine) as server, Sentinel(engine, server.port) as sentinel:
        with support.verve("--redis-url", sentinels.url(sentinel), "--request-timeout", "0.1"):
            patience = float(stores.ask(server, "GET", "verve:patience"))
        assert patience >= 2.5 > topology.ASK + 3 * topology.ANSWER, "until the next question, its answer, and another"


@stores.first_engine
def test_counting_goes_on_without_sentinels_but_no_primary_is_found_without_them(engine: str) -> None:
    with servers.Redis(engine) as server, Sentinel(engine, server.port) as sentinel:
        flags = "--redis-url", sentinels.url(sentinel), "--window", "1"
        with watched(*flags) as (program, operators), support.Client(program.address) as client:
            stores.let_settle(server)
            stores.wait_for_ok(client, 1)
            before = connections(sentinel)
            wait_for_next_question(program)
            assert connections(sentinel) == before, "one, however often it is asked"
            sentinel.kill()
            for _ in range(2):
                wait_for_next_question(program)
                assert not stores.failed(client.ask(support.accept(2)))
            assert stores.complaints(program) == []
            stores.cut_all(server)
            program.log.wait_for("Redis is away")
            assert stores.failed(client.ask(support.accept(3)))
            stores.wait_until(lambda: "no sentinel names the primary" in " ".join(operators.ready()[1]))
            sentinel.start()
            program.log.wait_for("Redis is back")
            assert not stores.failed(client.ask(support.accept(3)))


def connections(sentinel: Sentinel) -> list[str]:
    """Return the connections of instances that a sentinel has."""
    return re.findall(r"^id=(\d+) .* name=verve-", sentinel.ask("CLIENT", "LIST"), re.MULTILINE)


def wait_for_next_question(program: support.Program) -> None:
    """Wait for two ends of windows of a second, which takes longer than until sentinels are asked again."""
    for _ in range(2):
        program.log.wait_for("unique ids in", len(program.log.all))


def test_sentinels_of_which_none_is_there_are_told_in_one_line(engine: str) -> None:
    url = f"redis+sentinel://127.0.0.1:{servers.free_port()},127.0.0.1:{servers.free_port()}/{NAME}"
    with support.verve("--redis-url", url) as program, support.Client(program.address) as client:
        assert stores.failed(client.ask(support.accept(1)))
        line = stores.complaint(program)
        assert f"Redis is away, requests fail: no sentinel names the primary {NAME}: " in line
        assert "Connection refused" in line


@pytest.mark.parametrize("database", ["", "/1"])
def test_passwords_of_the_sentinels_and_of_the_primary(engine: str, tmp_path: Path, database: str) -> None:
    file = tmp_path / "password"
    file.write_text("of sentinels")
    with (
        servers.Redis(engine, password="hunter2") as primary,
        Sentinel(engine, primary.port, password="of sentinels") as sentinel,
    ):
        stores.ask(primary, "ACL", "SETUSER", "verve", "on", ">hunter2", "~*", "+@all")
        url = sentinels.url(sentinel).replace("://", "://verve:hunter2@") + database
        prefix = ("env", f"VERVE_SENTINEL_PASSWORD_FILE={file}")
        with support.verve("--redis-url", url, prefix=prefix) as program, support.Client(program.address) as client:
            stores.wait_for_ok(client, 7)
            assert stores.complaints(program) == []
            (there,) = [line for line in program.log.all if f"{NAME}, of the sentinels 127.0.0.1:" in line]
            assert f"database {database[1:] or 0}" in there
            assert "hunter2" not in there
            assert "of sentinels" not in there.replace("of the sentinels", "")
        with primary.client() as client_of_redis:
            assert f"db{database[1:] or 0}" in client_of_redis.info("keyspace")


@pytest.mark.parametrize("ask_clients", [False, True])
def test_tls_to_the_sentinels_and_to_the_primary(
    engine: str, tmp_path: Path, authority: trustme.CA, ask_clients: bool
) -> None:
    files = redis_tls.Files(tmp_path, authority)
    query = f"?ssl_ca_certs={files.authority}"
    if ask_clients:
        query += f"&ssl_certfile={files.client[0]}&ssl_keyfile={files.client[1]}"
    with (
        redis_tls.server(engine, files, ask_clients=ask_clients) as server,
        redis_tls.sentinel(engine, files, server.port, ask_clients=ask_clients) as port,
    ):
        url = f"rediss+sentinel://127.0.0.1:{port}/{NAME}{query}"
        with support.verve("--redis-url", url) as program, support.Client(program.address) as client:
            assert not stores.failed(client.ask(support.accept(7)))
            assert stores.ids(server.plain) == {7}
            assert stores.complaints(program) == []


def test_a_sentinel_whose_user_may_do_no_more_than_it_must(server: servers.Redis) -> None:
    with Sentinel(server.engine, server.port) as sentinel:
        needed = "+client|setname", "+sentinel|master", "+sentinel|get-master-addr-by-name"
        sentinel.ask("ACL", "SETUSER", "default", "on", ">hunter2", "-@all", *needed)
        flags = "--redis-url", sentinels.url(sentinel), "--sentinel-password", "hunter2"
        with support.verve(*flags) as program, support.Client(program.address) as client:
            assert not stores.failed(client.ask(support.accept(7)))
            assert stores.complaints(program) == []


def test_a_sentinel_that_is_silent_or_away_does_not_hide_what_another_says(server: servers.Redis) -> None:
    with Sentinel(server.engine, server.port) as sentinel, servers.Proxy(sentinel.port) as proxy:
        proxy.swallow = "replies"
        url = f"redis+sentinel://127.0.0.1:{proxy.port},127.0.0.1:{servers.free_port()},127.0.0.1:{sentinel.port}"
        with support.verve("--redis-url", f"{url}/{NAME}") as program, support.Client(program.address) as client:
            stores.wait_for_ok(client, 7)
            assert proxy.connections
            assert stores.complaints(program) == []


def test_who_follows_late_closes_nothing_that_others_still_fill(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The late one does not ask by itself: it is the window's end that has it ask."""

    async def never(*_: object) -> None: ...

    async def test() -> None:
        with servers.Redis(engine) as old, servers.Redis(engine) as new, Switch(old.port) as sentinel:
            new.follow(old)
            url, seconds = f"redis+sentinel://127.0.0.1:{sentinel.port}/{NAME}", stores.window_with(4)
            async with contextlib.AsyncExitStack() as stack:
                with monkeypatch.context() as patch:
                    patch.setattr(topology.Topology, "follow", never)
                    late = await stack.enter_async_context(stores.opened(url, seconds=seconds))
                early = await stack.enter_async_context(stores.opened(url, seconds=seconds))
                stores.let_settle(old)
                window = early.window
                await asyncio.gather(stores.stored(early, 1, 2), stores.stored(late, 3, 4))
                new.lead()
                sentinel.lead_to(new.port)
                await stores.until(lambda: not stores.up(early))
                await stores.until(lambda: stores.up(early))
                await asyncio.gather(stores.stored(early, 5, 6), stores.stored(late, 7, 8))
                assert stores.ids(new) & {5, 6, 7, 8} == {5, 6}, "each has stored in its own server"
                assert late.window == early.window == window
                async with stores.telling(early) as told, stores.telling(late) as told_late:
                    await stores.until(lambda: window in told and window in told_late)
                    assert told[window] == told_late[window] == 8

    stores.play(test())


class Switch(servers.Impostor):
    """A sentinel that can be told where the primary is."""

    def __init__(self, port: int) -> None:
        self._epoch, self._primary = 1, port
        super().__init__(lambda words: answer(words, self._epoch, "127.0.0.1", self._primary))

    def lead_to(self, port: int) -> None:
        self._epoch, self._primary = self._epoch + 1, port


def test_a_replica_that_a_sentinel_names_is_not_used_before_it_is_the_primary(engine: str) -> None:
    async def test() -> None:
        with servers.Redis(engine) as old, servers.Redis(engine) as new, Switch(new.port) as sentinel:
            new.follow(old)
            with stores.Log() as log:
                url = f"redis+sentinel://127.0.0.1:{sentinel.port}/{NAME}"
                store = redis_store.RedisStore(url, "verve", stores.long_window(), 10**6, stores.NEVER)
                await log.wait_for(f"{stores.AWAY}, requests fail: this Redis is a replica")
                assert await stores.add(store, 1) == dedup.DOWN
                new.lead()
                await stores.back(store, asyncio.get_running_loop().time())
                await stores.stored(store, 1)
                assert stores.ids(new) == {1}
                await store.stop(1)

    stores.play(test())


def test_a_switch_is_followed_though_all_sentinels_were_silent_for_a_while(engine: str) -> None:
    async def test() -> None:
        with (
            servers.Redis(engine) as old,
            servers.Redis(engine) as new,
            Switch(old.port) as sentinel,
            servers.Proxy(sentinel.port) as proxy,
        ):
            async with stores.opened(f"redis+sentinel://127.0.0.1:{proxy.port}/{NAME}") as store:
                proxy.swallow = "replies"
                before = proxy.connections
                await stores.until(lambda: proxy.connections > before)
                assert stores.up(store)
                proxy.swallow = ""
                sentinel.lead_to(new.port)
                await stores.until(lambda: not stores.up(store))
                await stores.until(lambda: stores.up(store))
                await stores.stored(store, 1)
                assert stores.ids(new) == {1}

    stores.play(test())


def test_sentinels_are_asked_at_the_same_time() -> None:
    """The first one answers when the second has been asked."""
    asked = threading.Event()

    def wait(words: list[bytes]) -> bytes:
        assert words[0] != b"SENTINEL" or asked.wait(servers.DEADLINE)
        return answer(words, 2, "10.0.0.1", 1)

    def note(words: list[bytes]) -> bytes:
        asked.set()
        return answer(words, 1, "10.0.0.2", 2)

    with servers.Impostor(wait) as one, servers.Impostor(note) as other:
        url = f"redis+sentinel://127.0.0.1:{one.port},127.0.0.1:{other.port}/{NAME}"
        assert asyncio.run(find(url)) == ("10.0.0.1", 1)


async def find(url: str) -> tuple[str, int]:
    """Ask sentinels where the primary is."""
    place = topology.Topology(url)
    try:
        found = await place.find()
    finally:
        place.close()
    return found.host, found.port


def says(epoch: int, host: str, port: int) -> servers.Impostor:
    """Return a sentinel that has heard of a failover, or not yet."""
    return servers.Impostor(lambda words: answer(words, epoch, host, port))


def answer(words: list[bytes], epoch: int, host: str, port: int) -> bytes:
    """Return what a sentinel says to a command."""
    if words[0] != b"SENTINEL":
        return b"+OK\r\n"
    said = ["config-epoch", str(epoch)] if words[1] == b"MASTER" else [host, str(port)]
    return b"*%d\r\n%b" % (len(said), b"".join(map(stores.bulk, said)))


@pytest.mark.parametrize("epochs", [(1, 2), (2, 1), (9, 10)])
def test_the_sentinel_that_has_heard_of_the_latest_failover_is_right(epochs: tuple[int, int]) -> None:
    with says(epochs[0], "10.0.0.1", 1) as one, says(epochs[1], "10.0.0.2", 2) as other:
        url = f"redis+sentinel://127.0.0.1:{one.port},127.0.0.1:{other.port}/{NAME}"
        newer = ("10.0.0.1", 1) if epochs[0] > epochs[1] else ("10.0.0.2", 2)
        assert asyncio.run(find(url)) == newer


@pytest.mark.parametrize("reply", [b"*0\r\n", b"$-1\r\n", b":1\r\n", b"+OK\r\n"])
def test_what_is_no_answer_of_a_sentinel_names_no_primary(reply: bytes) -> None:
    with servers.Impostor(lambda words: reply if words[0] == b"SENTINEL" else b"+OK\r\n") as impostor:
        url = f"redis+sentinel://127.0.0.1:{impostor.port}/{NAME}"
        with pytest.raises(redis.ConnectionError, match=f"no sentinel names the primary {NAME}: ."):
            asyncio.run(find(url))


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("redis+sentinel://h1:26379,h2:26380/main", "main, of the sentinels h1:26379, h2:26380, database 0"),
        ("redis+sentinel://h1,[::1]:5/main/3", "main, of the sentinels h1:26379, [::1]:5, database 3"),
        ("REDISS+SENTINEL://user:hunter2@h/a.b-c_d?db=2", "a.b-c_d, of the sentinels h:26379, database 2"),
    ],
)
def test_where_a_url_leads_is_told_without_its_secrets(url: str, where: str) -> None:
    assert topology.place(url) == f"Redis at {where}"
