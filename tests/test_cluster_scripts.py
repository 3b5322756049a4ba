"""The scripts of a cluster, one step at a time: what home and a part must never do, whoever asks and by which clock.

The plays of test_cluster_model.py have whole instances ask them. Here they are asked by hand, what an instance would
not often ask; their clock is handed in.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import redis
import servers

from redis_store import parts, scripts
from redis_store.parts import Part
from redis_store.scripts import Keys, PartKeys, slot_of

LENGTH = 60  # seconds of a window
W = 999_999_960  # start of the window in which a test begins
PATIENCE = 3  # seconds
MOST = 10  # seconds for which settling may be prolonged
ALL = 2  # parts
KEYS = Keys("v", LENGTH, ALL)
PART = KEYS.parts(ALL)[1]


class Closing(NamedTuple):
    """What CLOSING returns."""

    seconds: int
    microseconds: int
    open: int
    left: int
    newest: int
    settles: int
    patience: bytes
    put_back: int
    barred: bytes
    windows: list[bytes]

    @property
    def closing(self) -> list[tuple[int, int]]:
        """The windows that are to be counted, and their lengths; 0 of one that has to wait."""
        numbers = [int(number) for number in self.windows]
        return [*zip(numbers[::2], numbers[1::2], strict=True)]


class Server:
    """A server that is asked by scripts, at a moment that the test says."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.now = float(W + 1)

    def run(self, keys: Keys | PartKeys, script: str, *arguments: object, names: tuple[str, ...] = ()) -> Any:
        clock = f"{{'{int(self.now)}', '{int(self.now % 1 * 1e6)}'}}"
        assert script.count("redis.call('TIME')") == 1
        script = script.replace("redis.call('TIME')", clock)
        return self.client.execute_command(*keys.run(script, *map(str, arguments), keys=names))


