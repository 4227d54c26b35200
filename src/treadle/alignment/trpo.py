"""Trust region policy optimisation: the largest gain within a bound on the change of the policy.

    max_theta L(theta) = mean r A     subject to   KL(pi_old || pi_theta) <= delta
    F x = g,   F = mean_t J_t' (diag p_t - p_t p_t') J_t + damping      by conjugate gradients
    theta <- theta + c^j sqrt(2 delta / x' F x) x    for the first j whose KL and gain will do

J_t is the derivative of the logits of token t. J v comes from two passes at theta +- eps v, and
J' u from one backward pass, so no layer needs a second derivative. Where the batch is too uniform
to allow any step, none is taken. Schulman et al. 2015, arXiv:1502.05477.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from treadle.core.cards import Card
from treadle.models.decoder import DecoderModel
from treadle.objectives.policy import PolicyBatch

CARD = Card(
    id="al.trpo",
    paper="Schulman et al. 2015, arXiv:1502.05477",
    summary="TRPO: natural gradient by conjugate gradients, a line search, a bound on the KL.",
    recipe="treadle run trpo",
    oracle="tests/alignment/test_alignment_trpo.py::test_the_step_is_that_of_the_explicit_fisher",
)
Vector = Float[Tensor, " P"]


@dataclass(frozen=True)
class Bounds:
    """How far and how hard a step is sought."""

    delta: float
    """Most mean KL of a token, in nats."""
    damping: float
    iterations: int
    """Of conjugate gradients."""
    backtracks: int
    shrink: float


@dataclass(frozen=True)
class Taken:
    """What a step did."""

    kl: float
    gain: float
    """Of the surrogate, that is of the expected advantage."""
    scale: float
    """c^j of the accepted step; 0 where none was."""
    mismatch: float
    """Mean |log pi - log mu| of a sampled token before the step."""


def trust_region_step(model: DecoderModel, batches: Sequence[PolicyBatch], bounds: Bounds) -> Taken:
    """Move the trained parameters of `model` once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    old = parameters_to_vector(parameters).detach()
    with torch.no_grad():
        before = [logprobs(model, b) for b in batches]
        gap = mismatch(before, batches)
    start, g = gain_and_gradient(model, parameters, batches, before)
    x = conjugate_gradient(
        lambda v: fisher_product(model, parameters, batches, before, v) + bounds.damping * v,
        g,
        bounds.iterations,
    )
    curvature = float(x @ (fisher_product(model, parameters, batches, before, x)))
    curvature += bounds.damping * float(x @ x)
    if curvature <= 0:
        return Taken(kl=0.0, gain=0.0, scale=0.0, mismatch=gap)
    full = (2 * bounds.delta / curvature) ** 0.5 * x
    for j in range(bounds.backtracks):
        scale = bounds.shrink**j
        place(parameters, old + scale * full)
        kl, value = measured_step(model, batches, before)
        if kl <= bounds.delta and value > start:
            return Taken(kl=kl, gain=value - start, scale=scale, mismatch=gap)
    place(parameters, old)
    return Taken(kl=0.0, gain=0.0, scale=0.0, mismatch=gap)


def mismatch(before: Sequence[Float[Tensor, "M V"]], batches: Sequence[PolicyBatch]) -> float:
    """Mean |log pi - log mu| of the sampled tokens."""
    total, weight = 0.0, 0.0
    for logp, batch in zip(before, batches, strict=True):
        chosen = logp.gather(-1, batch.targets[:, None])[:, 0]
        total += float(((chosen - batch.behaviour).abs() * batch.weights).sum())
        weight += float(batch.weights.sum())
    return total / weight


