"""Unlearning: named texts are to be forgotten, all others kept.

    L = mean over pairs of  forget(x) - retain log p(y) / |y|        x to forget, y to keep

    GradientAscent   forget(x) = log p(x) / |x|
    NPO              forget(x) = 2/beta log(1 + (p(x) / p_ref(x))^beta)

Jang et al. 2023, arXiv:2210.01504; Zhang et al. 2024, Negative Preference Optimization,
arXiv:2404.05868. Ascent has no lower bound and ruins the model if it goes on; NPO slows down by
itself as p falls below p_ref, and is ascent again as beta goes to 0.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.models.decoder import DecoderModel
from treadle.objectives.dpo import sequence_logprobs
from treadle.objectives.objective import LossOutput, Objective

CARD = Card(
    id="ft.unlearn",
    paper="Zhang et al. 2024, NPO, arXiv:2404.05868; Jang et al. 2023, arXiv:2210.01504",
    summary="Makes a model forget named texts by NPO or gradient ascent, and keep all others.",
    recipe="treadle run unlearn",
    oracle="tests/objectives/test_objectives_unlearn.py::test_losses_by_hand",
)


@dataclass(frozen=True, kw_only=True)
class UnlearnBatch(Batch):
    """Pairs of texts: sequence 2 i is to be forgotten, sequence 2 i + 1 is kept."""

    reference: Float[Tensor, " S"] | None = None
    """Log-probability of each sequence before unlearning."""


class Forget(Config):
    """A shape: the loss of what is to be forgotten."""

    @abstractmethod
    def __call__(
        self,
        logp: Float[Tensor, " P"],
        lengths: Float[Tensor, " P"],
        reference: Float[Tensor, " P"] | None,
    ) -> Float[Tensor, " P"]:
        """Loss of each text, from its log-probability and its number of tokens."""


class GradientAscent(Forget):
    """Cross-entropy with the sign turned."""

    def __call__(
        self,
        logp: Float[Tensor, " P"],
        lengths: Float[Tensor, " P"],
        reference: Float[Tensor, " P"] | None,
    ) -> Float[Tensor, " P"]:
        return logp / lengths


class NPO(Forget):
    """Negative preference optimisation: a rejected answer without a chosen one."""

    beta: float = Field(0.1, gt=0.0)

    def __call__(
        self,
        logp: Float[Tensor, " P"],
        lengths: Float[Tensor, " P"],
        reference: Float[Tensor, " P"] | None,
    ) -> Float[Tensor, " P"]:
        if reference is None:
            raise TreadleError(
                "NPO compares with the model before unlearning, but the source computes no "
                "reference: set source.reference='{kind: InitialModel}'"
            )
        return -2 / self.beta * F.logsigmoid(-self.beta * (logp - reference))


class Unlearn(Objective):
    """Forget some texts, keep the others."""

    forget: Forget = NPO()
    retain: float = Field(1.0, ge=0.0)
    """Weight of the cross-entropy of what is kept; without it the model is soon of no use."""

    def __call__(self, model: DecoderModel, batch: UnlearnBatch) -> LossOutput:
        logp, lengths = sequence_logprobs(model, batch), batch.per_sequence(batch.weights)
        gone, kept = logp.unflatten(0, (-1, 2)).unbind(-1)
        gone_length, kept_length = lengths.unflatten(0, (-1, 2)).unbind(-1)
        reference = None if batch.reference is None else batch.reference[::2]
        forgotten = self.forget(gone, gone_length, reference)
        loss = -kept / kept_length
        metrics = {"forget_loss": (-gone / gone_length).sum(), "retain_loss": loss.sum()}
        return LossOutput(
            total=(forgotten + self.retain * loss).sum(),
            weight=batch.weights.new_tensor(len(gone)),
            metrics={name: value.detach() for name, value in metrics.items()},
        )
