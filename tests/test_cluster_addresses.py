"""How the nodes of a real cluster are reached: which addresses are asked first, and what the nodes announce."""

import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clusters
import operators
import pytest
import redis
import redis_tls
import servers
import support
import trustme
from stores import SECRET, complaints, failed, long_window, wait_for_ok, wait_until

from redis_store.slots import Range, lacking, moved_to, ranges
from redis_store.wire import Address

ASKED = Address(host="asked", port=1)
IDS = range(200)  # of which each of three nodes has many


@pytest.fixture(scope="module", params=servers.ENGINES)
def cluster(request: pytest.FixtureRequest) -> Iterator[clusters.Cluster]:
    """Three primaries; each test leaves them as it found them, but for their data."""
    with clusters.Cluster(request.param, replicas=0, password=SECRET) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def empty(request: pytest.FixtureRequest) -> None:
    if "cluster" in request.fixturenames:
        for node in request.getfixturevalue("cluster").nodes:
            node.tell("FLUSHALL")


def counted(nodes: list[clusters.Node]) -> int:
    """Return how many ids the nodes have."""
    return sum(node.tell("SCARD", key) for node in nodes for key in node.tell("KEYS", "verve:*") if kind(node, key))


def kind(node: clusters.Node, key: str) -> bool:
    return bool(re.search(r":\d+$", key)) and node.tell("TYPE", key) == "set"


def see_counted(cluster: clusters.Cluster, url: str) -> support.Lines:
    """See the program store ids on all nodes; return its log."""
    with (
        support.verve("--redis-url", url, "--window", str(long_window())) as program,
        support.Client(program.address) as client,
    ):
        for number in IDS:
            wait_for_ok(client, number)
        assert counted(cluster.nodes) == len(IDS)
        assert all(counted([node]) for node in cluster.nodes)
        assert SECRET not in "\n".join(program.log.all)
        return program.log


@contextlib.contextmanager
def set_to(nodes: list[clusters.Node], name: str, value: str | int) -> Iterator[None]:
    """Have nodes announce something else while the block runs."""
    before = [node.tell("CONFIG", "GET", name)[name] for node in nodes]
    try:
        for node in nodes:
            node.tell("CONFIG", "SET", name, value)
        yield
    finally:
        for node, old in zip(nodes, before, strict=True):
            node.tell("CONFIG", "SET", name, old)


def announced(node: clusters.Node) -> list[tuple[Any, ...]]:
    """Return host, port and what else a node says of each primary."""
    return [tuple(primary) for _, _, primary, *_ in node.tell("CLUSTER", "SLOTS")]


# What a map says


def entry(host: bytes | None, *more: Any) -> list[Any]:
    return [0, 16383, [host, 7000, b"name", *more], [b"10.0.0.2", 7001, b"other", []]]


@pytest.mark.parametrize(
    ("node", "tls", "host"),
    [
        (entry(b"10.0.0.1"), False, "10.0.0.1"),  # Redis 6.2
        (entry(b"10.0.0.1", []), False, "10.0.0.1"),
        (entry(b"::1", []), False, "::1"),
        (entry(b"", []), False, "asked"),
        (entry(None, []), False, "asked"),
        (entry(None, []), True, "asked"),
        (entry(None, [b"hostname", b"n1.example"]), True, "n1.example"),
        (entry(b"10.0.0.1", [b"hostname", b"n1.example"]), False, "10.0.0.1"),
        (entry(b"10.0.0.1", [b"hostname", b"n1.example"]), True, "n1.example"),
        (entry(b"10.0.0.1", [b"hostname", b""]), True, "10.0.0.1"),
        (entry(b"n1.example", [b"ip", b"10.0.0.1"]), False, "n1.example"),
        (entry(b"n1.example", [b"ip", b"10.0.0.1"]), True, "n1.example"),
        (entry(b"?", [b"ip", b"10.0.0.1"]), False, ""),
        (entry(b"?", [b"ip", b"10.0.0.1"]), True, ""),
    ],
)
def test_where_a_map_says_that_a_node_is(node: list[Any], tls: bool, host: str) -> None:
    asked = Address(host="asked", port=1, tls=tls)
    assert ranges([node], asked) == [Range(0, 16383, host, 7000, 1)]


