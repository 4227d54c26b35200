"""Direct preference optimisation: a reward model that is the policy itself.

    L = -log sigmoid( beta [ (log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x)) ] )

for a chosen answer y_w and a rejected y_l to one prompt x. The reference is the model before
training; its log-probabilities come with the batch, computed once (`alignment/preferences.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.data.batch import Batch
from treadle.kernels.linear_cross_entropy import token_logprobs
from treadle.models.decoder import DecoderModel
from treadle.nn.linear import bias_of
from treadle.objectives.objective import LossOutput, Objective, head_rule

CARD = Card(
    id="al.dpo",
    paper="Rafailov et al. 2023, arXiv:2305.18290; Mitchell 2023 (label smoothing)",
    summary="Direct preference optimisation, with label smoothing; shared prompts computed once.",
    recipe="treadle run dpo",
    oracle="tests/objectives/test_objectives_dpo.py::test_loss_and_gradients_match_separate_sequences",
)


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch(Batch):
    """Pairs of answers: sequence 2 i is chosen, sequence 2 i + 1 is rejected."""

    reference: Float[Tensor, " S"]
    """Log-probability of each sequence under the reference model."""


class DPO(Objective):
    """Direct preference optimisation."""

    beta: float = Field(0.1, gt=0.0)
    """How strongly the policy is held to the reference."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Assumed share of labels that are the wrong way round."""

    def __call__(self, model: DecoderModel, batch: PreferenceBatch) -> LossOutput:
        logp = sequence_logprobs(model, batch)
        chosen, rejected = (self.beta * (logp - batch.reference)).unflatten(0, (-1, 2)).unbind(-1)
        margin = chosen - rejected
        loss = -(1 - self.label_smoothing) * F.logsigmoid(margin)
        loss = loss - self.label_smoothing * F.logsigmoid(-margin)
        metrics = {
            "accuracy": (margin > 0).sum(),
            "margin": margin.detach().sum(),
            "chosen": chosen.detach().sum(),
            "rejected": rejected.detach().sum(),
        }
        pairs = batch.weights.new_tensor(batch.sequence_count / 2)
        return LossOutput(loss.sum(), pairs, metrics)


def sequence_logprobs(model: DecoderModel, batch: Batch) -> Float[Tensor, " S"]:
    """Log-probability of each sequence of a batch."""
    hidden = model(batch.tokens, batch.context())
    logp = token_logprobs(
        hidden[batch.sources],
        model.head_weight(),
        batch.targets,
        bias=bias_of(model.head),
        rule=head_rule(model),
    )
    return batch.per_sequence(logp)
