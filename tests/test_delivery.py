"""How the webhook delivers a report: each attempt, the pauses between attempts, and what a stop waits for; the timer.

Here the webhook runs in the test's own loop, with an outbox in memory and a real receiver.
"""

import asyncio
import base64
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
import standardwebhooks
from receivers import HANG, Answer, Receiver
from stores import Log, play, until

import outbound
import reporter

SECRET = bytes(range(32))
QUICK = {"BACKOFF": (0.01, 0.02), "SPREAD": 0.02, "NAP": 0.05, "HURRY": 0.01}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all pauses short, but those that a receiver asks for."""
    for name, value in QUICK.items():
        monkeypatch.setattr(reporter, name, value)


def report(start: int, count: int = 7) -> reporter.Report:
    return reporter.Report(reporter.iso(start), 60, count)


class Stream(reporter.MemoryOutbox):
    """An outbox whose reports another instance could deliver: a stop need not wait for them."""

    async def settle(self) -> None:
        pass


@contextlib.asynccontextmanager
async def delivering(receiver: Receiver, outbox: reporter.MemoryOutbox) -> AsyncIterator[reporter.Webhook]:
    """Run a webhook while the block runs."""
    webhook = reporter.Webhook(outbound.parse(receiver.url.encode()), SECRET, "verve", outbox)
    work = asyncio.create_task(webhook.run())
    try:
        yield webhook
        assert not work.done()
    finally:
        work.cancel()
        await asyncio.wait([work])
        await webhook.close()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("age", [0, 600, 86_400])
def test_a_report_is_signed_at_the_time_of_the_attempt(receiver: Receiver, age: int) -> None:
    """A receiver refuses what was signed more than five minutes ago, though the report may be older by far."""

    async def test() -> None:
        outbox = reporter.MemoryOutbox()
        outbox.put(report(int(time.time()) - 60 - age))
        async with delivering(receiver, outbox):
            await outbox.settle()

    play(test())
    (request,) = receiver.requests
    secret = base64.b64encode(SECRET).decode()
    assert standardwebhooks.Webhook(secret).verify(request.body, request.fields)["count"] == 7
    assert abs(int(request.fields["webhook-timestamp"]) - time.time()) < 60


@pytest.mark.usefixtures("quick")
def test_a_report_that_is_tried_again_is_signed_anew(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1_000_000_000.0, 1000.0)
    monkeypatch.setattr(reporter, "time", SimpleNamespace(time=lambda: next(clock)))
    receiver.answers.append(Answer(500))

    async def test() -> None:
        outbox = reporter.MemoryOutbox()
        outbox.put(report(900_000_000))
        async with delivering(receiver, outbox):
            await outbox.settle()

    play(test())
    first, again = receiver.requests
    assert int(again.fields["webhook-timestamp"]) >= int(first.fields["webhook-timestamp"]) + 1000
    assert again.fields["webhook-signature"] != first.fields["webhook-signature"]
    assert again.fields["webhook-id"] == first.fields["webhook-id"] == "verve/1998-07-09T16:00:00Z"
    assert again.body == first.body


@pytest.mark.usefixtures("quick")
def test_a_stop_waits_for_the_attempt_under_way_and_begins_no_other(receiver: Receiver) -> None:
    receiver.default = Answer(HANG)

    async def test() -> None:
        outbox = Stream()
        for number in range(3):
            outbox.put(report(60 * number, number))
        async with delivering(receiver, outbox) as webhook:
            await until(lambda: receiver.requests)
            webhook.hurry()
            stopping = asyncio.create_task(webhook.settle())
            for _ in range(20):
                await asyncio.sleep(0)
            assert not stopping.done(), "the attempt is still under way"
            receiver.release()
            await stopping
            assert await outbox.next() == (reporter.iso(60), 60, 1, True), "the first is noted as delivered"
            assert webhook.outcomes == {"delivered": 1}
            await asyncio.sleep(0.1)  # in which another attempt would begin

    with Log():
        play(test())
    assert len(receiver.requests) == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("status", [302, 400, 429, 500, 503])
def test_the_time_that_a_receiver_asks_for_is_waited_whatever_its_status(receiver: Receiver, status: int) -> None:
    receiver.answers.append(Answer(status, ("Retry-After: 1",)))

    async def test() -> None:
        outbox = reporter.MemoryOutbox()
        outbox.put(report(60))
        async with delivering(receiver, outbox):
            await outbox.settle()

    play(test())
    first, again = receiver.requests
    assert again.time - first.time >= 0.99


def test_a_receiver_cannot_ask_to_be_tried_without_pause(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses grow, up to a bound; Retry-After makes them longer and never shorter."""
    monkeypatch.setattr(reporter, "BACKOFF", (0.1, 0.4))
    monkeypatch.setattr(reporter, "NAP", 0.1)
    monkeypatch.setattr(reporter, "random", SimpleNamespace(uniform=lambda _, most: most))
    receiver.answers.extend([Answer(503, ("Retry-After: 0",))] * 4)

    async def test() -> None:
        outbox = reporter.MemoryOutbox()
        outbox.put(report(60))
        async with delivering(receiver, outbox):
            await outbox.settle()

    play(test())
    times = [request.time for request in receiver.requests]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    for pause, least in zip(pauses, (0.1, 0.2, 0.4, 0.4), strict=True):
        assert pause >= least - 0.01


def test_a_receiver_cannot_ask_for_a_shorter_pause(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "BACKOFF", (1.6, 1.6))
    monkeypatch.setattr(reporter, "NAP", 0.1)
    monkeypatch.setattr(reporter, "random", SimpleNamespace(uniform=lambda _, most: most))
    receiver.answers.append(Answer(503, ("Retry-After: 1",)))

    async def test() -> None:
        outbox = reporter.MemoryOutbox()
        outbox.put(report(60))
        async with delivering(receiver, outbox):
            await outbox.settle()

    play(test())
    first, again = receiver.requests
    assert again.time - first.time >= 1.55


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("status", "taken"), [(200, True), (201, True), (204, True), (299, True), (300, False)])
def test_any_2xx_ends_it(receiver: Receiver, status: int, taken: bool) -> None:
    receiver.answers.append(Answer(status))

    async def test() -> None:
        outbox = reporter.MemoryOutbox()
        outbox.put(report(60))
        async with delivering(receiver, outbox) as webhook:
            await outbox.settle()
            assert webhook.outcomes == ({"delivered": 1} if taken else {"failed": 1, "delivered": 1})

    play(test())
    assert len(receiver.requests) == (1 if taken else 2)


def test_windows_that_are_closed_are_reported_though_the_timer_is_stopped_meanwhile() -> None:
    """After a long suspension there are so many that other work gets a turn in between."""
    windows = [(60 * number, number) for number in range(3 * reporter.BURST)]
    reported: list[tuple[int, int]] = []

    async def roll() -> list[tuple[int, int]]:
        return windows if not reported else []

    async def test() -> None:
        timer = asyncio.create_task(reporter.roll_windows(lambda: 0.0, roll, lambda *window: reported.append(window)))
        while not reported:  # noqa: ASYNC110  # one turn of the loop at a time
            await asyncio.sleep(0)
        assert len(reported) < len(windows)
        timer.cancel()
        await asyncio.wait([timer])

    play(test())
    assert reported == windows
