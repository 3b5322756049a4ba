"""The endpoint over HTTP: what is an id, what is a target, what is answered and in which form."""

import pytest
from http_peers import (
    DATE,
    HOST,
    MARK,
    NEXT,
    NOW,
    PATH,
    Memory,
    Reply,
    Socket,
    Store,
    cut,
    get,
    line,
    replies,
    statuses,
    words,
)

# The endpoint's answers

FAILURES = {  # of section 4: request, status. All hold MARK
    "id missing": (get(b"&x=zqxj"), 400),
    "id twice": (get(b"7&id=zqxj"), 400),
    "id no integer": (get(b"zqxj"), 400),
    "id of 65 bits": (get(b"9223372036854775808&zqxj"), 400),
    "endpoint twice": (get(b"7&endpoint=http://zqxj.example/&endpoint=http://zqxj.example/"), 400),
    "endpoint relative": (get(b"7&endpoint=/zqxj"), 400),
    "endpoint ftp": (get(b"7&endpoint=ftp://zqxj.example/"), 400),
    "endpoint empty": (get(b"7&endpoint=&zqxj"), 400),
    "endpoint on loopback": (get(b"7&endpoint=http://127.0.0.1/zqxj"), 400),
    "another path": (line(b"GET /zqxj HTTP/1.1"), 404),
    "another path and method": (line(b"POST /zqxj HTTP/1.1"), 404),
    "another method": (get(b"7&zqxj", method=b"POST"), 405),
    "no method we know": (get(b"7", method=b"ZQXJ") + MARK, 405),
    "malformed line": (line(b"GET /zqxj /zqxj HTTP/1.1"), 400),
    "malformed field": (get(7, HOST + b"zqxj zqxj: zqxj\r\n"), 400),
    "malformed Host": (get(7, b"Host: zqxj/zqxj\r\n"), 400),
    "unknown coding": (get(7, HOST + b"Transfer-Encoding: zqxj\r\n"), 400),
    "long target": (get(b"7&" + MARK * 2048), 414),
    "long headers": (get(7, HOST + b"zqxj: " + MARK * 8192 + b"\r\n"), 431),
    "many headers": (get(7, HOST + b"zqxj: zqxj\r\n" * 100), 431),
    "long body": (get(7, HOST + b"Content-Length: 65537\r\n") + MARK, 413),
}
ENDS = (400, 408, 413, 414, 431)  # HTTP not to be read further; a 400 for the id is not


def test_ok(world: Memory | Socket) -> None:
    new, duplicate, head, failed = replies(world.talk(get(), get(), get(method=b"HEAD"), get(b"x", method=b"HEAD")))
    fields = {"content-type": "text/plain; charset=utf-8", "content-length": "2", "date": DATE}
    assert new == duplicate == Reply(200, fields, b"ok")
    assert head == Reply(200, fields, b"")
    assert (failed.status, failed.body, failed.closes) == (400, b"", False)
    assert world.store.added == [7, 7, 7]
    assert world.store.count == 1


@pytest.mark.parametrize("case", FAILURES)
def test_failure(world: Memory | Socket, case: str) -> None:
    request, status = FAILURES[case]
    ends = status in ENDS and not case.startswith(("id", "endpoint"))
    answer = world.talk(request, finish=not ends)
    (reply,) = replies(answer)
    assert (reply.status, reply.body) == (status, b"failed")
    assert MARK not in answer.lower()
    assert reply.closes is (ends or case == "no method we know")
    assert world.store.added == []
    if status == 405:
        assert reply.fields["allow"] == "GET, HEAD"


def test_the_date_is_that_of_the_second() -> None:
    now = [NOW + 0.25]
    with Memory(clock=lambda: now[0]) as memory:
        assert b"\r\nDate: Sun, 22 Nov 2026 06:31:00 GMT\r\n" in memory.talk(get())
        now[0] = 1798761599.0
        memory.advance(0.75)
        assert b"\r\nDate: Thu, 31 Dec 2026 23:59:59 GMT\r\n" in memory.talk(get())


def test_a_full_window_is_503_with_retry_after() -> None:
    with Memory(Store(max_ids=2)) as memory:
        *_, duplicate, full = replies(memory.talk(get(1), get(2), get(1), get(3)))
    assert (duplicate.status, full.status, full.body) == (200, 503, b"failed")
    assert int(full.fields["retry-after"]) > 0


INTEGERS: dict[bytes, int] = {
    b"7": 7,
    b"007": 7,
    b"%37": 7,
    b"%30%30%37": 7,
    b"-5": -5,
    b"%2D5": -5,
    b"%2d%35": -5,
    b"-005": -5,
    b"0": 0,
    b"000": 0,
    b"-0": 0,
    b"999999999999999999": 10**18 - 1,
    b"1000000000000000000": 10**18,
    b"0999999999999999999": 10**18 - 1,
    b"9223372036854775807": 2**63 - 1,
    b"09223372036854775807": 2**63 - 1,
    b"-9223372036854775807": -(2**63) + 1,
    b"-9223372036854775808": -(2**63),
    b"0" * 5000 + b"7": 7,
    b"-" + b"0" * 5000 + b"7": -7,
    b"0" * 5000: 0,
}
NO_INTEGERS = [
    *(b"9" * 20, b"9" * 5000, b"-" + b"9" * 5000),
    *words(
        r"|-|+5|%2B5|%2b5|--5|5-|-%205|1.0|1_000|+7|%207|7%20|7+|%097|7%0A|7%0D%0A|%0A7|7%00|%007|1,000|1e3|0x7|0b1|7L|nan"
        r"|inf|true|None|7.|.7|7=|=7|7;|7;id=8|7?|7/|%|%3|7%|7%3|%GG|%%37|%2537|'7'|\x227\x22|[7]|(7)|7:|%FF|7%EF%BB%BF"
        r"|%D9%A7|%d9%a7|%EF%BC%97|%C2%B2|%E2%88%925|%C2%A07"  # digits, a minus and a space, but not in ASCII
        r"|7&id=7|7&id=|7&id|7&%69d=7|7&x=1&i%64=8|10000000000000000000|18446744073709551615|18446744073709551623"
        r"|9223372036854775808|00009223372036854775808|-9223372036854775809"
    ),
]


