"""The whole program when Redis fails, refuses, hangs or talks nonsense, and when it is stopped."""

import itertools
import random
import re
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis
import servers
import support
from stores import (
    AT_RUN_TIME,
    AWAY,
    EDGES,
    QUIET,
    SECRET,
    SLACK,
    ask,
    bulk,
    complaint,
    complaints,
    failed,
    first_engine,
    ids,
    kinds,
    last_engine,
    long_window,
    name_of,
    sets,
    start_of,
    wait_for_ok,
    wait_until,
)

import redis_store.batches
import redis_store.node


@last_engine
def test_the_program_in_trouble(server: servers.Redis) -> None:
    trouble = AT_RUN_TIME["OOM"]
    window = str(long_window())
    with (
        support.verve("--redis-url", server.url, "--window", window) as program,
        support.Client(program.address) as client,
    ):
        assert not failed(client.ask(support.accept(1)))
        trouble.cause(server)
        assert all(failed(client.ask(support.accept(number))) for number in range(2, 50))
        assert not failed(client.ask(support.accept(1))), "it is in the store"
        line = complaint(program)
        assert "maxmemory" in line
        trouble.cure(server)
        wait_for_ok(client, 50)
        assert ids(server) == {1, 50}
        assert len(complaints(program)) <= 2


@first_engine
def test_redis_that_comes_late(server: servers.Redis) -> None:
    server.kill()
    with support.verve("--redis-url", server.url) as program, support.Client(program.address) as client:
        assert all(failed(client.ask(support.accept(number))) for number in range(50))
        line = complaint(program)
        assert re.search(AWAY, line)
        server.start()
        wait_for_ok(client, 1)
        wait_for_ok(client, 2)
        assert ids(server) >= {2}
        assert len(complaints(program)) <= 2


