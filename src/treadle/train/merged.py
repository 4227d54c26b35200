"""A merge of models as a source of a model: to be measured, exported or trained further."""

from __future__ import annotations

import torch
from torch import Tensor

from treadle.core.pipeline import Workspace
from treadle.merging.averages import Average
from treadle.merging.method import MergeMethod, merge_states
from treadle.models.decoder import DecoderModel
from treadle.models.hub.fill import require_plain
from treadle.models.source import ModelSource, Opened
from treadle.peft.adapter import merge
from treadle.quantization.quantize import unpack


class Merged(ModelSource):
    """Models of one shape, merged; their adapters are folded into them first.

    The tokenizer is that of the first model.
    """

    models: tuple[ModelSource, ...]
    base: ModelSource | None = None
    """What all were tuned from, where the method needs it."""
    method: MergeMethod = Average()

    def open(self, workspace: Workspace) -> Opened:
        self.method.check(len(self.models), has_base=self.base is not None)
        opened = [source.open(workspace) for source in self.models]
        states = [plain_state(one.model) for one in opened]
        base = None if self.base is None else plain_state(self.base.open(workspace).model)
        merged = merge_states(self.method, states, base)
        model = opened[0].model.requires_grad_(True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(merged[name])
        return Opened(model, opened[0].origin, opened[0].metadata)


def plain_state(model: DecoderModel) -> dict[str, Tensor]:
    """The parameters of a model without adapters and packed weights, by name; tied ones once.

    Raises:
        ConfigError: a transform is in the model that cannot be folded into its weights.
    """
    require_plain(unpack(merge(model)))
    return dict(model.named_parameters())
