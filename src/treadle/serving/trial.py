"""A/B and shadow trials: two models behind one name, votes and figures in an append-only file.

A request for the trial's name goes to model b with probability `share`. Which of the two is a hash
of the trial's name and the user, so a user meets the same model each time and no table is kept.
In shadow the user is always answered by model a, and model b gets a copy of the request.

Each line of the file is an event, a `served` answer or a `vote` on one; the figures are computed
from the file alone (`treadle.serving.verdict`).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from pydantic import Field, field_validator

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.inference.request import Finish

REMEMBERED = 100_000
"""Answers that can still be voted on."""


class Trial(Config):
    """Two models under one name."""

    name: str = Field(min_length=1, max_length=100)
    a: str
    b: str
    share: float = Field(0.5, ge=0.0, le=1.0)
    """Of the users that meet b."""
    shadow: bool = False
    """Everybody is answered by a; b answers the same unseen."""
    shadows: int = Field(8, ge=0)
    """Unseen answers under way at once; requests beyond them are not copied."""

    @field_validator("b")
    @classmethod
    def _differs(cls, b: str, info: Any) -> str:
        if b == info.data.get("a"):
            raise ValueError("a trial compares two models; a and b are the same")
        return b

    def arm(self, user: str) -> str:
        """The model that a user meets."""
        if self.shadow:
            return self.a
        digest = hashlib.sha256(f"{self.name}\0{user}".encode("utf-8", "replace")).digest()
        return self.b if int.from_bytes(digest[:8], "big") < self.share * 2**64 else self.a


def parse_trial(text: str) -> Trial:
    """`NAME=A:B`, `NAME=A:B@0.1`, or `NAME=A:B@shadow`.

    Raises:
        TreadleError: it is written otherwise.
    """
    name, equals, rest = text.partition("=")
    models, at, share = rest.partition("@")
    a, colon, b = models.partition(":")
    try:
        portion = float(share) if at and share != "shadow" else 0.5
        if not (name and equals and a and colon and b):
            raise ValueError("a part is missing")
        return Trial(name=name, a=a, b=b, share=portion, shadow=share == "shadow")
    except ValueError as error:
        raise TreadleError(
            f"trial `{text}`: {error}; write NAME=A:B, NAME=A:B@0.1 (a tenth meets B) or "
            "NAME=A:B@shadow"
        ) from None


class Served(Protocol):
    """What a trial records of an answer."""

    id: str
    tokens: int
    first_token: float | None
    finishes: list[Finish]
    text: str

    @property
    def seconds(self) -> float: ...


class Trials:
    """Trials that are under way, and the file of their events.

    Args:
        log: lines are appended here; None where there are no trials.
    """

    def __init__(self, trials: Sequence[Trial], models: Sequence[str], log: Path | None) -> None:
        self._trials: dict[str, Trial] = {}
        for trial in trials:
            for model in (trial.a, trial.b):
                if model not in models:
                    raise TreadleError(f"trial `{trial.name}`: no model `{model}` is served")
            if trial.name in self._trials or trial.name in models:
                raise TreadleError(f"trial `{trial.name}`: the name is taken; choose another")
            self._trials[trial.name] = trial
        if trials and log is None:
            raise TreadleError("a trial needs a file for its events: name one with --trial-log")
        self._file: IO[bytes] | None = None
        if log is not None and trials:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._file = log.open("ab")
            if self._file.tell() and not _ends_a_line(log):  # the server was killed
                self._file.write(b"\n")
        self._lock = threading.Lock()
        self._open: OrderedDict[str, str] = OrderedDict()

    @property
    def names(self) -> list[str]:
        return list(self._trials)

    def find(self, name: str) -> Trial | None:
        return self._trials.get(name)

    def served(
        self, trial: str, model: str, user: str | None, answer: Served, *, shadow: bool
    ) -> None:
        """Record an answer. Users are kept as a hash; texts only as one."""
        found = self._trials[trial]
        whole = bool(answer.finishes)
        self._append(
            event="served",
            id=answer.id,
            trial=trial,
            arm="a" if model == found.a else "b",
            model=model,
            shadow=shadow,
            user=None if user is None else _hash(f"{trial}\0{user}"),
            tokens=answer.tokens,
            first_token=answer.first_token,
            seconds=answer.seconds,
            finish=answer.finishes[0] if whole else "cancelled",
            text=_hash(answer.text),
        )
        if not shadow and whole:
            self._open[answer.id] = trial
            while len(self._open) > REMEMBERED:
                self._open.popitem(last=False)

    def vote(self, id: str, good: bool) -> bool:
        """Record a vote, one an answer; False where there is no such answer to vote on."""
        if self._open.pop(id, None) is None:
            return False
        self._append(event="vote", id=id, good=good)
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, **event: Any) -> None:
        assert self._file is not None
        line = json.dumps({"time": round(time.time(), 3), **event}).encode() + b"\n"
        with self._lock:  # one write a line: a kill leaves whole lines and at most one torn end
            self._file.write(line)
            self._file.flush()
            if event["event"] == "vote":
                os.fsync(self._file.fileno())


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
