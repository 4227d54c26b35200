"""Grouped feedback: answers that say nearly the same share what was said of them.

Answers to a problem whose word n-grams are alike form a cluster. The worth of answer i in cluster
c is s_i = u_c + v_i, with u ~ N(0, between^2) for clusters and v ~ N(0, within^2) for what is an
answer's own; verdicts p_ij in [0, 1] are Bradley and Terry's. The worths that are likeliest a
posteriori,

    max_s  sum_ij p_ij log sigmoid(s_i - s_j) + (1 - p_ij) log sigmoid(s_j - s_i)
           - sum_c u_c^2 / (2 between^2) - sum_i v_i^2 / (2 within^2),

rank all answers, and sigmoid(s_i - s_j) takes the place of each verdict. So one wrong verdict is
outvoted by those on answers like it, and verdicts never go in a circle. The covariance of s,
between^2 within a cluster plus within^2 on its diagonal, makes this a Gaussian process on
comparisons (Chu and Ghahramani 2005, Preference learning with Gaussian processes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.alignment.feedback import ByMarks, Comparison, Labeller, Verdict
from treadle.core.cards import Card
from treadle.core.pipeline import Workspace
from treadle.data.problems import Problems
from treadle.data.split import clusters_of, shingles_of

CARD = Card(
    id="al.reward.grouped",
    paper="Bradley and Terry 1952; Chu and Ghahramani 2005, ICML",
    summary="Alike answers share verdicts: ranks are refined from clusters down to answers.",
    recipe="treadle run iterate steps.label-1.pairing='{kind: EveryPair}' "
    "steps.label-1.labeller='{kind: Grouped, labeller: {kind: ByJudge}}'",
    oracle="tests/alignment/test_alignment_grouped.py::test_ranks_are_more_consistent_with_groups",
)


class Grouped(Labeller):
    """The verdicts of another labeller, refined."""

    labeller: Labeller = ByMarks()
    similarity: float = Field(0.3, gt=0.0, le=1.0)
    """Jaccard similarity of word n-grams from which two answers are alike."""
    shingle: int = Field(2, ge=1)
    """Words in an n-gram."""
    between: float = Field(1.5, gt=0.0)
    """Spread of the worths of clusters, in log-odds."""
    within: float = Field(0.5, gt=0.0)
    """Spread of the worths of a cluster's answers."""

    def __call__(
        self, comparisons: Sequence[Comparison], problems: Problems, workspace: Workspace
    ) -> list[Verdict]:
        verdicts = self.labeller(comparisons, problems, workspace)
        by_problem: dict[int, list[int]] = {}
        for i, c in enumerate(comparisons):
            by_problem.setdefault(id(c.problem), []).append(i)
        for places in by_problem.values():
            told = [i for i in places if not verdicts[i].failure]
            refined = self._refined([comparisons[i] for i in told], [verdicts[i] for i in told])
            for i, better in zip(told, refined, strict=True):
                verdicts[i] = replace(verdicts[i], first_better=better)
        return verdicts

    def _refined(
        self, comparisons: Sequence[Comparison], verdicts: Sequence[Verdict]
    ) -> list[float]:
        """Of comparisons of answers to one problem."""
        numbers: dict[str, int] = {}
        for c in comparisons:
            numbers.setdefault(c.first, len(numbers))
            numbers.setdefault(c.second, len(numbers))
        pairs = torch.tensor([[numbers[c.first], numbers[c.second]] for c in comparisons])
        first_better = torch.tensor([v.first_better for v in verdicts], dtype=torch.float64)
        if not len(pairs):
            return []
        clusters = clusters_of([shingles_of(t, self.shingle) for t in numbers], self.similarity)
        s = worths(pairs, first_better, covariance(clusters, self.between, self.within))
        refined: list[float] = torch.sigmoid(s[pairs[:, 0]] - s[pairs[:, 1]]).tolist()
        return refined


def covariance(clusters: Sequence[int], between: float, within: float) -> Float[Tensor, "A A"]:
    """Of the worths, before anything was said."""
    own = torch.tensor(clusters)
    same = (own[:, None] == own[None, :]).double()
    return between**2 * same + within**2 * torch.eye(len(clusters), dtype=torch.float64)


def worths(
    pairs: Tensor, first_better: Float[Tensor, " C"], prior: Float[Tensor, "A A"], steps: int = 100
) -> Float[Tensor, " A"]:
    """The likeliest worths a posteriori, by Newton's method.

    Args:
        pairs: the two answers of each comparison, [C, 2].
        first_better: probability that the first is better.
        prior: covariance of the worths.
    """
    rows = torch.arange(len(pairs))
    x = torch.zeros(len(pairs), len(prior), dtype=prior.dtype)
    x[rows, pairs[:, 0]] += 1
    x[rows, pairs[:, 1]] -= 1
    identity = torch.eye(len(prior), dtype=prior.dtype)
    s = torch.zeros(len(prior), dtype=prior.dtype)
    for _ in range(steps):
        p = torch.sigmoid(x @ s)
        w = x.T @ ((p * (1 - p))[:, None] * x)
        # (prior^-1 + w)^-1 b without the inverse, which answers of hardly any worth of their own
        # do not have.
        b = w @ s + x.T @ (first_better - p)
        s, before = prior @ torch.linalg.solve(identity + w @ prior, b), s
        if float((s - before).abs().max()) < 1e-10:
            break
    return s
