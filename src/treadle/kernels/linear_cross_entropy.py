"""Log-probabilities of target tokens from hidden states, never holding all logits.

    logp_i = z_i[y_i] - logsumexp(z_i),     z_i = cap(W h_i + b) / T

The logits of all tokens would be M x V floats (2 GB for 10,000 tokens of a 50,000-word
vocabulary); here they live a chunk of rows at a time.

`token_logprobs` serves any loss of log-probabilities: its backward computes each chunk again, or,
where the head is frozen, scales rows d logp_i / d h_i that the forward pass left.
`linear_cross_entropy` knows that the loss is -sum_i w_i logp_i, so it takes the gradient in the
forward pass, while the chunk's logits are there: no second product with W (as in Liger kernels,
Hsu et al. 2024, arXiv:2410.10989).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from treadle.core.cards import Card

CARD = Card(
    id="arch.fused",
    paper="Hsu et al. 2024, Liger kernels, arXiv:2410.10989",
    summary="RMSNorm, gate, rotation and head with loss that keep no intermediate results.",
    recipe="treadle run quickstart",
    oracle="tests/kernels/test_kernels_linear_cross_entropy.py::test_linear_cross_entropy_and_gradients",
)
CHUNK_ELEMENTS, CHUNK_ROWS = 4 * 2**20, 256
"""Logits held at once: 16 MiB in fp32, that caches and allocators keep; but of so many rows at
least that reading the matrix anew for each chunk stays cheap beside the product."""


@dataclass(frozen=True)
class HeadRule:
    """What happens between W h and the softmax."""

    softcap: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class TokenStatistics:
    """Log-probability and entropy (nats) of each prediction, without gradient."""

    logprobs: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]


def chunks(rows: int, vocab: int) -> list[slice]:
    step = max(CHUNK_ROWS, CHUNK_ELEMENTS // vocab)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def token_logprobs_reference(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " M"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    rule: HeadRule = HeadRule(),
) -> Float[Tensor, " M"]:
    """The definition, with all logits in memory."""
    logits = F.linear(hidden, weight, bias).float()
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    logp = (logits / rule.temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0]


def token_logprobs(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " M"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    rule: HeadRule = HeadRule(),
) -> Float[Tensor, " M"]:
    """Log-probability of each target in fp32, differentiable in hidden, weight and bias."""
    hidden, weight = operands(hidden, weight)
    logp: Tensor = _TokenLogprobs.apply(hidden, weight, targets, bias, rule)
    return logp


@torch.no_grad()
def token_statistics(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " M"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    rule: HeadRule = HeadRule(),
) -> TokenStatistics:
    """Log-probability of each target and entropy of its distribution."""
    hidden, weight = operands(hidden, weight)
    logprobs = torch.empty(len(targets), device=hidden.device)
    entropy = torch.empty_like(logprobs)
    for rows in chunks(len(targets), len(weight)):
        logits, _ = head_logits(hidden[rows], weight, bias, rule)
        shifted = logits.sub_(logits.amax(-1, keepdim=True))
        target = shifted.gather(-1, targets[rows, None])[:, 0]
        p = shifted.exp()
        mass = p.sum(-1)
        logprobs[rows] = target - mass.log()
        entropy[rows] = mass.log() - p.mul_(shifted).sum(-1) / mass
    return TokenStatistics(logprobs, entropy)


@dataclass(frozen=True)
class CrossEntropy:
    """Sum of weighted negative log-probabilities, and how many targets were the likeliest token."""

    total: Float[Tensor, ""]
    correct: Float[Tensor, ""]


def linear_cross_entropy(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " M"],
    weights: Float[Tensor, " M"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    rule: HeadRule = HeadRule(),
) -> CrossEntropy:
    """-sum_i weights_i logp_i; its gradient is taken chunk by chunk in the forward pass."""
    hidden, weight = operands(hidden, weight)
    return CrossEntropy(*_LinearCrossEntropy.apply(hidden, weight, targets, weights, bias, rule))


def operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype: autocast's where it is on, else the weight's. Cast once, not per chunk."""
    device = hidden.device.type
    mixed = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if mixed else weight.dtype
    return hidden.to(dtype), weight.to(dtype)


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: HeadRule
) -> tuple[Tensor, Tensor | None]:
    """fp32 logits after cap and temperature, and the derivative of the cap."""
    logits = F.linear(hidden, weight, bias).float()
    slope = None
    if rule.softcap is not None:
        tanh = torch.tanh(logits / rule.softcap)
        logits, slope = rule.softcap * tanh, 1 - tanh.square()
    if rule.temperature != 1.0:
        logits = logits / rule.temperature
    return logits, slope


