"""What `request_reader` makes of bytes, without a connection: heads in pieces, the short way beside the long one."""

import h11
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from request_reader import (
    CHUNKED,
    MAX_HEADERS,
    MAX_SIMPLE,
    Fault,
    Head,
    RequestReader,
    read_head,
    simple,
    simple_get,
)

GET = b"GET /a?id=7 HTTP/1.1\r\n"
HOST = b"Host: a\r\n"

HEADS: dict[bytes, Head | Fault | None] = {
    GET + HOST + b"\r\n": Head(b"GET", b"/a?id=7", old=False, keeps=True),
    b"\r\n\r\n" + GET + HOST + b"\r\n" + GET: Head(b"GET", b"/a?id=7", old=False, keeps=True),
    b"GET / HTTP/1.0\r\n\r\n": Head(b"GET", b"/", old=True, keeps=False),
    b"GET / HTTP/1.0\r\nConnection: x, Keep-Alive\r\n\r\n": Head(b"GET", b"/", old=True, keeps=True),
    b"GET / HTTP/1.0\r\nConnection: close, keep-alive\r\n\r\n": Head(b"GET", b"/", old=True, keeps=False),
    GET + HOST + b"Connection: x\r\nconnection:\tCLOSE \r\n\r\n": Head(b"GET", b"/a?id=7", old=False, keeps=False),
    GET + HOST + b"Proxy-Connection: close\r\n\r\n": Head(b"GET", b"/a?id=7", old=False, keeps=True),
    GET + HOST + b"Content-Length: 007\r\n\r\n": Head(b"GET", b"/a?id=7", old=False, keeps=True, body=7),
    GET + HOST + b"Content-Length: 0\r\nExpect: 100-continue\r\n\r\n": Head(b"GET", b"/a?id=7", old=False, keeps=True),
    GET + HOST + b"Transfer-Encoding: chunked\r\nExpect: 100-Continue\r\n\r\n": Head(
        b"GET", b"/a?id=7", old=False, keeps=True, body=CHUNKED, expects=True
    ),
    GET + HOST + b"Upgrade: h2c\r\nConnection: upgrade\r\nContent-Length: 5\r\n\r\n": Head(
        b"GET", b"/a?id=7", old=False, keeps=True, body=5
    ),
    GET + HOST + b"Connection: close\r\nContent-Length: 5\r\n\r\n": Head(b"GET", b"/a?id=7", old=False, keeps=False),
    b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\nContent-Length: 5\r\n\r\n": Head(
        b"CONNECT", b"a:80", old=False, keeps=False
    ),
    b"BREW / HTTP/1.1\r\n": Head(b"BREW", b"/", old=False, keeps=False),
    b"GET / HTTP/1.0\r\nConnection: keep-alive,x\tclose\r\n\r\n": Head(b"GET", b"/", old=True, keeps=False),
    b"GET / HTTP/1.0\r\nConnection: keep-alive\r\nConnection: x\r\n\r\n": Head(b"GET", b"/", old=True, keeps=True),
    b"\x16\x03\x01": Fault.MALFORMED,
    b"G@": Fault.MALFORMED,
    b"BREW /a": None,
    b"": None,
    b"\r\n": None,
    b"\r": None,
    b"GE": None,
    GET + HOST + b"\r": None,
    GET + b"\r\n": Fault.BAD_HOST,
    GET + HOST + HOST + b"\r\n": Fault.BAD_HOST,
    GET + b"Host: a/b\r\n\r\n": Fault.BAD_HOST,
    GET + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n": Fault.BAD_CODING,
    b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n": Fault.BAD_CODING,
    GET + HOST + b"Content-Length: 65537\r\n\r\n": Fault.LONG_BODY,
    b"GET /" + b"x" * 8192: None,
    b"GET /" + b"x" * 8192 + b" HTTP/1.1\r\n": Fault.LONG_TARGET,
    b"GET /" + b"x" * 8300: Fault.LONG_TARGET,
    GET + b"X: y\r\n" * 101 + b"\r\n": Fault.LONG_HEADERS,
    GET + b"X: y\r\n" * 100: None,
    b"GET / HTTP/1.2\r\n": Fault.MALFORMED,
    GET + b"X : y\r\n": Fault.MALFORMED,
}


@pytest.mark.parametrize("data", HEADS, ids=lambda data: repr(data[:60]))
def test_what_a_head_says(data: bytes) -> None:
    assert read_head(data) == HEADS[data]


@pytest.mark.parametrize("data", HEADS, ids=lambda data: repr(data[:60]))
def test_a_head_in_pieces_says_the_same_as_soon_as_it_is_known(data: bytes) -> None:
    request = RequestReader()
    read = 0
    while read < len(data) and request.head is None and request.fault is None:
        before = request.begun
        assert request.read(data[read : read + 1]) == 1
        read += 1
        assert request.begun or not before or data[read - 2 : read] == b"\r\n"
    assert (request.fault or request.head) == HEADS[data]


