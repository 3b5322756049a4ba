"""The operators' page, in a real browser: what it shows, and that it can be read."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import browser
import pytest
import servers
import support
from operators import Operators, feed, told, watched
from processes import kill, long_window, wait_until, workers
from receivers import Answer, Receiver


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


@pytest.fixture(scope="module")
def listening() -> Iterator[Operators]:
    with watched() as (_, operators):
        yield operators


# The page


def open_table(page: browser.Page) -> None:
    page.evaluate("document.querySelector('summary').click()")


def reading(page: browser.Page) -> str:
    """Return what is told of a bar; a screen reader tells the same."""
    said = "document.querySelector('#chart').getAttribute('aria-valuetext')"
    text, heard = page.evaluate(f"[document.querySelector('#reading').innerText, {said}]")
    assert heard == text
    return str(text)


def focus_on_chart(page: browser.Page) -> None:
    for _ in range(3):  # two links may stand before it
        page.press("Tab", 9)
        if page.evaluate("document.activeElement.id") == "chart":
            return
    raise AssertionError(page.evaluate("document.activeElement.outerHTML"))


def point_at(page: browser.Page, x: float) -> None:
    """Move the mouse to a place in the chart, in pixels from its left."""
    box = page.evaluate("(box => [box.left, box.top])(document.querySelector('#chart').getBoundingClientRect())")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + x, y=box[1] + 50)


def remember(server: servers.Redis, seconds: int, counts: list[int]) -> int:
    """Put reports of the last windows into the stream, oldest first; return the start of the newest."""
    newest = int(time.time()) // seconds * seconds - seconds
    with server.client() as client, client.pipeline() as pipe:
        for start, count in zip(range(newest - seconds * (len(counts) - 1), newest + 1, seconds), counts, strict=True):
            fields = {"window": f"{datetime.fromtimestamp(start, UTC):%Y-%m-%dT%H:%M:%SZ}", "seconds": seconds}
            pipe.xadd("verve:reports", fields | {"count": count}, id=f"{start}000-0")
        pipe.execute()
    return newest


def fits(page: browser.Page, width: int) -> bool:
    """Return whether nothing has to be scrolled sideways, in the page or in the table."""
    inner = "['html', '#table'].map(name => document.querySelector(name)).every(e => e.scrollWidth <= e.clientWidth)"
    return bool(page.evaluate(f"innerWidth === {width} && {inner}"))


def url_of(operators: Operators) -> str:
    return "http://{}:{}/".format(*operators.address)


def counts(page: browser.Page) -> str:
    return page.text("#count").replace(",", "")


def test_the_page_shows_what_is_counted_as_it_grows() -> None:
    with watched("--window", long_window()) as (program, operators):
        url = url_of(operators)
        with browser.Page(url) as page:
            page.wait_for("document.querySelector('#status').innerText === 'Ready'")
            assert counts(page) == "0"
            feed(program, *range(1234))
            page.wait_for("document.querySelector('#count').innerText === '1,234'")
            page.wait_for("document.querySelector('#requests').innerText.endsWith('1,234 in all')")
            assert page.text("#store") == "memory"
            assert page.text("#webhook") == "none"
            assert page.text("#ids").splitlines()[-1] == "1,234 new, 0 duplicate in all"
            assert page.text("#held").splitlines() == ["1,234", "of 10,000,000"]
            assert page.evaluate("document.querySelectorAll('#chart rect.open').length") == 1
            assert page.evaluate("document.querySelectorAll('#chart rect.closed').length") == 0
            assert set(page.requests) == {url, f"{url}state"}
            assert page.complaints == []


def test_the_page_has_a_bar_and_a_row_for_each_window() -> None:
    with (
        watched("--window", "1") as (program, operators),
        browser.Page(url_of(operators)) as page,
    ):
        with support.Client(program.address) as client:
            client.ask(support.get("/"))  # what follows is alike, so it is taken in one go and in one window
            client.send(*map(support.accept, range(100)))
            assert {answer.status for answer in client.receive(100)} == {200}
        page.wait_for("document.querySelectorAll('#chart rect.closed').length > 4")
        open_table(page)
        page.wait_for("[...document.querySelectorAll('#rows .number')].some(cell => cell.textContent === '100')")
        bars = page.evaluate(
            "[...document.querySelectorAll('rect.closed, rect.open')].map(bar =>"
            " [bar.className.baseVal, +bar.getAttribute('height')])"
        )
        assert [kind for kind, _ in bars].count("open") == 1
        assert min(height for _, height in bars) == 1  # of those without an id, so that they are seen
        room = "document.querySelector('.base').y.baseVal.value - document.querySelectorAll('.grid')[3].y.baseVal.value"
        assert page.evaluate("[...document.querySelectorAll('#chart text.number')].map(text => text.textContent)") == [
            *("0", "25", "50", "75", "100")
        ]
        assert max(height for _, height in bars) == page.evaluate(room)
        assert re.fullmatch(
            r"[0-9]+ counts, from 0 to 100\. The table below has them all\.",
            page.evaluate("document.querySelector('#chart').getAttribute('aria-label')"),
        )
        assert page.text("#title") == "The last 60 windows of a second"
        assert page.complaints == []


def test_the_page_says_that_it_has_lost_touch_and_comes_back() -> None:
    port = servers.free_port()
    with contextlib.ExitStack() as stack:
        with watched("--window", long_window(), at=port) as (program, _):
            page = stack.enter_context(browser.Page(f"http://127.0.0.1:{port}/"))
            feed(program, 1, 2, 3)
            page.wait_for("document.querySelector('#count').innerText === '3'")
        page.wait_for("document.querySelector('#status').innerText.startsWith('No contact with the server since')")
        assert page.evaluate("document.title") == "No contact - Verve"
        assert counts(page) == "3"
        with watched("--window", long_window(), at=port) as (program, _):
            page.wait_for("document.querySelector('#status').innerText === 'Ready'")
            assert counts(page) == "0"
            feed(program, 1)
            page.wait_for("document.querySelector('#count').innerText === '1'")
            assert page.complaints == []


def test_the_page_says_why_it_is_not_ready(server: servers.Redis) -> None:
    with watched("--redis-url", server.url) as (_, operators), browser.Page(url_of(operators)) as page:
        page.wait_for("document.querySelector('#store').innerText.endsWith('in reach')")
        server.kill()
        page.wait_for("document.querySelector('#status').innerText === 'Not ready'")
        page.wait_for("document.querySelector('#notes').innerText.startsWith('Redis is away')")
        page.wait_for("document.querySelector('#store .bad').innerText === 'takes no ids'")
        page.wait_for(
            "document.querySelector('#notes').innerText.endsWith('The counts below are the last that were known')"
        )
        server.start()
        page.wait_for("document.querySelector('#status').innerText === 'Ready'")
        page.wait_for("document.querySelector('#notes').innerText === ''")


def test_a_bar_that_is_chosen_by_keyboard_is_marked_and_told(server: servers.Redis) -> None:
    newest = remember(server, 1000, [7, 0, 1234])
    with (
        watched("--window", "1000", "--redis-url", server.url) as (_, operators),
        browser.Page(url_of(operators)) as page,
    ):
        page.wait_for("document.querySelector('#reading').innerText.endsWith(': 1,234 distinct ids')")
        assert page.evaluate("document.querySelectorAll('.pointed').length") == 0
        focus_on_chart(page)
        said = []
        for key, code in (("ArrowLeft", 37), ("ArrowLeft", 37), ("End", 35), ("Home", 36), ("ArrowRight", 39)):
            page.press(key, code)
            assert page.evaluate("document.querySelectorAll('.pointed').length") == 1
            said.append(reading(page))
        starts = [newest - 1000, newest - 2000, newest + 1000, newest - 2000, newest - 1000]
        names = [f"{datetime.fromtimestamp(start, UTC):%H:%M:%S}" for start in starts]
        counts_ = ["0 distinct ids", "7 distinct ids", "0 distinct ids so far", "7 distinct ids", "0 distinct ids"]
        assert [text[-len(f"{name}: {count}") :] for text, name, count in zip(said, names, counts_, strict=True)] == [
            f"{name}: {count}" for name, count in zip(names, counts_, strict=True)
        ]
        page.press("ArrowLeft", 37)
        page.press("ArrowLeft", 37)
        assert reading(page).endswith(": no count is known")
        page.press("Tab", 9)
        assert page.evaluate("document.querySelectorAll('.pointed').length") == 0
        assert reading(page).endswith(": 1,234 distinct ids")
        assert page.complaints == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_times_stand_under_their_bars(server: servers.Redis, width: int) -> None:
    seconds = next(seconds for seconds in (600, 540, 660) if seconds - time.time() % seconds > 60)  # no end is near
    remember(server, seconds, [*range(1000, 1070)])
    flags = "--redis-url", server.url, "--window", str(seconds)
    with watched(*flags) as (_, operators), browser.Page(url_of(operators), width=width) as page:
        page.wait_for("document.querySelectorAll('#chart rect.closed').length >= 58")
        places = "[...document.querySelectorAll('.time')].map(time => [time.textContent, +time.getAttribute('x')])"
        found = [(time_, x) for time_, x in page.evaluate(places) if ":" in time_]  # the others name a day
        assert len(found) >= 3
        for time_, x in found:
            point_at(page, x)
            assert re.search(rf"\b{time_}: [0-9,]+ distinct ids", reading(page))
            assert page.evaluate("document.querySelectorAll('.pointed').length") == 1
        point_at(page, -100)
        assert page.evaluate("document.querySelectorAll('.pointed').length") == 0


def readings(page: browser.Page) -> str:
    """Return what is told of all windows, by the keys, oldest first."""
    page.press("Home", 36)
    found = [reading(page)]
    while True:
        page.press("ArrowRight", 39)
        found.append(reading(page))
        if found[-1] == found[-2]:
            return "\n".join(found)


def test_windows_in_which_requests_failed_are_marked() -> None:
    with (
        watched("--window", "5", "--max-ids", "2") as (program, operators),
        browser.Page(url_of(operators), width=390) as page,
    ):
        page.wait_for("document.querySelector('#failed').innerText.endsWith('none so far')")
        assert page.evaluate("document.querySelectorAll('#chart .failed').length") == 0
        assert "failed" not in page.text("#legend")
        wait_until(lambda: time.time() % 5 < 3)  # failures are noted once a second
        with support.Client(program.address) as client:
            client.send(*map(support.accept, range(5)))
            assert [answer.status for answer in client.receive(5)] == [200, 200, 503, 503, 503]
        page.wait_for("document.querySelectorAll('#chart .failed').length")
        assert "requests failed" in page.text("#legend")
        assert page.evaluate("document.querySelector('#failed .bad').innerText.endsWith('a second')")
        assert page.text("#failed").endswith("3 in all: window full 3")
        focus_on_chart(page)
        wait_until(lambda: ": 2 distinct ids; 3 requests failed" in readings(page))
        open_table(page)
        page.wait_for("[...document.querySelectorAll('#rows .bad')].some(cell => cell.innerText === '3')")
        assert fits(page, 390)
        assert page.complaints == []


def test_an_outage_is_seen_by_who_looks_first_while_it_lasts(server: servers.Redis) -> None:
    """Windows that are not closed have no bar, but the mark of those in which requests failed."""
    remember(server, 2, [50] * 100)
    with watched("--window", "2", "--redis-url", server.url) as (program, operators):
        feed(program, 1)
        told(program, 1, 0, 0)  # so the instance has looked since the first of them
        server.kill()
        wait_until(lambda: operators.ready()[0] == 503)
        with support.Client(program.address) as client, browser.Page(url_of(operators), width=390) as page:
            page.wait_for("document.querySelectorAll('#chart rect.closed').length > 40")
            marks = "document.querySelectorAll('#chart .failed').length"
            wait_until(lambda: client.ask(support.accept(2)).status == 503 and page.evaluate(marks) >= 3)
            focus_on_chart(page)
            page.press("End", 35)
            page.press("ArrowLeft", 37)
            assert re.search("(no count is known|0 distinct ids, not closed yet)", reading(page))
            assert page.text("#store").endswith("takes no ids")
            assert fits(page, 390)
            assert page.complaints == []


def test_a_day_is_shown_and_fits_a_phone(server: servers.Redis) -> None:
    counts_ = [10] * 1600
    counts_[800] = 0
    counts_[805] = 99_999
    remember(server, 60, counts_)
    with watched("--redis-url", server.url) as (_, operators), browser.Page(url_of(operators), width=390) as page:
        page.wait_for("document.querySelector('#long').offsetWidth")
        assert re.sub(r"\s+", " ", page.text("#ranges")) == "1 hour 1 day"
        assert page.text("#title") == "The last hour, minute by minute"
        page.press("Tab", 9)
        page.press("Tab", 9)
        page.press("Enter", 13)
        page.wait_for("document.querySelector('#title').innerText === 'The last 24 hours, 10 minutes a bar'")
        assert page.evaluate("location.hash") == "#long"
        assert re.match("1,4[34][0-9] counts, from 0 to 99,999\\.", page.evaluate("chart.getAttribute('aria-label')"))
        assert page.text("#legend").split("\n") == ["not closed yet", "lowest window in a bar", "highest"]
        page.press("Tab", 9)
        said = set()
        page.press("Home", 36)
        for _ in range(143):
            page.press("ArrowRight", 39)
            said.add(re.sub(".* to [0-9:]+: ", "", reading(page)))
        assert {"10 distinct ids in a minute"} < said
        assert said <= {
            *(f"{low}{high} distinct ids in a minute" for low in ("0", "10") for high in ("", " to 10", " to 99,999"))
        }
        assert any("99,999" in text for text in said)
        open_table(page)
        page.wait_for("document.querySelectorAll('#rows tr').length >= 1439")
        assert fits(page, 390)
        assert page.complaints == []


def test_a_webhook_that_fails_is_seen_and_fits_a_phone() -> None:
    with (
        Receiver(default=Answer(500)) as receiver,
        watched("--window", "1", "--report-url", receiver.url) as (_, operators),
        browser.Page(url_of(operators), width=390) as page,
    ):
        page.wait_for("document.querySelector('#webhook .bad').innerText.endsWith('to deliver')")
        page.wait_for("document.querySelector('#webhook').innerText.endsWith('last attempt: status 500')")
        open_table(page)
        page.wait_for("document.querySelector('#rows .bad:last-child').innerText === 'waiting'")
        assert fits(page, 390)
        receiver.default = Answer(200)
        page.wait_for("document.querySelectorAll('#webhook .bad').length === 0")
        page.wait_for("[...document.querySelectorAll('#rows td')].some(cell => cell.innerText === 'has it')")


def test_what_the_workers_do_is_told(server: servers.Redis) -> None:
    flags = "--redis-url", server.url, "--workers", "2", "--window", long_window(), "--callback-allow", "127.0.0.0/8"
    with Receiver() as receiver, watched(*flags) as (program, operators):
        wait_until(lambda: operators.ready() == (200, ["ready"]))
        with browser.Page(url_of(operators)) as page:
            page.wait_for("document.querySelector('#workers').innerText === '2 of 2'")
            assert page.text("#wait") == "no id was stored"
            feed(program, 1, 2, 3, 2)
            with support.Client(program.address) as client:
                target = f"{support.PATH}?id=4&endpoint={receiver.url}/"
                assert client.ask(support.get(target)).status == 200
            page.wait_for("document.querySelector('#ids').innerText.endsWith('4 new, 1 duplicate in all')")
            page.wait_for("document.querySelector('#callbacks').innerText.endsWith('1 delivered')")
            assert re.fullmatch(r"p50 (under )?[0-9.]+ ms\np99 (under )?[0-9.]+ m?s", page.text("#wait"))
            page.wait_for("document.querySelector('#wait').innerText === 'no id was stored'")
            os.kill(workers(program)[1], signal.SIGSTOP)
            page.wait_for("document.querySelector('#workers .bad').innerText === '1 of 2'")
            kill(workers(program)[1])
            page.wait_for("document.querySelector('#workers').innerText.startsWith('2 of 2')")
            assert page.text("#workers").endswith("1 replaced so far")
            assert page.complaints == []


def test_the_links_lead_to_what_is_behind_the_page(listening: Operators) -> None:
    with browser.Page(url_of(listening)) as page:
        page.wait_for("document.querySelector('#status').innerText === 'Ready'")
        links = page.evaluate("[...document.querySelectorAll('footer a')].map(link => link.getAttribute('href'))")
        assert links == ["/windows.csv", "/windows", "/metrics", "/readyz"]
        assert {listening.ask(link).status for link in links} == {200}


def test_the_page_of_an_instance_that_never_reached_redis() -> None:
    flags = "--redis-url", f"redis://127.0.0.1:{servers.free_port()}"
    with watched(*flags) as (program, operators), browser.Page(url_of(operators)) as page:
        page.wait_for("document.querySelector('#about').innerText === 'No window is known yet'")
        assert page.text("#status") == "Not ready"
        assert "last that were known" not in page.text("#notes")
        with support.Client(program.address) as client:
            assert client.ask(support.accept(1)).status == 503
        page.wait_for("document.querySelector('#failed').innerText.endsWith('1 in all: store away 1')")
        assert page.complaints == []


CONTRAST = """(() => {
  const light = text => { const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(n => n / 255)
    .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll('body *')].filter(e => e.innerText && !e.children.length);
  return Math.min(...texts.map(e => light(getComputedStyle(e).color))
    .map(text => (Math.max(text, page) + .05) / (Math.min(text, page) + .05)));
})()"""  # WCAG 2.2, 1.4.3


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_the_page_is_readable_on_a_phone_in_the_dark_and_by_keyboard(listening: Operators, width: int) -> None:
    with browser.Page(url_of(listening), width=width) as page:
        page.wait_for("document.querySelector('#status').innerText === 'Ready'")
        colours = []
        for scheme in ("light", "dark"):
            page.prefer(scheme)
            assert page.evaluate(CONTRAST) >= 4.5
            colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert colours[0] != colours[1]
        page.press("Tab", 9)
        assert page.evaluate("document.activeElement.id") == "chart"
        page.press("Tab", 9)
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        page.press("Enter", 13)
        page.wait_for("document.querySelector('details').open")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.complaints == []


def test_the_page_lets_nothing_in(listening: Operators) -> None:
    policy = listening.ask("/").fields["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; ")
    assert "unsafe" not in policy
    with browser.Page(url_of(listening)) as page:
        page.wait_for("document.querySelector('#status').innerText === 'Ready'")
        script = (
            "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s)"
        )
        page.evaluate(f"(() => {{ {script} }})()")
        page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x'}))")
        page.wait_for("1")
        assert page.evaluate("window.broken") is None
        assert any("Content Security Policy" in complaint for complaint in page.complaints)