@pytest.mark.parametrize("before", [b"", get(1), get(1) + get(1)], ids=["alone", "second", "third"])
def test_an_id_is_its_integer_value(memory: Memory, before: bytes) -> None:
    for text, number in INTEGERS.items():
        memory.store.added.clear()
        assert statuses(memory.talk(before, get(text), get(text) + get(text)))[-3:] == [200] * 3, text
        assert memory.store.added[-3:] == [number] * 3, text


@pytest.mark.parametrize("before", [b"", get(1), get(1) + get(1)], ids=["alone", "second", "third"])
def test_what_is_no_id(memory: Memory, before: bytes) -> None:
    for text in NO_INTEGERS:
        memory.store.added.clear()
        answers = replies(memory.talk(before, get(text), get(text) + get(2), get(2) + get(text) + get(2)))
        assert [reply.status for reply in answers[-6:]] == [400, 400, 200, 200, 400, 200], text
        assert not any(reply.closes for reply in answers), text
        assert set(memory.store.added) <= {1, 2}, text


def test_ids_over_a_socket() -> None:
    with Socket() as world:
        assert statuses(world.talk(b"".join(map(get, INTEGERS)))) == [200] * len(INTEGERS)
        assert world.store.added == list(INTEGERS.values())
        assert statuses(world.talk(b"".join(map(get, NO_INTEGERS)))) == [400] * len(NO_INTEGERS)


TARGETS = {  # $ stands for the path
    target.replace(b"$", PATH): status
    for status, targets in {
        200: r"$?id=7&|$?&&id=7|$?x=1&id=7|$?id=7&x=1&y&=z&&|$?x=id=8&id=7|$?ids=8&ID=8&id%20=8&id=7|$?%69d=7"
        r"|$?i%64=%37|$?%69%64=007|$?x=%GG&id=7|$?x=?&id=7|$?xendpoint=y&id=7|/api/verve/%61ccept?id=7"
        r"|/%61pi/verve/accep%74?id=7|http://a$?id=7|HTTP://a$?id=7|https://a$?id=7|http://b.c:80$?id=7|http://[::1]:80$?x=http://y/&id=7",
        400: r"$|$?|$?id|$?id=|$?ID=7|$?id%3D7|$?id==7|$??id=7|$?ids=7|$?x=id=7|$?x=1;id=7|$?+id=7|$?id[]=7|$?id=7&id"
        r"|$?id=7&id=7|http://a$?id=x|http://a$",
        404: r"$/?id=7|/$?id=7|/API/verve/accept?id=7|$x?id=7|/api/verve/accep?id=7|$;v=1?id=7|$%20?id=7|$%3Fid=7"
        r"|$%00?id=7|$&id=7|/?id=7|/|/?$?id=7|/x$?id=7|http://a/?id=7|http://a?id=7|http://a|http://a/http://a$?id=7|ftp://a$?id=7",
    }.items()
    for target in words(targets)
}


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_targets(world: Memory | Socket, method: bytes) -> None:
    requests = [line(b"%b %b HTTP/1.1" % (method, target)) for target in TARGETS]
    stream = world.talk(*requests)
    assert dict(zip(TARGETS, statuses(stream), strict=True)) == TARGETS
    assert set(world.store.added) == {7}
    assert (b"\r\n\r\nHTTP/1.1" in stream) is (method == b"HEAD")


METHODS = words(
    r"POST|PUT|DELETE|OPTIONS|PATCH|TRACE|PROPFIND|QUERY|LINK|M-SEARCH|BREW|get|Get|GETX|GE|G|HEADS"
    r"|!#$%&'*+-.^_`~09AZaz\x7c|SETUP|PLAY|DESCRIBE|SOURCE|FLUSH"  # the last of RTSP and ICE, but tokens as any other
)


@pytest.mark.parametrize("method", METHODS)
def test_another_method_is_405_and_no_body_of_it_is_read_as_a_request(memory: Memory, method: bytes) -> None:
    fields = HOST + b"Content-Length: %d\r\n" % len(NEXT)
    for pieces in ([get(7, fields, method) + NEXT], cut(get(7, fields, method) + NEXT, 1)):
        first, *others = replies(memory.talk(*pieces))
        assert (first.status, first.fields["allow"]) == (405, "GET, HEAD")
        assert others == []
    assert memory.store.added == []


def test_every_answer_is_counted(memory: Memory) -> None:
    with_more = HOST + b"X: y\r\n"
    memory.talk(
        get(1), get(2), get(3, with_more), get(4) + get(5) + get(6), get(7, method=b"HEAD"), get(b"x"), get(b"x")
    )
    memory.talk(line(b"GET / HTTP/1.1"), get(1, HOST * 2))
    assert {status: count for status, count in memory.server.answered().items() if count} == {200: 7, 400: 3, 404: 1}
