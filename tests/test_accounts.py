"""The accounts of `accounts.py`: what they let pass, and what they don't."""

import accounts
import pytest
from accounts import Account, burst

EARLY, MID, LATE, NEXT = 100.1, 101.0, 101.9, 103.0  # of the windows that start at 100 and 102


def account(*bursts: accounts.Burst) -> Account:
    found = Account(2)
    for each in bursts:
        found.add(each)
    return found


@pytest.mark.parametrize(
    ("answers", "sure", "maybe", "again"),
    [
        ([["ok", "ok", "no", "lost"]], 2, 1, 0),
        ([["ok", "ok", "no", "lost"], ["ok", "no", "no", "lost"]], 2, 1, 0),
        ([["ok", "no", "lost"], ["no", "ok", "ok"]], 3, 0, 0),
    ],
)
def test_ids_are_counted_once_within_a_window(answers: list[list[str]], sure: int, maybe: int, again: int) -> None:
    assert burst(MID, MID, 2, *answers) == accounts.Burst(MID, MID, sure, maybe, again)


def test_ids_that_are_sent_twice_around_an_edge_may_be_counted_twice() -> None:
    answers = ["ok", "ok", "lost", "no"], ["ok", "no", "lost", "no"]
    assert burst(MID, NEXT, 2, *answers) == accounts.Burst(MID, NEXT, 2, 1, 2)
    assert burst(LATE, LATE, 2, *answers).again == 2, "so near an edge nobody knows"


@pytest.mark.parametrize("reports", [{100: 2, 102: 3}, {100: 2, 102: 4}])
def test_counts_that_can_be_right(reports: dict[int, int]) -> None:
    account(burst(MID, MID, 2, ["ok"] * 2), burst(NEXT, NEXT, 2, ["ok"] * 3, ["lost"] * 3)).check({100: 2, 102: 3})
    account(burst(MID, MID, 2, ["ok"] * 2), burst(NEXT, NEXT, 2, ["ok"] * 3 + ["lost"])).check(reports)


@pytest.mark.parametrize(
    ("reports", "text"),
    [
        ({100: 1, 102: 3}, "4 counted, expected 5 to 6"),
        ({100: 2, 102: 5}, "7 counted, expected 5 to 6"),
        ({100: 3, 102: 3}, "3 counted at 100, expected no more than 2"),
        ({100: 1, 102: 4}, "1 counted up to 100, expected no fewer than 2"),
    ],
)
def test_counts_that_can_not_be_right(reports: dict[int, int], text: str) -> None:
    found = account(burst(MID, MID, 2, ["ok"] * 2), burst(NEXT, NEXT, 2, ["ok"] * 3 + ["lost"]))
    with pytest.raises(AssertionError, match=text):
        found.check(reports)


def test_an_id_near_an_edge_may_be_in_either_window() -> None:
    for reports in ({100: 1, 102: 0}, {100: 0, 102: 1}):
        account(burst(LATE, LATE, 2, ["ok"])).check(reports)
        account(burst(EARLY + 2, EARLY + 2, 2, ["ok"])).check(reports)


def test_a_window_that_could_not_end_may_have_later_ids() -> None:
    found = account(burst(NEXT, NEXT, 2, ["ok"]))
    with pytest.raises(AssertionError):
        found.check({100: 1, 102: 0})
    found.late.append((101.5, 103.5))
    found.check({100: 1, 102: 0})
