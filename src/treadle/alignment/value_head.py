"""A value head beside the policy's own: what a state is worth, read from its hidden state."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from treadle.core.errors import ConfigError
from treadle.models.decoder import DecoderModel
from treadle.models.transform import Transform
from treadle.objectives.ppo import VALUE

M = TypeVar("M", bound=nn.Module)


class ValueHead(Transform):
    """Adds a linear layer with one output, zero at first and always trained.

    Adapters go before it, so that they do not freeze it.
    """

    def __call__(self, model: M) -> M:
        if not isinstance(model, DecoderModel):
            raise ConfigError(f"ValueHead: a {type(model).__name__} is no decoder")
        head = nn.Linear(model.config.dim, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        model.add_module(VALUE, head)
        return model
