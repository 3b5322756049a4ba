"""What waiting does not mend is told as such, in one line with the remedy, and tried again all the same."""

import asyncio
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis_tls
import sentinels
import servers
import support
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from stores import (
    AWAY,
    NEVER,
    SECRET,
    Log,
    add,
    back,
    complaint,
    complaints,
    failed,
    first_engine,
    long_window,
    opened,
    play,
    stored,
    until,
    wait_for_ok,
)

import dedup
import redis_store
from redis_store import topology


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> redis_tls.Files:
    return redis_tls.Files(tmp_path, authority)


@pytest.fixture
def sentinel(engine: str) -> Iterator[sentinels.Sentinel]:
    with sentinels.Sentinel(engine, servers.free_port()) as sentinel:
        yield sentinel


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give sentinels more time, so that a busy machine does not make one silent which would say what is wrong."""
    monkeypatch.setattr(topology, "ANSWER", 1.5)
    monkeypatch.setattr(topology, "FIRST", 4.0)


def pass_over_resets() -> None:
    """Have the loop not tell of uvloop's error for TLS to a peer that has reset the connection just then."""
    loop = asyncio.get_running_loop()
    tell = loop.get_exception_handler()
    assert tell is not None

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not re.search(r"TCPTransport closed=True.*handler is closed", str(context.get("exception"))):
            tell(loop, context)

    loop.set_exception_handler(handle)


def see(url: str, advice: str, port: int, sentinel_password: str = "") -> None:
    """See the store tell what is wrong with a URL in one line, without secrets, and go on trying.

    {} in the URL stands for the address of a proxy before `port`, which sees the tries.
    """

    async def test() -> None:
        pass_over_resets()
        with servers.Proxy(port) as proxy, Log() as log:
            address = url.format(f"127.0.0.1:{proxy.port}")
            store = redis_store.RedisStore(
                address, "verve", long_window(), 10**6, NEVER, sentinel_password=sentinel_password
            )
            await log.wait_for(f"{AWAY}, requests fail: {advice}")
            assert re.search(advice, store.unavailable)
            tries = "replies" if "sentinel" in url else "connections"  # a connection to a sentinel is kept
            before = getattr(proxy, tries)
            await until(lambda: getattr(proxy, tries) > before + 2)
            assert add(store, 1).result() == dedup.DOWN
            assert len(log.lines) == 1, log.lines
            assert not log.found(SECRET)
            # uvloop says goodbye to a peer, for up to 30 s, if it is stopped just when TLS is agreed on.
            proxy.refuse, before = True, proxy.connections
            proxy.cut()
            await until(lambda: proxy.connections > before + 1)
            await store.stop(1)

    play(test())


def test_a_database_that_redis_does_not_have(server: servers.Redis) -> None:
    see("redis://{}/99", "Redis has no database of this number: .*out of range", server.port)


def test_a_password_for_a_redis_that_has_none(server: servers.Redis) -> None:
    see(f"redis://:{SECRET}@{{}}", "Redis has no password: take", server.port)


def test_a_redis_that_has_become_a_node_of_a_cluster(server: servers.Redis) -> None:
    async def test() -> None:
        with Log() as log:
            async with opened(server.url) as store:
                await stored(store, 1)
                server.kill()
                server.options += ["--cluster-enabled", "yes", "--cluster-port", str(servers.free_port())]
                server.start()
                await log.wait_for("this Redis is a node of a cluster now: restart Verve to count over all nodes")
                assert add(store, 1).result() == dedup.DOWN

    play(test())


@pytest.mark.parametrize("database", ["", "/1"])
def test_a_sentinel(sentinel: sentinels.Sentinel, database: str) -> None:
    advice = "this is a sentinel: write redis\\+sentinel://HOST:PORT/NAME in --redis-url"
    see(f"redis://{{}}{database}", advice, sentinel.port)


def test_a_sentinel_that_does_not_know_the_name(sentinel: sentinels.Sentinel) -> None:
    advice = r"the sentinels know no primary of this name: correct it .*\(no sentinel names the primary other: "
    see("redis+sentinel://{}/other", advice, sentinel.port)


def test_a_server_that_is_no_sentinel(server: servers.Redis) -> None:
    see(f"redis+sentinel://{{}}/{sentinels.NAME}", "this is no sentinel: write redis://, not", server.port)


