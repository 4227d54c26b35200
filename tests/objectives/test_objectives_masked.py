"""Masked words against transformers' BertForMaskedLM, and an encoder that learns to say them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from models.bert_pair import LENGTHS, SIZE, padded, texts, their_inputs
from torch.testing import assert_close

from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.models.bert import bert
from treadle.models.bert_heads import MaskedHead, Pooler
from treadle.models.heads import WordHead
from treadle.models.hub.load import load_model
from treadle.nn.layout import Layout
from treadle.objectives.masked import MaskedLM
from treadle.peft.lora import LoRA

HIDDEN = torch.tensor([1, 4, 9, 10, 14, 19])
TRUE = torch.tensor([7, 60, 0, 33, 2, 5])


def batch() -> Batch:
    tokens, types = texts()
    return Batch(
        tokens=tokens,
        layout=Layout(LENGTHS),
        sources=HIDDEN,
        targets=TRUE,
        weights=torch.ones(len(TRUE)),
        sequences=torch.tensor([0, 0, 1, 1, 2, 2]),
        sequence_count=3,
        types=types,
    )


def test_matches_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZE)
    config._attn_implementation = "eager"
    theirs = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.25)
    theirs.save_pretrained(tmp_path)
    theirs.double()
    model = load_model(tmp_path, dtype=torch.float64).model
    flat = torch.full((sum(LENGTHS),), -100)
    flat[HIDDEN] = TRUE
    labels = padded(flat + 100) - 100  # padding must not count
    labels[their_inputs()["attention_mask"] == 0] = -100
    expected = theirs(**their_inputs(), labels=labels)
    output = MaskedLM()(model, batch())
    # our logits are rounded to float32, as in training
    assert_close((output.total / output.weight).double(), expected.loss, rtol=1e-6, atol=1e-6)
    said = expected.logits[their_inputs()["attention_mask"].bool()][HIDDEN].argmax(-1)
    assert output.metrics["accuracy"] == (said == TRUE).sum()
    (output.total / output.weight).backward()
    expected.loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    pairs = {
        "embedding.weight": "bert.embeddings.word_embeddings.weight",
        "blocks.0.mixer.q.weight": "bert.encoder.layer.0.attention.self.query.weight",
        "blocks.2.ffn.down.bias": "bert.encoder.layer.2.output.dense.bias",
        "head.words.dense.weight": "cls.predictions.transform.dense.weight",
        "head.words.norm.weight": "cls.predictions.transform.LayerNorm.weight",
        "head.words.vocabulary.bias": "cls.predictions.bias",
    }
    for ours, name in pairs.items():
        assert gradients[name].abs().max() > 1e-4
        gradient = model.get_parameter(ours).grad
        assert gradient is not None
        assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-6, msg=name)


def test_weights_count(tmp_path: Path) -> None:
    from dataclasses import replace

    torch.manual_seed(0)
    model = bert(dim=16, layers=1, heads=2, vocab=61, context=32).replace(std=0.5).build()
    whole = MaskedLM()(model, batch())
    weights = torch.tensor([1.0, 0, 2, 0, 0, 0])
    some = MaskedLM()(model, replace(batch(), weights=weights))
    single = [MaskedLM()(model, replace(batch(), weights=torch.eye(6)[i])).total for i in range(6)]
    assert_close(some.total, single[0] + 2 * single[2])
    assert_close(whole.total, torch.stack(single).sum())
    assert some.weight == 3
    hidden = model(batch().tokens, batch().context())[HIDDEN]
    said = replace(batch(), targets=model.logits(hidden).argmax(-1), weights=2 * weights)
    assert MaskedLM()(model, said).metrics["accuracy"] == 6


def test_a_fresh_head_learns_on_an_encoder_without_one() -> None:
    torch.manual_seed(0)
    model = bert(dim=32, layers=1, heads=2, vocab=61, context=32, head=Pooler()).build()
    before = model.embedding.weight.detach().clone()
    WordHead()(model)
    assert isinstance(model.head, MaskedHead)
    assert model.head.words.vocabulary.weight is model.embedding.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        output = MaskedLM()(model, batch())
        loss = output.total / output.weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(torch.tensor(61.0).log().item(), rel=0.2)
    assert losses[-1] < 0.1
    assert not torch.equal(model.embedding.weight, before)


def test_with_an_adapter_the_table_stays() -> None:
    model = bert(dim=16, layers=1, heads=2, vocab=61, context=32, head=Pooler()).build()
    WordHead()(LoRA(rank=2, targets=("q",))(model))
    open_now = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "embedding.weight" not in open_now
    assert "head.words.dense.weight" in open_now


def test_another_head_is_refused() -> None:
    model = bert(dim=16, layers=1, heads=2, vocab=61, context=32, head=Pooler()).build()
    with pytest.raises(TreadleError, match=r"ends in a PoolerHead, which says no words.*WordHead"):
        MaskedLM()(model, batch())
