"""A tiny decoder, and a stream of uneven documents that any number of ranks can share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from treadle.data.batch import Batch, Piece, assemble
from treadle.data.source import Stream, Work
from treadle.models.decoder import Decoder, DecoderModel
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.objectives.causal import CausalLM
from treadle.objectives.objective import LossOutput, Objective

VOCAB = 61


def tiny_model(seed: int = 0, layers: int = 2, dim: int = 16) -> DecoderModel:
    torch.manual_seed(seed)
    block = Block(mixer=Attention(heads=2), ffn=GatedMLP(hidden=2 * dim))
    return Decoder(vocab=VOCAB, dim=dim, context=64, blocks=(block,) * layers).build()


def documents(step: int, count: int) -> list[Piece]:
    """Documents of 3 to 20 tokens that count upwards; prompts of uneven length are not learnt."""
    generator = torch.Generator().manual_seed(1000 + step)
    pieces = []
    for _ in range(count):
        length = int(torch.randint(3, 21, (), generator=generator))
        start = int(torch.randint(0, VOCAB, (), generator=generator))
        prompt = int(torch.randint(0, length - 1, (), generator=generator))
        tokens = [(start + i * i) % VOCAB for i in range(length)]
        pieces.append(Piece(tokens, [i >= prompt for i in range(length)]))
    return pieces


class CountedLM(Objective):
    """Cross-entropy per prediction, whatever their weights: a large weight makes a large loss."""

    def __call__(self, model: DecoderModel, batch: Batch) -> LossOutput:
        output = CausalLM()(model, batch)
        count = torch.tensor(float(len(batch.targets)))
        return LossOutput(total=output.total, weight=count, metrics=output.metrics)


class TinyStream(Stream):
    """`count` documents a step, cut into `micro` micro-batches, shared by `world` ranks.

    `poison` multiplies the weights of a step's predictions: by NaN, or by a factor that makes a
    spike of `CountedLM`.
    """

    def __init__(
        self,
        *,
        count: int = 8,
        micro: int = 1,
        rank: int = 0,
        world: int = 1,
        poison: Mapping[int, float] | None = None,
        cycle: int = 1000,
    ) -> None:
        self.count, self.micro, self.rank, self.world = count, micro, rank, world
        self.poison, self.cycle, self.step = dict(poison or {}), cycle, 0

    def __next__(self) -> Work:
        pieces = documents(self.step % self.cycle, self.count)[self.rank :: self.world]
        batches = [assemble(pieces[i :: self.micro]) for i in range(self.micro)]
        if self.step in self.poison:
            factor = self.poison[self.step]
            batches = [spoiled(batch, factor) for batch in batches]
        self.step += 1
        return Work(tuple(batches))

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]


def spoiled(batch: Batch, factor: float) -> Batch:
    """Wrong targets with a weight of `factor`."""
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(0, VOCAB, batch.targets.shape, generator=generator)
    return replace(batch, targets=targets, weights=batch.weights * factor)
