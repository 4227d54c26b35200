"""Hidden states and attention against the papers' formulas, document by document."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from deaf import Deaf
from train.tiny import documents, tiny_model

from treadle.core.errors import ConfigError, TreadleError
from treadle.data.batch import Batch, Piece, assemble
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.nn.mixers.attention import Attention
from treadle.objectives.attention_transfer import AttentionMaps, ValueRelations
from treadle.objectives.distil import Distil, TaughtBatch
from treadle.objectives.hidden_states import (
    HiddenStates,
    MeanSquared,
    OneMinusCosine,
    StudentProjection,
)
from treadle.objectives.observe import observe


def student(seed: int = 0) -> DecoderModel:
    return moved(tiny_model(seed=seed))


def moved(model: DecoderModel) -> DecoderModel:
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def teacher() -> DecoderModel:
    return moved(tiny_model(seed=8, layers=4, dim=24))


@torch.no_grad()
def lesson(model: DecoderModel, states=(0, 3), attention: int = 2) -> TaughtBatch:
    batch = assemble([*(counting(n) for n in (10, 9, 8)), *documents(0, 5)])
    assert any((bucket.queries < 0).any() for bucket in batch.layout.buckets)  # padded rows
    batch = replace(batch, weights=torch.rand(len(batch.weights)))
    seen = observe(model, batch, states=states, attention=(attention,))
    looked = seen.attention[attention]
    return TaughtBatch(
        **{f.name: getattr(batch, f.name) for f in fields(Batch)},
        teacher_states=torch.stack([seen.states[s] for s in states]),
        teacher_q=looked.q,
        teacher_k=looked.k,
        teacher_v=looked.v,
        teacher_scale=looked.rule.scale,
    )


def counting(length: int) -> Piece:
    """Learned from its first token on."""
    return Piece(list(range(length, 2 * length)), [True] * length)


def blocks(model: DecoderModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Input of each block and output of the last, of one document."""
    context = Packed.of(Layout((len(tokens),)))
    states = [model.embed(tokens, context)]
    for block in model.blocks:
        states.append(block(states[-1], context))
    return states


def alone(batch: TaughtBatch) -> list[tuple[torch.Tensor, list[tuple[int, float]]]]:
    """Each document with its predicting positions and their weights."""
    found = []
    for segment in range(len(batch.layout.lengths)):
        span = batch.layout.span(segment)
        rows = [
            (s - span.start, w)
            for s, w in zip(batch.sources.tolist(), batch.weights.tolist(), strict=True)
            if s in span
        ]
        found.append((batch.tokens[span.start : span.stop], rows))
    return found


def compare(ours: DecoderModel, loss, theirs: DecoderModel, expected) -> None:
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    grads = 0
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
            grads += 1
    assert grads > 3


