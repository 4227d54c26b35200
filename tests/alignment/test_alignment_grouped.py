"""Grouped feedback: the likeliest worths, ranks under wrong labels, what is passed through."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

from treadle.alignment.feedback import Comparison, Labeller, Verdict
from treadle.alignment.grouped import Grouped, covariance, worths
from treadle.alignment.iterate import EveryPair, Neighbours
from treadle.core.pipeline import Pipeline, Workspace
from treadle.data.problems import Problems
from treadle.data.records import Problem, user


class Unasked(Problems):
    def problem(self, index: int) -> Problem:
        raise AssertionError

    def score(self, problem: Problem, completion: str) -> float:
        raise AssertionError


class Said(Labeller):
    """Verdicts that are known before: by the texts."""

    verdicts: tuple[tuple[str, str, float], ...]

    def __call__(self, comparisons, problems, workspace):
        known = {(a, b): v for a, b, v in self.verdicts}
        return [
            Verdict(known[c.first, c.second], bias=0.5)
            if (c.first, c.second) in known
            else Verdict(0.5, failure="not said")
            for c in comparisons
        ]


def ask(labeller: Labeller, comparisons: list[Comparison], folder: Path) -> list[Verdict]:
    workspace = Workspace(folder, folder, Pipeline(name="p", steps=()))
    return labeller(comparisons, Unasked(), workspace)


def test_worths_are_the_likeliest_a_posteriori() -> None:
    """Against gradient descent on the formula, cluster and answer apart."""
    clusters, between, within = [0, 0, 2, 2, 4], 1.5, 0.5
    pairs = torch.tensor([[0, 2], [1, 3], [2, 4], [4, 0], [0, 1], [3, 4]])
    better = torch.tensor([1.0, 0.9, 0.2, 0.5, 0.7, 0.0], dtype=torch.float64)
    found = worths(pairs, better, covariance(clusters, between, within))
    few = worths(pairs, better, covariance(clusters, between, within), steps=7)
    torch.testing.assert_close(few, found, rtol=1e-8, atol=1e-8)  # as fast as Newton's method is
    u = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    v = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([u, v], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        s = u[clusters] + v
        total = u.square().sum() / (2 * between**2) + v.square().sum() / (2 * within**2)
        for (i, j), p in zip(pairs.tolist(), better.tolist(), strict=True):
            q = 1 / (1 + (s[j] - s[i]).exp())
            total = total - p * q.log() - (1 - p) * (1 - q).log()
        total.backward()
        return total

    for _ in range(5):
        optimizer.step(loss)
    torch.testing.assert_close(found, (u[clusters] + v).detach(), rtol=1e-4, atol=1e-5)


def test_answers_of_hardly_any_worth_of_their_own() -> None:
    """Those of one cluster are as good as one answer."""
    pairs, better = torch.tensor([[0, 1], [1, 2], [0, 2]]), torch.tensor([1.0, 0.0, 1.0])
    found = worths(pairs, better.double(), covariance([0, 1, 1], 1.5, 1e-12))
    both = torch.tensor([[0, 1], [0, 1]]), torch.tensor([1.0, 1.0])
    one = worths(both[0], both[1].double(), covariance([0, 1], 1.5, 1e-12))
    torch.testing.assert_close(found, one[[0, 1, 1]])


def order(wins: dict[str, float]) -> list[str]:
    return sorted(wins, key=lambda t: (wins[t], t))


def tau(ranked: list[str], worth: dict[str, float]) -> float:
    """Kendall's, against the truth."""
    signs = [1 if worth[a] < worth[b] else -1 for a, b in itertools.combinations(ranked, 2)]
    return sum(signs) / len(signs)


def borda(comparisons: list[Comparison], verdicts: list[Verdict]) -> dict[str, float]:
    wins: dict[str, float] = {}
    for c, v in zip(comparisons, verdicts, strict=True):
        wins[c.first] = wins.get(c.first, 0.0) + v.first_better
        wins[c.second] = wins.get(c.second, 0.0) + 1 - v.first_better
    return wins


