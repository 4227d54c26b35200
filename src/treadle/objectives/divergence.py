"""Divergences between a teacher's distribution p and a student's q.

ForwardKL     KL(p | q)                                         Hinton et al. 2015
ReverseKL     KL(q | p)                                         Gu et al. 2024, MiniLLM
JensenShannon beta KL(p | m) + (1 - beta) KL(q | m),            Agarwal et al. 2024, GKD
              m = beta p + (1 - beta) q
SkewedKL      KL(p | a p + (1 - a) q)                           Ko et al. 2024, DistiLLM
SkewedReverseKL  KL(q | a q + (1 - a) p)
AbsoluteDifference  sum |p - q|                             of sorted p, q: Boizard et al. 2024

Each gives its value and q dD/dq, all in float32.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.config import Config
from treadle.kernels.linear_divergence import Pull


class Divergence(Config):
    """A shape: how far a student's distribution is from its teacher's, in nats."""

    @abstractmethod
    def __call__(self, log_p: Float[Tensor, "C K"], log_q: Float[Tensor, "C K"]) -> Pull:
        """Value of each row, and q times its derivative with respect to q."""


class ForwardKL(Divergence):
    """Covers all that the teacher finds likely."""

    def __call__(self, log_p: Float[Tensor, "C K"], log_q: Float[Tensor, "C K"]) -> Pull:
        p = log_p.exp()
        return Pull((p * (log_p - log_q)).sum(-1), p.neg_())


class ReverseKL(Divergence):
    """Keeps to what the teacher finds likely."""

    def __call__(self, log_p: Float[Tensor, "C K"], log_q: Float[Tensor, "C K"]) -> Pull:
        weighted = (log_q - log_p).mul_(log_q.exp())
        return Pull(weighted.sum(-1), weighted)


class JensenShannon(Divergence):
    """Generalised: forward KL as beta goes to 0, reverse KL as it goes to 1."""

    beta: float = Field(0.5, gt=0.0, lt=1.0)

    def __call__(self, log_p: Float[Tensor, "C K"], log_q: Float[Tensor, "C K"]) -> Pull:
        log_m = _mixture(log_p, log_q, self.beta)
        pull = (1 - self.beta) * log_q.exp() * (log_q - log_m)
        value = self.beta * (log_p.exp() * (log_p - log_m)).sum(-1) + pull.sum(-1)
        return Pull(value, pull)


class SkewedKL(Divergence):
    """Forward KL to a student that is helped with some of the teacher: bounded gradients."""

    alpha: float = Field(0.1, gt=0.0, lt=1.0)

    def __call__(self, log_p: Float[Tensor, "C K"], log_q: Float[Tensor, "C K"]) -> Pull:
        log_m = _mixture(log_p, log_q, self.alpha)
        value = (log_p.exp() * (log_p - log_m)).sum(-1)
        return Pull(value, (log_p + log_q - log_m).exp().mul_(self.alpha - 1))


class SkewedReverseKL(Divergence):
    """Reverse KL to a teacher that is mixed with some of the student."""

    alpha: float = Field(0.1, gt=0.0, lt=1.0)

    def __call__(self, log_p: Float[Tensor, "C K"], log_q: Float[Tensor, "C K"]) -> Pull:
        log_m = _mixture(log_q, log_p, self.alpha)
        weighted = log_q.exp() * (log_q - log_m)
        return Pull(weighted.sum(-1), weighted - self.alpha * (2 * log_q - log_m).exp())


class AbsoluteDifference(Divergence):
    """Of distributions in order of rank it is their transport cost, where all tokens are equally
    far from each other."""

    def __call__(self, log_p: Float[Tensor, "C K"], log_q: Float[Tensor, "C K"]) -> Pull:
        q = log_q.exp()
        difference = q - log_p.exp()
        return Pull(difference.abs().sum(-1), q.mul_(difference.sign()))


def _mixture(
    log_a: Float[Tensor, "C K"], log_b: Float[Tensor, "C K"], share: float
) -> Float[Tensor, "C K"]:
    """log(share a + (1 - share) b)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))
