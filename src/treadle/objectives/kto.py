"""KTO: single answers that someone called good or bad, no pairs needed.

    r = log pi(y|x) - log ref(y|x),    z0 = max(0, mean over the batch of r(y'|x))
    L = w_good [1 - sigmoid(beta (r - z0))]   or   w_bad [1 - sigmoid(beta (z0 - r))]

y' is the answer to another prompt: z0 estimates how far the policy has gone from the reference,
and no gradient flows through it. It is taken over the micro-batch, as the authors do.
Ethayarajh et al. 2024, arXiv:2402.01306.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from treadle.data.batch import Batch
from treadle.models.decoder import DecoderModel
from treadle.objectives.dpo import sequence_logprobs
from treadle.objectives.objective import LossOutput, Objective


@dataclass(frozen=True, kw_only=True)
class LabelledBatch(Batch):
    """Sequence 2 i is an answer to prompt i, sequence 2 i + 1 an answer to another prompt."""

    reference: Float[Tensor, " S"]
    """Log-probability of each sequence under the reference model."""
    good: Bool[Tensor, " L"]


class KTO(Objective):
    """Kahneman-Tversky optimisation."""

    beta: float = Field(0.1, gt=0.0)
    good_weight: float = Field(1.0, gt=0.0)
    bad_weight: float = Field(1.0, gt=0.0)
    """Choose the two so that good_weight * good answers and bad_weight * bad ones are within 1:1
    and 4:3 of each other."""

    def __call__(self, model: DecoderModel, batch: LabelledBatch) -> LossOutput:
        ratios = sequence_logprobs(model, batch) - batch.reference
        own, others = ratios.unflatten(0, (-1, 2)).unbind(-1)
        z0 = others.detach().mean().clamp(min=0)
        sign = torch.where(batch.good, 1.0, -1.0)
        weight = torch.where(batch.good, self.good_weight, self.bad_weight)
        loss = weight * (1 - torch.sigmoid(self.beta * sign * (own - z0)))
        rewards = self.beta * own.detach()
        count = batch.weights.new_tensor(len(batch.good))
        metrics = {
            "kl": z0 * count,
            "reward_good": (rewards * batch.good).sum(),
            "reward_bad": (rewards * ~batch.good).sum(),
        }
        return LossOutput(loss.sum(), count, metrics)
