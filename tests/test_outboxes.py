"""Outboxes: what is still to be delivered to the webhook, in memory and in Redis, and who delivers it."""

import asyncio

import pytest
import servers
from receivers import Answer, Receiver
from stores import Log, add, ask, name_of, opened, play, until

import dedup
import outbound
import redis_store
import reporter
from redis_store import outbox as outbox_room


def test_the_stream_is_delivered_under_load(server: servers.Redis) -> None:
    """Ids that wait at any time do not keep the webhook from Redis."""

    async def test() -> None:
        numbers = iter(range(100_000))

        def again(_: int) -> None:
            if (number := next(numbers, None)) is not None:
                store.add(number, again)

        async with opened(server.url, max_ids=10**6) as store:
            for _ in range(20):
                again(0)
            await until(lambda: store.count > 1000)
            for _ in range(3):
                assert await redis_store.StreamOutbox(store).keep() == (_ == 0)
            assert next(numbers, None) is not None, "the load was over"
            numbers = iter(())

    play(test())


def test_entries_that_others_wrote_are_passed_over(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url) as store:
            outbox = redis_store.StreamOutbox(store)
            assert await outbox.keep()
            assert await outbox._oldest() == ("", [])
            now = 1000 * (store.window + store.seconds)
            entries = [
                {"x": "y"},
                {"window": "x", "seconds": "60", "count": "1"},
                {"window": "2026-11-22T06:31:00", "seconds": "60", "count": "1"},
                {"window": "2026-11-22T06:31:00Z", "seconds": "x", "count": "1"},
                {"window": "2026-11-22T06:31:00Z", "seconds": "60", "count": "many"},
                {"window": "2026-13-22T06:31:00Z", "seconds": "60", "count": "1"},
                {"window": "2026-1-2T3:4:5Z", "seconds": "60", "count": "1"},
                {"window": "2026-11-22T06:31:00Z", "seconds": "9" * 30, "count": "1"},
                {"window": "é\r\nX: y", "seconds": "60", "count": "1"},
                {"window": "2026-11-22T06:31:00Z", "seconds": "60", "count": "1", "more": "x"},
            ]
            for number, entry in enumerate(entries):
                words = [word for pair in entry.items() for word in pair]
                ask(server, "XADD", "verve:reports", f"{now + number}-0", *words)
            assert await outbox.next() == ("2026-11-22T06:31:00Z", 60, 1, True)
            await outbox.done()
            assert ask(server, "XPENDING", "verve:reports", "webhook")["pending"] == 0
            await outbox.close()
            assert ask(server, "EXISTS", "verve:webhook") == 0

    play(test())


def test_only_one_has_the_lease(server: servers.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_room, "LEASE", 0.5)

    async def test() -> None:
        async with opened(server.url) as store, opened(server.url) as other_store:
            one, other = redis_store.StreamOutbox(store), redis_store.StreamOutbox(other_store)
            assert await one.keep()
            assert not await other.keep()
            await other.close()  # it isn't its
            assert await one.keep()
            await one.close()
            assert await other.keep()
            assert not await one.keep()
            while not await one.keep():  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # it expires, if it is not renewed
            assert not await other.keep()

    play(test())


def test_a_redis_that_refuses_the_webhook_is_told_of(server: servers.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_room, "LEASE", 0.1)

    async def test() -> None:
        async with opened(server.url) as store:
            outbox = redis_store.StreamOutbox(store)
            ask(server, "LPUSH", "verve:webhook", "x")
            with Log() as log:
                waiting = asyncio.create_task(outbox.next())
                await log.wait_for("ERROR verve.store: Redis refuses the webhook's commands")
                ask(server, "DEL", "verve:webhook")
                await log.wait_for("WARNING verve.store: Redis takes the webhook's commands again")
                assert len(log.lines) == 2
                now = store.window + store.seconds
                fields = "window", name_of(now), "seconds", "60", "count", "7"
                ask(server, "XADD", "verve:reports", f"{now}000-0", *fields)
                assert await waiting == (name_of(now), 60, 7, True)

    play(test())


def test_the_outbox_in_memory_keeps_the_first_and_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "MAX_REPORTS", 3)

    async def test() -> None:
        with Log() as log:
            outbox = reporter.MemoryOutbox()
            await outbox.settle()
            for number in range(6):
                outbox.put(reporter.Report(reporter.iso(number), 1, number))
            assert log.lines == [
                f"ERROR verve.reporter: the webhook takes no reports: that of {reporter.iso(lost)} is lost"
                for lost in (1, 2, 3)
            ]
            found = []
            for _ in range(3):
                found.append((await outbox.next())[2])
                await outbox.close()
                await outbox.done()
            assert found == [0, 4, 5]
            assert log.lines[3:] == [
                f"ERROR verve.reporter: reports that the webhook did not take, and are lost: {left}"
                for left in (3, 2, 1)
            ]
            await outbox.settle()
            await outbox.close()
            assert len(log.lines) == 6

    play(test())


def test_a_webhook_that_lost_the_lease_stops_before_the_next_attempt(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "BACKOFF", (0.01, 0.02))
    receiver.default = Answer(500)

    async def test() -> None:
        class Leased(reporter.MemoryOutbox):
            lost = False

            async def keep(self) -> bool:
                return not self.lost and len(receiver.requests) < 3

        outbox = Leased()
        webhook = reporter.Webhook(outbound.parse(receiver.url.encode()), None, "verve", outbox)
        outbox.put(reporter.Report(reporter.iso(60), 60, 7))
        await webhook._deliver(reporter.Report(reporter.iso(60), 60, 7))
        assert await outbox.next() == (reporter.iso(60), 60, 7, True), "it is not noted as delivered"
        assert len(receiver.requests) == 3
        assert webhook.why == "", "another delivers, and knows"
        await webhook.close()

    play(test())


def test_ids_and_reports_go_to_redis_together(server: servers.Redis) -> None:
    async def test() -> None:
        async with opened(server.url) as store:
            outbox = redis_store.StreamOutbox(store)
            results = await asyncio.gather(outbox.keep(), add(store, 1), outbox.keep(), add(store, 2))
            assert [*results] == [True, dedup.STORED, True, dedup.STORED]

    play(test())
