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
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field

from treadle.alignment.feedback import Comparison, Labeller, Verdict, asked
from treadle.core.errors import TreadleError
from treadle.core.files import write_text
from treadle.core.pipeline import Workspace
from treadle.data.problems import Problems

LABELS = "labels.jsonl"
CHOICES = {"left": 1.0, "right": 0.0, "same": 0.5}
PAGE = "person.html"
HOSTS = ("127.0.0.1", "localhost")
LONGEST = 4096
"""Bytes of a label that is sent."""


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
        """Set when the page has been told that all is done."""
        self.first_better = read_labels(path, comparisons)
        # A line that a kill tore would swallow the next one.
        write_text(path, "".join(self._row(i, v) for i, v in self.first_better.items()))
        self.look()

    @property
    def done(self) -> int:
        return len(self.first_better)

    def shown(self) -> Shown:
        total = len(self.comparisons)
        for number, c in enumerate(self.comparisons):
            if number not in self.first_better:
                left, right = (c.second, c.first) if self.turned[number] else (c.first, c.second)
                return Shown(number, self.done, total, asked(c.problem), left, right)
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
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._row(number, better))
                file.flush()
                os.fsync(file.fileno())
            self.first_better[number] = better

    def verdicts(self) -> list[Verdict]:
        return [Verdict(self.first_better[i]) for i in range(len(self.comparisons))]

    def _row(self, number: int, first_better: float) -> str:
        c = self.comparisons[number]
        row = {"first": c.first, "second": c.second, "number": number}
        return json.dumps({**row, "first_better": first_better}) + "\n"

    def look(self) -> None:
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


@cache
def page() -> bytes:
    return files(__package__).joinpath(PAGE).read_bytes()


def _handler(desk: Desk) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._here():
                self._json(403, {"error": "this page is for this machine alone"})
            elif self.path == "/":
                self._answer(200, page(), "text/html; charset=utf-8")
            elif self.path == "/next":
                self._json(200, asdict(desk.shown()))
            else:
                self._json(404, {"error": "there is nothing here"})

        def do_POST(self) -> None:
            # A page of another site may send forms, but not JSON.
            json_sent = self.headers["Content-Type"] == "application/json"
            if self.path != "/label" or not json_sent or not self._here():
                self._json(404, {"error": "there is nothing here"})
                return
            try:
                sent = json.loads(self._body())
                desk.label(sent["number"], sent["choice"])
            except (ValueError, KeyError, TypeError) as error:
                self._json(400, {"error": str(error)})
                return
            try:
                self._json(200, asdict(desk.shown()))
            finally:  # whoever left before the reply has said it all the same
                desk.look()

        def _here(self) -> bool:
            """Whether the page was called by this machine's own name, and not by another site's
            that now points to it."""
            return self.headers.get("Host", "").partition(":")[0] in HOSTS

        def _body(self) -> bytes:
            """Raises ValueError where it has no sound length."""
            length = int(self.headers["Content-Length"] or 0)
            if not 0 < length <= LONGEST:
                raise ValueError(f"a label has 1 to {LONGEST} bytes")
            return self.rfile.read(length)

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
