"""Feedback from a person: a page on this machine shows two answers side by side.

Each verdict is on disk before the next pair is shown, so a session may be left and taken up again.
Which answer stands on the left is drawn, and does not depend on who wrote it.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import Field

from treadle.alignment.feedback import Comparison, Labeller, Verdict
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Workspace
from treadle.data.problems import Problems

LABELS = "labels.jsonl"
CHOICES = {"left": 1.0, "right": 0.0, "same": 0.5}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Which is better?</title>
<style>body{font:16px/1.5 system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}
pre{white-space:pre-wrap;background:#f4f4f2;padding:1rem;border-radius:6px;margin:0}
.two{display:grid;grid-template-columns:1fr 1fr;gap:1rem}button{font:inherit;padding:.5rem 1rem}
@media(prefers-color-scheme:dark){body{background:#181818;color:#eee}pre{background:#282828}}</style>
<h1>Which is better?</h1><p id="place" aria-live="polite"></p><pre id="question"></pre>
<div class="two"><div><h2>Left</h2><pre id="left"></pre></div><div><h2>Right</h2><pre id="right">
</pre></div></div><p><button id="choose-left">Left (1)</button> <button id="choose-same">Same (2)
</button> <button id="choose-right">Right (3)</button></p><script>
let number=null;const at=id=>document.getElementById(id);
async function show(){const r=await (await fetch("next")).json();number=r.number;
for(const id of["question","left","right"])at(id).textContent=r[id]??"";
at("place").textContent=number===null?"All done. Thank you.":`${r.done+1} of ${r.total}`;
for(const c of["left","same","right"])at("choose-"+c).disabled=number===null}
async function choose(choice){if(number===null)return;const n=number;number=null;
await fetch("label",{method:"POST",headers:{"Content-Type":"application/json"},
body:JSON.stringify({number:n,choice})});await show()}
for(const c of["left","same","right"])at("choose-"+c).onclick=()=>choose(c);
onkeydown=e=>{const c={1:"left",2:"same",3:"right"}[e.key];if(c)choose(c)};show()</script></html>"""


class ByPerson(Labeller):
    """Someone at a browser on this machine."""

    port: int = Field(8765, ge=0, le=65535)
    seed: int = 0

    def __call__(
        self, comparisons: Sequence[Comparison], problems: Problems, workspace: Workspace
    ) -> list[Verdict]:
        """Raises TreadleError where the port is taken."""
        desk = Desk(comparisons, workspace.folder / LABELS, self.seed)
        try:
            server = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(desk))
        except OSError as error:
            raise TreadleError(
                f"ByPerson: port {self.port} is not to be had ({error.strerror}): set "
                "labeller.port to another"
            ) from None
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        workspace.progress.say(
            f"{len(comparisons) - desk.done} pairs wait for you at "
            f"http://127.0.0.1:{server.server_port}"
        )
        try:
            desk.finished.wait()
        finally:
            server.shutdown()
            server.server_close()
        return desk.verdicts()


@dataclass(frozen=True)
class Shown:
    """A pair as the page has it; `number` is None when all is done."""

    number: int | None
    done: int
    total: int
    question: str = ""
    left: str = ""
    right: str = ""


class Desk:
    """What is to be labelled and what has been, on disk in `path`."""

    def __init__(self, comparisons: Sequence[Comparison], path: Path, seed: int) -> None:
        self.comparisons, self.path = comparisons, path
        draw = random.Random(seed)
        self.turned = [draw.random() < 0.5 for _ in comparisons]
        self.finished, self.lock = threading.Event(), threading.Lock()
        self.first_better = read_labels(path, comparisons)
        self._look()

    @property
    def done(self) -> int:
        return len(self.first_better)

    def shown(self) -> Shown:
        total = len(self.comparisons)
        for number, c in enumerate(self.comparisons):
            if number not in self.first_better:
                left, right = (c.second, c.first) if self.turned[number] else (c.first, c.second)
                return Shown(number, self.done, total, c.problem.prompt[-1].content, left, right)
        return Shown(None, self.done, total)

    def label(self, number: int, choice: str) -> None:
        """Raises ValueError where there is no such pair or choice; a second verdict is ignored."""
        if choice not in CHOICES or number not in range(len(self.comparisons)):
            raise ValueError("no such pair or choice")
        with self.lock:
            if number in self.first_better:
                return
            left = CHOICES[choice]
            better = 1 - left if self.turned[number] else left
            comparison = self.comparisons[number]
            row = {"first": comparison.first, "second": comparison.second, "number": number}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "first_better": better}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.first_better[number] = better
        self._look()

    def verdicts(self) -> list[Verdict]:
        return [Verdict(self.first_better[i]) for i in range(len(self.comparisons))]

    def _look(self) -> None:
        if self.done == len(self.comparisons):
            self.finished.set()


def read_labels(path: Path, comparisons: Sequence[Comparison]) -> dict[int, float]:
    """Verdicts of an earlier session; those on other answers, and a torn last line, are dropped."""
    found: dict[int, float] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        number = row["number"]
        same = number < len(comparisons) and (row["first"], row["second"]) == (
            comparisons[number].first,
            comparisons[number].second,
        )
        if same:
            found[number] = row["first_better"]
    return found


def _handler(desk: Desk) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self._answer(200, PAGE.encode(), "text/html; charset=utf-8")
            elif self.path == "/next":
                self._json(200, asdict(desk.shown()))
            else:
                self._json(404, {"error": "there is nothing here"})

        def do_POST(self) -> None:
            # A page of another site may send forms, but not JSON.
            if self.path != "/label" or self.headers["Content-Type"] != "application/json":
                self._json(404, {"error": "there is nothing here"})
                return
            try:
                sent = json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), 4096)))
                desk.label(sent["number"], sent["choice"])
            except (ValueError, KeyError, TypeError) as error:
                self._json(400, {"error": str(error)})
                return
            self._json(200, {"done": desk.done})

        def _json(self, status: int, value: dict[str, Any]) -> None:
            self._answer(status, json.dumps(value).encode(), "application/json")

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            return

    return Handler
