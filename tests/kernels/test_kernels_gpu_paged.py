"""The Triton kernel of attention over pages, run by Triton's interpreter, beside its definition."""

from __future__ import annotations

import pytest
import torch

from treadle.kernels.attention import AttentionRule, attention_mask, attention_reference
from treadle.kernels.paged_attention import Where, paged_attention_reference

RULES = {
    "plain": AttentionRule(scale=0.3),
    "window": AttentionRule(scale=0.3, window=7),
    "sinks": AttentionRule(scale=0.3, window=7, sinks=3),
    "softcap": AttentionRule(scale=0.9, softcap=1.5),
    "alibi": AttentionRule(scale=0.3, slopes=(0.5, 0.25, 0.1, 0.02)),
    "alibi and window": AttentionRule(scale=0.3, window=20, slopes=(0.5, 0.25, 0.1, 0.02)),
}
PAGE = 4


def scattered(
    lengths: list[int], *, groups: int = 2, dim: int = 12, width: int = 12, padding: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Where]:
    """Queries, pages in any order with NaN wherever nothing was written, and their tables."""
    torch.manual_seed(len(lengths))
    needed = [-(-n // PAGE) for n in lengths]
    free = torch.randperm(sum(needed) + 5).tolist()
    keys = torch.full((PAGE * len(free), groups, dim), float("nan"))
    values = torch.full((PAGE * len(free), groups, width), float("nan"))
    tables = torch.zeros(len(lengths), max(needed) + padding, dtype=torch.long)
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        own = [free.pop() for _ in range(count)]
        tables[row] = own[0]
        tables[row, :count] = torch.tensor(own)
        for position in range(length):
            place = own[position // PAGE] * PAGE + position % PAGE
            keys[place], values[place] = torch.randn(groups, dim), torch.randn(groups, width)
    where = Where(PAGE, tables, torch.tensor(lengths) - 1)
    return torch.randn(len(lengths), 4, dim), keys, values, where


def by_hand(q, keys, values, where: Where, rule: AttentionRule) -> torch.Tensor:
    """A sequence at a time, its tokens laid side by side."""
    out = []
    for row, position in enumerate(where.positions.tolist()):
        span = torch.arange(position + 1)
        places = where.tables[row, span // PAGE] * PAGE + span % PAGE
        k, v = keys[places].transpose(0, 1)[None], values[places].transpose(0, 1)[None]
        mask = attention_mask(torch.tensor([[position]]), span[None], rule, q.dtype)
        out.append(attention_reference(q[row, None, :, None], k, v, mask, rule)[0, :, 0])
    return torch.stack(out)


@pytest.fixture(scope="module")
def kernel():
    pytest.importorskip("triton")
    from treadle.kernels.gpu import paged_attention as module

    return module


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("lengths", [[1], [5, 30, 4, 17]], ids=str)
def test_definition_sees_what_lies_in_its_pages(rule: AttentionRule, lengths: list[int]) -> None:
    given = scattered(lengths, width=8)
    found = paged_attention_reference(*given, rule)
    torch.testing.assert_close(found, by_hand(*given, rule))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_kernel_equals_the_definition(kernel, rule: AttentionRule) -> None:
    given = scattered([1, 5, 30, 4, 90], width=8)
    torch.testing.assert_close(kernel.paged_attention(*given, rule), by_hand(*given, rule))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_kernel_puts_parts_together(kernel, monkeypatch, rule: AttentionRule) -> None:
    """Long and short texts in one table: some parts have nothing to see."""
    monkeypatch.setattr(kernel, "PART", 64)
    monkeypatch.setattr(kernel, "BLOCK", 16)
    given = scattered([3, 290, 65, 130])
    torch.testing.assert_close(kernel.paged_attention(*given, rule), by_hand(*given, rule))


def test_kernel_takes_half_precision_and_many_heads_a_group(kernel) -> None:
    """fp16, since the interpreter multiplies no bf16."""
    q, keys, values, where = scattered([9, 40], groups=1)
    rule = RULES["plain"]
    low = kernel.paged_attention(q.half(), keys.half(), values.half(), where, rule)
    assert low.dtype == torch.float16
    exact = by_hand(q, keys, values, where, rule)
    torch.testing.assert_close(low.float(), exact, atol=0.005, rtol=0.005)
