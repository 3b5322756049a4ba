"""The webhook: one report a window, in order, at least once, whatever becomes of the receiver, of us and of Redis.

Most tests run the whole program with windows of a second, and a receiver that is scripted, stopped and started. Times
that would make a test long (those between attempts, and of the lease) are set to a fraction where a test says so with
`quick`: the order of events is what matters, and it does not depend on them.
"""

import base64
import contextlib
import email.utils
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import servers
import standardwebhooks
import support
from receivers import HANG, RESET, Answer, Receiver, Request
from stores import long_window, start_of

import reporter

KEY = base64.b64encode(bytes(range(32))).decode()
QUICK = "reporter.BACKOFF = (0.02, 0.2); reporter.SPREAD = 0.05; reporter.NAP = 0.1; reporter.HURRY = 0.05"
CUT = Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Le")
STOP = 20.0  # seconds that a stopping process takes at most on a busy machine, where it would be a minute if it hung


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


def quick(*more: str) -> tuple[str, ...]:
    return support.patched("\n".join([QUICK, *more]))


def second(*flags: str) -> tuple[str, ...]:
    return "--window", "1", *flags


def body_of(request: Request) -> dict[str, Any]:
    found = json.loads(request.body)
    assert isinstance(found, dict)
    return found


def windows(requests: list[Request]) -> list[str]:
    return [body_of(request)["window"] for request in requests]


def starts(requests: list[Request]) -> list[int]:
    return [start_of(window) for window in windows(requests)]


def logged(program: support.Program, *, final: bool = True) -> list[tuple[str, int]]:
    """Return windows and counts as the log has them."""
    pattern = r"unique ids in (\S+): ([0-9]+)" + ("$" if final else r"\b")
    found = [re.search(pattern, line) for line in program.log.all]
    return [(match[1], int(match[2])) for match in found if match]


def in_stream(server: servers.Redis) -> list[tuple[str, int]]:
    """Return windows and counts as the stream has them."""
    with server.client() as client:
        entries: Any = client.xrange("verve:reports")
    return [(fields["window"], int(fields["count"])) for _, fields in entries]


def told(requests: list[Request]) -> list[tuple[str, int]]:
    return [(body["window"], body["count"]) for body in map(body_of, requests)]


def once(requests: list[Request]) -> list[tuple[str, int]]:
    """Return what was told, each window the first time."""
    return list(dict.fromkeys(told(requests)))


def consecutive(found: list[int]) -> bool:
    return found == [*range(found[0], found[0] + len(found))]


def feed(program: support.Program, count: int) -> None:
    """Have new ids counted."""
    with support.Client(program.address) as client:
        for number in range(count):
            assert client.ask(support.accept(time.monotonic_ns() + number)).status == 200


@dataclass
class Away:
    """A program whose receiver is away for a while, and what it had delivered before."""

    program: support.Program
    receiver: Receiver
    before: int = 0