@pytest.mark.parametrize(
    ("there", "given", "advice"),
    [
        (SECRET, "", "the sentinels ask for a password: give that of their user default as --sentinel-password; no"),
        (SECRET, f"not {SECRET}", "the sentinels' user default has another password, or is off: correct --se"),
        ("", SECRET, "the sentinels' user default has no password: leave --sentinel-password out; no other"),
    ],
)
def test_a_password_that_sentinels_do_not_take(engine: str, there: str, given: str, advice: str) -> None:
    with sentinels.Sentinel(engine, servers.free_port(), password=there) as sentinel:
        see(f"redis+sentinel://{{}}/{sentinels.NAME}", advice, sentinel.port, given)


def test_a_user_of_the_sentinels_who_may_not_ask_them(sentinel: sentinels.Sentinel) -> None:
    sentinel.ask("ACL", "SETUSER", "default", "-sentinel")
    advice = "the sentinels' user default may not ask for the primary: see docs/operations.md"
    see(f"redis+sentinel://{{}}/{sentinels.NAME}", advice, sentinel.port)


def test_sentinels_on_which_the_user_default_is_off(sentinel: sentinels.Sentinel) -> None:
    sentinel.ask("ACL", "SETUSER", "verve", "on", f">{SECRET}", "+@all")
    sentinel.ask("ACL", "SETUSER", "default", ">another", "off")
    advice = "the sentinels' user default has another password, or is off: .* no other user can be given"
    see(f"redis+sentinel://{{}}/{sentinels.NAME}", advice, sentinel.port, SECRET)


def test_no_tls_where_sentinels_expect_it(engine: str, files: redis_tls.Files) -> None:
    with redis_tls.sentinel(engine, files, servers.free_port()) as port:
        advice = r"the sentinels expect TLS: write rediss\+sentinel:// in place of redis\+sentinel://"
        see(f"redis+sentinel://{{}}/{sentinels.NAME}", advice, port, SECRET)


def test_tls_where_sentinels_expect_none(sentinel: sentinels.Sentinel) -> None:
    advice = r"the sentinels expect no TLS: name their ports for TLS \(tls-port\) in --redis-url, or write"
    see(f"rediss+sentinel://{{}}/{sentinels.NAME}", advice, sentinel.port, SECRET)


def test_what_is_wrong_with_tls_to_a_sentinel_is_told_as_of_a_redis(engine: str, files: redis_tls.Files) -> None:
    with redis_tls.sentinel(engine, files, servers.free_port()) as port:
        advice = r"Redis's certificate is signed by .*ssl_ca_certs \(no sentinel names"
        see(f"rediss+sentinel://{{}}/{sentinels.NAME}", advice, port)


def test_the_sentinel_that_says_what_is_wrong_is_told(sentinel: sentinels.Sentinel) -> None:
    url = f"redis+sentinel://127.0.0.1:{servers.free_port()},{{}}/other"
    see(url, "the sentinels know no primary of this name", sentinel.port)


def test_no_tls_where_redis_expects_it(engine: str, files: redis_tls.Files) -> None:
    with redis_tls.server(engine, files) as server:
        see(f"redis://:{SECRET}@{{}}", "this Redis expects TLS: write rediss://", server.port)


def test_no_tls_where_redis_expects_it_and_a_certificate(engine: str, files: redis_tls.Files) -> None:
    with redis_tls.server(engine, files, ask_clients=True) as server:
        see(f"redis://:{SECRET}@{{}}", "this Redis expects TLS: write rediss://", server.port)


@pytest.mark.parametrize("password", ["", SECRET])
def test_tls_where_redis_expects_none(engine: str, password: str) -> None:
    with servers.Redis(engine, password=password) as server:
        see(f"rediss://:{SECRET}@{{}}", "this Redis expects no TLS: write redis://", server.port)


