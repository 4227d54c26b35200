"""Attention and value relations: the student attends where its teacher does.

    L_AT = mean_heads KL( A^T_i | A^S_i ),    A   = softmax(Q K^T scale)
    L_VR = mean_heads KL( R^T_i | R^S_i ),    R   = softmax(V V^T / sqrt(d))

for each predicting token i, over what it may see. Only one layer is taken, the last as a rule, so
students of any depth fit; relations are square in tokens, so they fit any width. Values may be cut
into another number of *relation heads* than the model has (MiniLM v2), so that they fit any number
of heads as well.

Wang et al. 2020, MiniLM, equations 7 to 10; Wang et al. 2021, MiniLMv2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.kernels.attention import AttentionRule, visible
from treadle.models.decoder import DecoderModel
from treadle.objectives.distil import TaughtBatch, Term, required
from treadle.objectives.observe import Seen

CARD = Card(
    id="kd.attention",
    paper="Wang et al. 2020, MiniLM, arXiv:2002.10957; Wang et al. 2021, arXiv:2012.15828",
    summary="Attention maps and value relations of one layer are matched, across widths.",
    recipe="treadle run distill-ladder",
    oracle="tests/objectives/test_objectives_features.py::test_attention_matches_minilm_formula",
)


class AttentionMaps(Term):
    """Where each token looks."""

    layer: int = Field(ge=0)
    """Of the student; the teacher's is `Live.attention`."""

    def states(self) -> tuple[int, ...]:
        return ()

    def attention(self) -> tuple[int, ...]:
        return (self.layer,)

    def __call__(self, model: DecoderModel, seen: Seen, batch: TaughtBatch) -> Float[Tensor, ""]:
        q, k = (
            required(t, self, "Live(attention=...)") for t in (batch.teacher_q, batch.teacher_k)
        )
        ours = seen.attention[self.layer]
        if ours.q.shape[1] != q.shape[1]:
            raise TreadleError(
                f"AttentionMaps: the student has {ours.q.shape[1]} heads, the teacher "
                f"{q.shape[1]}: use ValueRelations, which fits any number"
            )
        groups = q.shape[1] // k.shape[1]
        mine = Relation(ours.q, ours.k.repeat_interleave(ours.q.shape[1] // ours.k.shape[1], 1))
        goal = Relation(q, k.repeat_interleave(groups, 1))
        scales = (ours.rule.scale, batch.teacher_scale)
        return relation_divergence(batch, (mine, goal), scales, ours.rule)


class ValueRelations(Term):
    """Which tokens' values are alike."""

    layer: int = Field(ge=0)
    heads: int | None = Field(None, ge=1)
    """Relation heads that values are cut into; None: the model's own key-value heads."""

    def states(self) -> tuple[int, ...]:
        return ()

    def attention(self) -> tuple[int, ...]:
        return (self.layer,)

    def __call__(self, model: DecoderModel, seen: Seen, batch: TaughtBatch) -> Float[Tensor, ""]:
        theirs = required(batch.teacher_v, self, "Live(attention=...)")
        ours = seen.attention[self.layer]
        mine, goal = self._cut(ours.v), self._cut(theirs)
        if mine.shape[1] != goal.shape[1]:
            raise TreadleError(
                f"ValueRelations: the student has {mine.shape[1]} value heads, the teacher "
                f"{goal.shape[1]}: set `heads` to a number that divides both widths"
            )
        scales = (mine.shape[-1] ** -0.5, goal.shape[-1] ** -0.5)
        pair = (Relation(mine, mine), Relation(goal, goal))
        return relation_divergence(batch, pair, scales, ours.rule)

    def _cut(self, v: Float[Tensor, "N G E"]) -> Float[Tensor, "N R F"]:
        if self.heads is None:
            return v
        flat = v.flatten(1)
        if flat.shape[1] % self.heads:
            raise TreadleError(
                f"ValueRelations: values of width {flat.shape[1]} cannot be cut into "
                f"heads={self.heads}"
            )
        cut: Tensor = flat.unflatten(1, (self.heads, -1))
        return cut


@dataclass(frozen=True)
class Relation:
    """Two sides of a product of tokens with tokens."""

    left: Float[Tensor, "N H D"]
    right: Float[Tensor, "N H D"]


@dataclass(frozen=True)
class _Rows:
    """Segments of like shape; indices of padding point at token 0 and are not seen."""

    queries: Int[Tensor, "B Q"]
    keys: Int[Tensor, "B K"]
    seen: Bool[Tensor, "B 1 Q K"]
    weights: Float[Tensor, "B Q"]


def relation_divergence(
    batch: TaughtBatch,
    pair: tuple[Relation, Relation],
    scales: tuple[float, float],
    rule: AttentionRule,
) -> Float[Tensor, ""]:
    """sum_i w_i mean_heads KL( softmax(theirs_i) | softmax(mine_i) ) over (mine, theirs)."""
    total = batch.weights.new_zeros(())
    for rows in _rows(batch, rule):
        log_q, log_p = (
            _log_relation(relation, rows, scale)
            for relation, scale in zip(pair, scales, strict=True)
        )
        difference = (log_p - log_q).masked_fill(~rows.seen, 0.0)
        kl = (log_p.exp() * difference).sum(-1).mean(1)
        total = total + (rows.weights * kl).sum()
    return total


def _log_relation(relation: Relation, rows: _Rows, scale: float) -> Float[Tensor, "B H Q K"]:
    left = relation.left[rows.queries].transpose(1, 2)
    right = relation.right[rows.keys].transpose(1, 2)
    scores: Tensor = (left @ right.transpose(-1, -2)).float() * scale
    return F.log_softmax(scores.masked_fill(~rows.seen, float("-inf")), -1)


def _rows(batch: TaughtBatch, rule: AttentionRule) -> Iterator[_Rows]:
    device = batch.tokens.device
    positions = batch.layout.positions.to(device)
    weights = torch.zeros(len(positions), device=device)
    weights = weights.index_add(0, batch.sources, batch.weights)
    for bucket in batch.layout.buckets:
        queries, keys = bucket.queries.to(device), bucket.keys.to(device)
        at, of = queries.clamp(min=0), keys.clamp(min=0)
        seen = visible(
            positions[at].masked_fill(queries < 0, -1),
            positions[of].masked_fill(keys < 0, -1),
            rule,
        )
        # A padded query sees one token, lest its softmax be empty; its weight is zero.
        seen[..., 0] |= ~seen.any(-1)
        yield _Rows(at, of, seen[:, None], weights[at].masked_fill(queries < 0, 0.0))
