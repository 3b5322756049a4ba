"""The operators' page, in a real browser: what it shows, and that it can be read."""

import contextlib
import re
from collections.abc import Iterator

import browser
import pytest
import servers
import support
from operators import Operators, feed, watched
from processes import long_window


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


@pytest.fixture(scope="module")
def listening() -> Iterator[Operators]:
    with watched() as (_, operators):
        yield operators


# The page


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
            assert page.evaluate("document.querySelectorAll('#chart rect').length") == 1
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
        page.wait_for("document.querySelectorAll('#chart rect').length > 4")
        page.wait_for("[...document.querySelectorAll('#rows .number')].some(cell => cell.textContent === '100')")
        bars = page.evaluate(
            "[...document.querySelectorAll('rect')].map(bar => [bar.className.baseVal, +bar.getAttribute('height')])"
        )
        assert [kind for kind, _ in bars].count("open") == 1
        assert max(height for _, height in bars) == 100
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
        page.wait_for("document.querySelector('#notes').innerText.includes('the last that were known')")
        server.start()
        page.wait_for("document.querySelector('#status').innerText === 'Ready'")
        page.wait_for("document.querySelector('#notes').innerText === ''")


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
