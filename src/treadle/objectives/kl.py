"""Estimators of KL(pi || ref) from samples of pi, with d = log ref - log pi of each token.

    k1 = -d                  unbiased, of high variance, may be negative
    k2 = d^2 / 2             biased, small variance; its gradient is that of the KL on samples of pi
    k3 = e^d - d - 1         unbiased, never negative

Schulman 2020, Approximating KL Divergence. As a term of the loss, k1 has a gradient whose mean is
zero, so it belongs in rewards; k3's gradient is that of the reverse, KL(ref || pi), near pi = ref
(Tang and Munos 2025, arXiv:2506.09477).
"""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config

CARD = Card(
    id="al.kl",
    paper="Schulman 2020, Approximating KL Divergence; arXiv:2506.09477",
    summary="Estimators k1, k2 and k3 of the KL to a reference, from the sampled tokens alone.",
    recipe="treadle run quickstart steps.3.objective='{kind: GRPO, beta: 0.04, kl: {kind: K2}}' "
    "steps.3.source.reference='{kind: FrozenCopy}'",
    oracle="tests/objectives/test_objectives_kl.py::test_means_are_the_exact_kl",
)


class KLEstimate(Config):
    """A shape: an estimate of the KL at each sampled token."""

    @abstractmethod
    def __call__(
        self, logp: Float[Tensor, " M"], reference: Float[Tensor, " M"]
    ) -> Float[Tensor, " M"]:
        """From log-probabilities of the policy, which sampled the tokens, and of the reference."""


class K1(KLEstimate):
    """log pi - log ref."""

    def __call__(
        self, logp: Float[Tensor, " M"], reference: Float[Tensor, " M"]
    ) -> Float[Tensor, " M"]:
        return logp - reference


class K2(KLEstimate):
    """(log pi - log ref)^2 / 2."""

    def __call__(
        self, logp: Float[Tensor, " M"], reference: Float[Tensor, " M"]
    ) -> Float[Tensor, " M"]:
        return (logp - reference).square() / 2


class K3(KLEstimate):
    """ref / pi - log(ref / pi) - 1."""

    def __call__(
        self, logp: Float[Tensor, " M"], reference: Float[Tensor, " M"]
    ) -> Float[Tensor, " M"]:
        d = reference - logp
        return d.expm1() - d
