"""The chat page in a real browser, headless."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")
from playwright import sync_api
from serving.tiny_server import Brake, Running, running, tiny_engine

from treadle.serving.pool import Base
from treadle.serving.trial import Trial

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("trial") / "votes.jsonl"
    offers = [Base("tiny", tiny_engine), Base("other", lambda: tiny_engine(1))]
    offers.append(Brake().offer("slow"))
    trials = [Trial(name="duel", a="tiny", b="other")]
    with running(offers, trials=trials, trial_log=log) as it:
        yield it


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not BROWSER:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    page = browser.new_page(color_scheme="light")
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.goto(server.url)
    page.wait_for_selector("#model option", state="attached")
    yield page
    page.close()
    assert [p for p in problems if "status of 400" not in p] == []


def ask(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def shot(page: Any, name: str) -> None:
    """A picture to look at, where TREADLE_SHOTS names a folder."""
    if folder := os.environ.get("TREADLE_SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_a_conversation_in_a_browser(page: Any) -> None:
    assert page.locator("#model option").all_text_contents() == [
        "tiny",
        "other",
        "slow",
        "duel (trial)",
    ]
    page.click("#show-settings")
    page.fill("#max_tokens", "40")
    page.fill("#seed", "3")
    ask(page, "Hello")
    page.wait_for_selector("#send:visible")
    answer = page.locator(".assistant .text").text_content()
    assert answer
    page.locator(".assistant .token", has_text=re.compile("[a-zA-Z]")).first.hover()
    shown = page.locator("#tip td").all_text_contents()
    assert shown[1].endswith("%")
    shot(page, "light")
    page.click("#theme")
    page.check("#shade")
    shot(page, "dark")
    assert page.locator("#messages.shade").count() == 1
    ask(page, "Again")
    page.wait_for_selector("#send:visible")
    assert page.locator("article").count() == 4

    page.reload()  # history and settings are there again
    page.wait_for_selector("#conversations li")
    assert page.input_value("#max_tokens") == "40"
    assert page.locator("html[data-theme=dark]").count() == 1
    page.click("#conversations li button:first-child")
    assert page.locator(".assistant .text").first.text_content() == answer
    page.click("#conversations li button:last-child")
    assert page.locator("#conversations li").count() == 0


def test_the_answer_is_the_servers(page: Any, server: Running) -> None:
    page.click("#show-settings")
    page.fill("#seed", "11")
    page.fill("#max_tokens", "30")
    ask(page, "Hi")
    page.wait_for_selector("#send:visible")
    answer = server.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        seed=11,
        max_tokens=30,
        temperature=0.7,
        top_p=0.95,
    )
    shown = page.locator(".assistant .text").evaluate("e => e.textContent")
    assert shown == answer.choices[0].message.content


def test_stop(page: Any, server: Running) -> None:
    page.select_option("#model", "slow")
    page.click("#show-settings")
    page.fill("#max_tokens", "900")
    page.fill("#top_k", "1")
    ask(page, "A long one")
    page.wait_for_selector(".assistant .token")
    page.click("#stop")
    page.wait_for_selector("#send:visible")
    assert page.locator(".who", has_text="stopped").count() == 1
    assert page.locator(".assistant .text").text_content()


def test_markup_is_shown_and_not_obeyed(page: Any) -> None:
    hostile = (
        "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    )
    page.click("#show-settings")
    page.fill("#max_tokens", "3")
    ask(page, hostile)
    page.wait_for_selector("#send:visible")
    assert page.locator(".user .text").text_content() == hostile
    assert page.locator("#messages img, #messages script").count() == 0
    assert page.title() == "treadle"


def test_errors_are_told(page: Any) -> None:
    page.click("#show-settings")
    page.fill("#system", "x" * 2000)
    with page.expect_response("**/chat/completions"):
        ask(page, "Hello")
    page.wait_for_selector("#trouble:visible")
    assert "shorten the prompt" in page.locator("#trouble").text_content()
    assert page.locator(".assistant").count() == 0


def test_a_vote(page: Any, server: Running) -> None:
    page.select_option("#model", "duel")
    page.click("#show-settings")
    page.fill("#max_tokens", "5")
    ask(page, "Hello")
    page.wait_for_selector(".votes button")
    page.click(".votes button[aria-label=Good]")
    page.wait_for_selector(".votes:has-text('voted good')")


def test_phone(page: Any) -> None:
    page.set_viewport_size(PHONE)
    page.click("#show-settings")
    page.fill("#max_tokens", "60")
    page.click("#show-settings")
    ask(page, "Hello")
    page.wait_for_selector("#send:visible")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["width"]
    shot(page, "phone")
    page.click("#show-history")
    page.click("#conversations li button:first-child")
    assert not page.locator("#history").is_visible()


def test_files_of_the_page_are_named(server: Running) -> None:
    import httpx

    assert httpx.get(f"{server.url}/page/..%2Fapp.py").status_code == 404
    assert httpx.get(f"{server.url}/page/app.py").status_code == 404
    index = httpx.get(server.url)
    assert "script-src 'self'" in index.headers["content-security-policy"]