@pytest.mark.parametrize("distance", [MeanSquared(), OneMinusCosine()])
def test_hidden_states_match_tinybert_formula(distance) -> None:
    ours, theirs = (StudentProjection(width=24)(student()) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    assert ours.projection.weight.requires_grad
    fresh = StudentProjection(width=500)(student()).projection.weight
    assert fresh.std().item() == pytest.approx(16**-0.5, rel=0.05)
    batch = lesson(teacher())
    output = Distil(terms=(HiddenStates(layers=(0, 1), distance=distance),))(ours, batch)
    total = torch.zeros(())
    for tokens, rows in alone(batch):
        mine, goal = blocks(theirs, tokens), blocks(teacher(), tokens)
        for layer, other in ((0, 0), (1, 3)):
            for i, w in rows:
                a, b = mine[layer + 1][i] @ theirs.projection.weight.T, goal[other + 1][i].detach()
                if isinstance(distance, MeanSquared):
                    total = total + w * ((a - b) ** 2).sum() / 24 / 2
                else:
                    total = total + w * (1 - a @ b / (a.norm() * b.norm())) / 2
    compare(ours, output.total / output.weight, theirs, total / batch.weights.sum())


def heads(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    return list(x.flatten(1).chunk(count, -1))


def divergence(scores_t: torch.Tensor, scores_s: torch.Tensor, row: int) -> torch.Tensor:
    p = scores_t[row, : row + 1].softmax(-1)
    q = scores_s[row, : row + 1].softmax(-1)
    return (p * (p.log() - q.log())).sum()


def shared_keys(model: DecoderModel, heads: int, kv_heads: int) -> DecoderModel:
    """The same shape of model with several heads on one key."""
    (block,) = set(model.config.blocks)
    blocks = (block.replace(mixer=Attention(heads=heads, kv_heads=kv_heads)),)
    return moved(model.config.replace(blocks=blocks * len(model.blocks)).build())


def test_heads_that_share_keys() -> None:
    """Student and teacher share them unequally: head h of either sees key h // (heads a key)."""
    ours, theirs = (shared_keys(tiny_model(), 4, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    wise = shared_keys(tiny_model(seed=8, layers=4, dim=24), 4, 1)
    batch = lesson(wise)
    output = Distil(terms=(AttentionMaps(layer=1),))(ours, batch)
    total = torch.zeros(())
    for tokens, rows in alone(batch):
        mine = observe(theirs, assemble_one(tokens), attention=(1,)).attention[1]
        with torch.no_grad():
            goal = observe(wise, assemble_one(tokens), attention=(2,)).attention[2]
        for i, w in rows:
            for h in range(4):
                t = goal.q[:, h] @ goal.k[:, 0].T / math.sqrt(6)
                s = mine.q[:, h] @ mine.k[:, h // 2].T / math.sqrt(4)
                total = total + w * divergence(t, s, i) / 4
    compare(ours, output.total / output.weight, theirs, total / batch.weights.sum())


@pytest.mark.parametrize("relation_heads", [2, 4])
def test_attention_matches_minilm_formula(relation_heads: int) -> None:
    """Equations 7 to 10 of MiniLM for each document alone: maps of two heads, value relations."""
    ours, theirs, batch = student(), student(), lesson(teacher())
    terms = (AttentionMaps(layer=1), ValueRelations(layer=1, heads=relation_heads, weight=2.0))
    output = Distil(terms=terms)(ours, batch)
    total = torch.zeros(())
    for tokens, rows in alone(batch):
        small = assemble_one(tokens)
        mine = observe(theirs, small, attention=(1,)).attention[1]
        with torch.no_grad():
            goal = observe(teacher(), small, attention=(2,)).attention[2]
        for i, w in rows:
            for h in range(2):
                t = goal.q[:, h] @ goal.k[:, h].T / math.sqrt(12)
                s = mine.q[:, h] @ mine.k[:, h].T / math.sqrt(8)
                total = total + w * divergence(t, s, i) / 2
            pairs = zip(heads(goal.v, relation_heads), heads(mine.v, relation_heads), strict=True)
            for a, b in pairs:
                t, s = a @ a.T / math.sqrt(a.shape[1]), b @ b.T / math.sqrt(b.shape[1])
                total = total + 2.0 * w * divergence(t, s, i) / relation_heads
    compare(ours, output.total / output.weight, theirs, total / batch.weights.sum())


def assemble_one(tokens: torch.Tensor) -> Batch:
    return assemble([Piece(tokens.tolist(), [True] * len(tokens))])


def test_watched_pass_equals_plain_pass() -> None:
    model, batch = student(), lesson(teacher())
    seen = observe(model, batch, states=(0, 1), attention=(0,))
    assert torch.equal(seen.hidden, model(batch.tokens, batch.context()))
    assert not model.blocks[0]._forward_hooks


def test_bad_terms() -> None:
    batch = lesson(teacher())
    for term, message in (
        (HiddenStates(layers=(5, 1)), r"layer 5 does not exist.*0 to 1"),
        (AttentionMaps(layer=2), r"layer 2 does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            Distil(terms=(term,))(student(), batch)
    for term, message in (
        (HiddenStates(layers=(1,)), r"1 layers of the student.*2 of the teacher"),
        (HiddenStates(layers=(0, 1)), r"width 16.*24.*StudentProjection\(width=24\)"),
        (ValueRelations(layer=1, heads=3), r"width 16 cannot be cut into heads=3"),
    ):
        with pytest.raises(TreadleError, match=message):
            Distil(terms=(term,))(student(), batch)
    odd = replace(batch, teacher_q=torch.randn(len(batch.tokens), 3, 8))
    with pytest.raises(TreadleError, match=r"AttentionMaps: the student has 2 heads.*teacher 3"):
        Distil(terms=(AttentionMaps(layer=1),))(student(), odd)
    odd = replace(batch, teacher_v=torch.randn(len(batch.tokens), 3, 8))
    with pytest.raises(TreadleError, match=r"ValueRelations: the student has 2.*the teacher 3"):
        Distil(terms=(ValueRelations(layer=1),))(student(), odd)
    blind = student().config
    blind = blind.replace(blocks=(blind.blocks[0], blind.blocks[1].replace(mixer=Deaf())))
    with pytest.raises(ConfigError, match="layer 1 does not attend: watch another one"):
        Distil(terms=(AttentionMaps(layer=1),))(blind.build(), batch)
    none = replace(batch, teacher_states=None)
    with pytest.raises(TreadleError, match=r"set `lesson` of the source Taught to Live\(states"):
        Distil(terms=(HiddenStates(layers=(1,)),))(student(), none)
