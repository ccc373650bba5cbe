"""The live page in a browser: Debian's chromium, or playwright's own where that is installed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.http_server import serving

api = pytest.importorskip("playwright.sync_api", reason="the extra `page` is not installed")
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "page.png"
OTHER = """(() => {
  const other = [...slots].find(([number, slot]) => slot.live && number !== chosen)[0];
  $("slot").value = other;
  $("slot").dispatchEvent(new Event("change"));
  return other;
})()"""
ALL_NAMED = """[...document.querySelectorAll("button, input, textarea, select")].every((each) =>
  each.textContent.trim() || each.labels?.length || each.getAttribute("aria-label"))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[api.Browser]:
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium
        found = shutil.which("chromium") or chromium.executable_path
        if not Path(found).exists():
            pytest.skip("no browser: apt-get install chromium, or playwright install chromium")
        with chromium.launch(executable_path=found, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture
def page(browser) -> Iterator[api.Page]:
    """Give a page whose script and console must have no error."""
    errors: list[str] = []
    with browser.new_page() as page:
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda told: told.type == "error" and errors.append(told.text))
        yield page
    assert [error for error in errors if "401" not in error] == []


def ask(page: api.Page, tokens: int) -> None:
    page.fill("#most", str(tokens))
    page.fill("#temperature", "0.7")
    page.fill("#prompt", "pack my box")
    page.press("#prompt", "Enter")


def until(page: api.Page, condition: str, seconds: float = 60) -> None:
    """Wait for a condition; the page's own policy forbids playwright's way."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def live(page: api.Page) -> None:
    until(page, "document.getElementById('link').textContent === 'live'")


def test_a_generation_appears_as_it_grows_and_a_reload_recovers(page, server, tmp_path) -> None:
    page.goto(server.url)
    live(page)
    ask(page, 430)
    until(page, "document.querySelectorAll('.assistant span').length > 5")
    until(page, "waves.size > 3 && document.querySelectorAll('.right').length > 2")
    until(page, "document.getElementById('speed').textContent !== '–'")
    until(page, "[...nodes.values()].some((node) => node.kind === 'hit')")
    until(page, "[...nodes.values()].some((node) => node.died)")
    page.screenshot(path=tmp_path / "page.png")
    assert not page.evaluate("messages.at(-1).done")
    before = page.evaluate("plainText(messages.at(-1).pieces)")
    page.reload()
    live(page)
    assert page.inner_text(".user") == "pack my box"
    until(page, "waves.size > 3")
    until(page, "messages.at(-1).done", 200)
    message = page.evaluate("messages.at(-1)")
    assert "with the same text so far" in message["about"]
    request = message["request"] | {"stream": False}
    whole = server.post("/v1/chat/completions", request).json()["choices"][0]["message"]["content"]
    assert message["content"] == whole
    assert whole.startswith(before)
    shown = page.evaluate(
        "[...document.querySelectorAll('.assistant span')].map(e => e.textContent)"
    )
    assert "".join(shown) == whole


def test_of_several_requests_one_is_chosen(page, server) -> None:
    page.goto(server.url)
    live(page)
    body = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True}
    with ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(server.post, "/v1/completions", body) for _ in range(2)]
        until(page, "!document.getElementById('slots').hidden")
        other = page.evaluate(OTHER)
        assert page.evaluate("[chosen, $('slot').value]") == [other, str(other)]
        until(page, "[...nodes.values()].some((node) => node.slot === chosen)")
        assert [answer.result().status_code for answer in answers] == [200, 200]
    until(page, "document.getElementById('slots').hidden")
    page.goto("about:blank")


def test_a_key_is_asked_for_and_kept(page, llm) -> None:
    with serving(llm, api_key="secret") as served:
        page.goto(served.url)
        page.fill("#secret", "wrong")
        page.press("#secret", "Enter")
        until(page, "document.getElementById('secret').value === ''")
        page.wait_for_selector("#lock", state="visible")
        page.fill("#secret", "secret")
        page.press("#secret", "Enter")
        live(page)
        page.reload()
        live(page)
        assert page.is_hidden("#lock")
        page.goto("about:blank")  # or its stream would hold up the server's end


def test_a_phone_and_a_keyboard_are_enough(page, server) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    for path in ("/", "/docs"):
        page.goto(server.url + path)
        page.wait_for_load_state("networkidle" if path == "/docs" else "load")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert "logit_bias" in page.inner_text("main")
    page.goto(server.url)
    live(page)
    assert page.evaluate(ALL_NAMED)
    page.focus("#speeds button")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.get_attribute("#speeds button:nth-of-type(2)", "aria-pressed") == "true"
    ask(page, 200)
    until(page, "document.querySelectorAll('.assistant span').length > 5")
    page.focus("#stop")
    page.keyboard.press("Enter")
    until(page, "messages.at(-1).about === 'stopped'")
    page.goto("about:blank")


def test_the_docs_have_a_small_picture_of_it() -> None:
    assert PICTURE.read_bytes().startswith(b"\x89PNG")
    assert PICTURE.stat().st_size < 150_000
