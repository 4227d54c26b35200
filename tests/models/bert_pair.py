"""A tiny BERT's sizes, and texts of unequal length as treadle and transformers take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SIZE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "layer_norm_eps": 1e-6,
}
LENGTHS = (9, 4, 7)


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three documents of unequal length as one flat run, with the types of their tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 61, (sum(LENGTHS),), generator=generator)
    types = torch.cat([torch.arange(n) >= n // 2 for n in LENGTHS]).long()
    return tokens, types


def padded(flat: torch.Tensor) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(list(flat.split(LENGTHS)), batch_first=True)


def their_inputs() -> dict[str, torch.Tensor]:
    tokens, types = texts()
    mask = padded(torch.ones_like(tokens))
    return {"input_ids": padded(tokens), "token_type_ids": padded(types), "attention_mask": mask}


def wave(t: torch.Tensor) -> torch.Tensor:
    """A number that depends on each entry in its own way."""
    return (t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).cos().view_as(t)).sum()
