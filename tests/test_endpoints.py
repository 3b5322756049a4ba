"""Endpoints that requests name: which are refused, whatever they are written like, and what the others are sent.

No test asks a resolver or reaches another machine.
"""

# ruff: noqa: RUF001, SIM905
import itertools
import re
from collections.abc import Iterator
from ipaddress import IPv4Network, ip_address

import pytest
import servers
import support
from receivers import Receiver
from spies import ALLOW, LONG, Spy, from_log, request
from stores import ask, play

import outbound
import reporter

MAPPED = ip_address("::ffff:7f00:1")  # since Python 3.13 written ::ffff:127.0.0.1; both are one address

# Names


FORBIDDEN = [
    ["10.0.0.1"],
    ["127.0.0.1"],
    ["::1"],
    ["169.254.169.254"],
    ["192.168.1.1", "fd00::1", "fe80::1"],
    ["::ffff:10.0.0.1"],
    ["64:ff9b::7f00:1"],
    ["2002:7f00:1::"],
    ["0.0.0.0"],
    ["224.0.0.1"],
]


def test_a_name_of_a_forbidden_address_is_refused_and_logged() -> None:
    names = {f"inside{number}.test": addresses for number, addresses in enumerate(FORBIDDEN)}
    resolver = f"outbound.resolve = lambda host: [outbound.ip_address(text) for text in {names}[host]]"
    talkative = "reporter.LINES = 1000"
    with support.verve(*LONG, prefix=support.patched(f"{resolver}\n{talkative}")) as program:
        for number, name in enumerate(names):
            with support.Client(program.address) as client:
                assert client.ask(request(number, f"http://{name}:81/x")).body == b"ok"
            line = program.log.wait_for(f"callback to http://{name}:81 .*").string
            assert "WARNING" in line
            assert line.endswith("refused: the host has no address that may be reached")


def test_the_address_that_was_checked_is_the_one_that_is_called(receiver: Receiver) -> None:
    resolver = "\n".join(
        [
            "asked = []",
            "def resolve(host):",
            "    asked.append(host)",
            "    found = ['10.0.0.1', '127.0.0.1', 'fd00::1'] if len(asked) == 1 else ['10.0.0.1']",
            "    return [outbound.ip_address(text) for text in found]",
            "outbound.resolve = resolve",
        ]
    )
    with support.verve(*LONG, *ALLOW, prefix=support.patched(resolver)) as program:
        with support.Client(program.address) as client:
            assert client.ask(request(1, f"http://Name.Test.:{receiver.port}/x")).body == b"ok"
        (found,) = receiver.wait_for(1)
        assert found.fields["host"] == f"name.test.:{receiver.port}"


def test_a_name_that_does_not_resolve_is_logged() -> None:
    resolver = "import socket\ndef resolve(host):\n    raise socket.gaierror(-2, 'Name or service not known')\n"
    with support.verve(*LONG, prefix=support.patched(resolver + "outbound.resolve = resolve")) as program:
        with support.Client(program.address) as client:
            assert client.ask(request(1, "http://nowhere.test/")).body == b"ok"
        assert program.log.wait_for("callback to http://nowhere.test:80 failed: Name or service not known")


# Hostile endpoints

LOCALS = """
http://127.0.0.1/ http://127.1.2.3:9/ HTTP://127.0.0.1/ https://127.0.0.1/ http://0.0.0.0/ http://0.1.2.3/
http://10.0.0.1/ http://172.16.0.1/ http://172.31.255.255/ http://192.168.0.1/ http://100.64.0.1/ http://198.18.0.1/
http://192.0.0.1/ http://192.0.2.1/ http://224.0.0.1/ http://239.1.1.1/ http://240.0.0.1/ http://255.255.255.255/
http://169.254.169.254/latest/meta-data/ http://169.254.0.1/ http://[fd00:ec2::254]/ http://169.254.169.254.:80/
http://[::1]/ http://[0:0:0:0:0:0:0:1]/ http://[::]/ http://[::ffff:127.0.0.1]/ http://[::ffff:7f00:1]/
http://[::127.0.0.1]/ http://[::ffff:0:127.0.0.1]/ http://[::ffff:169.254.169.254]/ http://[64:ff9b::127.0.0.1]/
http://[64:ff9b::a9fe:a9fe]/ http://[64:ff9b:1::1]/ http://[2002:7f00:1::]/ http://[2002:a9fe:a9fe::1]/
http://[2001::1]/ http://[2001:db8::1]/ http://[fe80::1]/ http://[fec0::1]/ http://[fc00::1]/ http://[ff02::1]/
http://[3fff::1]/ http://[100::1]/ http://localhost/ http://LOCALHOST/ http://localhost./ http://a.localhost/
http://localhost:8080/ http://127.0.0.1:65535/
""".split()