def test_a_map_of_several_ranges() -> None:
    slots = [[0, 5, [b"a", 1, b"x"]], [7, 7, [b"b", 2, b"y"], [b"c", 3, b"z"], [b"d", 4, b"w"]]]
    assert ranges(slots, ASKED) == [Range(0, 5, "a", 1, 0), Range(7, 7, "b", 2, 2)]
    assert ranges([], ASKED) == []


def test_what_a_map_lacks() -> None:
    good, hidden = Range(0, 5, "a", 1, 0), Range(6, 9, "", 7003, 0)
    assert lacking([good, good]) == ""
    assert lacking([good, None, hidden]) == "slots of the cluster are on no node"
    assert lacking([good, hidden]) == "a node with port 7003 announces no address"


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("MOVED 3999 10.0.0.1:6381", ("10.0.0.1", 6381)),
        ("MOVED 3999 ::1:6381", ("::1", 6381)),
        ("MOVED 3999 n1.example:6381", ("n1.example", 6381)),
        ("MOVED 3999 :6381", ("asked", 6381)),
        ("MOVED 3999 ?:6381", None),
        ("MOVED 3999 n1.example:", None),
        ("MOVED 3999", None),
        ("MOVED", None),
    ],
)
def test_where_a_node_says_that_a_slot_is(words: str, place: tuple[str, int] | None) -> None:
    assert moved_to(redis.ResponseError(words), ASKED) == place


# Whom to ask first


def test_one_node_is_enough_and_each_is_told_the_password(cluster: clusters.Cluster) -> None:
    log = see_counted(cluster, f"redis://:{SECRET}@127.0.0.1:{cluster.nodes[1].port}")
    assert not [line for line in log.all if re.search(" (WARNING|ERROR) ", line)]


def test_the_first_address_is_dead(cluster: clusters.Cluster) -> None:
    dead = servers.free_port()
    log = see_counted(cluster, f"redis://:{SECRET}@127.0.0.1:{dead},127.0.0.1:{cluster.nodes[2].port}")
    away, back = [line for line in log.all if re.search(" (WARNING|ERROR) ", line)]
    assert f"Redis is away, requests fail: can't connect to 127.0.0.1:{dead}" in away
    assert "Redis is back, all parts" in back


