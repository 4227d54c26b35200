"""Proximal policy optimisation: a clipped policy step and a clipped value step.

    L_pi = -mean min(r A, clip(r, 1 - eps, 1 + eps) A),          r = pi / pi_old
    L_V  = mean max[(V - R)^2, (clip(V, V_old +- eps_V) - R)^2] / 2
    L    = L_pi + c L_V

over tokens. The value is a second head on the policy's own hidden states.
Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.models.decoder import DecoderModel
from treadle.objectives.objective import LossOutput, Objective
from treadle.objectives.policy import ClippedRatio, PolicyBatch, Surrogate, sampled_logprobs

CARD = Card(
    id="al.ppo",
    paper="Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593",
    summary="PPO with GAE, clipped value and an adaptive KL to the reference.",
    recipe="treadle run ppo",
    oracle="tests/objectives/test_objectives_ppo.py::test_loss_and_gradients_match_float64",
)
VALUE = "value"
"""Name of the value head in the model."""


@dataclass(frozen=True, kw_only=True)
class PPOBatch(PolicyBatch):
    """Sampled tokens with advantages, and what the value head is to learn."""

    returns: Float[Tensor, " M"]
    values: Float[Tensor, " M"]
    """Of the value head when the tokens were sampled."""


class PPO(Objective):
    """Proximal policy optimisation."""

    surrogate: Surrogate = ClippedRatio()
    value_clip: float = Field(0.2, gt=0.0)
    value_weight: float = Field(0.1, ge=0.0)
    """The coefficient c."""

    def __call__(self, model: DecoderModel, batch: PPOBatch) -> LossOutput:
        hidden = model(batch.tokens, batch.context())[batch.sources]
        logp = sampled_logprobs(model, hidden, batch)
        log_ratio = logp - batch.behaviour
        gain = self.surrogate(log_ratio, batch.advantages, logp)
        value = state_values(model, hidden)
        near = batch.values + (value - batch.values).clamp(-self.value_clip, self.value_clip)
        errors = [(v - batch.returns).square() for v in (value, near)]
        value_loss = torch.maximum(*errors) / 2
        loss = -gain.value + self.value_weight * value_loss
        metrics = {
            "clipped": gain.clipped.sum(),
            "drift": log_ratio.detach().abs().sum(),
            "value_loss": value_loss.detach().sum(),
        }
        return LossOutput((batch.weights * loss).sum(), batch.weights.sum(), metrics)


def state_values(model: DecoderModel, hidden: Float[Tensor, "M D"]) -> Float[Tensor, " M"]:
    """The value of the states that hidden states stand for, in fp32.

    Raises:
        TreadleError: the model has no value head.
    """
    head = dict(model.named_children()).get(VALUE)
    if not isinstance(head, nn.Linear):
        raise TreadleError("PPO needs a value head: add `{kind: ValueHead}` to the transforms")
    with torch.autocast(hidden.device.type, enabled=False):
        value: Tensor = hidden.float() @ head.weight[0].float() + head.bias[0].float()
    return value
