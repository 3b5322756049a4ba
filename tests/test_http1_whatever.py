"""Requests at random: one means the same on a used connection as on a fresh one, and all are answered in good form."""

from collections.abc import Sequence

import pytest
from http_corpus import EXPECTING, LAST, MALFORMED, ODD, STREAMS
from http_peers import HOST, START, Memory, Mixed, Store, Telling, cut, cut_at, get, replies, statuses, words
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

# The shortcut: what was once read is not read again

FIELDS = [
    HOST,
    b"Host: b:80\r\nX: y\r\n",
    b"X: \xff\r\nhost:a\r\n",
    b"Host: a\r\nConnection: keep-alive\r\n",
    *(HOST + field for field in words(r"X: id=1\r\n|Content-Length: 0\r\n|Connection: Upgrade\r\nUpgrade: h2c\r\n")),
    *(HOST + field for field in words(r"Expect: 100-continue\r\n|Connection: close\r\n|Host: a\r\n")),
    *words(r"|Host: a/b\r\n"),
]
BODIES = [(HOST + b"Content-Length: 3\r\n", b"abc"), (HOST + b"Transfer-Encoding: chunked\r\n", b"1\r\nx\r\n0\r\n\r\n")]
IDS = st.sampled_from([b"1", b"2", b"5", b"05", b"-4", b"%37", b"x", b"", b"8&x=1", b"8&id=8", b"9" * 19, b"1" * 18])
REQUESTS = st.one_of(
    st.builds(get, IDS | st.integers(0, 10**6), st.sampled_from(FIELDS[:4])),
    st.builds(get, IDS | st.integers(0, 10**6), st.sampled_from(FIELDS[:4])),
    st.builds(
        get,
        IDS,
        st.sampled_from(FIELDS),
        st.sampled_from([b"GET", b"GET", b"HEAD", b"POST"]),
        st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]),
    ),
    st.builds(lambda id_, framing: get(id_, framing[0]) + framing[1], IDS, st.sampled_from(BODIES)),
)
CUTS = st.lists(st.integers(0, 10**6), max_size=6)


relaxed = examples(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("store", [Telling, Mixed])
def test_a_request_means_on_a_used_connection_what_it_means_on_a_fresh_one(store: type[Telling]) -> None:
    with Memory(store()) as memory:
        fresh: dict[bytes, tuple[bytes, bool, list[int]]] = {}

        def ask(request: bytes) -> tuple[bytes, bool, list[int]]:
            if request not in fresh:
                memory.store.added.clear()
                answer = memory.talk(request)
                fresh[request] = answer, replies(answer)[-1].closes, memory.store.added.copy()
            return fresh[request]

        @relaxed
        @given(st.lists(REQUESTS, min_size=1, max_size=12), CUTS)
        def check(requests: list[bytes], cuts: list[int]) -> None:
            expected, ids = b"", []
            for request in requests:
                answer, closes, added = ask(request)
                expected += answer
                ids += added
                if closes:
                    break
            memory.store.added.clear()
            stream = b"".join(requests)
            assert memory.talk(*cut_at(stream, cuts)) == expected
            assert memory.store.added == ids

        check()


TAIL = b" HTTP/1.1\r\nHost: a\r\n\r\n"
PLAIN = b"GET /api/verve/accept?id="
PIECES = [TAIL, PLAIN] * 3 + words(
    r"1|22|x|| |\r\n|\r\n\r\n|?|&|&x=1|-|GET| HTTP/1.1| HTTP/1.1\r\nHost: a\r\n|Host: a\r\n\r\n| HTTP/1.1\r\n\r\n"
    r"| HTTP/1.0\r\n\r\n| HTTP/1.1\r\nHost: b\r\n\r\n| HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n"
)


@pytest.mark.parametrize("store", [Store, Telling, Mixed])
def test_the_shortcut_reads_whatever_comes_as_byte_by_byte(store: type[Store]) -> None:
    with Memory(store()) as memory:

        @relaxed
        @given(st.lists(st.sampled_from(PIECES), max_size=15), CUTS)
        @example([PLAIN, b"1", TAIL, PLAIN, b"2", TAIL], [])
        @example([b"1", TAIL, TAIL], [])
        @example([b"1", TAIL, PLAIN, TAIL, PLAIN, b"1", TAIL], [])
        @example([b"1", TAIL, b"1", TAIL, PLAIN, b"22", TAIL], [])
        def check(pieces: list[bytes], cuts: list[int]) -> None:
            stream = get(7) + b"".join(pieces)
            memory.store.added.clear()
            slow = memory.talk(*cut(stream, 1))
            added = memory.store.added.copy()
            for fast in ([stream], [get(7), stream[len(get(7)) :]], cut_at(stream, cuts)):
                memory.store.added.clear()
                assert memory.talk(*filter(None, fast)) == slow
                assert memory.store.added == added

        check()


def test_a_full_window_is_told_to_those_whose_ids_do_not_fit() -> None:
    with Memory(Store(10)) as memory:
        said = memory.talk(get(0), b"".join(map(get, range(1, 9))), b"".join(map(get, (9, 10, 8, 11, 9))))
        assert statuses(said) == [200] * 10 + [503, 200, 503, 200]
        assert memory.store.count == 10


# Whatever comes


SEEDS = [*(request for request, _ in ODD.values()), *MALFORMED.values(), *STREAMS.values(), *LAST.values(), EXPECTING]
CHANGES = st.tuples(
    st.sampled_from(["flip", "delete", "insert", "double", "swap"]),
    st.integers(0, 10**4),
    st.integers(1, 40),
    st.sampled_from(
        [b"\r\n", b"\r", b"\n", b"\0", b" ", b":", b"\r\n\r\n", b"0\r\n\r\n", HOST, START, get(), b"HEAD", b"\xff"]
    )
    | st.binary(min_size=1, max_size=3),
)


def change(stream: bytes, changes: Sequence[tuple[str, int, int, bytes]]) -> bytes:
    for how, at, size, new in changes:
        start = at % (len(stream) + 1)
        old = stream[start : start + size]
        put = {
            "flip": bytes([old[0] ^ (1 << size % 8)]) + old[1:] if old else b"",
            "delete": b"",
            "insert": new + old,
            "double": old + old,
            "swap": new,
        }[how]
        stream = stream[:start] + put + stream[start + len(old) :]
    return stream


@pytest.mark.parametrize("store", [Telling, Mixed])
def test_whatever_comes_is_answered_in_good_form(store: type[Telling]) -> None:
    with Memory(store()) as memory:

        @relaxed
        @given(st.lists(st.sampled_from(SEEDS), min_size=1, max_size=4), st.lists(CHANGES, max_size=6), CUTS)
        def check(parts: list[bytes], changes: list[tuple[str, int, int, bytes]], cuts: list[int]) -> None:
            stream = change(b"".join(parts), changes) or b"\0"
            memory.store.added.clear()
            answer = memory.talk(*cut_at(stream, cuts))
            found = [reply for reply in replies(answer) if reply.status != 100]
            assert len(found) <= stream.count(b"HTTP/1.") + 1
            assert all(reply.body for reply in found) or b"HEAD" in stream
            assert len(memory.store.added) <= len(found)
            assert statuses(memory.talk(get(3))) == [200]

        check()