class Home(Server):
    """What is asked of home."""

    def __init__(self, client: "redis.Redis") -> None:
        super().__init__(client)
        self.mark = self.arrive()[0]
        self.now += PATIENCE + 1  # so it has settled

    def arrive(self, run_id: str = "run", seen: bytes = b"") -> list[Any]:
        """Return the mark, whether it settles, and the fleet's patience."""
        found: list[Any] = self.run(KEYS, scripts.ARRIVE, run_id, seen.decode(), PATIENCE, MOST)
        return found

    def close(self, *lived: int, limit: int = 100, last: object = "+inf", known: int = -1) -> Closing:
        """Begin to close what is over, as one who lived through some windows."""
        named = [text for start in lived for text in (start, KEYS.member(start))]
        fixed = (LENGTH, limit, 1000, self.mark.decode(), PATIENCE, last, ALL, known)
        return Closing(*self.run(KEYS, scripts.CLOSING, *fixed, *named, names=KEYS.closing))

    def report(self, start: int, *counts: int) -> int:
        """Bring the counts of the first parts."""
        name = KEYS.member(start).split()[0]
        fixed = (1000, self.mark.decode(), ALL, start, name, LENGTH)
        pairs = [number for pair in enumerate(counts) for number in pair]
        found = self.run(KEYS, scripts.REPORT, *fixed, *pairs, names=(*KEYS.closing, KEYS.counts(start)))
        return int(found)

    def bring(self, newest: int, *starts: int) -> None:
        """Bring reports, of one id each."""
        pairs = [text for start in starts for text in (start, f"{KEYS.member(start)} 1")]
        self.run(KEYS, scripts.BRING, newest, *pairs)

    def reports(self) -> dict[int, int]:
        entries: Any = self.client.xrange(KEYS.stream)
        return {int(entry.partition(b"-")[0]) // 1000: int(fields.get(b"count", -1)) for entry, fields in entries}

    def foreign_entry(self, moment: int) -> None:
        self.client.xadd(KEYS.stream, {"hello": "world"}, id=f"{moment}000-0")

    def to(self, moment: float) -> None:
        self.now = moment


@pytest.fixture
def client(server: servers.Redis) -> Iterator["redis.Redis"]:
    with redis.Redis(port=server.port) as client:
        yield client


@pytest.fixture
def home(client: "redis.Redis") -> Home:
    return Home(client)


# What is open


def test_a_window_that_is_being_closed_is_not_opened_by_a_clock_that_is_set_back(home: Home) -> None:
    home.to(W + LENGTH + 5)
    assert home.close(W).closing == [(W, LENGTH)]
    home.to(W + 30)
    assert home.close(W).open == W + LENGTH


def test_a_window_that_an_instance_knows_to_be_closed_is_not_opened_by_a_home_that_forgot_it(home: Home) -> None:
    assert home.close(known=W + LENGTH).open == W + 2 * LENGTH


def test_a_window_that_is_reported_is_not_opened(home: Home) -> None:
    home.bring(W + LENGTH)
    assert home.close().open == W + 2 * LENGTH


def test_the_window_of_now_is_open_and_so_is_the_next(home: Home) -> None:
    assert home.close().open == W
    home.to(W + 2 * LENGTH + 5)
    assert home.close().closing == [(W, LENGTH), (W + LENGTH, LENGTH)], "both are known, whoever was there"


# What is named to be closed


def test_who_has_another_mark_closes_and_reports_nothing(home: Home) -> None:
    home.to(W + LENGTH + 5)
    home.close(W)
    before = {key: home.client.dump(key) for key in home.client.scan_iter()}
    home.mark = b"run 1.0"
    for asked in (lambda: home.close(W), lambda: home.report(W, 1, 2)):
        with pytest.raises(redis.ResponseError, match="LOST"):
            asked()
    assert {key: home.client.dump(key) for key in home.client.scan_iter()} == before


def test_nothing_is_closed_while_home_settles(home: Home) -> None:
    home.to(W + LENGTH + 5)
    home.mark = home.arrive("other")[0]
    for _ in range(2):
        found = home.close(W)
        assert (found.settles, found.closing) == (1, [])
        home.now += PATIENCE - 0.1
        home.arrive("other")
    home.now += PATIENCE + 0.1
    found = home.close(W)
    assert (found.settles, found.closing) == (0, [(W, LENGTH)]), "what was named meanwhile is known"


def test_a_window_that_was_opened_ahead_waits_for_a_second_until_somebody_names_it(home: Home) -> None:
    home.close()
    home.to(W + LENGTH + 0.9)
    assert home.close().closing == [(W, 0)]
    assert home.close(W).closing == [(W, LENGTH)]
    home.to(W + 2 * LENGTH + 1.1)
    assert home.close().closing == [(W, LENGTH), (W + LENGTH, LENGTH)]


def test_windows_are_named_in_order(home: Home) -> None:
    home.close()
    home.to(W + 3 * LENGTH + 5)
    assert home.close(W + 2 * LENGTH).closing == [(W + turn * LENGTH, LENGTH) for turn in range(3)]
    assert home.close(limit=2).closing == [(W, LENGTH), (W + LENGTH, LENGTH)], "the oldest"


def test_a_window_behind_the_last_that_may_be_closed_is_not_named(home: Home) -> None:
    home.to(W + 2 * LENGTH + 5)
    assert home.close(W, W + LENGTH, last=W).closing == [(W, LENGTH)]


def test_a_window_that_another_has_reported_does_not_hold_up_later_ones(home: Home) -> None:
    home.to(W + 2 * LENGTH + 5)
    home.close(W, W + LENGTH)
    home.bring(W)  # by one who saw the report, which is lost here
    assert home.close().closing == [(W + LENGTH, LENGTH)]
    assert home.report(W + LENGTH, 1, 1) == 1


# Reports that were brought, and an entry of somebody else


def test_nothing_is_closed_before_all_reports_are_put_back(home: Home) -> None:
    home.to(W + 5 * LENGTH)
    home.bring(W + LENGTH, W, W + LENGTH)
    first = home.close(W + 2 * LENGTH, limit=1)
    assert (first.left, first.put_back, first.closing) == (1, 1, [])
    assert home.report(W + 2 * LENGTH, 5, 5) == 0, "one of them is not there yet"
    home.bring(-1)
    second = home.close(limit=1)
    assert (second.left, second.put_back, second.closing) == (0, 1, [(W + 2 * LENGTH, LENGTH)])
    assert home.report(W + 2 * LENGTH, 5, 5) == 1
    assert home.reports() == {W: 1, W + LENGTH: 1, W + 2 * LENGTH: 10}
    assert home.close().put_back == 0, "once"


def test_a_report_that_an_entry_keeps_out_is_named_and_nothing_closed(home: Home) -> None:
    home.foreign_entry(W + LENGTH + 1)
    home.to(W + 3 * LENGTH)
    home.bring(W, W)
    found = home.close(W + LENGTH)
    assert (found.barred, found.closing) == (b"%d" % W, [])


def test_a_window_that_an_entry_keeps_out_is_named_and_its_counts_wait(home: Home) -> None:
    home.to(W + LENGTH + 5)
    home.foreign_entry(W + 2 * LENGTH)
    found = home.close(W)
    assert (found.barred, found.closing) == (b"%d" % W, [(W, LENGTH)])
    assert home.report(W, 3, 4) == 0
    home.client.rename(KEYS.stream, "aside")
    assert home.close().closing == [(W, LENGTH)], "it is not done with"
    assert home.report(W) == 1
    assert home.reports() == {W: 7}


# Reporting


def test_a_window_is_reported_when_the_counts_of_all_parts_are_there(home: Home) -> None:
    home.to(W + LENGTH + 5)
    home.close(W)
    assert home.report(W, 3) == 0
    assert home.report(W, 9, 4) == 1, "and the first count that was brought of a part stands"
    assert home.reports() == {W: 7}


def test_a_window_is_reported_once(home: Home) -> None:
    home.to(W + LENGTH + 5)
    home.close(W)
    assert [home.report(W, 3, 4) for _ in range(2)] == [1, 1]
    assert home.reports() == {W: 7}
    assert not home.client.exists(KEYS.counts(W)), "nor is anything kept for it"
    home.client.delete(KEYS.stream)
    assert home.report(W, 3, 4) == 1
    assert home.reports() == {}, "what was taken out on purpose stays out"


@pytest.mark.parametrize("lived", [True, False])
def test_a_window_waits_for_those_before_it(home: Home, lived: bool) -> None:
    home.close()
    home.to(W + 2 * LENGTH + 5)
    home.close(*([W] if lived else []))
    if lived:  # so it stands in the index alone
        home.client.delete(KEYS.closing[0])
        home.close(W, W + LENGTH)
        home.client.zrem(KEYS.closing[0], KEYS.member(W))
    assert home.report(W + LENGTH, 1, 1) == 0
    assert home.report(W, 2, 2) == 1
    assert home.report(W + LENGTH, 1, 1) == 1
    assert [*home.reports()] == [W, W + LENGTH]


def test_what_is_kept_of_a_window_expires(home: Home) -> None:
    """But for the stream."""

    def lasting() -> set[str]:
        return {key.decode() for key in home.client.scan_iter() if home.client.ttl(key) == -1}

    home.to(W + LENGTH + 5)
    home.bring(W - LENGTH, W - LENGTH)
    assert len(home.client.keys()) >= 3, "the mark, the newest report, those that are brought"
    assert lasting() == set()
    home.close(W)
    home.report(W, 3)
    assert lasting() == {KEYS.stream}


# Marks, and settling


def take(part: Server, run_id: str = "run", seen: bytes = b"") -> tuple[bytes, int]:
    """Arrive at the part; return its mark, and whether it settles."""
    mark, settles = part.run(PART, scripts.TAKE, run_id, seen.decode(), PATIENCE, MOST)
    return mark, settles


def close(part: Server, mark: bytes, held: int = 0) -> int:
    count = part.run(PART, scripts.CLOSE, mark.decode(), PATIENCE, held, names=(PART.ids(W),))
    return int(count)


@pytest.mark.parametrize("at", ["home", "a part"])
def test_another_mark_than_the_one_last_seen_is_a_possible_loss(client: "redis.Redis", at: str) -> None:
    asked = Home(client)
    arrive = asked.arrive if at == "home" else lambda *words: take(asked, *words)
    mark, settles, *_ = arrive("run")
    asked.now += PATIENCE + 1
    assert [*arrive("run", mark)][:2] == [mark, 0], "nothing has changed"
    assert [*arrive("run")][:2] == [mark, 0], "nor for a newcomer"
    found, settles, *_ = arrive("run", b"run 1.0")
    assert found != mark
    assert settles == 1
    assert arrive("run", b"run 1.0")[0] == found, "somebody else was here before, for the same reason"


@pytest.mark.parametrize("at", ["home", "a part"])
def test_settling_goes_on_for_as_long_as_somebody_arrives_but_not_without_end(client: "redis.Redis", at: str) -> None:
    asked = Home(client)
    arrive = asked.arrive if at == "home" else lambda *words: take(asked, *words)
    asked.now += PATIENCE + 1
    begun = asked.now
    mark, *_ = arrive("other")
    while asked.now < begun + MOST:
        assert [*arrive("other", mark)][:2] == [mark, 1]
        asked.now += PATIENCE - 0.1
    assert arrive("other", mark)[1] == 1, "since the last one in time"
    asked.now = begun + MOST + PATIENCE + 0.1
    assert arrive("other", mark)[1] == 0


def test_a_part_that_settles_is_not_closed(client: "redis.Redis") -> None:
    part = Server(client)
    mark, _ = take(part)
    assert close(part, mark) == -1
    part.now += PATIENCE + 0.1
    assert close(part, mark) == 0


def test_a_set_that_was_deleted_is_a_loss_once(client: "redis.Redis") -> None:
    """Begun anew without a time to live, it is closed as it is when the part has settled, though its owner is dead."""
    part = Server(client)
    mark, _ = take(part)
    part.now += PATIENCE + 0.1
    client.sadd(PART.ids(W), 1, 2)
    with pytest.raises(redis.ResponseError, match="LOST"):
        close(part, mark)
    found, settles = take(part, "run", mark)
    assert found != mark
    assert settles == 1
    part.now += PATIENCE + 0.1
    assert close(part, found) == 2
    assert [close(part, found, held=9) for _ in range(2)] == [2, 2], "who comes later is told the same"


@pytest.mark.parametrize("what", ["arrive", "close"])
def test_a_part_whose_server_is_out_of_memory_can_be_arrived_at_and_closed(client: "redis.Redis", what: str) -> None:
    part = Server(client)
    mark, _ = take(part)
    part.now += PATIENCE + 0.1
    client.config_set("maxmemory", 1)
    try:
        assert close(part, mark) == 0 if what == "close" else take(part, "other")[1] == 1
    finally:
        client.config_set("maxmemory", 0)


def test_what_is_kept_of_a_part_expires(client: "redis.Redis") -> None:
    part = Server(client)
    mark, _ = take(part)
    part.now += PATIENCE + 0.1
    close(part, mark)
    assert {key.decode() for key in client.scan_iter() if client.ttl(key) == -1} == set()


# What never changes, or an instance of another version would count the same id elsewhere


@pytest.mark.parametrize(
    ("number", "part"),
    [(0, 0), (1, 39), (2, 15), (7, 20), (-1, 24), (10**9, 47), (2**63 - 1, 56), (-(2**63), 32)],
)
def test_an_id_is_in_the_same_part_for_ever(number: int, part: int) -> None:
    assert parts.part_of(number) == part
    all_parts = [Part(each, PART) for each in range(parts.PARTS)]
    assert [(found.number, ids) for found, ids in parts.split([number], all_parts)] == [(part, [number])]


def test_many_ids_are_in_the_same_parts_for_ever() -> None:
    found = bytes(parts.part_of(number) for number in range(-(2**63), 2**63, 2**64 // 9973))
    assert hashlib.sha256(found).hexdigest()[:16] == "bde700ffefc71801"


def test_a_part_has_the_same_keys_for_ever() -> None:
    keys = Keys("verve", LENGTH, parts.PARTS).parts(parts.PARTS)
    assert keys[0].ids(W) == f"verve:{{14}}:{W}"
    assert keys[63].mark == "verve:{44}:mark"
    slots: Sequence[int] = [slot_of(each.mark) for each in keys]
    assert slots == sorted(slots), "spread over the slots in their order"
