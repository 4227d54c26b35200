"""Attention of one new token a sequence on keys and values that lie in pages.

    out_b = sum_p softmax_p( cap(scale * q_b . k_p) + bias(t_b - p) ) v_p,    p <= t_b
    with k_p at place `table_b[p // page] * page + p % page` of the store

Pages beyond a sequence's own are padding of its table, and places beyond its last token may hold
anything, NaN too: neither is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.kernels.attention import AttentionRule, attention, attention_mask


@dataclass(frozen=True)
class Where:
    """In which pages the sequences lie, and at which position their new tokens stand."""

    page: int
    """Tokens in a page."""
    tables: Int[Tensor, "B W"]
    positions: Int[Tensor, " B"]


@dataclass(frozen=True)
class Seen:
    """Places to gather, and which of them count."""

    places: Int[Tensor, "B K"]
    mask: Tensor


def seen(where: Where, rule: AttentionRule, dtype: torch.dtype) -> Seen:
    """All that the tables hold; what is not there is read at the sequence's first place."""
    tables, positions, page = where.tables, where.positions[:, None], where.page
    span = torch.arange(tables.shape[1] * page, device=tables.device)
    places = (tables[:, :, None] * page + span[:page]).flatten(1)
    there = span <= positions
    held = torch.where(there, span, -1)
    places = torch.where(there, places, places[:, :1])
    return Seen(places, attention_mask(positions, held, rule, dtype))


def one_token(
    q: Float[Tensor, "B H D"],
    keys: Float[Tensor, "B G K D"],
    values: Float[Tensor, "B G K E"],
    mask: Tensor,
    rule: AttentionRule,
) -> Float[Tensor, "B H E"]:
    """Attention of one query a sequence."""
    groups = q.shape[1] // keys.shape[1]
    if groups > 1 and rule.slopes is None and rule.softcap is None:
        # The heads of a group share keys: let them be the rows of one small product.
        return attention(q.unflatten(1, (-1, groups)), keys, values, mask, rule).flatten(1, 2)
    return attention(q[:, :, None], keys, values, mask, rule)[:, :, 0]


def paged_attention_reference(
    q: Float[Tensor, "B H D"],
    keys: Float[Tensor, "P G D"],
    values: Float[Tensor, "P G E"],
    where: Where,
    rule: AttentionRule,
) -> Float[Tensor, "B H E"]:
    """The definition: gathers all that the tables name."""
    found = seen(where, rule, q.dtype)
    k, v = (plane[found.places].transpose(1, 2).to(q.dtype) for plane in (keys, values))
    return one_token(q, k, v, found.mask, rule)
