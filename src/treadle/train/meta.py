"""Few-shot fine-tuning by meta-learning: a start from which a few examples of a new task suffice.

    inner     w_0 = w,   w_k+1 = w_k - a grad L(w_k; support_k)              K steps on a task
    Reptile   w <- w + b mean over tasks of (w_K - w)
    MAML      w <- w - b mean over tasks of v_0,     v_K = grad L(w_K; query),
              v_k = v_k+1 - a H_k v_k+1,     H_k the Hessian of L(.; support_k) at w_k

Nichol et al. 2018, arXiv:1803.02999; Finn et al. 2017, arXiv:1703.03400. A product with H is a
central difference of two gradients (Fallah et al. 2020, HF-MAML, arXiv:1908.10400): fused kernels
have no second derivative, and the memory is that of one inner step, however many there are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config

CARD = Card(
    id="ft.fewshot",
    paper="Finn et al. 2017, MAML, arXiv:1703.03400; Nichol et al. 2018, Reptile, arXiv:1803.02999",
    summary="Finds a start from which a few examples of a new task are enough.",
    recipe="treadle run few-shot",
    oracle="tests/train/test_train_meta.py::test_maml_gradient_is_that_of_the_whole_episode",
)

Weights = Mapping[str, Tensor]
Loss = Callable[[Weights, Any], Float[Tensor, ""]]
"""The mean loss of a batch under given weights."""


@dataclass(frozen=True)
class Episode:
    """One task of a meta-step."""

    support: Sequence[Any]
    """A batch for each inner step."""
    query: Any
    """What the adapted weights are judged by."""


@dataclass(frozen=True)
class MetaGradient:
    """The mean over the tasks of a meta-step."""

    gradients: dict[str, Tensor]
    query_loss: float
    """Of the adapted weights."""


class MetaMethod(Config):
    """A shape: what is taken for the gradient of the start."""

    @abstractmethod
    def direction(
        self, loss: Loss, path: Sequence[Weights], episode: Episode, lr: float
    ) -> dict[str, Tensor]:
        """From the weights of all inner steps, the first and the last included."""

    def __call__(
        self, loss: Loss, weights: Weights, episodes: Sequence[Episode], lr: float
    ) -> MetaGradient:
        """Adapt to each task, and look back."""
        sums = {name: torch.zeros_like(w) for name, w in weights.items()}
        judged = 0.0
        for episode in episodes:
            path = adapt(loss, weights, episode.support, lr)
            for name, part in self.direction(loss, path, episode, lr).items():
                sums[name] += part / len(episodes)
            with torch.no_grad():
                judged += float(loss(path[-1], episode.query)) / len(episodes)
        return MetaGradient(sums, judged)


class Reptile(MetaMethod):
    """Towards where the task ends up, in units of the mean inner gradient."""

    def direction(
        self, loss: Loss, path: Sequence[Weights], episode: Episode, lr: float
    ) -> dict[str, Tensor]:
        first, last = path[0], path[-1]
        return {n: (first[n] - last[n]) / (lr * len(episode.support)) for n in first}


class FirstOrderMAML(MetaMethod):
    """The gradient at the adapted weights, as if they did not depend on the start."""

    def direction(
        self, loss: Loss, path: Sequence[Weights], episode: Episode, lr: float
    ) -> dict[str, Tensor]:
        return gradient(loss, path[-1], episode.query)


class MAML(MetaMethod):
    """The gradient of what comes out of the inner steps, second order."""

    step: float = Field(1e-3, gt=0.0)
    """Length of the step of a difference, as a share of the length of all weights, or of 1 where
    they all begin at 0."""

    def direction(
        self, loss: Loss, path: Sequence[Weights], episode: Episode, lr: float
    ) -> dict[str, Tensor]:
        v = gradient(loss, path[-1], episode.query)
        for weights, batch in zip(reversed(path[:-1]), reversed(episode.support), strict=True):
            bent = self.hessian_product(loss, weights, batch, v)
            v = {name: part - lr * bent[name] for name, part in v.items()}
        return v

    def hessian_product(
        self, loss: Loss, weights: Weights, batch: Any, v: Weights
    ) -> dict[str, Tensor]:
        """H v of the loss of a batch."""
        size = length(weights)
        h = self.step * torch.where(size > 0, size, 1.0) / length(v).clamp(min=1e-30)
        ahead = gradient(loss, {n: w + h * v[n] for n, w in weights.items()}, batch)
        behind = gradient(loss, {n: w - h * v[n] for n, w in weights.items()}, batch)
        return {n: (ahead[n] - behind[n]) / (2 * h) for n in weights}


def adapt(loss: Loss, weights: Weights, support: Sequence[Any], lr: float) -> list[Weights]:
    """w_0 ... w_K: plain gradient steps on a task."""
    path: list[Weights] = [{name: w.detach() for name, w in weights.items()}]
    for batch in support:
        slope = gradient(loss, path[-1], batch)
        path.append({name: w - lr * slope[name] for name, w in path[-1].items()})
    return path


def gradient(loss: Loss, weights: Weights, batch: Any) -> dict[str, Tensor]:
    """Of the loss of a batch, with respect to the weights."""
    here = {name: w.detach().requires_grad_() for name, w in weights.items()}
    found = torch.autograd.grad(loss(here, batch), list(here.values()))
    return dict(zip(here, found, strict=True))


def length(weights: Weights) -> Float[Tensor, ""]:
    """Of all weights as one vector."""
    return torch.stack([w.square().sum() for w in weights.values()]).sum().sqrt()
