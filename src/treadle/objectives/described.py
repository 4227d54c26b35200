"""An objective for a hypernetwork: each batch comes with the description of its task."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from treadle.data.batch import Batch
from treadle.models.decoder import DecoderModel
from treadle.objectives.objective import LossOutput, Objective
from treadle.peft.hypernetwork import write


@dataclass(frozen=True, kw_only=True)
class DescribedBatch(Batch):
    """A batch of one task."""

    description: Int[Tensor, " L"]
    """Its tokens."""


class Described(Objective):
    """Another objective, under the LoRA that is written from the batch's description."""

    objective: Objective

    def __call__(self, model: DecoderModel, batch: DescribedBatch) -> LossOutput:
        write(model, batch.description)
        return self.objective(model, batch)