def test_ranks_are_more_consistent_with_groups(tmp_path: Path) -> None:
    """Eight answers in three clusters, every verdict wrong with probability 0.3, 60 problems:
    ranks by refined verdicts are nearer to the truth than ranks by wins, and than those of the
    same model without clusters."""
    draw = random.Random(0)
    found: dict[str, list[float]] = {"plain": [], "alone": [], "grouped": []}
    said = ("the river runs down to the sea", "bread needs flour and much time", "no idea at all")
    for number in range(60):
        cluster_worth = [draw.gauss(0, 1.5) for _ in said]
        worth = {}
        for i in range(8):
            c = i % 3
            worth[f"{said[c]} {'indeed ' * (i // 3)}yes"] = cluster_worth[c] + draw.gauss(0, 0.3)
        problem = Problem((user(f"q{number}"),), "", "exact")
        comparisons = [Comparison(problem, a, b) for a, b in EveryPair()(list(worth))]
        rows = []
        for c in comparisons:
            right = worth[c.first] > worth[c.second]
            rows.append((c.first, c.second, float(right != (draw.random() < 0.3))))
        labeller = Said(verdicts=tuple(rows))
        for name, one in (
            ("plain", labeller),
            ("alone", Grouped(labeller=labeller, similarity=1.0, shingle=50)),
            ("grouped", Grouped(labeller=labeller)),
        ):
            ranked = order(borda(comparisons, ask(one, comparisons, tmp_path)))
            found[name].append(tau(ranked, worth))
    mean = {name: sum(row) / len(row) for name, row in found.items()}
    assert mean["grouped"] > mean["plain"] + 0.1
    assert mean["grouped"] > mean["alone"] + 0.1


def test_problems_are_apart_and_failures_pass_through(tmp_path: Path) -> None:
    """The same words as an answer to another problem are another answer."""
    one, two = (Problem((user(q),), "", "exact") for q in ("one", "two"))
    comparisons = [
        Comparison(one, "a b c", "x y z"),
        Comparison(two, "x y z", "a b c"),
        Comparison(two, "x y z", "nobody knows"),
    ]
    labeller = Said(verdicts=(("a b c", "x y z", 1.0), ("x y z", "a b c", 1.0)))
    first, second, third = ask(Grouped(labeller=labeller), comparisons, tmp_path)
    assert first.first_better == pytest.approx(second.first_better)
    assert 0.5 < first.first_better < 1.0
    assert (first.bias, third.failure, third.first_better) == (0.5, "not said", 0.5)
    assert ask(Grouped(labeller=labeller), comparisons[2:], tmp_path)[0].failure == "not said"
    assert ask(Grouped(labeller=labeller), [], tmp_path) == []


def test_alike_answers_share_verdicts(tmp_path: Path) -> None:
    """What was said against one is held against its like, as far as they are alike."""
    problem = Problem((user("q"),), "", "exact")
    alike, other = "the sea is wide and blue", "bread is made of flour"
    comparisons = [
        Comparison(problem, alike, other),
        Comparison(problem, f"{alike} indeed", other),
    ]
    labeller = Said(verdicts=((alike, other, 1.0), (f"{alike} indeed", other, 0.5)))
    together = ask(Grouped(labeller=labeller), comparisons, tmp_path)
    assert together[1].first_better > 0.6
    apart = ask(Grouped(labeller=labeller, shingle=50), comparisons, tmp_path)
    assert apart[1].first_better < together[1].first_better
    assert together[0].first_better > together[1].first_better


def test_pairings() -> None:
    texts = ["a", "b", "c", "d", "e"]
    assert Neighbours()(texts) == [("a", "b"), ("c", "d")]
    assert EveryPair()(texts[:3]) == [("a", "b"), ("a", "c"), ("b", "c")]