@dataclass(frozen=True)
class _Softmax:
    """exp(z - max z), in the place of the logits, and what was read before they went."""

    exponentials: Float[Tensor, "C V"]
    mass: Float[Tensor, " C"]
    logp: Float[Tensor, " C"]
    likeliest: Float[Tensor, " C"]
    """1 where the target has the greatest logit."""

    @staticmethod
    def of(logits: Tensor, targets: Tensor) -> _Softmax:
        peak = logits.amax(-1, keepdim=True)
        target = logits.gather(-1, targets[:, None]) - peak
        exponentials = logits.sub_(peak).exp_()
        mass = exponentials.sum(-1)
        return _Softmax(exponentials, mass, target[:, 0] - mass.log(), (target[:, 0] == 0).float())

    def gradient(self, slope: Tensor | None, targets: Tensor, g: Tensor, rule: HeadRule) -> Tensor:
        """d(sum g_i logp_i) / d(W h): g (onehot - softmax), through temperature and cap."""
        g = g / rule.temperature
        grad = self.exponentials.mul_((-g / self.mass)[:, None])
        grad.scatter_add_(1, targets[:, None], g[:, None])
        return grad if slope is None else grad.mul_(slope)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        rule: HeadRule,
    ) -> Tensor:
        logp = torch.empty(len(targets), device=hidden.device)
        # Of a frozen head only d logp_i / d h_i is asked for, which the loss scales row by row.
        ctx.frozen = ctx.needs_input_grad[0] and not (
            ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        )
        slopes = torch.empty_like(hidden) if ctx.frozen else None
        for rows in chunks(len(targets), len(weight)):
            logits, slope = head_logits(hidden[rows], weight, bias, rule)
            softmax = _Softmax.of(logits, targets[rows])
            logp[rows] = softmax.logp
            if slopes is not None:
                one = torch.ones_like(softmax.logp)
                grad = softmax.gradient(slope, targets[rows], one, rule)
                slopes[rows] = (grad.to(weight.dtype) @ weight).to(slopes.dtype)
        kept = (slopes,) if slopes is not None else (hidden, weight, targets, bias)
        ctx.save_for_backward(*kept)
        ctx.rule = rule
        return logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.frozen:
            (slopes,) = ctx.saved_tensors
            return (slopes * grads[0][:, None]).to(slopes.dtype), None, None, None, None
        hidden, weight, targets, bias = ctx.saved_tensors
        sums = HeadGradients(ctx, hidden, weight, bias)
        for rows in chunks(len(targets), len(weight)):
            logits, slope = head_logits(hidden[rows], weight, bias, ctx.rule)
            softmax = _Softmax.of(logits, targets[rows])
            sums.add(rows, softmax.gradient(slope, targets[rows], grads[0][rows], ctx.rule))
        return sums.hidden, sums.weight, None, sums.bias, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        rule: HeadRule,
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=hidden.device)
        correct = torch.zeros((), device=hidden.device)
        sums = HeadGradients(ctx, hidden, weight, bias, positions=(0, 1, 4))
        for rows in chunks(len(targets), len(weight)):
            logits, slope = head_logits(hidden[rows], weight, bias, rule)
            y, w = targets[rows], weights[rows].float()
            softmax = _Softmax.of(logits, y)
            total -= (w * softmax.logp).sum()
            correct += (w * softmax.likeliest).sum()
            if sums.needed:
                sums.add(rows, softmax.gradient(slope, y, -w, rule))
        ctx.sums = sums
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.sums.times(grads[0])
        return hidden, weight, None, None, bias, None


class HeadGradients:
    """Sums of the gradients that are asked for; rows of logit gradients go in."""

    def __init__(
        self,
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        positions: tuple[int, int, int] = (0, 1, 3),
    ) -> None:
        need = [ctx.needs_input_grad[p] for p in positions]
        self.needed = any(need)
        self.inputs, self.matrix = hidden, weight
        self.hidden = torch.empty_like(hidden) if need[0] else None
        # Summed over chunks: in fp32, or rounding errors of bf16 add up.
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if need[1] else None
        self.bias = torch.zeros_like(bias) if need[2] and bias is not None else None

    def add(self, rows: slice, grad: Tensor) -> None:
        low = grad.to(self.matrix.dtype)
        if self.hidden is not None:
            self.hidden[rows] = (low @ self.matrix).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight += low.T @ self.inputs[rows].to(low.dtype)
        if self.bias is not None:
            self.bias += grad.sum(0).to(self.bias.dtype)

    def times(self, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias where the sum's own gradient is `g`."""
        hidden, weight, bias = (
            None if t is None else t * g.to(t.dtype) for t in (self.hidden, self.weight, self.bias)
        )
        return hidden, weight, bias
