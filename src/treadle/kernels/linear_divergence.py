"""A divergence between the next-token distributions of a teacher and a student, chunk by chunk.

    L = sum_i w_i D(p_i, q_i),    q_i = softmax(W h_i + b),   p_i the teacher's

As in `linear_cross_entropy`, logits live for a chunk of rows at a time and the gradient is taken
while they are there: with g = dD/dq and s = q g,

    dD/dz = s - q sum(s)

The teacher gives hidden states, whose logits are made beside the student's, or only its likeliest
tokens. In that case the tokens that it does not name are one class together: D of the coarser
distributions, which never exceeds D of the full ones (data processing inequality). A teacher of
another vocabulary gives ranks instead of tokens: its likeliest stands against the student's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.kernels.linear_cross_entropy import (
    HeadGradients,
    HeadRule,
    chunks,
    head_logits,
    operands,
)

SMALLEST = 1e-7
"""Least mass of the tokens that a teacher does not name: fp32 rounds a sum of the others so."""


@dataclass(frozen=True)
class Pull:
    """A divergence and how it pulls at the student."""

    value: Float[Tensor, " C"]
    pull: Float[Tensor, "C K"]
    """q dD/dq."""


Pointwise = Callable[[Float[Tensor, "C K"], Float[Tensor, "C K"]], Pull]
"""(log p, log q) -> Pull."""


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None
    rule: HeadRule


@dataclass(frozen=True)
class HiddenTeacher:
    """A teacher by its last hidden states."""

    hidden: Float[Tensor, "M E"]
    head: Head


@dataclass(frozen=True)
class TopTeacher:
    """A teacher by the log-probabilities of its likeliest tokens."""

    tokens: Int[Tensor, "M K"]
    logprobs: Float[Tensor, "M K"]


@dataclass(frozen=True)
class RankedTeacher:
    """A teacher of another vocabulary: how likely it finds its first, second, ... token."""

    logprobs: Float[Tensor, "M K"]
    """In descending order."""


Teacher = HiddenTeacher | TopTeacher | RankedTeacher


def linear_divergence(
    hidden: Float[Tensor, "M D"],
    head: Head,
    teacher: Teacher,
    weights: Float[Tensor, " M"],
    divergence: Pointwise,
) -> Float[Tensor, ""]:
    """sum_i weights_i D(p_i, q_i), differentiable in the student's hidden states and head."""
    hidden, weight = operands(hidden, head.weight)
    total: Tensor = _LinearDivergence.apply(
        hidden, weight, head.bias, teacher, weights, divergence, head.rule
    )
    return total


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Teacher,
        weights: Tensor,
        divergence: Pointwise,
        rule: HeadRule,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        sums = HeadGradients(ctx, hidden, weight, bias, positions=(0, 1, 2))
        for rows in chunks(len(hidden), len(weight)):
            logits, slope = head_logits(hidden[rows], weight, bias, rule)
            log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
            if isinstance(teacher, HiddenTeacher):
                found, gradient = _whole(log_q, teacher, rows, divergence)
            elif isinstance(teacher, RankedTeacher):
                ranked = log_q.topk(teacher.logprobs.shape[1], -1).indices
                named = TopTeacher(ranked, teacher.logprobs[rows])
                found, gradient = _top(log_q, named, slice(None), divergence)
            else:
                found, gradient = _top(log_q, teacher, rows, divergence)
            w = weights[rows].float()
            total += (w * found).sum()
            if sums.needed:
                gradient.mul_((w / rule.temperature)[:, None])
                sums.add(rows, gradient if slope is None else gradient.mul_(slope))
        ctx.sums = sums
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.sums.times(grads[0]), None, None, None, None


def _whole(
    log_q: Float[Tensor, "C V"], teacher: HiddenTeacher, rows: slice, divergence: Pointwise
) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
    """The divergence of a chunk, and its gradient with respect to the logits."""
    head = teacher.head
    states, weight = operands(teacher.hidden[rows], head.weight)
    logits, _ = head_logits(states, weight, head.bias, head.rule)
    log_p = logits.sub_(logits.logsumexp(-1, keepdim=True))
    found = divergence(log_p, log_q)
    gradient = log_q.exp_().mul_(-found.pull.sum(-1, keepdim=True)).add_(found.pull)
    return found.value, gradient


def _top(
    log_q: Float[Tensor, "C V"], teacher: TopTeacher, rows: slice, divergence: Pointwise
) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
    tokens, log_p = teacher.tokens[rows].long(), teacher.logprobs[rows].float()
    named = log_q.gather(-1, tokens)
    found = divergence(_with_rest(log_p), _with_rest(named))
    total = found.pull.sum(-1, keepdim=True)
    # A token in the rest shares its pull in proportion to its mass there.
    rest = found.pull[:, -1:] / _rest(named)[:, None]
    gradient = log_q.exp_().mul_(rest - total)
    gradient.scatter_(1, tokens, found.pull[:, :-1] - named.exp() * total)
    return found.value, gradient


def _rest(logprobs: Float[Tensor, "C K"]) -> Float[Tensor, " C"]:
    return (1 - logprobs.exp().sum(-1)).clamp(min=SMALLEST)


def _with_rest(logprobs: Float[Tensor, "C K"]) -> Float[Tensor, "C K1"]:
    return torch.cat([logprobs, _rest(logprobs).log()[:, None]], -1)
