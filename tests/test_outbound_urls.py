"""URLs: what is read from them, what is refused, and the requests that are made of them."""

import re
from ipaddress import IPv6Address

import h11
import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from outbound import Url, parse, request


@pytest.mark.parametrize(
    ("text", "url"),
    [
        (b"http://a", Url(False, "a", 80, "/", "")),
        (b"http://a/", Url(False, "a", 80, "/", "")),
        (b"HTTPS://Example.COM/Path?Query#Fragment", Url(True, "example.com", 443, "/Path", "?Query")),
        (b"http://a?x=1", Url(False, "a", 80, "/", "?x=1")),
        (b"http://a#f?x", Url(False, "a", 80, "/", "")),
        (b"http://a/?", Url(False, "a", 80, "/", "?")),
        (b"http://a/b?c?d/e:@", Url(False, "a", 80, "/b", "?c?d/e:@")),
        (b"http://a:8080/", Url(False, "a", 8080, "/", "")),
        (b"https://a:80/", Url(True, "a", 80, "/", "")),
        (b"http://a:00080/", Url(False, "a", 80, "/", "")),
        (b"http://a:65535", Url(False, "a", 65535, "/", "")),
        (b"http://a_b.c-d.example./", Url(False, "a_b.c-d.example.", 80, "/", "")),
        (b"http://xn--bcher-kva.example/", Url(False, "xn--bcher-kva.example", 80, "/", "")),
        (b"http://1.2.3.4/", Url(False, "1.2.3.4", 80, "/", "")),
        (b"http://1.2.3.4.example/", Url(False, "1.2.3.4.example", 80, "/", "")),
        (b"http://[::1]/", Url(False, "::1", 80, "/", "")),
        (b"http://[2001:DB8:0:0::1]:81/", Url(False, "2001:db8::1", 81, "/", "")),
        (b"http://[::ffff:1.2.3.4]/", Url(False, str(IPv6Address("::ffff:1.2.3.4")), 80, "/", "")),
        (b"http://u:p@a/", Url(False, "a", 80, "/", "", "Basic dTpw")),
        (b"http://u@a/", Url(False, "a", 80, "/", "", "Basic dTo=")),
        (b"http://%3A:%0D%0A@a/", Url(False, "a", 80, "/", "", "Basic OjoNCg==")),
        (b"http://@a/", Url(False, "a", 80, "/", "", "Basic Og==")),
        (b"http://a/%0d%0a/../\"<>\\^`{|}[]@:'", Url(False, "a", 80, "/%0d%0a/../\"<>\\^`{|}[]@:'", "")),
        (b"http://" + b"a" * 63 + b".b/", Url(False, "a" * 63 + ".b", 80, "/", "")),
        (b"http://a/" + b"x" * 4087, Url(False, "a", 80, "/" + "x" * 4087, "")),
    ],
)
def test_good_urls(text: bytes, url: Url) -> None:
    assert parse(text) == url
    assert len(set(url.origin)) == 3


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"a",
        b"/a",
        b"//a/b",
        b"a.example/b",
        b"http:",
        b"http:/a",
        b"http://",
        b"http:///a",
        b"http://?a",
        b"http://#a",
        b"http://:80/",
        b"http://a:/",
        b"ftp://a/",
        b"file:///etc/passwd",
        b"javascript://a/",
        b"httpx://a/",
        b" http://a/",
        b"http://a/ ",
        b"http://a/\n",
        b"http://a\n",
        b"http://a/b c",
        b"http://a/\r\nX: y",
        b"http://a\r\nX: y/",
        b"http://a/?\r\nX: y",
        b"http://a/#\r\nX: y",
        b"http://u\r\n@a/",
        b"http://a/\0",
        b"http://a/\x7f",
        b"http://a/\xc3\xa4",
        b"http://\xc3\xa4/",
        b"http://a/#\xff",
        b"http://a:0/",
        b"http://a:65536/",
        b"http://a:99999999/",
        b"http://a:-1/",
        b"http://a:+80/",
        b"http://a:8 0/",
        b"http://a:x/",
        b"http://a b/",
        b"http://a%2eb/",
        b"http://a\\b/",
        b"http://good.example\\@b/",
        b"http://a@b@c/",
        b"http://a@b\\@c/",
        b"http://u:p@/",
        b"http://.a/",
        b"http://a..b/",
        b"http://./",
        b"http://-a/",
        b"http://a-/",
        b"http://a.-b.c/",
        b"http://" + b"a" * 64 + b"/",
        b"http://" + b"a." * 127 + b"/",
        b"http://127.1/",
        b"http://2130706433/",
        b"http://0x7f000001/",
        b"http://0x7f.1/",
        b"http://0X7F.0.0.1/",
        b"http://0177.0.0.1/",
        b"http://127.0.0.01/",
        b"http://127.0.0.0x1/",
        b"http://127.0.0.1./",
        b"http://256.0.0.1/",
        b"http://1.2.3/",
        b"http://1.2.3.4.5/",
        b"http://a.1/",
        b"http://a.0x/",
        b"http://[]/",
        b"http://[::1/",
        b"http://::1/",
        b"http://[::1]a/",
        b"http://[::1]:x/",
        b"http://[1.2.3.4]/",
        b"http://[:::]/",
        b"http://[::g]/",
        b"http://[::1%lo]/",
        b"http://[::1%25lo]/",
        b"http://[v1.a]/",
        b"http://a/" + b"x" * 4088,
    ],
)
def test_bad_urls(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"^expected ") as caught:
        parse(text)
    assert not isinstance(caught.value, UnicodeError)
    assert re.fullmatch(r"expected [a-zA-Z0-9 ]+", str(caught.value)), "it may repeat what came in"