SPELLINGS = """
http://2130706433/ http://0x7f000001/ http://0x7f.0.0.1/ http://0x7f.1/ http://017700000001/ http://0177.0.0.1/
http://0177.0.0.01/ http://127.1/ http://127.0.1/ http://127.0.0.1./ http://127.0.0.1../ http://127.0.0.01/
http://127.0.0.256/ http://127.0.0.0x1/ http://0/ http://00/ http://0x/ http://1.2.3.4.5/ http://127.0.0.1.1/
http://a.0x7f/ http://a.1/ http://-1/ http://1e3.1/ http://127。0。0。1/ http://１２７.0.0.1/ http://①②⑦.0.0.1/
http://127.0.0.1%2f@a/ http://127.0.0.1%00/ http://%31%32%37.0.0.1/ http://[::1/ http://::1]/ http://::1/ http://[::1]]/
http://[[::1]]/ http://[]/ http://[:]/ http://[1::2::3]/ http://[::1%25lo]/ http://[::1%lo]/ http://[fe80::1%251]/
http://[fe80::1%25eth0]/ http://[::g]/ http://[127.0.0.1]/ http://[localhost]/ http://[v1.a]/ http://[::1]a/
http://[::1].a/ http://[::ffff:127.1]/
""".split()

SHAPES = [
    *("", "/", "//", "//127.0.0.1/", "//host/", "host", "host/path", "host:80/", "127.0.0.1", "127.0.0.1:80"),
    *("http", "http:", "http:/", "http://", "http:///", "http:///path", "http://?a", "http://#a", "http://:80/"),
    *("http:/127.0.0.1/", "http:127.0.0.1", "http:host", "http:///127.0.0.1/", "http:\\\\127.0.0.1\\", "http://\\a/"),
    *("http://a\\@127.0.0.1/", "http://127.0.0.1\\@a/", "http://127.0.0.1\\.a/", "\\\\127.0.0.1\\", "/\\127.0.0.1/"),
    *("ftp://127.0.0.1/", "file:///etc/passwd", "file://127.0.0.1/etc/passwd", "gopher://127.0.0.1:6379/_FLUSHALL"),
    *("dict://127.0.0.1/", "ws://127.0.0.1/", "unix:/run/x", "javascript:alert(1)", "data:text/plain,x", "httpx://a/"),
    *("http+unix://a/", "http ://a/", " http://127.0.0.1/", "http://127.0.0.1/ ", "\thttp://127.0.0.1/", "ℎttp://a/"),
    *("url:http://127.0.0.1/", "http://http://127.0.0.1/", "hTTp//127.0.0.1/", "view-source:http://127.0.0.1/"),
    # users and passwords, which say to whom the sender belongs, and hide whom the URL is about
    *("http://a@127.0.0.1/", "http://a:b@127.0.0.1/", "http://@127.0.0.1/", "http://:@127.0.0.1/", "http://a@b.test/"),
    *("http://a@b@127.0.0.1/", "http://a@b@c/", "http://b.test@127.0.0.1/", "http://127.0.0.1:80@b.test/", "http://@/"),
    *("http://a:b@/", "http://a%40b@127.0.0.1/", "http://b.test%2F@127.0.0.1/"),
    # ports
    *("http://127.0.0.1:0/", "http://a.test:0/", "http://a.test:65536/", "http://a.test:99999/", "http://a.test:80a/"),
    *("http://a.test:-1/", "http://a.test:+80/", "http://a.test:8 0/", "http://a.test:80:80/", "http://a.test:٨٠/"),
    *("http://a.test:http/", "http://a.test:0x50/", "http://a.test:000080/", "http://a.test:4294967376/"),
    *("http://a.test:%38%30/", "http://[::1]:x/", "http://[::1]:0/"),
    # characters that end a line, a word or a string somewhere
    *(
        f"http://a.test{text}"
        for text in ("\r\n/", "\n/", "\0/", " /", "\t/", "\x7f/", "\v/", "\x1f/", "\u2028/", "é/")
    ),
    *(
        f"http://a.test/{text}"
        for text in ("\r\nX: y", "\n", "\r", "\0", " ", "\t", "\x7f", "\x80", "é", "\u2028", "a b")
    ),
    *(f"http://a.test/?{text}" for text in ("\r\nX: y", "\n", "\0", " ", "é")),
    *(f"http://a.test/#{text}" for text in ("\r\nX: y", "\0", " ")),
    *(
        f"http://a{text}b.test/"
        for text in ("%0d%0a", "%00", "%20", "%2e", "%2f", "%23", "%40", "%", "%zz", "*", "$", "^")
    ),
    # names that are none, and those of other alphabets
    *("http://./", "http://../", "http://.a.test/", "http://a..test/", "http://a.test../", "http://-a.test/"),
    *("http://a-.test/", "http://bücher.test/", "http://ＥＸＡＭＰＬＥ.test/", "http://a。test/", "http://ａ.test/"),
    *("http://ⓛocalhost/", "http://loc\u00adalhost/", "http://local\u200bhost/", "http://%6cocalhost/", "http://a,b/"),
    *("http://" + "a" * 64 + ".test/", "http://" + "a." * 127 + "test/", "http://" + "a" * 254 + "/"),
    "http://a.test/" + "x" * 4083,
]


NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def guarded() -> Iterator[tuple[support.Program, servers.Redis]]:
    """A program that may reach public addresses only, and whose resolver would give none but a forbidden one."""
    never = support.patched("outbound.resolve = lambda host: [outbound.ip_address('10.0.0.1')]")
    with (
        servers.Redis(next(iter(servers.ENGINES))) as server,
        support.verve(*LONG, "--redis-url", server.url, prefix=never) as program,
    ):
        yield program, server
        assert from_log(program, "callback|ERROR|WARNING") == []


def refused(guarded: tuple[support.Program, servers.Redis], number: int, words: bytes) -> None:
    """See that a request is refused, and its id not stored."""
    program, server = guarded
    with support.Client(program.address) as client:
        response = client.ask(words)
        assert (response.status, response.body) == (400, b"failed")
        assert re.fullmatch("[ -~]+", response.fields["verve-error"])
    assert [key for key in ask(server, "KEYS", "*:ids") if ask(server, "SISMEMBER", key, number)] == []


@pytest.mark.parametrize("endpoint", [*LOCALS, *SPELLINGS, *SHAPES], ids=lambda text: ascii(text)[1:60])
def test_a_hostile_endpoint_is_refused(guarded: tuple[support.Program, servers.Redis], endpoint: str) -> None:
    number = next(NUMBERS)
    refused(guarded, number, request(number, endpoint))


@pytest.mark.parametrize("query", ["&endpoint", "&endpoint=", "&endpoint=http://a.test/&endpoint=http://a.test/"])
def test_one_endpoint_is_expected(guarded: tuple[support.Program, servers.Redis], query: str) -> None:
    number = next(NUMBERS)
    refused(guarded, number, support.get(f"{support.PATH}?id={number}{query}"))


@pytest.mark.parametrize(
    "raw", [b"http://a.test/\0", b"http://a.test/\x7f", b"http://a.test/\t", b"http://a.test/\xff"]
)
def test_raw_bytes_are_refused(guarded: tuple[support.Program, servers.Redis], raw: bytes) -> None:
    number = next(NUMBERS)
    before, after = support.get(f"{support.PATH}?id={number}&endpoint=RAW").split(b"RAW")
    refused(guarded, number, before + raw + after)


