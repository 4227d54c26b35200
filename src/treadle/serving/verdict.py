"""What the votes of a trial say: two rates, their difference, and whether it is more than chance.

    fixed   z = (p_b - p_a) / sqrt(p (1-p) (1/n_a + 1/n_b)),  p pooled; two-sided
    safe    E = prod over blocks of  prod_i f(y_i; t_arm) / f(y_i; t_0),
            t_0 = (m_a t_a + m_b t_b) / (m_a + m_b),   f the Bernoulli chance

A p-value is valid for a number of votes that was fixed before; looking again and again until it is
small finds differences that are not there. E may be looked at after each vote: under equal rates
it ever reaches 1/alpha with chance at most alpha (Ville). Its guesses t_a, t_b for a block are made
from the votes before it. A block has m_a votes on a and m_b on b.

The z test: Fleiss 1981. E: Turner, Ly and Gruenwald 2021, Generic E-Variables for Exact Sequential
k-Sample Tests, arXiv:2106.02693.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.core.cards import Card
from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.results import wilson

CARD = Card(
    id="deploy.ab",
    paper="Turner, Ly and Gruenwald 2021, arXiv:2106.02693",
    summary="Splits traffic between two models or shadows one; votes, figures, honest verdicts.",
    recipe="treadle serve a=smollm2-135m-instruct b=gemma3-270m --trial duel=a:b "
    "--trial-log votes.jsonl",
    oracle="tests/serving/test_serving_verdict.py::test_planted_difference_is_found",
)
Vote = tuple[str, bool]
"""The arm, `a` or `b`, and whether the answer was good."""


@dataclass(frozen=True)
class Verdict:
    """What votes say of two rates."""

    good: tuple[int, int]
    votes: tuple[int, int]
    difference: float
    """Rate of b minus rate of a."""
    interval: tuple[float, float]
    """95%, Newcombe 1998."""
    p: float
    """Of the z test; for a number of votes fixed before."""
    evidence: float
    """E; at 1/alpha or more the rates differ."""
    best_evidence: float
    """The largest E so far; once past 1/alpha the test is decided."""

    def decided(self, alpha: float) -> bool:
        return self.best_evidence >= 1 / alpha


def judge(votes: Sequence[Vote], *, blocks: tuple[int, int] = (1, 1)) -> Verdict:
    """
    Args:
        votes: in the order in which they came.
        blocks: votes of a and of b in a block; best in the ratio of the traffic.
    """
    n = [sum(arm == side for arm, _ in votes) for side in "ab"]
    good = [sum(arm == side and y for arm, y in votes) for side in "ab"]
    rates = [g / m if m else math.nan for g, m in zip(good, n, strict=True)]
    (low_a, high_a), (low_b, high_b) = wilson(good[0], n[0]), wilson(good[1], n[1])
    difference = rates[1] - rates[0]
    below = math.hypot(rates[1] - low_b, high_a - rates[0])
    above = math.hypot(high_b - rates[1], rates[0] - low_a)
    process = evidence(votes, blocks)
    return Verdict(
        good=(good[0], good[1]),
        votes=(n[0], n[1]),
        difference=difference,
        interval=(difference - below, difference + above),
        p=z_test(good[0], n[0], good[1], n[1]),
        evidence=process[-1],
        best_evidence=max(process),
    )


def z_test(good_a: int, n_a: int, good_b: int, n_b: int) -> float:
    """Two-sided p-value of equal rates, by the pooled normal approximation."""
    if not n_a or not n_b:
        return 1.0
    pooled = (good_a + good_b) / (n_a + n_b)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
    if error == 0:
        return 1.0
    return math.erfc(abs(good_b / n_b - good_a / n_a) / error / math.sqrt(2))


def evidence(votes: Iterable[Vote], blocks: tuple[int, int] = (1, 1)) -> list[float]:
    """E after each whole block, beginning with 1."""
    waiting: dict[str, list[bool]] = {"a": [], "b": []}
    seen = {"a": [0.5, 1.0], "b": [0.5, 1.0]}  # good and all, from a weak prior
    log_e, process = 0.0, [1.0]
    for arm, good in votes:
        waiting[arm].append(good)
        if any(len(waiting[side]) < m for side, m in zip("ab", blocks, strict=True)):
            continue
        guess = {side: seen[side][0] / seen[side][1] for side in "ab"}
        middle = sum(m * guess[s] for s, m in zip("ab", blocks, strict=True)) / sum(blocks)
        for side, m in zip("ab", blocks, strict=True):
            for y in waiting[side][:m]:
                log_e += math.log(_chance(y, guess[side]) / _chance(y, middle))
                seen[side][0] += y
                seen[side][1] += 1
            del waiting[side][:m]
        process.append(math.exp(min(log_e, 700.0)))
    return process


def _chance(good: bool, rate: float) -> float:
    return rate if good else 1 - rate


@dataclass
class Arm:
    """Figures of one arm's answers, apart from votes."""

    answers: int = 0
    cancelled: int = 0
    tokens: int = 0
    first_tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Record:
    """What the file of events holds of one trial."""

    models: dict[str, str] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=lambda: {"a": Arm(), "b": Arm()})
    shadows: int = 0
    same: int = 0
    """Shadows whose text is the one that was shown."""
    votes: list[Vote] = field(default_factory=list)


def read_events(path: Path) -> dict[str, Record]:
    """Trials by name. A line that a kill cut short is passed over.

    Raises:
        TreadleError: no such file.
        FileFormatError: a line is JSON but no event.
    """
    if not path.is_file():
        raise TreadleError(f"{path}: no such file; `treadle serve --trial-log` writes it")
    trials: dict[str, Record] = {}
    served: dict[str, dict[str, Any]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            try:
                _take(event, trials, served)
            except (KeyError, TypeError) as error:
                raise FileFormatError(
                    f"{path}:{number}: not an event of a trial: {error}"
                ) from None
    return trials


def _take(
    event: dict[str, Any], trials: dict[str, Record], served: dict[str, dict[str, Any]]
) -> None:
    if event["event"] == "vote":
        answer = served[event["id"]]
        trials[answer["trial"]].votes.append((answer["arm"], bool(event["good"])))
        return
    record = trials.setdefault(event["trial"], Record())
    arm = record.arms[event["arm"]]
    record.models[event["arm"]] = event["model"]
    arm.answers += 1
    arm.tokens += event["tokens"]
    arm.cancelled += event["finish"] == "cancelled"
    arm.seconds.append(event["seconds"])
    if event["first_token"] is not None:
        arm.first_tokens.append(event["first_token"])
    other = served.get(event["id"])
    if other is not None:
        record.shadows += 1
        record.same += other["text"] == event["text"]
    if not event["shadow"]:  # votes are on what was shown
        served[event["id"]] = event
    else:
        served.setdefault(event["id"], event)