def test_a_body_is_drained_to_its_end_and_no_further() -> None:
    for framing, body in (
        (b"Content-Length: 5\r\n", b"hello"),
        (b"Transfer-Encoding: chunked\r\n", b"5;x=y\r\nhello\r\n0\r\nX: y\r\n\r\n"),
    ):
        head = b"PUT / HTTP/1.1\r\n" + HOST + framing + b"\r\n"
        request = RequestReader()
        assert request.read(head + body + GET) == len(head)
        assert not request.whole
        assert request.read(body[:-1]) == len(body) - 1
        assert not request.whole
        assert request.read(b"__" + body[-1:] + GET, 2) == 3
        assert request.whole
        assert request.fault is None


def test_whether_an_answer_has_a_body_is_known_from_the_first_bytes_on() -> None:
    for method, expected in ((b"HEAD", True), (b"GET", False), (b"HEADS", False)):
        request = RequestReader()
        request.read(b"\r\n" + method + b" / ")
        assert request.wants_no_body is expected
        request.read(b"HTTP/1.1\r\n")
        assert request.wants_no_body is expected
        if request.head is None:
            request.read(HOST + b"Content-Length: 5\r\n\r\n")
            assert request.wants_no_body is expected


# The short way accepts nothing that the long way does not accept with the same outcome

LINES = st.sampled_from(
    [
        *(b"Host: a\r\n", b"host:a:80 \r\n", b"HOST:\t[::1]\r\n", b"Host: a/b\r\n", b"Host:\r\n", b"Host : a\r\n"),
        *(
            b"hosts: a\r\n",
            b"X-Host: b\r\n",
            b"Host: a%41b%\r\n",
            b"Host: A%4A\r\n",
            b"Hos: a\r\n",
            b"Host: a\r\n b\r\n",
        ),
        *(
            b"X: y\r\n",
            b"X:y\r\n",
            b"X: \r\n",
            b"X:\r\n",
            b"X : y\r\n",
            b"X\r\n",
            b": y\r\n",
            b" X: y\r\n",
            b"X: \xff\t\r\n",
        ),
        *(
            b"X: a\0\r\n",
            b"X: a\rb\r\n",
            b"X: a\nb\r\n",
            b"X: a\n",
            b"X: a\x7f\r\n",
            b"X: a\x0b\r\n",
            b"X(: y\r\n",
            b"\xe9: y\r\n",
        ),
        *(
            b"Content-Length: 0\r\n",
            b"content-length: 5\r\n",
            b"Content-Length:5\r\n",
            b"Content-Type: x\r\n",
            b"CONTENT-LENGTH: 1\r\n",
        ),
        *(
            b"Transfer-Encoding: chunked\r\n",
            b"TRANSFER-ENCODING: gzip\r\n",
            b"Transfer: chunked\r\n",
            b"TE: trailers\r\n",
        ),
        *(
            b"Connection: keep-alive\r\n",
            b"connection: Keep-Alive \r\n",
            b"Connection: close\r\n",
            b"CONNECTION:close\r\n",
        ),
        *(
            b"Connection: keep-alive, close\r\n",
            b"Connection: keep-alivex\r\n",
            b"Connection: upgrade\r\n",
            b"Connections: close\r\n",
        ),
        *(
            b"Connection:\r\n",
            b"Connection: keep-alive\t\t\r\n",
            b"Connection: \tkeep-alive,\r\n",
            b"Proxy-Connection: close\r\n",
        ),
        *(
            b"Expect: 100-continue\r\n",
            b"Upgrade: h2c\r\n",
            b"Cookie: a=b; c\r\n",
            b"traceparent: 00-1-1-01\r\n",
            b"\r\n",
            b"",
        ),
    ]
)
TARGETS = st.sampled_from(
    [
        b"/a?id=7",
        b"/",
        b"*",
        b"//",
        b"/\x80",
        b"/a b",
        b"/#",
        b"/\x22<>\\^`{|}",
        b"a",
        b"http://a/",
        b"/%zz",
        b"/?#",
        b"/\x7f",
        b"/\t",
    ]
)
METHODS = st.sampled_from([b"GET", b"GET", b"GET", b"HEAD", b"POST", b"get", b"GETS", b"\r\nGET"])
VERSIONS = st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/11", b"http/1.1"])
REQUESTS = st.builds(
    lambda method, target, version, lines, end: b"%b %b %b\r\n%b%b" % (method, target, version, b"".join(lines), end),
    METHODS,
    TARGETS,
    VERSIONS,
    st.lists(LINES, max_size=8),
    st.sampled_from([b"\r\n", b"\r\n", b"\r\n\r\n", b"\r\n" + GET, b"\n", b"\r\r\n", b""]),
)
PLACES = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2), st.binary(max_size=2)), max_size=2)


