"""Losses of embeddings against sentence-transformers, through an encoder and through a decoder."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import (
    CosineSimilarityLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from tiny_readers import framed_tokenizer, open_tokenizer, tiny_decoder, tiny_encoder
from torch import nn
from torch.testing import assert_close

from treadle.core.errors import TreadleError
from treadle.data.framing import Framer
from treadle.data.labelled import RatedBatch, by_column, extend
from treadle.data.matches import MatchBatch, left_out
from treadle.models.decoder import DecoderModel
from treadle.models.heads import EmbeddingHead, NumberHead, read
from treadle.models.pooling import LastToken, MeanPooling
from treadle.objectives.embed import Embed, InfoNCE, Likeness, Matryoshka

ROWS = (
    ("warm loom", "red", "old old"),
    ("cold", "blue thread", "new new"),
    ("good thread", "bad", "warm red blue"),
    ("new", "loom loom old", "cold cold"),
)


def match_batch(negatives: int, tokenizer=None) -> MatchBatch:
    framer = Framer(tokenizer or framed_tokenizer(), longest=20)
    rows = [row[: 2 + negatives] for row in ROWS]
    documents = [tuple(framer.text(t) for t in row) for row in rows]
    return extend(MatchBatch, by_column(documents), queries=len(rows), left_out=left_out(rows))


def models() -> list[tuple[DecoderModel, object]]:
    return [
        (EmbeddingHead(pooling=MeanPooling())(tiny_encoder()), framed_tokenizer()),
        (EmbeddingHead(pooling=LastToken())(tiny_decoder()), open_tokenizer()),
    ]


class Columns(nn.Module):
    """What sentence-transformers' losses call: vectors of one column of texts at a time."""

    def __init__(self, columns: list[torch.Tensor]) -> None:
        super().__init__()
        self.columns = columns
        self.calls = 0

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": self.columns[int(features["column"])]}

    def get_sentence_embedding_dimension(self) -> int:
        return self.columns[0].shape[-1]

    get_embedding_dimension = get_sentence_embedding_dimension


def theirs(vectors: torch.Tensor, width: int, loss: Callable[[nn.Module], nn.Module], labels=None):
    columns = list(vectors.split(width))
    features = [{"column": torch.tensor(i)} for i in range(len(columns))]
    return loss(Columns(columns))(features, labels)


def compare(model: DecoderModel, ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(ours, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    mine = torch.autograd.grad(ours, parameters, retain_graph=True, allow_unused=True)
    their = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in mine)
    for a, b in zip(mine, their, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b)


@pytest.mark.parametrize("negatives", [0, 1])
def test_matches_sentence_transformers(negatives: int) -> None:
    for model, tokenizer in models():
        batch = match_batch(negatives, tokenizer)
        vectors = read(model, batch.tokens, batch.context(), batch.sources)
        output = Embed(loss=InfoNCE(temperature=0.1))(model, batch)
        expected = theirs(vectors, len(ROWS), lambda m: MultipleNegativesRankingLoss(m, scale=10.0))
        compare(model, output.total / output.weight, expected)


def test_matryoshka_matches_sentence_transformers() -> None:
    for model, tokenizer in models():
        batch = match_batch(1, tokenizer)
        vectors = read(model, batch.tokens, batch.context(), batch.sources)
        loss = Matryoshka(loss=InfoNCE(), dims=(16, 8, 3), weights=(1.0, 0.5, 2.0))
        output = Embed(loss=loss)(model, batch)
        expected = theirs(
            vectors,
            len(ROWS),
            lambda m: MatryoshkaLoss(
                m, MultipleNegativesRankingLoss(m), [16, 8, 3], matryoshka_weights=[1.0, 0.5, 2.0]
            ),
        )
        compare(model, output.total / output.weight, expected)
        whole = Embed(loss=InfoNCE())(model, batch)
        assert output.metrics["accuracy"] == whole.metrics["accuracy"]
        even = Embed(loss=loss.replace(weights=()))(model, batch)
        ones = Embed(loss=loss.replace(weights=(1.0, 1.0, 1.0)))(model, batch)
        assert_close(even.total, ones.total)


def test_likeness_matches_sentence_transformers() -> None:
    model, _ = models()[0]
    values = torch.tensor([1.0, 0.0, 0.3, -0.5])
    matches = match_batch(0)
    batch = extend(RatedBatch, matches, values=values)
    vectors = read(model, batch.tokens, batch.context(), batch.sources)
    output = Embed(loss=Likeness())(model, batch)
    expected = theirs(vectors, len(ROWS), CosineSimilarityLoss, labels=values)
    compare(model, output.total / output.weight, expected)


def test_what_is_left_out_is_no_negative() -> None:
    """By the formula: the sum runs over the candidates that remain."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    out = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    batch = extend(MatchBatch, match_batch(0), queries=3, left_out=out)
    found = InfoNCE(temperature=0.5)(vectors, batch)
    expected = 0.0
    for i in range(3):
        q = vectors[i] / vectors[i].norm()
        scores = [float(q @ (d / d.norm())) / 0.5 for d in vectors[3:]]
        kept = [math.exp(s) for j, s in enumerate(scores) if not out[i, j]]
        expected -= math.log(math.exp(scores[i]) / sum(kept))
    assert float(found.total) == pytest.approx(expected)
    assert float(found.weight) == 3


def test_what_gives_no_embedding() -> None:
    batch = match_batch(0)
    with pytest.raises(TreadleError, match="TextReadout gives no vectors: add the transform"):
        Embed()(NumberHead()(tiny_encoder()), batch)
    with pytest.raises(TreadleError, match=r"dims \(32, 8\), but the vectors have 16"):
        Embed(loss=Matryoshka(dims=(32, 8)))(EmbeddingHead()(tiny_encoder()), batch)
    for wrong, said in (((8, 8), "do not fall"), ((), "do not fall"), ((8, 0), "do not fall")):
        with pytest.raises(ValueError, match=said):
            Matryoshka(dims=wrong)
    assert Matryoshka(dims=(8, 1)).dims[-1] == 1
    with pytest.raises(ValueError, match="1 weights for 2 dims"):
        Matryoshka(dims=(8, 4), weights=(1.0,))