def test_an_authority_that_is_not_trusted(engine: str, files: redis_tls.Files, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(str(stranger))
    with redis_tls.server(engine, files) as server:
        for query in ("", f"?ssl_ca_certs={stranger}"):
            see(f"rediss://:{SECRET}@{{}}{query}", "Redis's certificate is signed by .*ssl_ca_certs", server.port)


def test_a_certificate_for_another_name(engine: str, authority: trustme.CA, tmp_path: Path) -> None:
    files = redis_tls.Files(tmp_path, authority, "redis.example")
    with redis_tls.server(engine, files) as server:
        advice = "Redis's certificate is for another name: .*ssl_check_hostname=false"
        see(f"rediss://:{SECRET}@{{}}?ssl_ca_certs={files.authority}", advice, server.port)


def test_a_certificate_that_has_expired(engine: str, authority: trustme.CA, tmp_path: Path) -> None:
    files = redis_tls.Files(tmp_path, authority, not_after=datetime(2020, 1, 1, tzinfo=UTC))
    with redis_tls.server(engine, files) as server:
        advice = "Redis's certificate is not valid now: renew it, or set the clock"
        see(f"rediss://:{SECRET}@{{}}?ssl_ca_certs={files.authority}", advice, server.port)


def test_no_certificate_where_redis_asks_for_one(engine: str, files: redis_tls.Files) -> None:
    with redis_tls.server(engine, files, ask_clients=True) as server:
        advice = "Redis asks for a client's certificate: .*ssl_certfile and ssl_keyfile"
        see(f"rediss://:{SECRET}@{{}}?ssl_ca_certs={files.authority}", advice, server.port)


def test_a_certificate_that_redis_does_not_take(engine: str, files: redis_tls.Files, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    certificate, key = redis_tls.Files(other, trustme.CA()).client
    with redis_tls.server(engine, files, ask_clients=True) as server:
        advice = "Redis does not take this client's certificate: "
        query = f"ssl_ca_certs={files.authority}&ssl_certfile={certificate}&ssl_keyfile={key}"
        see(f"rediss://:{SECRET}@{{}}?{query}", advice, server.port)


@first_engine
def test_a_file_that_is_not_there_and_then_is(engine: str, files: redis_tls.Files, tmp_path: Path) -> None:
    """The process stays up meanwhile."""
    path = tmp_path / "later.pem"
    with redis_tls.server(engine, files) as server:
        url = f"rediss://127.0.0.1:{server.port}?ssl_ca_certs={path}"
        with support.verve("--redis-url", url) as program, support.Client(program.address) as client:
            assert failed(client.ask(support.accept(1)))
            line = complaint(program)
            assert "a file that --redis-url names for TLS can't be used" in line
            assert f"ssl_ca_certs={path}: No such file or directory" in line
            path.write_bytes(files.authority.read_bytes())
            wait_for_ok(client, 1)
            assert len(complaints(program)) == 2
            assert "Redis is back" in complaints(program)[1]


@pytest.mark.parametrize(
    "query",
    [
        "ssl_ca_certs={folder}",
        "ssl_ca_certs={folder}/server.key",
        "ssl_certfile={folder}/none",
        "ssl_certfile={folder}/client.pem",
        "ssl_certfile={folder}/client.pem&ssl_keyfile={folder}/none",
        "ssl_certfile={folder}/client.pem&ssl_keyfile={folder}/server.key",
        "ssl_certfile={folder}/client.pem&ssl_keyfile={folder}/locked.key",
    ],
)
@pytest.mark.parametrize("url", [f"rediss://:{SECRET}@127.0.0.1", f"rediss+sentinel://:{SECRET}@127.0.0.1/main"])
def test_a_file_that_cannot_be_used(files: redis_tls.Files, url: str, query: str) -> None:
    """A key with a pass phrase is none, and nobody is asked for it on the terminal."""
    folder = files.authority.parent
    key = load_pem_private_key(files.client[1].read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"phrase"))
    (folder / "locked.key").write_bytes(locked)

    async def test() -> None:
        with Log() as log:
            whole = f"{url}?{query.format(folder=folder)}"
            store = redis_store.RedisStore(whole, "verve", long_window(), 10**6, NEVER)
            await log.wait_for(f"{AWAY}.*: a file that --redis-url names for TLS can't be used: .*{folder}")
            assert not log.found(SECRET)
            await store.stop(1)

    play(test())


def test_a_redis_that_is_silent_is_not_taken_for_a_mistake(engine: str, files: redis_tls.Files) -> None:
    async def test() -> None:
        with redis_tls.server(engine, files) as server, servers.Proxy(server.port) as proxy, Log() as log:
            proxy.swallow = "replies"
            url = f"rediss://127.0.0.1:{proxy.port}?ssl_ca_certs={files.authority}"
            store = redis_store.RedisStore(url, "verve", long_window(), 10**6, NEVER)
            await log.wait_for(f"{AWAY}, requests fail: no answer within 1 s")
            before = proxy.connections
            await until(lambda: proxy.connections > before + 2)
            assert len(log.lines) == 1, log.lines
            proxy.swallow = ""
            await back(store, asyncio.get_running_loop().time())
            await stored(store, 1)
            await store.stop(1)

    play(test())
