"""Losses of heads against transformers' and sentence-transformers'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from tiny_readers import framed_tokenizer, tiny_decoder, tiny_encoder
from torch import nn
from torch.testing import assert_close
from transformers.loss.loss_utils import (
    ForSequenceClassificationLoss,
    ForTokenClassification,
)

from treadle.core.errors import TreadleError
from treadle.data.framing import Framer, laid
from treadle.data.labelled import RatedBatch, extend, labelled
from treadle.models.heads import ClassHead, NumberHead, TextReadout, TokenHead, read
from treadle.objectives.classify import Classify, Relevance, SquaredError

LABELS = ("a", "b", "c")
TEXTS = ("warm loom", "cold", "red old thread new")


def documents():
    framer = Framer(framed_tokenizer(), longest=20)
    return laid([framer.text(t) for t in TEXTS])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def same_gradients(model: nn.Module, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert_close(ours, theirs)
    ours.backward()
    mine = gradients(model)
    theirs.backward()
    their = gradients(model)
    assert mine.keys() == their.keys()
    assert any("head" in n for n in mine)
    for name in mine:
        assert_close(mine[name], their[name])


class Config:
    """What transformers' losses ask of a model's configuration."""

    num_labels = 3
    problem_type = None


def test_losses_match_transformers() -> None:
    batch = labelled(documents(), [2, 0, 1], (1.0, 1.0, 1.0))
    model = ClassHead(labels=LABELS)(tiny_encoder())
    logits = read(model, batch.tokens, batch.context(), batch.sources)
    theirs = ForSequenceClassificationLoss(batch.targets, logits, Config())
    output = Classify()(model, batch)
    same_gradients(model, output.total / output.weight, theirs)

    framer = Framer(framed_tokenizer(), longest=20)
    words = labelled(
        laid([framer.words(t.split()) for t in TEXTS]), [0, 1, 2, 2, 1, 0, 0], (1,) * 3
    )
    tagger = TokenHead(labels=LABELS)(tiny_encoder())
    every = torch.arange(len(words.tokens))
    logits = read(tagger, words.tokens, words.context(), every)
    targets = torch.full_like(words.tokens, -100)
    targets[words.sources] = words.targets
    theirs = ForTokenClassification(logits, targets, Config())
    output = Classify()(tagger, words)
    same_gradients(tagger, output.total / output.weight, theirs)


def test_weights_are_those_of_torch() -> None:
    weights = (0.5, 2.0, 3.0)
    batch = labelled(documents(), [2, 0, 0], weights)
    model = ClassHead(labels=LABELS)(tiny_decoder())
    logits = read(model, batch.tokens, batch.context(), batch.sources)
    theirs = F.cross_entropy(logits, batch.targets, weight=torch.tensor(weights))
    output = Classify()(model, batch)
    same_gradients(model, output.total / output.weight, theirs)
    right = (logits.argmax(-1) == batch.targets).float() * batch.weights
    assert_close(output.metrics["accuracy"], right.sum())


def test_squared_error_matches_transformers() -> None:
    batch = extend(RatedBatch, documents(), values=torch.tensor([0.5, -2.0, 3.0]))
    model = NumberHead()(tiny_encoder())
    scores = read(model, batch.tokens, batch.context(), batch.sources)

    class One(Config):
        num_labels = 1

    output = SquaredError()(model, batch)
    theirs = ForSequenceClassificationLoss(batch.values, scores, One())
    same_gradients(model, output.total / output.weight, theirs)


def test_relevance_matches_sentence_transformers() -> None:
    framer = Framer(framed_tokenizer(), longest=20)
    pairs = [
        framer.text("warm loom", "red"),
        framer.text("cold", "blue old"),
        framer.text("a", "b"),
    ]
    batch = extend(RatedBatch, laid(pairs), values=torch.tensor([1.0, 0.0, 0.7]))
    model = NumberHead()(tiny_encoder())
    logits = read(model, batch.tokens, batch.context(), batch.sources)

    class Theirs(CrossEncoder):
        num_labels = 1
        device = torch.device("cpu")

        def __init__(self) -> None:
            nn.Module.__init__(self)

        def preprocess(self, pairs, **kwargs):
            return {}

        def forward(self, tokens):
            return {"scores": logits}

    loss = BinaryCrossEntropyLoss(Theirs())
    output = Relevance()(model, batch)
    theirs = loss([["a", "b", "c"], ["d", "e", "f"]], batch.values)
    same_gradients(model, output.total / output.weight, theirs)
    (bias,) = (p for p in model.parameters() if p.shape == (1,))
    middle = float(logits[:, 0].detach().median())
    for place in (-0.5, 0.5):  # the middle score just below and just above zero
        bias.data += place - middle
        middle = place
        scores = read(model, batch.tokens, batch.context(), batch.sources)[:, 0].tolist()
        right = sum((s > 0) == (v > 0.5) for s, v in zip(scores, (1, 0, 0.7), strict=True))
        assert float(Relevance()(model, batch).metrics["accuracy"]) == right


def test_micro_batches_add_up() -> None:
    """One of three documents equals three of one, padding or no padding."""
    model = ClassHead(labels=LABELS)(tiny_encoder())
    framer = Framer(framed_tokenizer(), longest=20)
    together = Classify()(model, labelled(documents(), [2, 0, 1], (1.0, 2.0, 3.0)))
    alone = [
        Classify()(model, labelled(laid([framer.text(t)]), [k], (1.0, 2.0, 3.0)))
        for t, k in zip(TEXTS, (2, 0, 1), strict=True)
    ]
    assert_close(together.total, torch.stack([a.total for a in alone]).sum())
    assert_close(together.weight, torch.stack([a.weight for a in alone]).sum())


def test_types_of_a_pair_are_seen() -> None:
    """The same tokens with the types of one text give another score."""
    model = NumberHead()(tiny_encoder())
    framed = Framer(framed_tokenizer(), longest=20).text("warm", "cold")
    flat = replace(framed, types=(0,) * len(framed.ids))
    scores = []
    for document in (framed, flat):
        batch = laid([document])
        scores.append(read(model, batch.tokens, batch.context(), batch.sources))
    assert not torch.allclose(*scores)


def test_heads_and_values_that_do_not_fit(tmp_path: Path) -> None:
    batch = extend(RatedBatch, documents(), values=torch.tensor([0.5, 2.0, 1.0]))
    classes = ClassHead(labels=LABELS)(tiny_encoder())
    assert isinstance(classes.head, TextReadout)
    with pytest.raises(TreadleError, match="gives 3 numbers a text, not one: add the transform"):
        SquaredError()(classes, batch)
    with pytest.raises(TreadleError, match=r"2.0 is no relevance: give\s+0 to 1"):
        Relevance()(NumberHead()(tiny_encoder()), batch)
    with pytest.raises(TreadleError, match="no head for a task"):
        Classify()(tiny_decoder(), batch)