def conjugate_gradient(
    apply: Callable[[Vector], Vector], b: Vector, iterations: int, tolerance: float = 1e-10
) -> Vector:
    """x with A x = b, for A symmetric and positive definite, which `apply` multiplies by."""
    x = torch.zeros_like(b)
    r, p = b.clone(), b.clone()
    rr = r @ r
    first = float(rr)
    for _ in range(iterations):
        if float(rr) <= tolerance * first:
            break
        ap = apply(p)
        alpha = rr / (p @ ap)
        x = x + alpha * p
        r = r - alpha * ap
        rr, before = r @ r, rr
        p = r + rr / before * p
    return x


def logprobs(model: DecoderModel, batch: PolicyBatch) -> Float[Tensor, "M V"]:
    """Log-probabilities of all tokens at each prediction: M x V floats, so batches stay small."""
    hidden = model(batch.tokens, batch.context())
    logits = model.logits(hidden[batch.sources])
    if logits.dtype is torch.bfloat16:  # a divergence of 1e-3 is less than its rounding
        logits = logits.float()
    return (logits / batch.temperature).log_softmax(-1)


def fisher_product(
    model: DecoderModel,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[PolicyBatch],
    before: Sequence[Float[Tensor, "M V"]],
    v: Vector,
) -> Vector:
    """F v at the present parameters, without damping."""
    here = parameters_to_vector(parameters).detach()
    eps = difference(here, v)
    total, weight = torch.zeros_like(v), 0.0
    for batch, logp in zip(batches, before, strict=True):
        with torch.no_grad():
            place(parameters, here + eps * v)
            ahead = logprobs(model, batch)
            place(parameters, here - eps * v)
            # The derivative of log p is that of the logits less its mean under p, and
            # diag(p) - p p' takes such means away, here by the softmax of the backward pass.
            jv = (ahead - logprobs(model, batch)) / (2 * eps)
            place(parameters, here)
            u = logp.exp() * jv * batch.weights[:, None]
        product = torch.autograd.grad((logprobs(model, batch) * u).sum(), parameters)
        total += parameters_to_vector(product)
        weight += float(batch.weights.sum())
    return total / weight


def difference(here: Vector, v: Vector) -> float:
    """A step of central differences that balances their error with that of rounding."""
    machine: float = torch.finfo(v.dtype).eps ** (1 / 3)
    return machine * (1 + float(here.norm())) / max(float(v.norm()), 1e-30)


def gain_and_gradient(
    model: DecoderModel,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[PolicyBatch],
    before: Sequence[Float[Tensor, "M V"]],
) -> tuple[float, Vector]:
    """L and its gradient at the present parameters."""
    weight = sum(float(b.weights.sum()) for b in batches)
    total, value = torch.zeros(0), 0.0
    for batch, logp in zip(batches, before, strict=True):
        loss = surrogate(logprobs(model, batch), logp, batch) / weight
        part = parameters_to_vector(torch.autograd.grad(loss, parameters))
        total = part if not len(total) else total + part
        value += float(loss.detach())
    return value, total


def surrogate(
    logp: Float[Tensor, "M V"], before: Float[Tensor, "M V"], batch: PolicyBatch
) -> Float[Tensor, ""]:
    """Sum of r A over the sampled tokens, with r against the policy before the step."""
    chosen = batch.targets[:, None]
    ratio = (logp.gather(-1, chosen) - before.gather(-1, chosen))[:, 0].exp()
    return (ratio * batch.advantages * batch.weights).sum()


@torch.no_grad()
def measured_step(
    model: DecoderModel, batches: Sequence[PolicyBatch], before: Sequence[Float[Tensor, "M V"]]
) -> tuple[float, float]:
    """Mean KL(pi_old || pi) of a token, exact, and L."""
    kl, value, weight = 0.0, 0.0, 0.0
    for batch, old in zip(batches, before, strict=True):
        now = logprobs(model, batch)
        kl += float(((old.exp() * (old - now)).sum(-1) * batch.weights).sum())
        value += float(surrogate(now, old, batch))
        weight += float(batch.weights.sum())
    return kl / weight, value / weight


@torch.no_grad()
def place(parameters: Sequence[nn.Parameter], vector: Vector) -> None:
    vector_to_parameters(vector, parameters)
