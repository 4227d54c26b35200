"""An objective for a model that has something of its own for each task."""

from __future__ import annotations

from treadle.data.batch import Batch
from treadle.models.decoder import DecoderModel
from treadle.objectives.objective import LossOutput, Objective
from treadle.peft.multitask_prompt import set_task


class AsTask(Objective):
    """Another objective, with the prompt of the batch's task."""

    objective: Objective

    def __call__(self, model: DecoderModel, batch: Batch) -> LossOutput:
        set_task(model, batch.task)
        return self.objective(model, batch)