@pytest.fixture(scope="module", autouse=True)
def away() -> Iterator[tuple[list[Away], threading.Thread]]:
    """Two programs, in memory and with Redis, whose receivers are away for twenty windows, while other tests run."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(servers.Redis(next(iter(servers.ENGINES))))
        found = []
        for flags in (), ("--redis-url", server.url):
            receiver = stack.enter_context(Receiver())
            program = support.verve(*second(*flags), "--report-url", receiver.url, prefix=quick())
            found.append(Away(stack.enter_context(program), receiver))
        for one in found:
            one.receiver.wait_for(1)
            one.receiver.stop()
            one.before = len(one.receiver.requests)

        def work() -> None:
            for round_ in range(20):
                lines = [len(one.program.log.all) for one in found]
                for one, start in zip(found, lines, strict=True):
                    feed(one.program, round_ % 4)
                    one.program.log.wait_for("unique ids in", start)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield found, thread
        finally:
            thread.join()


# What is sent


@pytest.mark.parametrize(("stored", "given"), [("memory", KEY), ("redis", f"whsec_{KEY}")])
def test_a_report_is_what_standard_webhooks_expects(
    server: servers.Redis, receiver: Receiver, stored: str, given: str
) -> None:
    flags = ("--redis-url", server.url, "--key-prefix", "shop") if stored == "redis" else ()
    url = receiver.url.replace("//", "//me:p%40ss@") + "/hook?to=me"
    with support.verve(
        *second(*flags), "--report-url", url, "--report-secret", given, "--log-level", "debug"
    ) as program:
        feed(program, 3)
        receiver.wait_until(lambda requests: sum(body_of(request)["count"] for request in requests) == 3, "three ids")
    for request in receiver.requests[: 1 if stored == "memory" else None]:
        body = body_of(request)
        assert list(body) == ["window", "seconds", "count", "final"]
        count = body["count"]
        window = body["window"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", window)
        text = f'{{"window": "{window}", "seconds": 1, "count": {count}, "final": true}}'
        assert request.body == text.encode()
        sent = request.fields["webhook-timestamp"]
        assert re.fullmatch("[0-9]{10}", sent)
        signature = request.fields["webhook-signature"]
        assert signature.startswith("v1,")
        assert request.head.split("\r\n") == [
            "POST /hook?to=me HTTP/1.1",
            f"Host: 127.0.0.1:{receiver.port}",
            "User-Agent: verve",
            f"webhook-id: {'shop' if stored == 'redis' else 'verve'}/{window}",
            f"webhook-timestamp: {sent}",
            f"webhook-signature: {signature}",
            "Authorization: Basic " + base64.b64encode(b"me:p@ss").decode(),
            "Content-Type: application/json",
            f"Content-Length: {len(text)}",
            "",
            "",
        ]
        for secret in KEY, f"whsec_{KEY}":
            assert standardwebhooks.Webhook(secret).verify(request.body, request.fields) == body
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            standardwebhooks.Webhook(KEY).verify(request.body.replace(b"1", b"2"), request.fields)
    everything = "\n".join(program.log.all)
    assert f"the webhook at {receiver.url}" in everything
    assert f"the webhook took the report of {windows(receiver.requests)[0]}" in everything
    for private in KEY, "p%40ss", "p@ss", "/hook", "to=me", base64.b64encode(b"me:p@ss").decode(), "Basic":
        assert private not in everything


def test_a_report_without_secret_and_password(receiver: Receiver) -> None:
    with support.verve(*second(), "--report-url", receiver.url, prefix=quick()):
        (request, *_) = receiver.wait_for(1)
    assert "webhook-signature" not in request.fields
    assert "authorization" not in request.fields
    assert request.fields["webhook-id"] == f"verve/{windows([request])[0]}"


def test_secrets_are_not_told_when_the_receiver_fails(receiver: Receiver) -> None:
    receiver.answers.extend([Answer(500), Answer(RESET), Answer(302, ("Location: /secret-path",))])
    url = receiver.url.replace("//", "//user:password@") + "/secret-path"
    flags = "--report-url", url, "--report-secret", KEY, "--log-level", "debug", "--drain-timeout", "0.5"
    with support.verve(*second(), *flags, prefix=quick()) as program:
        receiver.wait_for(4)
        receiver.stop()
        program.log.wait_for("tried again: [Cc]onn")
        program.process.send_signal(signal.SIGINT)
        assert program.wait() == 0
    for private in KEY, "password", "secret-path":
        assert private not in "\n".join(program.log.all)


@pytest.mark.parametrize("host", ["127.1", "0x7f.1", "2130706433", "127.0.0.01", "a..b", "127.0.0.1.", "1.2.3.4.5"])
def test_an_unclear_url_is_refused_at_the_start(host: str) -> None:
    found = support.run("--report-url", f"http://user:password@{host}/")
    assert found.returncode == 2
    assert found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert "--report-url" in line
    assert "password" not in line


# Again and again


def test_a_report_is_tried_until_it_is_taken(receiver: Receiver) -> None:
    others = (
        Answer(404),
        Answer(302, ("Location: /other",)),
        CUT,
        Answer(raw=b"nonsense\r\n\r\n"),
        Answer(410),
    )
    receiver.answers.extend([Answer(500), Answer(500), *others, Answer(204)])
    with support.verve(*second(), "--report-url", receiver.url, prefix=quick()) as program:
        found = receiver.wait_for(8 + 2)
        program.log.wait_for("the webhook takes reports again")
    assert {request.target for request in found} == {"/"}
    after = next(n for n, window in enumerate(windows(found)) if window != windows(found)[0])
    assert after >= 8
    assert len({(request.body, request.fields["webhook-id"]) for request in found[:8]}) == 1
    assert consecutive(starts(found[after - 1 :]))
    first = windows(found)[0]
    text = "\n".join(program.log.all)
    for why in "status 500", "status 404", "status 302", "closed", "not HTTP", "status 410":
        assert re.search(f"WARNING .*did not take the report of {first}, and is tried again: .*{why}", text)
    assert len(re.findall("tried again: status 500", text)) == 1, "told once while it is the same"
    assert f"takes reports again, from that of {first} on" in text


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_is_obeyed(receiver: Receiver, kind: str) -> None:
    value = "2" if kind == "seconds" else email.utils.formatdate(time.time() + 3, usegmt=True)
    receiver.answers.append(Answer(503, (f"Retry-After: {value}",)))
    with support.verve(*second(), "--report-url", receiver.url, prefix=quick()):
        first, again, *_ = receiver.wait_for(2)
    assert windows([first]) == windows([again])
    if kind == "seconds":
        assert again.time - first.time >= 1.9
    else:
        sent = email.utils.parsedate_to_datetime(value).timestamp()
        assert time.time() - time.monotonic() + again.time >= sent - 0.2


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("", 0, 0),
        ("0", 0, 0),
        ("1", 1, 1),
        ("007", 7, 7),
        ("120", 120, 120),
        ("599", 599, 599),
        ("600", 600, 600),
        ("601", 600, 600),
        ("1000000000", 600, 600),
        ("9" * 64, 600, 600),
        ("-1", 0, 0),
        ("+1", 0, 0),
        ("1.5", 0, 0),
        ("1e3", 0, 0),
        ("\u0661", 0, 0),
        ("\xb2", 0, 0),
        ("1, 2", 0, 0),
        ("soon", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 600, 600),
        ("Fri, 31 Dec 99999 23:59:59 GMT", 0, 0),
        ("Fri, 31 Foo 2099 23:59:59 GMT", 0, 0),
        ("Mon, 01 Jan 0001 00:00:00 +2300", 0, 0),
        (":::", 0, 0),
    ],
)
def test_retry_after_as_a_table(value: str, low: float, high: float) -> None:
    assert low <= reporter.retry_after(value) <= high


@pytest.mark.parametrize(
    "form",
    ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y", "%d %b %Y %H:%M:%S -0000"],
)
@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "JST-9"])
def test_retry_after_as_a_date(monkeypatch: pytest.MonkeyPatch, form: str, zone: str) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        value = time.strftime(form, time.gmtime(time.time() + 100))
        assert 60 < reporter.retry_after(value) <= 100
    time.tzset()


# Receivers that are away


def test_another_instance_goes_on_when_the_one_that_delivers_is_killed(
    server: servers.Redis, receiver: Receiver
) -> None:
    """The lease is short."""
    prefix = quick("redis_store.outbox.LEASE = 2.0")
    flags = second("--redis-url", server.url, "--report-url", receiver.url)
    with support.verve(*flags, prefix=prefix) as one:
        receiver.wait_for(2)
        receiver.default = Answer(HANG)
        before = len(receiver.requests)
        receiver.wait_for(before + 1)
        with support.verve(*flags, prefix=prefix) as other:
            other.log.wait_for("unique ids in")
            one.end()
            receiver.default = Answer()
            receiver.release()
            last = start_of(logged(other)[-1][0]) + 4
            receiver.wait_until(lambda requests: starts(requests)[-1] >= last, "the other's windows")
            assert other.stop() == 0
    found = once(receiver.requests)
    assert found == [entry for entry in in_stream(server) if found[0] <= entry <= found[-1]]
    assert consecutive([start_of(window) for window, _ in found])
    assert len(receiver.requests) - len(found) <= 2, "only what was under way is sent again"


def test_the_next_instance_delivers_what_the_last_left(server: servers.Redis, receiver: Receiver) -> None:
    flags = second("--redis-url", server.url, "--report-url", receiver.url)
    with support.verve(*flags, prefix=quick()) as program:
        receiver.wait_for(1)
        receiver.stop()
        for _ in range(3):
            feed(program, 2)
            program.log.wait_for("unique ids in", len(program.log.all))
    left = in_stream(server)[-1]
    receiver.start()
    with support.verve(*flags, prefix=quick()):
        receiver.wait_until(lambda requests: left in told(requests), "what was left")
    found = told(receiver.requests)
    assert found == [entry for entry in in_stream(server) if found[0] <= entry <= found[-1]]


def test_a_receiver_that_hangs_does_not_hold_the_exit(receiver: Receiver) -> None:
    receiver.default = Answer(HANG)
    slow = quick("outbound.EXCHANGE_TIME = 60.0")
    with support.verve(*second(), "--report-url", receiver.url, "--drain-timeout", "0.5", prefix=slow) as program:
        receiver.wait_for(1)
        since = time.monotonic()
        assert program.stop() == 0
        assert time.monotonic() - since < STOP
    text = "\n".join(program.log.all)
    assert "not everything that waited was told within 0.5 s" in text
    assert re.search("ERROR .*reports that the webhook did not take, and are lost: [1-9]", text)


# The first and the last


def test_what_is_counted_so_far_is_told_at_the_end(receiver: Receiver) -> None:
    with support.verve("--window", str(long_window()), "--report-url", receiver.url) as program:
        feed(program, 5)
        assert program.stop() == 0
        ((window, count),) = logged(program, final=False)
        (request,) = receiver.requests
        assert count == 5
        assert body_of(request) == {
            "window": window,
            "seconds": body_of(request)["seconds"],
            "count": 5,
            "final": False,
        }
        assert b'"final": false}' in request.body


def test_the_end_of_a_program_with_a_failing_receiver_is_tried_again(receiver: Receiver) -> None:
    receiver.answers.extend([Answer(500), Answer(503, ("Retry-After: 100",))])
    with support.verve("--window", str(long_window()), "--report-url", receiver.url) as program:
        feed(program, 1)
        assert program.stop() == 0
        assert [body_of(request)["count"] for request in receiver.requests] == [1, 1, 1]


def test_with_redis_the_open_window_is_not_told_at_the_end(server: servers.Redis, receiver: Receiver) -> None:
    flags = "--redis-url", server.url, "--report-url", receiver.url
    with support.verve("--window", str(long_window()), *flags) as program:
        feed(program, 5)
    assert receiver.requests == []


def test_a_webhook_can_be_added_to_a_fleet(server: servers.Redis, receiver: Receiver) -> None:
    flags = second("--redis-url", server.url)
    with support.verve(*flags) as one:
        one.log.wait_for("unique ids in")
        backlog = in_stream(server)
        with support.verve(*flags, "--report-url", receiver.url, prefix=quick()):
            feed(one, 3)
            receiver.wait_for(2)
    found = told(receiver.requests)
    assert not {*found} & {*backlog}
    assert consecutive(starts(receiver.requests))
    assert {*found} <= {*in_stream(server)}


def test_the_first_window_that_is_closed_is_the_first_that_is_delivered(
    server: servers.Redis, receiver: Receiver
) -> None:
    """Others have reported windows before."""
    flags = second("--redis-url", server.url)
    with support.verve(*flags) as one:
        one.log.wait_for("unique ids in")
        with support.verve(*flags, "--report-url", receiver.url, prefix=quick()) as program:
            feed(program, 2)
            receiver.wait_for(3)
            found = told(receiver.requests)
            assert found == logged(program)[: len(found)]


def test_windows_closed_while_redis_was_not_there_yet_are_not_missed(receiver: Receiver) -> None:
    """The webhook begins with the first window that is closed, even if Redis comes later than we do."""
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        server.kill()
        with support.verve(*second("--redis-url", server.url), "--report-url", receiver.url, prefix=quick()) as program:
            program.log.wait_for("Redis is away")
            server.start()
            receiver.wait_for(2)
            found = told(receiver.requests)
            assert found == in_stream(server)[: len(found)]


def test_later_windows_are_delivered_when_redis_lost_everything(server: servers.Redis, receiver: Receiver) -> None:
    """Whichever of two instances comes first then."""
    flags = second("--redis-url", server.url, "--report-url", receiver.url)
    with support.verve(*flags, prefix=quick()) as one, support.verve(*flags, prefix=quick()) as other:
        receiver.wait_for(2)
        server.kill()
        for program in one, other:
            program.log.wait_for("Redis is away")
        before = len(receiver.requests)
        server.start()
        feed_until_up(one)
        receiver.wait_for(before + 3)
        entries = in_stream(server)
    found = [entry for entry in once(receiver.requests) if entry in entries]
    assert found[:3] == entries[:3]
    assert once(receiver.requests) == sorted(once(receiver.requests))


def feed_until_up(program: support.Program) -> None:
    program.log.wait_for("Redis is back")
    feed(program, 3)


# Several who could


def test_workers_deliver_a_window_once(server: servers.Redis, receiver: Receiver) -> None:
    flags = second("--redis-url", server.url, "--workers", "2", "--report-url", receiver.url)
    with support.verve(*flags, prefix=quick()) as program:
        for count in 1, 2, 3:
            feed(program, 8)
            receiver.wait_for(count)
    assert consecutive(starts(receiver.requests))
    assert {*told(receiver.requests)} <= {*in_stream(server)}


def test_windows_that_ended_while_no_worker_lived_are_told_by_a_successor(
    server: servers.Redis, receiver: Receiver
) -> None:
    """The parent is stopped meanwhile, so that it starts none; the windows are empty, but for the first."""
    flags = second("--redis-url", server.url, "--workers", "2", "--report-url", receiver.url)
    with support.verve(*flags, prefix=quick("redis_store.outbox.LEASE = 2.0")) as program:
        feed(program, 2)
        receiver.wait_for(2)
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        program.freeze()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        with server.client() as redis:
            until = redis.time()[0] + 4
            while redis.time()[0] < until:
                time.sleep(0.02)
        program.thaw()
        receiver.wait_until(lambda requests: starts(requests)[-1] > until, "a window that a successor lived through")
        found = once(receiver.requests)
        assert consecutive([start_of(window) for window, _ in found])
        assert consecutive([start_of(window) for window, _ in logged(program)])
        assert found == in_stream(server)[: len(found)]


def test_instances_deliver_a_window_once(server: servers.Redis, receiver: Receiver) -> None:
    flags = second("--redis-url", server.url, "--report-url", receiver.url)
    with support.verve(*flags) as one, support.verve(*flags) as other, support.verve(*flags) as third:
        for count in 1, 2:
            for program in one, other, third:
                feed(program, count)
            receiver.wait_for(count)
        assert one.stop() == 0  # another may take over, at once
        receiver.wait_for(len(receiver.requests) + 2)
    assert consecutive(starts(receiver.requests))
    assert {*told(receiver.requests)} <= {*in_stream(server)}


# At a stop


def test_a_status_is_taken_whatever_becomes_of_the_body(receiver: Receiver) -> None:
    receiver.default = Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + bytes(70_000))
    with support.verve(*second(), "--report-url", receiver.url, prefix=quick()) as program:
        found = receiver.wait_for(3)
        assert len(set(windows(found))) == 3
        receiver.default = Answer(200)
        assert program.stop() == 0


def test_a_client_that_sends_half_a_request_does_not_cost_the_last_report(receiver: Receiver) -> None:
    flags = "--window", "86400", "--report-url", receiver.url, "--drain-timeout", "3"
    with support.verve(*flags) as program, support.Client(program.address) as client:
        client.send(b"GET /")
        assert program.stop() == 0
        (request,) = receiver.wait_for(1)
        assert json.loads(request.body)["final"] is False


def test_a_report_on_its_way_is_waited_for_at_a_stop(server: servers.Redis, receiver: Receiver) -> None:
    receiver.default = Answer(HANG)
    flags = *second(), "--redis-url", server.url, "--report-url", receiver.url
    with support.verve(*flags, prefix=quick()) as program:
        receiver.wait_for(1)
        program.send(signal.SIGTERM)
        program.log.wait_for("stopping")
        receiver.release()
        assert program.wait() == 0
    with server.client() as client:
        (group,) = client.xinfo_groups("verve:reports")
        assert group["pending"] == 0


@pytest.mark.parametrize("files", [False, True])
def test_nothing_private_is_in_the_title_of_the_process(receiver: Receiver, tmp_path: Path, files: bool) -> None:
    """By environment variables the secret and the password stay out of what other users see; by files, of both."""
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("reads /proc")
    env = {"VERVE_REPORT_URL": receiver.url.replace("//", "//me:password@"), "VERVE_REPORT_SECRET": KEY}
    if files:
        for name, text in env.items():
            (tmp_path / name).write_text(text + "\n")
        env = {f"{name}_FILE": str(tmp_path / name) for name in env}
    with support.verve(*second(), prefix=("env", *map("=".join, env.items()))) as program:
        (request, *_) = receiver.wait_for(1)
        assert standardwebhooks.Webhook(KEY).verify(request.body, request.fields)
        assert request.fields["authorization"] == "Basic " + base64.b64encode(b"me:password").decode()
        seen = Path(f"/proc/{program.pid}/cmdline").read_bytes()
        if files:
            seen += Path(f"/proc/{program.pid}/environ").read_bytes()
        assert b"password" not in seen
        assert KEY.encode() not in seen


# This test is the last, since others run while its receivers are away.


def test_a_receiver_that_was_away_for_twenty_windows_gets_them_all(away: tuple[list[Away], threading.Thread]) -> None:
    """The waits between attempts are short; in earnest the first after a long time away comes within a minute."""
    found, thread = away
    thread.join()
    for one in found:
        assert len(one.receiver.requests) == one.before
        one.program.log.wait_for("WARNING .* is tried again: [Cc]onn")
        one.receiver.start()
    for one in found:
        one.receiver.wait_for(one.before + 20)
        one.program.log.wait_for("takes reports again")
        assert one.program.stop() == 0
        delivered = told(one.receiver.requests)
        assert delivered == logged(one.program, final=False)[: len(delivered)]
        assert consecutive(starts(one.receiver.requests))
        assert len(delivered) >= 20 + one.before
        assert {count for _, count in delivered} >= {0, 1, 2, 3}
