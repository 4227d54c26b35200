"""How far the labels of preference pairs are trusted.

A pair whose label is right with probability q has the loss q l(z) + (1 - q) l(-z): one that may
as well be wrong teaches nothing. Where raters give no q, `CrossFitted` finds it: a Bradley-Terry
model that is linear in the frozen model's features is fitted on the other folds, its margin d_i on
a pair it never saw says how likely its label is, and Bayes' rule with the rate of flipped labels
eps gives

    p_i = sigmoid(d_i / T)                                   the answer is better in truth
    q_i = (1 - eps) p_i / [(1 - eps) p_i + eps (1 - p_i)]    its label is right

T makes the labels likeliest as they were given, sum_i log[(1 - eps) p_i + eps (1 - p_i)]; eps
comes from the user.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from treadle.alignment.trees import Tree, assemble_trees, in_parts, tree_size
from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.batch import within_budget
from treadle.data.records import Preference
from treadle.data.source import Env
from treadle.nn.modes import evaluating
from treadle.objectives.reward import sequence_ends

CARD = Card(
    id="al.reward.confidence",
    paper="Northcutt et al. 2021, arXiv:1911.00068 (cross-fitting); Mitchell 2023 (soft labels)",
    summary="Pairs weighted by how likely their labels are right: stated, or cross-fitted.",
    recipe="treadle run reward-model steps.reward.source.pairs.path=pairs.jsonl "
    "steps.reward.source.confidence='{kind: CrossFitted, flipped: 0.2}'",
    oracle="tests/alignment/test_alignment_confidence.py::test_planted_flips_are_found",
)


class Confidence(Config):
    """A shape: for each pair the probability that its label is the right way round."""

    @abstractmethod
    def __call__(
        self,
        env: Env,
        pairs: Sequence[Preference],
        numbers: Sequence[int],
        tree: Callable[[int], Tree],
        tokens: int,
    ) -> Float[Tensor, " P"] | None:
        """Of pairs, whose trees are those of `numbers`; None where all are certain."""


class Stated(Confidence):
    """What the data say in `confidence`; pairs without are certain."""

    def __call__(
        self,
        env: Env,
        pairs: Sequence[Preference],
        numbers: Sequence[int],
        tree: Callable[[int], Tree],
        tokens: int,
    ) -> Float[Tensor, " P"] | None:
        return confidences_of(pairs)


class CrossFitted(Confidence):
    """Found from the pairs themselves, with features of the model before it is trained."""

    flipped: float = Field(0.1, gt=0.0, lt=0.5)
    """The share eps of labels that are taken to be wrong."""
    folds: int = Field(5, ge=2)
    ridge: float = Field(1.0, gt=0.0)
    """Penalty on the weights of the standardised features."""

    def __call__(
        self,
        env: Env,
        pairs: Sequence[Preference],
        numbers: Sequence[int],
        tree: Callable[[int], Tree],
        tokens: int,
    ) -> Float[Tensor, " P"]:
        if len(numbers) < 2 * self.folds:
            raise TreadleError(
                f"CrossFitted: {len(numbers)} pairs are too few for folds={self.folds}"
            )
        parts = in_parts(numbers)
        features = torch.cat([differences(env, [tree(i) for i in p], tokens) for p in parts])
        d = held_out_margins(features, self.folds, self.ridge)
        return posterior(calibrated(d, self.flipped), self.flipped).float()


def confidences_of(pairs: Sequence[Preference]) -> Float[Tensor, " P"] | None:
    """What the data say; None where they say nothing of any pair."""
    if all(p.confidence is None for p in pairs):
        return None
    return torch.tensor([1.0 if p.confidence is None else p.confidence for p in pairs])


@torch.no_grad()
def differences(env: Env, trees: Sequence[Tree], tokens: int) -> Float[Tensor, "P D"]:
    """Last hidden state of the chosen answer less that of the rejected one."""
    rows = []
    with evaluating(env.model), env.autocast():
        for run in within_budget([tree_size(t) for t in trees], tokens):
            batch = assemble_trees([trees[i] for i in run]).to(env.device)
            hidden = env.model(batch.tokens, batch.context())[sequence_ends(batch)]
            chosen, rejected = hidden.double().cpu().unflatten(0, (-1, 2)).unbind(1)
            rows.append(chosen - rejected)
    return torch.cat(rows)


def held_out_margins(
    features: Float[Tensor, "P D"], folds: int, ridge: float
) -> Float[Tensor, " P"]:
    """Each pair's margin under the model that was fitted without it."""
    scale = features.square().mean(0).sqrt().clamp(min=1e-6)
    x = features / scale
    margins = torch.empty(len(x), dtype=x.dtype)
    fold = torch.arange(len(x)) % folds
    for k in range(folds):
        w = fit_logistic(x[fold != k], ridge)
        margins[fold == k] = x[fold == k] @ w
    return margins


def fit_logistic(x: Float[Tensor, "P D"], ridge: float, steps: int = 50) -> Float[Tensor, " D"]:
    """argmin_w sum_i -log sigmoid(x_i . w) + ridge |w|^2 / 2, by Newton's method.

    A step that would climb is halved: where labels are nearly separable, whole ones go to and fro
    without end. The steps are taken in the span of the rows, P x P, where features outnumber pairs.
    """
    q, r = torch.linalg.qr(x.T)  # x = r.T q.T, and w lies in the span of q
    z = r.T
    v = torch.zeros(z.shape[1], dtype=x.dtype)
    identity = torch.eye(z.shape[1], dtype=x.dtype)

    def loss(v: Tensor) -> float:
        return float(ridge * v @ v / 2 - F.logsigmoid(z @ v).sum())

    here = loss(v)
    for _ in range(steps):
        p = torch.sigmoid(-(z @ v))
        gradient = ridge * v - z.T @ p
        hessian = ridge * identity + z.T @ ((p * (1 - p))[:, None] * z)
        step = torch.linalg.solve(hessian, gradient)
        while (there := loss(v - step)) > here and float(step.abs().max()) > 1e-10:
            step = step / 2
        v, here = v - step, there
        if float(step.abs().max()) < 1e-10:
            break
    w: Tensor = q @ v
    return w


def calibrated(margins: Float[Tensor, " P"], flipped: float) -> Float[Tensor, " P"]:
    """margins / T, with the T > 0 under which labels that are flipped so often are likeliest."""
    temperatures = torch.logspace(-2, 2, 161, dtype=margins.dtype) * margins.std().clamp(min=1e-9)
    p = torch.sigmoid(margins[None] / temperatures[:, None])
    likelihood = ((1 - flipped) * p + flipped * (1 - p)).log().sum(-1)
    return margins / temperatures[likelihood.argmax()]


def posterior(margins: Float[Tensor, " P"], flipped: float) -> Float[Tensor, " P"]:
    """Probability that a label is right, from the log odds that its answer is better."""
    p = torch.sigmoid(margins)
    right = (1 - flipped) * p
    return right / (right + flipped * (1 - p))
