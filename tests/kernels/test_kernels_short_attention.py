"""Attention over short bf16 rows beside torch's fused kernel and the definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.kernels.attention import (
    AttentionRule,
    attention,
    attention_mask,
    attention_reference,
)
from treadle.kernels.short_attention import MOST, is_short

RULES = {
    "causal": AttentionRule(scale=0.2),
    "full": AttentionRule(scale=0.2, causal=False),
    "window": AttentionRule(scale=0.2, window=5),
    "alibi": AttentionRule(scale=0.2, slopes=(0.5, 0.25, 0.1, 0.05)),
}
B, Q, D = 3, 23, 16


def heads(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, count, Q, D, generator=generator).bfloat16().requires_grad_()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_matches_torch_and_the_definition(rule: AttentionRule) -> None:
    """The output is torch's to the bit; gradients are nearer to the exact ones than torch's."""
    q, k, v = heads(4, 0), heads(2, 1), heads(2, 2)
    gradient = heads(4, 3).detach()
    span = torch.arange(Q).expand(B, Q)
    plain = rule.window is None and rule.slopes is None
    mask = None if plain else attention_mask(span, span, rule, q.dtype)
    assert is_short(q, k, v)
    ours = attention(q, k, v, mask, rule)
    found = torch.autograd.grad(ours, (q, k, v), gradient)
    fused = F.scaled_dot_product_attention(
        *(q, k, v),
        attn_mask=mask,
        is_causal=plain and rule.causal,
        scale=rule.scale,
        enable_gqa=True,
    )
    assert torch.equal(ours, fused)
    theirs = torch.autograd.grad(fused, (q, k, v), gradient)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    whole = attention_mask(span, span, rule, q.dtype)
    whole = whole if whole.dtype == torch.bool else whole.double()
    defined = attention_reference(*exact, whole, rule)
    for mine, his, true in zip(
        found, theirs, torch.autograd.grad(defined, exact, gradient.double()), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        error, other = ((t.double() - true).norm() / true.norm() for t in (mine, his))
        assert error < 4e-3
        assert error < other


def test_what_is_not_short_goes_to_torch() -> None:
    q, k, v = heads(4, 0), heads(2, 1), heads(2, 2)
    assert is_short(q, k, v)
    assert not is_short(q.float(), k.float(), v.float())
    assert not is_short(q.detach(), k.detach(), v.detach())
    assert not is_short(q, k, v[..., : D // 2])
    assert not is_short(*(t.to("meta") for t in (q, k, v)))
    assert not is_short(q[:, :, :0], k, v)
    with torch.no_grad():
        assert not is_short(q, k, v)
    longest = MOST // D
    assert is_short(q, k.repeat(1, 1, longest // Q, 1), v)
    assert not is_short(q, k.repeat(1, 1, longest // Q + 1, 1), v)


@pytest.mark.parametrize("turned", range(3))
def test_numbers_that_do_not_lie_side_by_side(turned: int) -> None:
    """Torch's kernel reads only those that do; the gradients of others are right, too."""
    given = [heads(4, 0), heads(2, 1), heads(2, 2)]
    rule, gradient = RULES["causal"], heads(4, 3).detach()
    there = [t.detach().clone().requires_grad_() for t in given]
    apart = there[turned].detach().transpose(-1, -2).contiguous().transpose(-1, -2)
    there[turned] = apart.requires_grad_()
    for mine, true in zip(
        *(torch.autograd.grad(attention(*x, None, rule), x, gradient) for x in (there, given)),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=0.05, atol=0.02)