def compare(data: bytes) -> bool:
    """Return whether the short way takes the request; if so, the long way must read the same out of it."""
    match = simple_get(data, 0, MAX_SIMPLE)
    if match is None:
        return False
    assert read_head(data) == Head(b"GET", match[1], old=False, keeps=True)
    request = RequestReader()
    assert request.read(data) == match.end()
    assert request.whole
    server = h11.Connection(h11.SERVER)
    server.receive_data(data[: match.end()])
    event = server.next_event()
    assert isinstance(event, h11.Request)
    assert (event.method, event.target) == (b"GET", match[1])
    return True


@examples(deadline=None, max_examples=1000, suppress_health_check=list(HealthCheck))
@given(REQUESTS, PLACES)
@example(GET + HOST + b"\r\n", [])
def test_the_short_way_reads_as_the_long_one(data: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    for at, size, new in changes:
        start = at % (len(data) + 1)
        data = data[:start] + new + data[start + size :]
    compare(data)


def test_every_byte_at_every_place_of_a_simple_request() -> None:
    """As it stands, put before each byte, and in each byte's place."""
    data = GET + b"X: y\r\nHost: a\r\nConnection: keep-alive\r\nz:\r\n\r\n"
    assert compare(data)
    taken = sum(
        compare(data[:at] + bytes([byte]) + data[at + size :])
        for at in range(len(data))
        for byte in range(256)
        for size in (0, 1)
    )
    assert taken > 2000


TAKEN = [
    b"Host: a\r\n",
    b"host:\ta:80\t \r\n",
    b"HOST: A%4a\r\nx:\r\n",
    b"Host: [::1]:8080\r\n",
    b"Accept: */*\r\nCookie: a\r\nHost: a\r\nTraceparent: 00\r\nConnection: Keep-Alive\r\nTE: trailers\r\n",
    b"Host: a\r\nExpect: 100-continue\r\nUpgrade: h2c\r\nContent-Type: x\r\nHosts: b\r\nX: \x80\xff\t\r\n",
    b"X: y\r\n" * 49 + b"Host: a\r\n" + b"X: y\r\n" * 50,
]


@pytest.mark.parametrize("headers", TAKEN)
def test_what_the_short_way_takes(headers: bytes) -> None:
    """What clients and load balancers send; if it were not taken, it would be read all the same, but slowly."""
    assert compare(GET + headers + b"\r\n")
    assert not compare(GET + headers)
    assert not compare(b"HEAD" + (GET + headers + b"\r\n")[3:])
    assert headers.count(b"\n") <= MAX_HEADERS


@pytest.mark.parametrize(
    "line",
    [
        *(b"Content-Length: 5", b"content-length:0", b"CONTENT-LENGTH: 1", b"Transfer-Encoding: chunked", b"Host: a"),
        *(b"transfer-encoding:x", b"Connection: close", b"connection: keep-alive, close", b"Connection:keep-alivex"),
        *(b"X : y", b"X: \0", b"X: a\nb", b"X: a\rb", b"X", b": y", b" X: y"),
    ],
)
def test_what_the_short_way_leaves_to_the_long_one(line: bytes) -> None:
    for headers in (line + b"\r\n" + HOST, HOST + line + b"\r\n", b"X: y\r\n" + HOST + b"X: y\r\n" + line + b"\r\n"):
        assert not compare(GET + headers + b"\r\n")


def test_the_short_way_never_takes_more_than_its_bounds() -> None:
    for headers in (
        b"X: y\r\n" * 50 + HOST,
        HOST + b"X: y\r\n" * 51,
        b"X: %b\r\n" % (b"y" * MAX_SIMPLE) + HOST,
    ):
        assert not compare(GET + headers + b"\r\n")
    tight = GET + HOST + b"X: %b\r\n\r\n" % (b"y" * (MAX_SIMPLE - len(GET + HOST) - 7))
    assert len(tight) == MAX_SIMPLE
    assert compare(tight)
    assert not compare(tight.replace(b"y", b"yy", 1))


def test_a_simple_request_of_one_target() -> None:
    match = simple(rb"/a\?id=([0-9]{1,3}+)")
    found = match(GET + HOST + b"\r\n", 0, MAX_SIMPLE)
    assert found is not None
    assert found[1] == b"7"
    for other in (b"/a?id=", b"/a?id=1234", b"/a?id=7x", b"/aaid=7", b"/a?id=7 "):
        assert match(GET.replace(b"/a?id=7", other) + HOST + b"\r\n", 0, MAX_SIMPLE) is None
