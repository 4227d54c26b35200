"""A person's verdicts: kept at once, turned back, asked for in a browser; bad input."""

from __future__ import annotations

import io
import json
import shutil
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from treadle.alignment.feedback import Comparison, Verdict
from treadle.alignment.person import ByPerson, Desk, _handler
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.core.progress import Progress, Silent
from treadle.data.problems import Problems
from treadle.data.records import Problem, user

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
PAIRS = [
    Comparison(Problem((user(f"question {i} <b>"),), "", "exact"), f"one {i} <i>x</i>", f"two {i}")
    for i in range(6)
]


class NobodyScores(Problems):
    def problem(self, index: int) -> Problem:
        raise AssertionError

    def score(self, problem: Problem, completion: str) -> float:
        raise AssertionError


class Heard(Silent):
    """Tells the address as soon as it is said."""

    def __init__(self) -> None:
        self.address, self.said = "", threading.Event()

    def say(self, line: str) -> None:
        self.address = line.rpartition(" ")[2]
        self.said.set()


def verdicts(desk: Desk) -> list[float]:
    return [v.first_better for v in desk.verdicts()]


def prefer_one(shown: dict[str, str | int]) -> str:
    return "left" if str(shown["left"]).startswith("one") else "right"


def test_verdicts_do_not_depend_on_sides_and_survive(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    desk = Desk(PAIRS, path, seed=0)
    assert {desk.turned[i] for i in range(6)} == {True, False}
    for _ in range(4):
        shown = desk.shown()
        desk.label(shown.number, prefer_one(vars(shown)))
    desk.label(4, "same")
    desk.label(4, "left")  # too late
    with path.open("a") as file:
        file.write('{"number": 5, "fir')  # killed while writing
    again = Desk(PAIRS, path, seed=0)
    assert (again.done, again.shown().number, again.finished.is_set()) == (5, 5, False)
    again.label(5, "left" if again.turned[5] else "right")
    again.look()
    assert again.finished.is_set()
    whole = Desk(PAIRS, path, seed=0)  # the torn line swallowed nothing
    assert whole.finished.is_set()
    assert (whole.shown().number, whole.shown().done) == (None, 6)
    for desk in (again, whole):
        assert verdicts(desk) == [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    assert Desk(PAIRS[1:], path, seed=0).done == 0  # labels of other answers


def test_wrong_labels_are_refused(tmp_path: Path) -> None:
    desk = Desk(PAIRS, tmp_path / "labels.jsonl", seed=0)
    for number, choice in ((6, "left"), (-1, "left"), (0, "best")):
        with pytest.raises(ValueError, match="no such pair or choice"):
            desk.label(number, choice)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TreadleError, match=f"port {port} is not to be had"):
            ask(ByPerson(port=port), tmp_path, Silent())


def ask(labeller: ByPerson, folder: Path, progress: Progress) -> list[Verdict]:
    workspace = Workspace(folder, folder, Pipeline(name="p", steps=()), progress)
    return labeller(PAIRS, NobodyScores(), workspace)


def post(url: str, body: str | None, kind: str, **headers: str) -> int:
    data = None if body is None else body.encode()
    request = urllib.request.Request(url, data, {"Content-Type": kind, **headers})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_page_is_for_this_machine(tmp_path: Path) -> None:
    """Whatever name another site gave to its address."""
    heard = Heard()
    thread = threading.Thread(target=lambda: ask(ByPerson(port=0), tmp_path, heard), daemon=True)
    thread.start()
    assert heard.said.wait(20)
    label, json_kind = '{"number": 0, "choice": "left"}', "application/json"
    for host in ("elsewhere.example", "127.0.0.1.example:80", ""):
        for path in ("/", "/next"):
            assert post(heard.address + path, None, json_kind, Host=host) == 403
        assert post(f"{heard.address}/label", label, json_kind, Host=host) == 404
    assert not (tmp_path / "labels.jsonl").read_text()
    assert post(f"{heard.address}/next", None, json_kind, Host="localhost") == 200
    for number in range(6):
        body = label.replace("0", str(number))
        assert post(f"{heard.address}/label", body, json_kind) == 200
    thread.join(20)
    assert not thread.is_alive()


def test_whoever_leaves_before_the_reply_has_said_it(tmp_path: Path) -> None:
    """The last verdict ends the session, though its page was closed at once."""
    desk = Desk(PAIRS[:1], tmp_path / "labels.jsonl", seed=0)

    class Gone(_handler(desk)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.path = "/label"
            body = json.dumps({"number": 0, "choice": "same"}).encode()
            self.headers = {"Content-Type": "application/json", "Host": "localhost:8765"}
            self.headers["Content-Length"] = str(len(body))
            self.rfile = io.BytesIO(body)

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Gone().do_POST()
    assert desk.finished.is_set()
    assert verdicts(desk) == [0.5]


def test_a_person_in_a_browser(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no Chromium on this machine")
    heard, found = Heard(), []
    thread = threading.Thread(
        target=lambda: found.extend(ask(ByPerson(port=0), tmp_path, heard)), daemon=True
    )
    thread.start()
    assert heard.said.wait(20)
    assert post(f"{heard.address}/label", '{"number": 0, "choice": "left"}', "text/plain") == 404
    for body in ('{"number": 0}', "[]", "?", " " * 5000, '{"number": 0, "choice": []}'):
        assert post(f"{heard.address}/label", body, "application/json") == 400
    assert post(f"{heard.address}/elsewhere", "{}", "application/json") == 404
    assert not (tmp_path / "labels.jsonl").read_text()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox"], timeout=120_000
        )
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(heard.address)
        for i in range(6):
            page.wait_for_function(
                f"document.getElementById('place').textContent == '{i + 1} of 6'"
            )
            assert page.text_content("#question") == f"question {i} <b>"
            sides = {s: page.text_content(f"#{s}") for s in ("left", "right")}
            assert set(sides.values()) == {f"one {i} <i>x</i>", f"two {i}"}
            better = prefer_one(sides)
            if i == 2:
                page.reload()  # what is said is kept, what is not said is asked again
                page.wait_for_function("document.getElementById('place').textContent == '3 of 6'")
            if i == 4:
                page.keyboard.press("Alt+1")  # is for the browser
                page.keyboard.press("Control+3")
                page.keyboard.press({"left": "1", "right": "3"}[better])
            elif i == 5:
                page.keyboard.press("2")
            else:
                page.click(f"#choose-{better}")
        page.wait_for_function(
            "document.getElementById('place').textContent.startsWith('All done')"
        )
        assert page.is_hidden("#choose-left")
        browser.close()
    thread.join(20)
    assert not thread.is_alive()
    assert [v.first_better for v in found] == [1.0] * 5 + [0.5]
    rows = [json.loads(x) for x in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [r["number"] for r in rows] == list(range(6))
