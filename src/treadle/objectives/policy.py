"""GRPO and its relatives: policy gradients on groups of sampled completions.

    r_i = pi(y_i) / pi_old(y_i)                               importance ratio
    J = sum_i n_i [ min(r_i A_i, clip(r_i, 1 - low, 1 + high) A_i) - beta KL_i ]

Shao et al. 2024 (DeepSeekMath, arXiv:2402.03300). The members of the family are values of four
axes: how advantages come from a group's rewards (`alignment/advantages.py`), the ratio, the
clipping, and the normalisation n_i:

    GRPO      token ratio      clip     each sequence 1, its tokens 1/length
    DAPO      token ratio      clip with high > low     each token 1        arXiv:2503.14476
    Dr. GRPO  token ratio      clip     each token 1/constant               arXiv:2503.20783
    GSPO      sequence ratio   clip     as GRPO                             arXiv:2507.18071
    CISPO     token ratio      the weight is clipped, not the objective     arXiv:2506.13585
    RLOO, REINFORCE++          by their advantages
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.kernels.linear_cross_entropy import token_logprobs
from treadle.models.decoder import DecoderModel
from treadle.nn.linear import bias_of
from treadle.objectives.kl import K3, KLEstimate
from treadle.objectives.objective import LossOutput, Objective, head_rule

CARD = Card(
    id="al.grpo",
    paper="Shao et al. 2024, DeepSeekMath, arXiv:2402.03300",
    summary="Group-relative policy optimisation with verifiable rewards, and its variants as axes.",
    recipe="treadle run quickstart",
    oracle="tests/objectives/test_objectives_policy.py::test_losses_and_gradients_match_trl",
)


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(Batch):
    """Sampled completions with their advantages."""

    advantages: Float[Tensor, " M"]
    """Advantage of the sequence that each prediction belongs to."""
    behaviour: Float[Tensor, " M"]
    """Log-probability of each token under the policy that sampled it."""
    reference: Float[Tensor, " M"] | None = None
    """Log-probability under the reference policy, where a KL penalty asks for it."""
    temperature: float = 1.0
    """Of the sampling; both log-probabilities are at this temperature."""


class Ratio(Config):
    """A shape: importance ratios in log space."""

    @abstractmethod
    def __call__(self, log_ratio: Float[Tensor, " M"], batch: PolicyBatch) -> Float[Tensor, " M"]:
        """Log importance ratio that each token uses."""


class TokenRatio(Ratio):
    """Each token has its own."""

    def __call__(self, log_ratio: Float[Tensor, " M"], batch: PolicyBatch) -> Float[Tensor, " M"]:
        return log_ratio


class SequenceRatio(Ratio):
    """The geometric mean over the sequence; the gradient still flows through each token (GSPO)."""

    def __call__(self, log_ratio: Float[Tensor, " M"], batch: PolicyBatch) -> Float[Tensor, " M"]:
        return sequence_mean(log_ratio, batch)[batch.sequences]


class Surrogate(Config):
    """A shape: the term that is maximised for each token."""

    @abstractmethod
    def __call__(
        self,
        log_ratio: Float[Tensor, " M"],
        advantages: Float[Tensor, " M"],
        logp: Float[Tensor, " M"],
    ) -> Surrogates:
        """Value of the surrogate and where it was clipped."""


@dataclass(frozen=True)
class Surrogates:
    value: Float[Tensor, " M"]
    clipped: Float[Tensor, " M"]


class ClippedRatio(Surrogate):
    """min(r A, clip(r) A), Schulman et al. 2017."""

    low: float = Field(0.2, gt=0.0, lt=1.0)
    high: float = Field(0.2, gt=0.0)

    def __call__(
        self,
        log_ratio: Float[Tensor, " M"],
        advantages: Float[Tensor, " M"],
        logp: Float[Tensor, " M"],
    ) -> Surrogates:
        ratio = log_ratio.exp()
        bounded = ratio.clamp(1 - self.low, 1 + self.high) * advantages
        free = ratio * advantages
        return Surrogates(torch.minimum(free, bounded), (bounded < free).float())


class ClippedWeight(Surrogate):
    """clip(r) A log pi, the weight without gradient, so that no token is dropped (CISPO)."""

    high: float = Field(4.0, gt=0.0)

    def __call__(
        self,
        log_ratio: Float[Tensor, " M"],
        advantages: Float[Tensor, " M"],
        logp: Float[Tensor, " M"],
    ) -> Surrogates:
        ratio = log_ratio.detach().exp()
        weight = ratio.clamp(max=1 + self.high)
        return Surrogates(weight * advantages * logp, (weight < ratio).float())


class Normalisation(Config):
    """A shape: the weight n_i of each token, and what the sum is divided by."""

    @abstractmethod
    def __call__(self, batch: PolicyBatch) -> Normalised:
        """Token weights and divisor of this micro-batch."""


@dataclass(frozen=True)
class Normalised:
    weights: Float[Tensor, " M"]
    divisor: Float[Tensor, ""]


class PerSequence(Normalisation):
    """Every sequence counts alike, whatever its length (GRPO)."""

    def __call__(self, batch: PolicyBatch) -> Normalised:
        lengths = batch.per_sequence(batch.weights)
        divisor = torch.tensor(float(batch.sequence_count), device=batch.weights.device)
        return Normalised(batch.weights / lengths[batch.sequences], divisor)


class PerToken(Normalisation):
    """Every token counts alike (DAPO)."""

    def __call__(self, batch: PolicyBatch) -> Normalised:
        return Normalised(batch.weights, batch.weights.sum())


class PerBudget(Normalisation):
    """Divide by sequences times a constant, so that length carries no bias (Dr. GRPO)."""

    tokens: int = Field(ge=1)
    """The most tokens that a completion may have."""

    def __call__(self, batch: PolicyBatch) -> Normalised:
        divisor = float(batch.sequence_count * self.tokens)
        return Normalised(batch.weights, torch.tensor(divisor, device=batch.weights.device))


class GRPO(Objective):
    """Group-relative policy optimisation."""

    ratio: Ratio = TokenRatio()
    surrogate: Surrogate = ClippedRatio()
    normalisation: Normalisation = PerSequence()
    beta: float = Field(0.0, ge=0.0)
    """Weight of the KL to the reference policy."""
    kl: KLEstimate = K3()

    def __call__(self, model: DecoderModel, batch: PolicyBatch) -> LossOutput:
        logp = sampled_logprobs(model, model(batch.tokens, batch.context())[batch.sources], batch)
        log_ratio = logp - batch.behaviour
        surrogate = self.surrogate(self.ratio(log_ratio, batch), batch.advantages, logp)
        gain = surrogate.value
        norm = self.normalisation(batch)
        metrics = {
            "clipped": (norm.weights * surrogate.clipped).sum(),
            "mismatch": (norm.weights * log_ratio.detach().abs()).sum(),
        }
        if batch.reference is not None:
            kl = self.kl(logp, batch.reference)
            metrics["kl"] = (norm.weights * kl.detach()).sum()
            gain = gain - self.beta * kl
        elif self.beta:
            raise TreadleError(
                f"GRPO: beta={self.beta} asks for a reference, but the source has none: set "
                "source.reference='{kind: FrozenCopy}'"
            )
        return LossOutput(-(norm.weights * gain).sum(), norm.divisor, metrics)


def sampled_logprobs(
    model: DecoderModel, hidden: Float[Tensor, "M D"], batch: PolicyBatch
) -> Float[Tensor, " M"]:
    """log pi of the sampled tokens at the batch's temperature, from the states before them."""
    return token_logprobs(
        hidden,
        model.head_weight(),
        batch.targets,
        bias=bias_of(model.head),
        rule=head_rule(model, batch.temperature),
    )


def sequence_mean(values: Float[Tensor, " M"], batch: Batch) -> Float[Tensor, " S"]:
    """Weighted mean of a value over the predictions of each sequence."""
    return batch.per_sequence(values * batch.weights) / batch.per_sequence(batch.weights)
