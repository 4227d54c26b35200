"""Students made of their teacher: some of its layers, or its shape with fresh weights."""

from __future__ import annotations

import re

import torch
from pydantic import Field

from treadle.core.errors import ConfigError
from treadle.core.pipeline import Workspace
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened
from treadle.objectives.observe import check_layer
from treadle.peft.adapter import merge
from treadle.quantization.quantize import unpack

_BLOCK = re.compile(r"blocks\.(\d+)\.")


class Thinned(ModelSource):
    """Some layers of a model, with its embedding, last norm and head (Sanh et al. 2019).

    Adapters are folded into the weights first, and packed weights unpacked.
    """

    model: ModelSource
    layers: tuple[int, ...] = Field(min_length=1)
    """Which blocks are kept, in ascending order; 0 is the first."""

    def open(self, workspace: Workspace) -> Opened:
        """The student.

        Raises:
            ConfigError: a layer does not exist, comes twice or out of order.
        """
        opened = self.model.open(workspace)
        if list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(
                f"Thinned: layers={self.layers} are not in ascending order, each once"
            )
        for layer in self.layers:
            check_layer(opened.model, layer)
        plain = unpack(merge(opened.model))
        return Opened(thinned(plain, self.layers), opened.origin, opened.metadata)


class Reinitialised(ModelSource):
    """A model's shape and tokenizer with fresh weights: the student without a teacher."""

    model: ModelSource
    seed: int = 0

    def open(self, workspace: Workspace) -> Opened:
        opened = self.model.open(workspace)
        state = torch.get_rng_state()
        torch.manual_seed(self.seed)
        fresh = opened.model.config.build()
        torch.set_rng_state(state)
        return Opened(fresh, opened.origin, opened.metadata)


def thinned(model: DecoderModel, layers: tuple[int, ...]) -> DecoderModel:
    """A model of the given blocks of `model`, with weights of its own."""
    config = model.config.replace(blocks=tuple(model.config.blocks[layer] for layer in layers))
    student = config.build()
    places = {layer: place for place, layer in enumerate(layers)}
    weights = {}
    for name, tensor in model.state_dict().items():
        match = _BLOCK.match(name)
        if match is None:
            weights[name] = tensor
        elif int(match[1]) in places:
            weights[f"blocks.{places[int(match[1])]}.{name[match.end() :]}"] = tensor
    student.load_state_dict(weights)
    return student
