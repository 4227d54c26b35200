"""How often a labeller agrees with the labels of pairs that someone gave before."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from treadle.alignment.feedback import Comparison, Labeller, Verdict, decided
from treadle.alignment.iterate import different, judged
from treadle.alignment.preferences import Pairs
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Step, Workspace
from treadle.core.results import EVALUATION, Figure, accuracy
from treadle.data.problems import Problems
from treadle.data.records import Problem


class Agreement(Step):
    """The share of pairs that a labeller decides as their labels do; a tie counts half.

    For a labeller that is asked in both orders, also the share that one order alone would have
    got right.
    """

    labeller: Labeller
    subject: str = "labeller"
    pairs: Pairs
    limit: int = Field(200, ge=1)
    """Take the first so many pairs."""
    seed: int = 0
    """Draws which answer is shown first."""

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        pairs = self.pairs.resolve(workspace)
        draw = random.Random(self.seed)
        comparisons, signs = [], []
        for i in range(min(self.limit, pairs.count())):
            pair = pairs.pair(i)
            chosen, rejected = pair.chosen[-1].content, pair.rejected[-1].content
            if not different(chosen, rejected):
                continue
            kept = draw.random() < 0.5
            first, second = (chosen, rejected) if kept else (rejected, chosen)
            comparisons.append(Comparison(Problem(pair.prompt, "", "none"), first, second))
            signs.append(kept)
        if not comparisons:
            raise TreadleError(f"{self.name}: no pair has two different answers")
        verdicts = self.labeller(comparisons, NoMarks(), workspace)
        agreed = [
            won if kept else 1 - won
            for kept, won in zip(signs, map(decided, verdicts), strict=True)
        ]
        results: dict[str, Figure] = {"agreement": accuracy(agreed)}
        once = [
            float((first_order(v) > 0) == kept)
            for kept, v in zip(signs, verdicts, strict=True)
            if v.bias is not None
        ]
        if once:
            results["agreement in one order"] = accuracy(once)
        return {
            "kind": EVALUATION,
            "subject": self.subject,
            "results": results,
            "tokens_per_second": None,
            "size_bytes": None,
            "left_out": min(self.limit, pairs.count()) - len(comparisons),
            **judged(verdicts),
        }


class NoMarks(Problems):
    """What pairs out of a file have in the place of problems with a verifier."""

    def problem(self, index: int) -> Problem:
        raise TreadleError("pairs out of a file are no problems: name problems with a verifier")

    def score(self, problem: Problem, completion: str) -> float:
        raise TreadleError("pairs out of a file have no verifier: take another labeller")


def first_order(verdict: Verdict) -> float:
    """The log-odds of the first answer where it alone was shown first: worth and place."""
    assert verdict.bias is not None
    p = min(max(verdict.first_better, 1e-15), 1 - 1e-15)
    return math.log(p / (1 - p)) + verdict.bias