def test_addresses_that_give_no_answer_hold_nobody_up(cluster: clusters.Cluster) -> None:
    """All of them are asked at the same time, once it is known that there is a cluster."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(8)]
        dead = [f"127.0.0.1:{sock.getsockname()[1]}" for sock in silent]
        first, *others = (f"127.0.0.1:{node.port}" for node in cluster.nodes)
        proxies = [stack.enter_context(servers.Proxy(node.port)) for node in cluster.nodes[:1]]
        url = f"redis://:{SECRET}@127.0.0.1:{proxies[0].port},{','.join([*dead, first, *others])}"
        see_counted(cluster, url)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("database", ["/1", "?db=1"])
def test_a_database_above_0_is_refused_in_one_line(cluster: clusters.Cluster, database: str, workers: str) -> None:
    found = support.run("--redis-url", f"{cluster.url}{database}", "--workers", workers)
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert line.endswith(
        "ERROR verve: --redis-url leads to a cluster, of which only database 0 is used: "
        "expected no database in it, got 1"
    )
    assert SECRET not in line


@pytest.mark.parametrize("database", ["/0", "?db=0"])
def test_database_0_may_be_named(cluster: clusters.Cluster, database: str) -> None:
    see_counted(cluster, f"{cluster.url}{database}")


def test_a_node_that_is_reached_over_a_unix_socket(engine: str, tmp_path: Path) -> None:
    with clusters.Cluster(engine, replicas=0) as cluster:
        path = tmp_path / "redis.sock"
        node = cluster.nodes[0]
        node.kill()
        node.options += ["--unixsocket", str(path)]
        node.start()
        cluster.settle()
        see_counted(cluster, f"unix://{path}")


def test_a_password_that_one_node_does_not_take(cluster: clusters.Cluster) -> None:
    other = cluster.nodes[2]
    other.tell("ACL", "SETUSER", "verve", "on", ">another", "~*", "+@all")
    for node in cluster.nodes[:2]:
        node.tell("ACL", "SETUSER", "verve", "on", f">{SECRET}", "~*", "+@all")
    url = f"redis://verve:{SECRET}@127.0.0.1:{cluster.nodes[0].port}"
    with operators.watched("--redis-url", url, "--window", str(long_window())) as (program, watch):
        program.log.wait_for(
            f"Redis at 127.0.0.1:{other.port} is away, requests for its parts fail: "
            "Redis does not know this user and password: correct --redis-url"
        )
        wait_until(lambda: watch.ready()[0] == 200)
        assert f"parts are away: 127.0.0.1:{other.port}: Redis does not" in str(watch.ready()[1])
        other.tell("ACL", "SETUSER", "verve", "resetpass", f">{SECRET}")
        program.log.wait_for("Redis is back, all parts")


# What nodes announce


def went_and_came(program: support.Program) -> bool:
    """Whether the log says in turn that parts are away, and that they are back.

    For a second, nodes that don't know the new address yet may say the old one again.
    """
    back = ["Redis is back" in line for line in complaints(program)]
    return back == [number % 2 == 1 for number in range(len(back))]


@pytest.mark.parametrize(("name", "home"), [("ip", False), ("port", False), ("port", True)])
def test_a_node_that_announces_where_it_is_not(cluster: clusters.Cluster, name: str, home: bool) -> None:
    """Its ids fail, and if it is home all do; the log and /readyz say where it is taken to be and what to do."""
    first = cluster.primary_of("verve:reports")
    others = [node for node in cluster.nodes if node is not first]
    node, seed = (first, others[0]) if home else others
    value = "127.66.0.1" if name == "ip" else str(servers.free_port())
    there = f"{value}:{node.port}" if name == "ip" else f"127.0.0.1:{value}"
    words = (
        "a node can't be reached at the address that it announces: if it runs, set its cluster-announce-ip or "
        "cluster-announce-hostname to one that leads there from here, or open the network "
        f"(announced as {there}: can't connect to {there}: Connection refused)"
    )
    flags = "--redis-url", f"redis://:{SECRET}@127.0.0.1:{seed.port}", "--window", str(long_window())
    with contextlib.ExitStack() as stack:
        stack.enter_context(set_to([node], f"cluster-announce-{name}", value))
        host, port = there.split(":")
        wait_until(lambda: all((host, int(port)) in [each[:2] for each in announced(peer)] for peer in cluster.nodes))
        program, watch = stack.enter_context(operators.watched(*flags))
        program.log.wait_for(re.escape(f"Redis at {there} is away, requests for its parts fail: {words}"))
        client = stack.enter_context(support.Client(program.address))
        wait_until(lambda: watch.ready()[0] == (503 if home else 200))
        told = r"not ready\nRedis is" if home else r"warning: \d+ of 64 parts are"
        assert re.search(rf"{told} away: {re.escape(f'{there}: {words}')}", "\n".join(watch.ready()[1]))
        answers = {failed(client.ask(support.accept(number))) for number in IDS}
        assert answers == ({True} if home else {True, False})
        assert len(complaints(program)) == 1
        node.tell("CONFIG", "SET", f"cluster-announce-{name}", 0 if name == "port" else "")
        program.log.wait_for("Redis is back, all parts")
        for number in IDS:
            wait_for_ok(client, number)
        assert went_and_came(program)
    cluster.settle()


def test_a_node_that_was_in_reach_is_only_away(engine: str) -> None:
    """What it announces is right, so there is nothing to do about it."""
    with clusters.Cluster(engine, replicas=0) as cluster:
        url = f"redis://127.0.0.1:{cluster.nodes[0].port}"
        with operators.watched("--redis-url", url, "--window", str(long_window())) as (program, watch):
            wait_until(lambda: watch.ready() == (200, ["ready"]))
            node = cluster.nodes[1]
            node.kill()
            away = f"127.0.0.1:{node.port}: can't connect to 127.0.0.1:{node.port}: Connection refused"
            wait_until(lambda: away in str(watch.ready()[1]))
            assert not any("announce" in line for line in program.log.all)


def test_a_node_that_announces_no_host_is_where_the_one_is_that_was_asked(engine: str) -> None:
    with clusters.Cluster(engine, primaries=1, replicas=0) as cluster:
        assert announced(cluster.nodes[0])[0][0] in (None, "")
        see_counted(cluster, cluster.url)


def test_a_node_that_is_to_announce_a_host_name_and_has_none(cluster: clusters.Cluster) -> None:
    hidden = cluster.nodes[2]
    with contextlib.ExitStack() as stack:
        stack.enter_context(set_to(cluster.nodes[:2], "cluster-announce-hostname", "localhost"))
        stack.enter_context(set_to(cluster.nodes, "cluster-preferred-endpoint-type", "hostname"))
        wait_until(lambda: sorted(each[0] for each in announced(cluster.nodes[0])) == ["?", "localhost", "localhost"])
        url = f"redis://:{SECRET}@127.0.0.1:{cluster.nodes[0].port}"
        program, watch = stack.enter_context(operators.watched("--redis-url", url, "--window", str(long_window())))
        words = (
            "a node of the cluster tells nobody where it is: set its cluster-announce-hostname, or its "
            f"cluster-preferred-endpoint-type to ip (a node with port {hidden.port} announces no address)"
        )
        program.log.wait_for(re.escape(f"requests for some parts fail: {words}") + "|" + re.escape(words))
        wait_until(lambda: watch.ready()[0] == 200)
        assert f"parts are away: {words}" in str(watch.ready()[1])
        assert len(complaints(program)) == 1
        stack.enter_context(set_to([hidden], "cluster-announce-hostname", "localhost"))
        program.log.wait_for("Redis is back, all parts")
        assert went_and_came(program)


def test_a_cluster_whose_slots_are_on_no_node(engine: str) -> None:
    options = "--cluster-enabled", "yes", "--cluster-port", str(servers.free_port())
    with (
        servers.Redis(engine, *options) as server,
        operators.watched("--redis-url", server.url, "--window", str(long_window())) as (program, watch),
    ):
        words = "the cluster is not complete: give each slot to a node (redis-cli --cluster fix)"
        program.log.wait_for(re.escape(f"Redis is away, requests fail: {words}"))
        assert watch.ready()[0] == 503
        assert words in str(watch.ready()[1])
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        program.log.wait_for("Redis is back, all parts")


def test_a_cluster_that_takes_nothing_while_a_slot_is_away(engine: str) -> None:
    with clusters.Cluster(engine, replicas=0, full_coverage=True) as cluster:
        url = f"redis://127.0.0.1:{cluster.nodes[0].port}"
        with operators.watched("--redis-url", url, "--window", str(long_window())) as (program, _):
            program.log.wait_for("listening")
            cluster.nodes[1].kill()
            program.log.wait_for(
                "the cluster takes no ids of these parts: see CLUSTER INFO of its nodes; with "
                "cluster-require-full-coverage no, ids of slots that are not away are taken"
            )
            cluster.nodes[1].start()
            program.log.wait_for("Redis is back, all parts")


# TLS


@contextlib.contextmanager
def tls_cluster(engine: str, files: redis_tls.Files) -> Iterator[tuple[clusters.Cluster, list[int]]]:
    """Run a cluster that is reached with TLS; gives it, and its ports with TLS."""
    if redis_tls.has_tls(engine):
        with clusters.Cluster(engine, replicas=0, password=SECRET, tls=files) as cluster:
            yield cluster, [node.tls_port for node in cluster.nodes]
        return
    with clusters.Cluster(engine, replicas=0, password=SECRET) as cluster, contextlib.ExitStack() as stack:
        ports = [stack.enter_context(redis_tls.front(node.port, files, ask_clients=False)) for node in cluster.nodes]
        for node, port in zip(cluster.nodes, ports, strict=True):
            node.tell("CONFIG", "SET", "cluster-announce-port", port)
        wait_until(lambda: all({each[1] for each in announced(node)} == {*ports} for node in cluster.nodes))
        yield cluster, ports


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_tls_to_all_nodes(engine: str, tmp_path: Path, authority: trustme.CA, name: str) -> None:
    """Certificates are mostly for names: the one that is announced goes before the address."""
    files = redis_tls.Files(tmp_path, authority, name)
    with tls_cluster(engine, files) as (cluster, ports):
        if name == "localhost":
            for node in cluster.nodes:
                node.tell("CONFIG", "SET", "cluster-announce-hostname", name)
            wait_until(lambda: all(str(announced(node)).count(name) == len(ports) for node in cluster.nodes))
        url = f"rediss://:{SECRET}@{name}:{ports[1]}?ssl_ca_certs={files.authority}"
        with (
            support.verve("--redis-url", url, "--window", str(long_window())) as program,
            support.Client(program.address) as client,
        ):
            for number in IDS:
                wait_for_ok(client, number)
            assert counted([*cluster.primaries()]) == len(IDS)
            assert complaints(program) == []
            source, target, _ = cluster.primaries()
            if redis_tls.has_tls(engine):
                slots = {clusters.slot_of(key) for key in source.tell("KEYS", "verve:*")}
                cluster.move(slots, source, target)
            for number in IDS:
                wait_for_ok(client, number + 1000)
            assert not [line for line in complaints(program) if "certificate" in line]


def test_windows_are_closed_over_tls_when_a_replica_has_acknowledged(tmp_path: Path, authority: trustme.CA) -> None:
    files = redis_tls.Files(tmp_path, authority, "127.0.0.1")

    def told(lines: list[str]) -> int:
        return sum(int(match[1]) for line in lines if (match := re.search(r"unique ids in .*: ([0-9]+)", line)))

    with clusters.Cluster("redis", password=SECRET, tls=files) as cluster:
        url = f"rediss://:{SECRET}@127.0.0.1:{cluster.nodes[0].tls_port}?ssl_ca_certs={files.authority}"
        with (
            support.verve("--redis-url", url, "--window", "2") as program,
            support.Client(program.address) as client,
        ):
            for number in IDS:
                wait_for_ok(client, number)
            program.log.wait_until(lambda lines: told(lines) >= len(IDS) or None, "the counts of all windows")
            assert told(program.log.all) == len(IDS)
            assert all("cmdstat_wait" in str(node.tell("INFO", "commandstats")) for node in cluster.primaries())


def test_a_certificate_that_is_not_for_what_nodes_announce(engine: str, tmp_path: Path, authority: trustme.CA) -> None:
    files = redis_tls.Files(tmp_path, authority, "localhost")
    with tls_cluster(engine, files) as (_, ports):
        url = f"rediss://:{SECRET}@localhost:{ports[0]}?ssl_ca_certs={files.authority}"
        with support.verve("--redis-url", url, "--window", str(long_window())) as program:
            program.log.wait_for(
                re.escape(
                    "Redis's certificate is for another name: write one that it has in --redis-url (a node of a "
                    "cluster must announce it: cluster-announce-hostname), or add ssl_check_hostname=false"
                )
            )