@pytest.mark.parametrize(
    ("endpoint", "line", "host"),
    [
        ("http://127.0.0.1:PORT/a%0d%0aX:%20y", "/a%0d%0aX:%20y?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/%250d%250a", "/%250d%250a?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/%00%20%09", "/%00%20%09?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/?%0d%0a", "/?%0d%0a&count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/a\\b", "/a\\b?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/../../etc", "/../../etc?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT//10.0.0.1/", "//10.0.0.1/?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/http://10.0.0.1/", "/http://10.0.0.1/?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/@10.0.0.1/", "/@10.0.0.1/?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT?@10.0.0.1/", "/?@10.0.0.1/&count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT#@10.0.0.1/", "/?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/#\\@10.0.0.1/", "/?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/?a#b#c", "/?a&count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/a+b", "/a+b?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/'\"<>[]{}|^`", "/'\"<>[]{}|^`?count=N", "127.0.0.1:PORT"),
        (
            "http://127.0.0.1:PORT/?a=b&endpoint=http://10.0.0.1",
            "/?a=b&endpoint=http://10.0.0.1&count=N",
            "127.0.0.1:PORT",
        ),
        ("HTTP://127.0.0.1:PORT", "/?count=N", "127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT/" + "x" * 4000, "/" + "x" * 4000 + "?count=N", "127.0.0.1:PORT"),
        ("http://[::ffff:127.0.0.1]:PORT/", "/?count=N", f"[{MAPPED}]:PORT"),
        ("http://[0:0:0:0:0:FFFF:7F00:1]:PORT/", "/?count=N", f"[{MAPPED}]:PORT"),
    ],
)
def test_an_odd_endpoint_gets_just_what_it_says(spy: Spy, endpoint: str, line: str, host: str) -> None:
    port = str(spy.receiver.port)
    found = spy.call(endpoint.replace("PORT", port))
    line = line.replace("N", str(spy.count))
    host = host.replace("PORT", port)
    assert found.head == f"GET {line} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: verve\r\n\r\n"


def test_an_ipv6_endpoint(spy: Spy) -> None:
    with Receiver("::1") as receiver:
        other = Spy(spy.program, receiver, spy.count)
        for host in "[::1]", "[0:0::1]":
            assert other.call(f"http://{host}:{receiver.port}/").fields["host"] == f"[::1]:{receiver.port}"
        spy.count = other.count


@pytest.mark.parametrize(
    ("host", "sent"),
    [
        ("name.test", "name.test"),
        ("NAME.Test", "name.test"),
        ("name.test.", "name.test."),
        ("xn--bcher-kva.test", "xn--bcher-kva.test"),
        ("under_score.test", "under_score.test"),
        ("ip6-localhost", "ip6-localhost"),
        ("127.0.0.1.test", "127.0.0.1.test"),
        ("a" * 63 + ".test", "a" * 63 + ".test"),
    ],
)
def test_a_name_is_sent_as_host(receiver: Receiver, monkeypatch: pytest.MonkeyPatch, host: str, sent: str) -> None:
    asked: list[str] = []

    def resolve(name: str) -> list[outbound.Address]:
        asked.append(name)
        return [ip_address("127.0.0.1")]

    async def test() -> None:
        monkeypatch.setattr(outbound, "resolve", resolve)
        client = outbound.Client(outbound.Guard([IPv4Network("127.0.0.0/8")]))
        callbacks = reporter.Callbacks(client, "GET")
        callbacks.send(callbacks.parse(f"http://{host}:{receiver.port}/x".encode()), 0, 7)
        await client.settle()
        callbacks.close()
        assert callbacks.outcomes == {"delivered": 1}

    play(test())
    (found,) = receiver.requests
    assert found.head.startswith(f"GET /x?count=7 HTTP/1.1\r\nHost: {sent}:{receiver.port}\r\n")
    assert asked == [sent]


def test_the_table_is_long_enough() -> None:
    assert len({*LOCALS, *SPELLINGS, *SHAPES}) >= 60