def test_what_of_a_url_may_be_logged() -> None:
    assert parse(b"http://[::1]/secret?token").place == "http://[::1]:80"
    assert parse(b"https://u:p@a.example/secret?token").place == "https://a.example:443"


_URL_BYTES = st.one_of(
    st.binary(max_size=40),
    st.lists(
        st.sampled_from(
            [
                *(b"http://", b"https://", b"HTTP://", b"a", b"b.example", b"127.0.0.1", b"[::1]", b"[::ffff:1.2.3.4]"),
                *(b":", b"80", b"443", b"@", b"/", b"?", b"#", b"%0d%0a", b"\r\n", b"\r", b"\n", b"\0", b" ", b"\t"),
                *(b"\r\nX: y\r\n", b"\\", b".", b"..", b"0x7f", b"1", b"-", b"_", b"\x80", b"\xe2\x80\xa8", b"u:p"),
            ]
        ),
        max_size=9,
    ).map(b"".join),
    st.from_regex(rb"https?://([a-z0-9:%!]{0,9}@)?[a-z0-9.\-_\[\]:]{1,20}(:[0-9]{0,6})?(/.{0,20})?(\?.{0,9})?"),
)


@examples(deadline=None)
@given(
    _URL_BYTES | _URL_BYTES.map(b"http://".__add__) | _URL_BYTES.map(b"https://a/".__add__),
    st.sampled_from(["GET", "POST"]),
    st.sampled_from([b"", b'{"count": 1}']),
)
@example(b"http://u@[::1]:8080/a?b#c", "POST", b"{}")
@example(b"https://a:443", "GET", b"")
@example(b"https://a:80", "GET", b"")
@example(b"http://a:443", "POST", b"")
def test_whatever_is_parsed_makes_one_well_formed_request(text: bytes, method: str, body: bytes) -> None:
    try:
        url = parse(text)
    except ValueError:
        return
    data = request(url, method, url.target, body=body)
    head, end, rest = data.partition(b"\r\n\r\n")
    assert (end, rest) == (b"\r\n\r\n", body)
    start, *lines = head.split(b"\r\n")
    assert re.fullmatch(rb"%b /[!-~]* HTTP/1\.1" % method.encode(), start)
    assert b"#" not in start
    assert all(re.fullmatch(rb"[A-Za-z-]+: [!-~]([ -~]*[!-~])?", line) for line in lines)
    fields = {name: value for name, _, value in (line.partition(b": ") for line in lines)}
    expected = {b"Host", b"User-Agent"} | ({b"Authorization"} if url.authorization else set())
    if body or method == "POST":
        expected |= {b"Content-Type", b"Content-Length"}
    assert set(fields) == expected
    assert len(lines) == len(expected), "a field stands there twice"

    again = parse((b"https://" if url.secure else b"http://") + fields[b"Host"] + url.target.encode())
    assert again == url._replace(authorization="")
    server = h11.Connection(h11.SERVER)
    server.receive_data(data)
    event = server.next_event()
    assert isinstance(event, h11.Request)
    assert event.target == url.target.encode()
