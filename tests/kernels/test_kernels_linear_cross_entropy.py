"""The chunked head against its definition in float64 and torch's own fused function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from treadle.kernels import linear_cross_entropy as lce
from treadle.kernels.linear_cross_entropy import (
    HeadRule,
    linear_cross_entropy,
    token_logprobs,
    token_logprobs_reference,
    token_statistics,
)

RULES = [HeadRule(), HeadRule(softcap=2.0), HeadRule(temperature=0.6, softcap=3.0)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lce, "CHUNK_ELEMENTS", 5 * 37)
    monkeypatch.setattr(lce, "CHUNK_ROWS", 5)


def operands(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(23, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(37, 8, dtype=dtype, requires_grad=True)
    bias = torch.randn(37, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, 37, (23,)), torch.rand(23)


@pytest.mark.parametrize("rule", RULES)
def test_token_logprobs_and_gradients(rule: HeadRule) -> None:
    h, w, b, y, c = operands()
    expected = token_logprobs_reference(h, w, y, bias=b, rule=rule)
    grads = torch.autograd.grad((expected * c).sum(), (h, w, b))
    found = token_logprobs(h, w, y, bias=b, rule=rule)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * c).sum(), (h, w, b)), grads)


@pytest.mark.parametrize("rule", RULES)
def test_linear_cross_entropy_and_gradients(rule: HeadRule) -> None:
    h, w, b, y, c = operands()
    expected = -(token_logprobs_reference(h, w, y, bias=b, rule=rule) * c).sum()
    grads = torch.autograd.grad(3 * expected, (h, w, b))
    found = linear_cross_entropy(h, w, y, c, bias=b, rule=rule)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found.total, (h, w, b)), grads)
    assert not found.correct.requires_grad


def test_matches_torch() -> None:
    h, w, _, y, _ = operands()
    found = linear_cross_entropy(h, w, y, torch.ones(23)).total
    torch.testing.assert_close(found, F.cross_entropy(h @ w.T, y, reduction="sum"))


def test_statistics() -> None:
    h, w, b, y, _ = operands()
    stats = token_statistics(h, w, y, bias=b)
    p = torch.distributions.Categorical(logits=F.linear(h, w, b))
    torch.testing.assert_close(stats.entropy, p.entropy())
    torch.testing.assert_close(stats.logprobs, p.log_prob(y))


def test_frozen_head_gets_no_gradient() -> None:
    h, w, _, y, c = operands()
    w.requires_grad_(False)
    linear_cross_entropy(h, w, y, c).total.backward()
    assert w.grad is None
    assert h.grad is not None


@pytest.mark.parametrize("rule", RULES)
def test_a_frozen_head_gives_the_same_gradient(rule: HeadRule) -> None:
    """Taken in the forward pass; also twice, and none where only the head is trained."""
    h, w, b, y, c = operands()
    expected = token_logprobs_reference(h, w, y, bias=b, rule=rule)
    wanted, wanted_head, wanted_bias = torch.autograd.grad((expected * c).sum(), (h, w, b))
    found = token_logprobs(h, w.detach(), y, bias=b.detach(), rule=rule)
    torch.testing.assert_close(found, expected)
    for factor in (1, 3):
        (grad,) = torch.autograd.grad((factor * found * c).sum(), h, retain_graph=True)
        torch.testing.assert_close(grad, factor * wanted)
    alone = token_logprobs(h.detach(), w, y, bias=b.detach(), rule=rule)
    torch.testing.assert_close(torch.autograd.grad((alone * c).sum(), w)[0], wanted_head)
    with_bias = token_logprobs(h, w.detach(), y, bias=b, rule=rule)
    both = torch.autograd.grad((with_bias * c).sum(), (h, b))
    torch.testing.assert_close(both[0], wanted)
    torch.testing.assert_close(both[1], wanted_bias)


def test_autocast_is_close_and_keeps_dtypes() -> None:
    h, w, b, y, c = operands()
    exact = linear_cross_entropy(h, w, y, c, bias=b).total
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(h, w, y, c, bias=b).total
    grads = torch.autograd.grad(found, (h, w, b))
    assert [g.dtype for g in grads] == [torch.float32] * 3
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-2)


def test_memory_does_not_grow_with_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made is a chunk's logits, not those of all rows."""
    largest = 0
    original = F.linear

    def watching(*args):
        nonlocal largest
        out = original(*args)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(lce.F, "linear", watching)
    h, w, _, y, c = operands()
    linear_cross_entropy(h, w, y, c).total.backward()
    assert largest <= 5 * 37
