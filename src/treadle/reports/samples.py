"""Answers to the same held-out problems, before and after, side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest

from treadle.core.results import Sample
from treadle.reports.stages import RIGHT

LONGEST = 1500
"""Characters of a prompt or an answer that are shown."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One side of a pair."""

    text: str
    score: float
    right: bool


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A problem and what was answered; None where a stage did not answer it."""

    problem: str
    task: str
    prompt: str
    expected: str
    before: Answer | None
    after: Answer | None


def pick(before: Mapping[str, Sample], after: Mapping[str, Sample], limit: int) -> list[Pair]:
    """At most `limit` problems, drawn in turn from the four kinds of change.

    The order within a kind is by the hash of the problem's name: nobody chose them.
    """
    shared = [p for p in after if p in before] or list(after) or list(before)
    kinds: dict[tuple[bool, bool], list[str]] = {}
    for problem in sorted(shared, key=lambda p: hashlib.sha256(p.encode()).digest()):
        change = (_right(before.get(problem)), _right(after.get(problem)))
        kinds.setdefault(change, []).append(problem)
    turns = [kinds.get(k, []) for k in ((False, True), (True, False), (True, True), (False, False))]
    drawn = [p for p in chain.from_iterable(zip_longest(*turns)) if p is not None][:limit]
    order = {p: place for place, p in enumerate(p for kind in turns for p in kind)}
    return [_pair(p, before.get(p), after.get(p)) for p in sorted(drawn, key=order.__getitem__)]


def _right(sample: Sample | None) -> bool:
    return sample is not None and sample["score"] >= RIGHT


def _pair(problem: str, before: Sample | None, after: Sample | None) -> Pair:
    known = after or before
    assert known is not None
    return Pair(
        problem=problem,
        task=known["task"],
        prompt=shorten(known["prompt"]),
        expected=shorten(known["expected"]),
        before=_answer(before),
        after=_answer(after),
    )


def _answer(sample: Sample | None) -> Answer | None:
    if sample is None:
        return None
    return Answer(text=shorten(sample["answer"]), score=sample["score"], right=_right(sample))


def shorten(text: str) -> str:
    """The beginning of a long text, and how much is left out."""
    left = len(text) - LONGEST
    return text if left <= 0 else f"{text[:LONGEST]}… ({left:,} more characters)"
