"""Embedding models: near where texts belong together, far where they do not.

    InfoNCE       - log exp(s(q_i, d_i) / t) / sum_j exp(s(q_i, d_j) / t),   s the cosine
                  d_j: the texts of other queries of the micro-batch, and hard negatives
                  van den Oord et al. 2018, arXiv:1807.03748; Henderson et al. 2017
    Likeness      (s(a, b) - v)^2                       Reimers and Gurevych 2019, arXiv:1908.10084
    Matryoshka    sum_k w_k L(e[:k])    so that the first k numbers are an embedding by themselves
                  Kusupati et al. 2022, arXiv:2205.13147

Negatives come from the micro-batch: of these losses alone, k micro-batches are not one of k times
the size.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.labelled import RatedBatch
from treadle.data.matches import MatchBatch
from treadle.models.decoder import DecoderModel
from treadle.models.heads import VectorReadout, read, task_head
from treadle.objectives.objective import LossOutput, Objective

CARDS = (
    Card(
        id="ft.embedding",
        paper="van den Oord et al. 2018, arXiv:1807.03748; Reimers and Gurevych 2019, SBERT",
        summary="Trains embeddings on texts that belong together, with hard negatives.",
        recipe="treadle run embed-train steps.train.source.texts.path=pairs.jsonl",
        oracle="tests/objectives/test_objectives_embed.py::test_matches_sentence_transformers",
    ),
    Card(
        id="ft.embedding.matryoshka",
        paper="Kusupati et al. 2022, arXiv:2205.13147",
        summary="Embeddings whose first numbers are embeddings by themselves.",
        recipe="treadle run embed-train steps.train.source.texts.path=pairs.jsonl "
        "steps.train.objective.loss='{kind: Matryoshka, dims: [384, 64]}'",
        oracle="tests/objectives/test_objectives_embed.py"
        "::test_matryoshka_matches_sentence_transformers",
    ),
)


class EmbeddingLoss(Config):
    """A shape: a loss of the vectors of a batch's documents."""

    @abstractmethod
    def __call__(self, vectors: Float[Tensor, "S D"], batch: Any) -> LossOutput:
        """`batch` is the type that the loss's sources yield."""


class InfoNCE(EmbeddingLoss):
    """Which of the candidates belongs to the query?"""

    temperature: float = Field(0.05, gt=0.0)

    def __call__(self, vectors: Float[Tensor, "S D"], batch: MatchBatch) -> LossOutput:
        queries, candidates = vectors[: batch.queries], vectors[batch.queries :]
        scores = F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T
        scores = (scores / self.temperature).masked_fill(batch.left_out, -torch.inf)
        own = torch.arange(batch.queries, device=vectors.device)
        right = (scores.argmax(-1) == own).sum()
        total = F.cross_entropy(scores, own, reduction="sum")
        return LossOutput(total, vectors.new_tensor(batch.queries), {"accuracy": right})


class Likeness(EmbeddingLoss):
    """The cosine of a pair should be its value."""

    def __call__(self, vectors: Float[Tensor, "S D"], batch: RatedBatch) -> LossOutput:
        first, second = vectors.chunk(2)
        errors = F.cosine_similarity(first, second) - batch.values
        return LossOutput(errors.square().sum(), batch.values.new_tensor(len(batch.values)))


class Matryoshka(EmbeddingLoss):
    """A loss of the whole vector and of shorter and shorter parts of it."""

    loss: EmbeddingLoss = InfoNCE()
    dims: tuple[int, ...] = (384, 192, 96, 48)
    """Lengths, from the whole vector down."""
    weights: tuple[float, ...] = ()
    """Of each length; none: all 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.dims or self.dims[-1] < 1 or any(a <= b for a, b in pairwise(self.dims)):
            raise ValueError(f"dims {self.dims} do not fall from the whole vector down")
        if self.weights and len(self.weights) != len(self.dims):
            raise ValueError(f"{len(self.weights)} weights for {len(self.dims)} dims")
        return self

    def __call__(self, vectors: Float[Tensor, "S D"], batch: Any) -> LossOutput:
        width = vectors.shape[-1]
        if self.dims[0] > width:
            raise TreadleError(
                f"Matryoshka: dims {self.dims}, but the vectors have {width} numbers"
            )
        parts = [self.loss(vectors[:, :dim], batch) for dim in self.dims]
        weights = self.weights or (1.0,) * len(parts)
        total = torch.stack([w * p.total for w, p in zip(weights, parts, strict=True)]).sum()
        return replace(parts[0], total=total)


class Embed(Objective):
    """A loss of embeddings, each text read by itself."""

    loss: EmbeddingLoss = InfoNCE()

    def __call__(self, model: DecoderModel, batch: MatchBatch | RatedBatch) -> LossOutput:
        head = task_head(model)
        if not isinstance(head, VectorReadout):
            raise TreadleError(
                f"the model's {type(head).__name__} gives no vectors: add the transform "
                "`{kind: EmbeddingHead}`"
            )
        vectors = read(model, batch.tokens, batch.context(), batch.sources)
        return self.loss(vectors, batch)
