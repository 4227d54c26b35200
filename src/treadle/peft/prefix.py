"""Prefix tuning: learned keys and values before the first token, in every attention layer.

    K_l <- [P_k,l; K_l],    V_l <- [P_v,l; V_l],     P [n, layers, 2, G, D] trained

Li and Liang 2021, arXiv:2101.00190. The weights stay as they are; what is learned is as many
numbers as n tokens take in a key-value cache, and costs a model as much as n tokens more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.models.decoder import DecoderModel
from treadle.models.transform import M, Transform
from treadle.nn.context import Context, Packed
from treadle.nn.layout import Layout
from treadle.nn.mixers.attention import AttentionLayer
from treadle.nn.prefix import KeysValues, Prefixed, Recorded
from treadle.peft.adapter import Added, device_of, freeze
from treadle.peft.virtual import Direct, VirtualTokens

CARD = Card(
    id="ft.prefix",
    paper="Li and Liang 2021, Prefix-Tuning, arXiv:2101.00190",
    summary="Learned keys and values before the first token of every attention layer.",
    recipe="treadle run fine-tune 'steps.sft.transforms=[{kind: PrefixTuning}]' "
    "steps.sft.optimizer.lr=0.01",
    oracle="tests/peft/test_peft_prefix.py::test_prefix_matches_peft",
)


class PrefixTuning(Transform):
    """Learned keys and values."""

    tokens: int = Field(default=16, ge=1)
    """n."""
    encoder: VirtualTokens = Direct()

    def __call__(self, model: M) -> M:
        decoder = plain_decoder(model, "PrefixTuning")
        with torch.no_grad():
            recorded = record(decoder, real_tokens(decoder, self.tokens))
        shapes = {(t.keys.shape, t.values.shape) for t in recorded.values()}
        if len(shapes) != 1 or len({s for pair in shapes for s in pair}) != 1:
            raise ConfigError("PrefixTuning: the attention layers differ in their key-value heads")
        start = torch.stack([x for t in recorded.values() for x in (t.keys, t.values)], 1)
        return attach(model, KeyValueTable(self, tuple(recorded), start))


class Prefix(Added, ABC):
    """What is learned, as a module of the model called `prefix`."""

    count: int

    @abstractmethod
    def tables(self, model: DecoderModel) -> Mapping[int, KeysValues]:
        """Keys and values of every attention layer, by its number."""


class KeyValueTable(Prefix):
    def __init__(self, config: PrefixTuning, layers: tuple[int, ...], start: torch.Tensor) -> None:
        super().__init__()
        self.config, self.count, self.layers = config, config.tokens, layers
        self.shape = tuple(start.shape)
        width = start.shape[-2] * start.shape[-1]
        self.virtual = config.encoder.build(width, start.flatten(1)).to(start.device)

    def tables(self, model: DecoderModel) -> Mapping[int, KeysValues]:
        pairs = self.virtual().view(self.shape).unflatten(1, (-1, 2))
        return {
            layer: KeysValues(pairs[:, place, 0], pairs[:, place, 1])
            for place, layer in enumerate(self.layers)
        }


class PrefixedForward:
    """Stands in for the model's `forward`. An object, not a closure: a copied model has its own."""

    def __init__(self, model: DecoderModel, prefix: Prefix) -> None:
        self.model, self.prefix = model, prefix

    def __call__(self, tokens: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        if context is None:
            rows, width = (1, tokens.shape[0]) if tokens.ndim == 1 else tokens.shape
            context = Packed.of(Layout.rows(rows, width), tokens.device)
        if isinstance(context, Packed):
            tables = self.prefix.tables(self.model)
            context = Prefixed.of(context, self.prefix.count, tables)
        elif context.prefix != self.prefix.count:
            raise ConfigError(
                f"the model has a learned prefix of {self.prefix.count} positions, and "
                f"{type(context).__name__} holds {context.prefix}: whatever caches keys and values "
                "must begin each sequence with those of `prefix_of(model)`"
            )
        return type(self.model).forward(self.model, tokens, context)


def prefix_of(model: nn.Module) -> Prefix | None:
    """The learned prefix of a model, if it has one."""
    found = getattr(model, "prefix", None)
    return found if isinstance(found, Prefix) else None


def plain_decoder(model: nn.Module, owner: str) -> DecoderModel:
    """The model as a decoder that can take a prefix.

    Raises:
        ConfigError: it is none, or has a prefix.
    """
    if not isinstance(model, DecoderModel):
        raise ConfigError(f"{owner}: {type(model).__name__} is no decoder")
    if prefix_of(model) is not None:
        raise ConfigError(f"{owner}: the model has a learned prefix already; take one of them")
    layers = [m.layer for m in model.modules() if isinstance(m, AttentionLayer)]
    if not layers:
        raise ConfigError(f"{owner}: the model has no attention layer that could see a prefix")
    return model


def attach(model: M, prefix: Prefix) -> M:
    """Let every pass begin with the prefix, and nothing but it and other additions train."""
    assert isinstance(model, DecoderModel)
    model.add_module("prefix", prefix)
    forward: dict[str, Any] = vars(model)
    forward["forward"] = PrefixedForward(model, prefix)
    freeze(model)
    return model


def real_tokens(model: DecoderModel, count: int) -> torch.Tensor:
    """Embeddings of tokens drawn from the vocabulary: a better start than noise."""
    device = device_of(model.embedding)
    ids = torch.randint(0, model.config.vocab, (count,)).to(device)
    rows: torch.Tensor = model.embedding(ids)
    return rows


def record(model: DecoderModel, rows: torch.Tensor) -> dict[int, KeysValues]:
    """Keys and values of these embeddings in every attention layer."""
    context = Recorded.of(rows.shape[0], rows.device)
    x = rows
    for block in model.blocks:
        x = block(x, context)
    return context.tables
