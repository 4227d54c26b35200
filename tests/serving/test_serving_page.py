"""The chat page in a real browser, headless."""

from __future__ import annotations

import json
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
    told = page.locator(".assistant .token").all_text_contents()
    assert "".join(told) == answer, "each token has its probability"
    assert len(told) > 5
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


LOOM = "A loom weaves cloth from thread. The warp is held tight."


def test_documents_are_attached_and_told(page: Any, tmp_path: Path) -> None:
    (tmp_path / "loom.md").write_text(LOOM)
    (tmp_path / "bread.txt").write_text("Bread rises because of yeast.")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")
    page.set_input_files("#files", [tmp_path / "loom.md", tmp_path / "bread.txt"])
    page.wait_for_selector("#documents li")
    assert page.locator("#documents li span").all_text_contents() == ["loom.md", "bread.txt"]
    page.set_input_files("#files", [tmp_path / "picture.png"])
    page.wait_for_selector("#trouble:visible")
    assert "picture.png is not plain text" in page.locator("#trouble").text_content()
    page.click("#documents li:last-child button")
    assert page.locator("#documents li").count() == 1
    page.click("#show-settings")
    page.fill("#max_tokens", "10")
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "What does a loom weave?")
    assert asked.value.post_data_json["documents"] == [{"title": "loom.md", "text": LOOM}]
    page.wait_for_selector("#send:visible")
    assert "[1] loom.md" in page.locator(".sources").text_content()
    page.reload()
    page.wait_for_selector("#conversations li")
    page.click("#conversations li button:first-child")
    assert page.locator("#documents li").count() == 1, "they belong to the conversation"


def test_what_an_answer_carries_is_lit(page: Any) -> None:
    """An answer as a server with an index of its own would give it."""
    said = "Löwen 🦁 sleep. A loom weaves cloth. Yes [2]."
    chunks: list[dict[str, Any]] = [{"content": said}]
    chunks.append(
        {
            "sources": [
                {"number": 1, "title": "loom.md", "text": LOOM},
                {"number": 2, "title": "<b>other</b>", "text": "Yes."},
                {"number": 3, "title": "third", "text": "No."},
            ],
            "citations": [
                {"start": 15, "end": 35, "source": 1, "by": "words"},
                {"start": 36, "end": 44, "source": 2, "by": "mark"},
            ],
        }
    )
    body = "".join(
        "data: "
        + json.dumps({"id": "x", "choices": [{"delta": delta, "finish_reason": None}]})
        + "\n\n"
        for delta in chunks
    )
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            body=body + "data: [DONE]\n\n", content_type="text/event-stream"
        ),
    )
    ask(page, "Well?")
    page.wait_for_selector("#send:visible")
    first, second = page.locator(".sources > ul > li").all()
    assert second.text_content() == "[2] <b>other</b> Yes."
    assert page.locator(".sources summary").text_content() == "Read, not cited: 1"
    page.reload()  # without tokens the text is cut where the citations are
    page.wait_for_selector("#conversations li")
    page.click("#conversations li button:first-child")
    first, second = page.locator(".sources > ul > li").all()
    first.hover()
    lit = page.locator(".assistant .text .lit")
    page.wait_for_function("document.querySelectorAll('.text .lit').length > 0")
    assert "A loom weaves cloth." in lit.all_text_contents()[0]
    assert page.locator("[data-marks='[1]']").count() == 1
    assert page.locator("[data-marks='[2]']").count() == 0, "its mark is in the text"
    page.locator(".assistant .text span", has_text="Yes [2].").hover()
    assert "lit" in second.get_attribute("class")
    page.locator("h1").hover()
    assert page.locator(".sources .lit").count() == 0
    assert page.locator(".assistant .text").text_content() == said


def test_attention_is_shown(page: Any, server: Running) -> None:
    page.click("#show-settings")
    page.fill("#max_tokens", "12")
    page.fill("#system", "Be kind.")
    page.fill("#seed", "3")
    ask(page, "Hello")
    page.wait_for_selector("#send:visible")
    page.click(".assistant .who button")
    page.wait_for_selector(".attention .bar:visible")
    box = page.locator(".attention")
    assert "Be kind." in box.locator(".looked").first.text_content()
    assert box.locator("select").first.locator("option").count() == 3  # all, 0, 1
    with page.expect_response("**/v1/attention") as told:
        box.locator("select").first.select_option("1")
    with page.expect_response("**/v1/attention") as told:
        box.locator("select").last.select_option("2")
    said = told.value.json()
    assert (said["layers"], said["heads"]) == (2, 4)
    page.wait_for_function("document.querySelectorAll('.looked.answer .chosen').length === 1")
    texts = box.locator(".looked.answer span").all_text_contents()
    place = max(i for i, text in enumerate(texts) if text.strip())
    box.locator(".looked.answer span").nth(place).click()
    row, prompt = said["weights"][place], box.locator(".looked").first
    assert f"{100 * row[0]:.1f}% at the first token" in box.locator(".note").text_content()
    largest = max(row[1:])
    for place in (1, 5, 9):
        strength = (
            prompt.locator("span")
            .nth(place)
            .evaluate("e => e.style.getPropertyValue('--strength')")
        )
        assert strength == f"{int(70 * row[place] / largest + 0.5)}%"
    shot(page, "attention")
    page.click(".assistant .who button")
    assert page.locator(".attention").count() == 0


def test_attention_that_there_is_none_of_is_told(page: Any) -> None:
    refused = {"error": {"message": "start the server with `--device cpu`", "type": "x"}}
    page.route("**/v1/attention", lambda route: route.fulfill(status=400, json=refused))
    page.click("#show-settings")
    page.fill("#max_tokens", "5")
    ask(page, "Hello")
    page.wait_for_selector("#send:visible")
    page.click(".assistant .who button")
    page.wait_for_function(
        "document.querySelector('.attention .note').textContent.includes('--device cpu')"
    )


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
    page.click(".votes button:has-text('Good')")
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