@first_engine
def test_redis_that_hangs(server: servers.Redis) -> None:
    sent = iter(range(10**9))
    ok: set[int] = set()
    lost: set[int] = set()

    def take(response: support.Response, number: int) -> None:
        (lost if failed(response) else ok).add(number)

    flags = "--redis-url", server.url, "--window", "2", "--request-timeout", "1"
    with support.verve(*flags) as program, support.Client(program.address) as client:
        for number in range(20):
            take(client.ask(support.accept(next(sent))), number)
        assert not lost
        server.freeze()
        since = time.monotonic()
        take(client.ask(support.accept(number := next(sent))), number)
        assert time.monotonic() - since < 1 + SLACK
        assert lost == {20}
        since = time.monotonic()
        for _ in range(50):
            take(client.ask(support.accept(number := next(sent))), number)
        assert time.monotonic() - since < 25, "50 requests at once, and not a second each"
        assert len(lost) == 51
        line = complaint(program)
        assert re.search(AWAY, line)
        frozen = int(time.time()) // 2 * 2
        wait_until(lambda: time.time() > frozen + 2.2)
        server.thaw()
        wait_for_ok(client, number := next(sent))
        ok.add(number)
        take(client.ask(support.accept(number := next(sent))), number)
        assert number in ok
        last = name_of(int(time.time()) // 2 * 2)
        program.log.wait_for(f"unique ids in {last}: ")
        reports = server.reports()
        assert len(ok) <= sum(reports.values()) <= len(ok) + len(lost)
        starts = [*map(start_of, reports)]
        assert starts == [*range(starts[0], starts[-1] + 1, 2)], "a window is missing"
        assert len(complaints(program)) == 2


@first_engine
@pytest.mark.parametrize("given", ["", "wrong-secret"])
def test_a_password_that_redis_does_not_take(engine: str, given: str) -> None:
    with servers.Redis(engine, password=SECRET) as server:
        url = f"redis://{':' + given + '@' if given else ''}127.0.0.1:{server.port}"
        with support.verve("--redis-url", url) as program, support.Client(program.address) as client:
            assert all(failed(client.ask(support.accept(number))) for number in range(20))
            line = complaint(program)
            assert "password" in line
            assert "--redis-url" in line
            ask(server, "CONFIG", "SET", "requirepass", given)
            server.password = given
            wait_for_ok(client, 1)
            assert not [line for line in program.log.all if SECRET in line or "wrong-secret" in line]


@last_engine
def test_a_redis_that_refuses_now_and_then_does_not_flood_the_log(server: servers.Redis) -> None:
    """As one does whose memory others fill and empty."""
    over = threading.Event()

    def refuse() -> None:
        with server.client() as client:
            while not over.is_set():
                client.config_set("maxmemory", 1)
                client.config_set("maxmemory", 0)

    with (
        support.verve("--redis-url", server.url, "--window", str(long_window())) as program,
        support.Client(program.address) as client,
    ):
        thread = threading.Thread(target=refuse)
        thread.start()
        since = time.monotonic()
        said = [failed(client.ask(support.accept(number))) for number in range(3000)]
        over.set()
        thread.join()
        changes = sum(one != other for one, other in itertools.pairwise(said))
        assert changes > 50, "Redis refused too seldom"
        assert len(complaints(program)) <= 4 + 2 * (time.monotonic() - since) / redis_store.batches.HUSH
        server.client().config_set("maxmemory", 1)
        wait_until(
            lambda: failed(client.ask(support.accept(random.getrandbits(60)))) and "refuses" in complaints(program)[-1]
        )


@last_engine
def test_a_link_that_comes_and_goes_does_not_flood_the_log(server: servers.Redis, proxy: servers.Proxy) -> None:
    with (
        support.verve("--redis-url", proxy.url, "--window", str(long_window())) as program,
        support.Client(program.address) as client,
    ):
        since = time.monotonic()
        for number in range(12):
            wait_for_ok(client, number)
            proxy.cut()
        waits = sum(
            min(redis_store.node.RETRY[0] * 2**turn, redis_store.node.RETRY[1]) / 2 for turn in range(11)
        )  # at least, between them
        assert time.monotonic() - since > waits, "so many could have been told of in no time"
        assert len(complaints(program)) <= 2 * 12


EVIL = "\x1b[31m\u2028\x85\x00\x7f"  # what a terminal or a reader of lines would act on
INFO = "redis_version:7.0.0\r\nrun_id:1\r\n"
NONSENSE: dict[str, dict[str, bytes]] = {
    "version": {"INFO": bulk(f"redis_version:5.0.{EVIL}\r\n")},
    "policy": {"INFO": bulk(f"{INFO}maxmemory:1\r\nmaxmemory_policy:{EVIL}\r\n"), "EVAL": b"-ERR\r\n"},
    "window": {"EVAL": f"-WINDOW 7{EVIL}\r\n".encode()},
    "error": {"INFO": f"-ERR {EVIL}\r\n".encode()},
    "no-version": {"INFO": bulk(f"redis_version:{EVIL}\r\n")},
    "no-utf-8": {"INFO": b"$4\r\n\xff\xfe\x00\x1b\r\n"},
    "no-text": {"INFO": b":1\r\n"},
    "no-mark": {"EVAL": b":1\r\n"},
    "no-protocol": {"INFO": EVIL.encode() + b"\r\n"},
    "no-redis": {"INFO": b"HTTP/1.1 400 Bad Request\r\n\r\n"},
    "no-length": {"INFO": f"${EVIL}\r\n".encode()},
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_redis_that_talks_nonsense_is_told_of_once_and_not_repeated(name: str) -> None:
    said = {"INFO": bulk(INFO), "EVAL": bulk("1 0"), "XRANGE": b"*0\r\n"} | NONSENSE[name]
    with servers.Impostor(lambda words: said.get(words[0].decode(), b"+OK\r\n")) as impostor:
        url = f"redis://user:{SECRET}@127.0.0.1:{impostor.port}"
        program = support.Program(["--redis-url", url, "--log-level", "debug"], ())
        try:
            wait_until(lambda: impostor.connections > 3 or program.process.poll() is not None)
            assert program.process.poll() == 1 or program.stop() == 0
            program.wait()
        finally:
            program.end()
    lines = program.log.all
    assert all(line.isprintable() for line in lines)
    assert not any(SECRET in line for line in lines)
    assert len([line for line in lines if line.startswith("Traceback")]) <= 1
    assert 1 <= len(complaints(program)) <= 2, complaints(program)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_redis_that_is_too_old_is_refused(workers: str) -> None:
    with servers.Impostor(lambda words: bulk("redis_version:6.0.16\r\n") if words[0] == b"INFO" else b"+OK\r\n") as old:
        found = support.run("--redis-url", f"redis://127.0.0.1:{old.port}", "--workers", workers)
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert line.endswith("ERROR verve: Redis 6.0.16 is too old: expected 6.2 or newer, or Valkey")


@pytest.mark.parametrize("name", ["AUTH", "SADD"])
def test_what_redis_repeats_of_a_command_is_not_logged(engine: str, name: str) -> None:
    """Of one that it does not know it repeats the words: a password, or ids."""
    with servers.Redis(engine, "--rename-command", name, "") as server:
        url = f"redis://{'user:' + SECRET + '@' if name == 'AUTH' else ''}127.0.0.1:{server.port}"
        with support.verve("--redis-url", url, "--log-level", "debug") as program:
            with support.Client(program.address) as client:
                assert failed(client.ask(support.accept(123456789)))
            line = complaint(program)
            assert f"unknown command '{name}'" in line
            assert SECRET not in line
            assert "123456789" not in line


@last_engine
def test_an_id_that_is_negative_zero_or_at_the_edge(server: servers.Redis) -> None:
    with (
        support.verve("--redis-url", server.url, "--window", str(long_window())) as program,
        support.Client(program.address) as client,
    ):
        client.send(*map(support.accept, EDGES * 2))
        assert {response.status for response in client.receive(2 * len(EDGES))} == {200}
        for bad in str(2**63), str(-(2**63) - 1), "1.0":
            assert client.ask(support.get(f"{support.PATH}?id={bad}")).status == 400
        assert ids(server) == {*EDGES}


class Load:
    """Threads that ask, one connection each, a new id with every request, until told that it was the last."""

    def __init__(self, address: support.Address, count: int) -> None:
        self.ok: set[int] = set()
        self.unanswered: list[str] = []
        self._address = address
        self._threads = [threading.Thread(target=self._ask, args=(number << 40,)) for number in range(count)]
        self.running = threading.Barrier(count + 1)
        for thread in self._threads:
            thread.start()
        self.running.wait(servers.DEADLINE)

    def _ask(self, number: int) -> None:
        quiet = 0.0
        try:
            with support.Client(self._address) as client:
                answered = time.monotonic()
                for count in range(10**9):
                    numbers = range(number, number := number + 3)
                    quiet = time.monotonic() - answered
                    client.send(*map(support.accept, numbers))
                    for each in numbers:
                        (response,) = client.receive()
                        if failed(response):
                            self.unanswered.append(str(response))
                        self.ok.add(each)
                        if response.closes:
                            assert each == number - 1, "answered as the last, with others taken behind it"
                            assert client.rest() == b""
                            return
                    answered = time.monotonic()
                    if count == 20:
                        self.running.wait(servers.DEADLINE)
        except (OSError, AssertionError, threading.BrokenBarrierError) as error:
            if quiet < QUIET:
                self.unanswered.append(repr(error))

    def join(self) -> None:
        for thread in self._threads:
            thread.join(servers.DEADLINE)
            assert not thread.is_alive()


@last_engine
def test_a_stop_under_load(server: servers.Redis) -> None:
    with support.verve("--redis-url", server.url, "--window", str(long_window())) as program:
        load = Load(program.address, 6)
        assert program.stop(signal.SIGTERM) == 0
        load.join()
        assert load.unanswered == []
        assert ids(server) == load.ok


@first_engine
def test_a_stop_while_redis_hangs(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--window", str(long_window()), "--request-timeout", "0.3"
    with support.verve(*flags) as program, support.Client(program.address) as client:
        assert not failed(client.ask(support.accept(1)))
        server.freeze()
        client.send(support.accept(2))
        program.send(signal.SIGTERM)
        (response,) = client.receive()
        assert failed(response)
        client.close()
        assert program.wait() == 0


@last_engine
def test_the_first_answer_of_a_fresh_instance_is_ok(server: servers.Redis, proxy: servers.Proxy) -> None:
    """Even if Redis takes a moment to answer, and the client is at the door from the beginning."""
    port = servers.free_port()
    first: list[support.Response] = []

    def knock() -> None:
        since = time.monotonic()
        while time.monotonic() - since < servers.DEADLINE:
            try:
                with support.Client(("127.0.0.1", port)) as client:
                    first.append(client.ask(support.accept(1)))
                    return
            except ConnectionRefusedError:
                time.sleep(0.005)

    thread = threading.Thread(target=knock)
    thread.start()
    proxy.stall()
    try:
        program = support.Program(["--redis-url", proxy.url, "--port", str(port)], ())
        wait_until(lambda: proxy.connections)
    finally:
        proxy.flow()
    thread.join(servers.DEADLINE)
    assert program.stop() == 0
    assert [response.status for response in first] == [200]


# Where Redis is


def counts_there(server: servers.Redis, prefix: str, *flags: str, environ: tuple[str, ...] = ()) -> str:
    """Run the program, see that an id gets to where it should, and return the log."""
    words = ("env", *environ) if environ else ()
    with (
        support.verve("--window", str(long_window()), *flags, prefix=words) as program,
        support.Client(program.address) as client,
    ):
        assert not failed(client.ask(support.accept(1)))
        found = sets(server)
        assert [*found.values()] == [{1}]
        assert all(key.startswith(prefix + ":") for key in found)
        return "\n".join(program.log.all)


@first_engine
def test_a_prefix(server: servers.Redis) -> None:
    counts_there(server, "a|b:c", "--redis-url", server.url, "--key-prefix", "a|b:c")
    assert all(key.startswith("a|b:c:") for key in kinds(server))


@last_engine
def test_a_unix_socket(engine: str) -> None:
    with tempfile.TemporaryDirectory(prefix="verve-") as folder:
        path = str(Path(folder, "redis.sock"))
        with servers.Redis(engine, "--unixsocket", path) as server:
            assert path in counts_there(server, "verve", "--redis-url", f"unix://{path}")


@last_engine
def test_a_database(server: servers.Redis) -> None:
    log = counts_there_in(server, 3, f"{server.url}/3")
    assert "database 3" in log
    counts_there_in(server, 5, f"{server.url}?db=5")
    assert kinds(server) == {}, "nothing in database 0"


def counts_there_in(server: servers.Redis, database: int, url: str) -> str:
    with (
        support.verve("--window", str(long_window()), "--redis-url", url) as program,
        support.Client(program.address) as client,
    ):
        assert not failed(client.ask(support.accept(1)))
        with redis.Redis(port=server.port, db=database, decode_responses=True) as there:
            keys: Any = there.keys("verve:*:ids")
            members: Any = there.smembers(keys[0])
            assert members == {"1"}
        return "\n".join(program.log.all)


@first_engine
def test_a_user_and_a_password(engine: str) -> None:
    with servers.Redis(engine, password=SECRET) as server:
        assert SECRET not in counts_there(server, "verve", "--redis-url", server.url)
        ask(server, "FLUSHALL")
        ask(server, "ACL", "SETUSER", "verve", "on", ">p@ss:w/rd", "~verve:*", "&*", "+@all")
        url = f"redis://verve:p%40ss%3Aw%2Frd@127.0.0.1:{server.port}"
        assert "p@ss" not in counts_there(server, "verve", "--redis-url", url)


@last_engine
def test_redis_named_by_the_environment(server: servers.Redis) -> None:
    link = "REDIS_PORT_6379_TCP_ADDR=127.0.0.1", f"REDIS_PORT_6379_TCP_PORT={server.port}"
    nowhere = f"redis://127.0.0.1:{servers.free_port()}"
    for environ, flags in (
        ((f"REDIS_URL={server.url}", "REDIS_PORT_6379_TCP_ADDR=127.0.0.1", "REDIS_PORT_6379_TCP_PORT=1"), ()),
        (link, ()),
        ((f"VERVE_REDIS_URL={server.url}", f"REDIS_URL={nowhere}"), ()),
        ((f"REDIS_URL={nowhere}",), ("--redis-url", server.url)),
    ):
        counts_there(server, "verve", *flags, environ=environ)
        ask(server, "FLUSHALL")
