"""A model without its values: what it is made of, at no memory and in no time.

Layers draw fresh weights when they are made. On the meta device that draws nothing, but torch
imports its compiler to find that out (1.1 s); here the filling is left out altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from treadle.core.cards import Card
from treadle.models.decoder import Decoder, DecoderModel

CARD = Card(
    id="inf.loading",
    paper="No paper: engineering.",
    summary="Weights are mapped from their file, not copied; models are laid out before a byte is "
    "read; nothing is imported or filled that will not be used.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was'",
    oracle="tests/models/test_models_outline.py::test_weights_are_mapped_not_copied",
)


def outline(decoder: Decoder) -> DecoderModel:
    """The decoder's model on the meta device."""
    with torch.device("meta"), Unfilled():
        return decoder.build()


DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
"""What torch's layers fill their weights with."""


class Unfilled(TorchFunctionMode):
    """Those leave a tensor as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in DRAWS:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)
