"""Pooling: the hidden states of a text to one vector.

mean    1/T sum_t h_t         all-MiniLM, E5
first   h_1                   BERT's [CLS], which sees everything after it
last    h_T                   decoders, whose last token alone has seen the whole text
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.core.config import Config
from treadle.nn.layout import Layout


def wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Pooling(Config):
    """A shape: one vector for each document."""

    @abstractmethod
    def __call__(self, hidden: Float[Tensor, "N D"], layout: Layout) -> Float[Tensor, "S D"]:
        """Of the documents of a layout without parents, in float32."""


class MeanPooling(Pooling):
    """The mean over all tokens, special ones too."""

    def __call__(self, hidden: Float[Tensor, "N D"], layout: Layout) -> Float[Tensor, "S D"]:
        lengths = torch.tensor(layout.lengths, device=hidden.device)
        rows = torch.repeat_interleave(lengths)
        states = wide(hidden)
        sums = states.new_zeros(len(lengths), states.shape[-1])
        return sums.index_add(0, rows, states) / lengths[:, None]


class FirstToken(Pooling):
    """The first token's, for encoders."""

    def __call__(self, hidden: Float[Tensor, "N D"], layout: Layout) -> Float[Tensor, "S D"]:
        return wide(hidden[torch.tensor(layout.starts, device=hidden.device)])


class LastToken(Pooling):
    """The last token's, for decoders."""

    def __call__(self, hidden: Float[Tensor, "N D"], layout: Layout) -> Float[Tensor, "S D"]:
        ends = torch.tensor(list(accumulate(layout.lengths)), device=hidden.device)
        return wide(hidden[ends - 1])
