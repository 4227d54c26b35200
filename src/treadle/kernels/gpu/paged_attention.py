# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""`paged_attention_reference` in Triton: keys are read where they lie, nothing is gathered.

A program takes the query heads of one key-value head of one sequence through a part of its text,
BLOCK tokens at a time, with the running maximum m and mass l of Milakov and Gimelshein 2018:

    m' = max(m, max s),  l' = l e^(m - m') + sum e^(s - m'),  a' = a e^(m - m') + e^(s - m') V

The parts of a text (flash decoding, Dao et al. 2023) are then put together by their m and l. A
program reads its sequence's own length, so a graph recorded once serves texts of any length.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from treadle.kernels.attention import AttentionRule
from treadle.kernels.paged_attention import Where

BLOCK = 64
"""Tokens at a time."""
PART = 512
"""Tokens a program takes at least before a text is cut into parts."""
MOST_PARTS = 16


def paged_attention(
    q: Float[Tensor, "B H D"],
    keys: Float[Tensor, "P G D"],
    values: Float[Tensor, "P G E"],
    where: Where,
    rule: AttentionRule,
) -> Float[Tensor, "B H E"]:
    """Attention of one token a sequence, causal; its sums are in fp32."""
    assert rule.causal, "a token that is written sees what came before"
    rows, heads, dim = q.shape
    groups, width = keys.shape[1], values.shape[2]
    longest = where.tables.shape[1] * where.page
    parts = max(1, min(MOST_PARTS, longest // PART))
    q, keys, values = q.contiguous(), keys.contiguous(), values.contiguous()
    tables, positions = where.tables.contiguous(), where.positions.contiguous()
    slopes = positions if rule.slopes is None else _slopes(rule.slopes, q.device)
    sums = q.new_empty(rows, heads, parts, width, dtype=torch.float32)
    peaks = q.new_empty(rows, heads, parts, dtype=torch.float32)
    masses = torch.empty_like(peaks)
    _paged_attention[rows, groups, parts](
        q,
        keys,
        values,
        tables,
        positions,
        slopes,
        sums,
        peaks,
        masses,
        rule.scale,
        rule.softcap or 0.0,
        rule.window or longest + 1,
        rule.sinks if rule.window else 0,
        heads,
        groups,
        where.page,
        tables.shape[1],
        parts,
        DIM=dim,
        WIDTH=width,
        SHARED=heads // groups,
        DIM_=_padded(dim),
        WIDTH_=_padded(width),
        SHARED_=_padded(heads // groups),
        CAP=rule.softcap is not None,
        SLOPED=rule.slopes is not None,
        BLOCK=BLOCK,
    )
    if parts == 1:
        return (sums[:, :, 0] / masses).to(q.dtype)
    share = (peaks - peaks.amax(-1, keepdim=True)).exp()
    mass = (masses * share).sum(-1, keepdim=True)
    return ((sums * share[..., None]).sum(2) / mass).to(q.dtype)


@cache
def _slopes(slopes: tuple[float, ...], device: torch.device) -> Float[Tensor, " H"]:
    """On the device once: a recorded pass cannot bring them there."""
    return torch.tensor(slopes, device=device)


def _padded(size: int) -> int:
    """Tensor cores take 16 at least, and Triton's blocks are powers of two."""
    return max(16, int(triton.next_power_of_2(size)))


@triton.jit
def _paged_attention(
    q,
    keys,
    values,
    tables,
    positions,
    slopes,
    sums,
    peaks,
    masses,
    scale,
    softcap,
    window,
    sinks,
    heads,
    groups,
    page,
    pages,
    parts,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    DIM_: tl.constexpr,
    WIDTH_: tl.constexpr,
    SHARED_: tl.constexpr,
    CAP: tl.constexpr,
    SLOPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here = tl.load(positions + row)
    chunk = tl.cdiv(tl.cdiv(here + 1, parts), BLOCK) * BLOCK
    start, stop = part * chunk, tl.minimum((part + 1) * chunk, here + 1)
    # What lies before the window no query sees, unless it is a sink.
    low = tl.maximum(here + 1 - window, 0)
    if sinks == 0:
        start = tl.maximum(start, low // BLOCK * BLOCK)
    shared, dims, widths = tl.arange(0, SHARED_), tl.arange(0, DIM_), tl.arange(0, WIDTH_)
    head = row * heads + group * SHARED + shared
    query = tl.load(
        q + head[:, None] * DIM + dims[None, :],
        mask=(shared < SHARED)[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    if SLOPED:
        slope = tl.load(slopes + group * SHARED + shared, mask=shared < SHARED, other=0.0)
    # Finite, so that a part that sees nothing weighs nothing instead of NaN.
    peak = tl.full([SHARED_], -1e30, tl.float32)
    mass = tl.zeros([SHARED_], tl.float32)
    total = tl.zeros([SHARED_, WIDTH_], tl.float32)
    for first in range(start, stop, BLOCK):
        position = first + tl.arange(0, BLOCK)
        there = (position < stop) & ((position >= low) | (position < sinks))
        number = tl.load(tables + row * pages + position // page, mask=there, other=0)
        place = (number * page + position % page) * groups + group
        key = tl.load(
            keys + place[:, None] * DIM + dims[None, :],
            mask=there[:, None] & (dims < DIM)[None, :],
            other=0.0,
        ).to(query.dtype)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if CAP:
            score = softcap * (1 - 2 / (1 + tl.exp(2 * score / softcap)))
        if SLOPED:
            score -= slope[:, None] * (here - position)[None, :].to(tl.float32)
        score = tl.where(there[None, :], score, -1e30)
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.where(there[None, :], tl.exp(score - higher[:, None]), 0.0)
        fade = tl.exp(peak - higher)
        value = tl.load(
            values + place[:, None] * WIDTH + widths[None, :],
            mask=there[:, None] & (widths < WIDTH)[None, :],
            other=0.0,
        ).to(query.dtype)
        mass = mass * fade + tl.sum(weight, 1)
        part_of_total = tl.dot(weight.to(query.dtype), value, input_precision="ieee")
        total = total * fade[:, None] + part_of_total
        peak = higher
    own = head * parts + part
    tl.store(peaks + own, peak, mask=shared < SHARED)
    tl.store(masses + own, mass, mask=shared < SHARED)
    tl.store(
        sums + own[:, None] * WIDTH + widths[None, :],
        total,
        mask=(shared < SHARED)[:, None] & (widths < WIDTH)[None, :],
    )
