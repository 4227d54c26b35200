"""Clipping against torch's own, naive float64 loops, and planted spikes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from treadle.optim.clipping import AGC, NoClip, NormClip, ValueClip, ZClip, gradient_norm
from treadle.optim.optimizer import Clip

SHAPES = ((5, 3), (4,), (2, 3, 2), ())


def parameters(scale: float = 1.0, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in SHAPES:
        p = nn.Parameter(torch.randn(shape, generator=generator))
        p.grad = scale * torch.randn(shape, generator=generator)
        made.append(p)
    made.append(nn.Parameter(torch.ones(3)))  # never got a gradient
    return made


def grads(ps: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in ps if p.grad is not None]


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_norm_and_value_match_torch(scale: float) -> None:
    ours, theirs = parameters(scale), parameters(scale)
    norm = NormClip(max_norm=0.7).build()(ours)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
    assert norm == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(grads(ours), grads(theirs), rtol=1e-5, atol=1e-6)

    ours, theirs = parameters(scale), parameters(scale)
    assert ValueClip(max_value=0.3).build()(ours) == pytest.approx(float(expected), rel=1e-6)
    torch.nn.utils.clip_grad_value_(theirs, 0.3)
    torch.testing.assert_close(grads(ours), grads(theirs))


def test_no_clip_only_measures() -> None:
    ours, same = parameters(50.0), parameters(50.0)
    norm = NoClip().build()(ours)
    flat = torch.cat([g.double().flatten() for g in grads(same)])
    assert norm == pytest.approx(float(flat.norm()), rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(grads(ours), grads(same), strict=True))


def test_adaptive_clip_matches_naive_loop() -> None:
    ours, naive = parameters(0.5), parameters(0.5)
    AGC(ratio=0.2, eps=1e-3).build()(ours)
    for p in naive:
        if p.grad is None:
            continue
        units = range(p.shape[0]) if p.ndim > 1 else [...]
        for unit in units:
            w, g = p.detach()[unit].double(), p.grad[unit].double()
            limit = 0.2 * max(float((w * w).sum()) ** 0.5, 1e-3)
            size = float((g * g).sum()) ** 0.5
            if size > limit:
                p.grad[unit] = (g * (limit / size)).float()
    torch.testing.assert_close(grads(ours), grads(naive), rtol=1e-5, atol=1e-7)
    assert any(
        not torch.equal(a, b) for a, b in zip(grads(ours), grads(parameters(0.5)), strict=True)
    )


def with_norm(norm: float) -> list[nn.Parameter]:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), norm / 2)
    return [p]


def test_zclip_matches_the_paper_and_cuts_a_planted_spike() -> None:
    generator = torch.Generator().manual_seed(1)
    norms = (0.5 + 0.05 * torch.randn(60, generator=generator)).tolist()
    norms[40] = 5.0
    clipper = ZClip(z=2.5, alpha=0.9, warmup=10, max_norm=100.0).build()
    after = []
    for norm in norms:
        ps = with_norm(norm)
        assert clipper(ps) == pytest.approx(norm, rel=1e-5)
        after.append(gradient_norm(ps))

    first = norms[:10]
    mean = sum(first) / 10
    var = sum((n - mean) ** 2 for n in first) / 10
    expected = list(first)
    for norm in norms[10:]:
        z = (norm - mean) / math.sqrt(var)
        target = mean + 2.5**2 / z * math.sqrt(var) if z > 2.5 else norm
        expected.append(target)
        mean = 0.9 * mean + 0.1 * target
        var = 0.9 * var + 0.1 * (target - mean) ** 2
    assert after == pytest.approx(expected, rel=1e-4)
    assert after[40] < 0.6, "the spike is brought into the range of its neighbours"
    assert after[45] == pytest.approx(norms[45], rel=1e-4), "and leaves no trace"


def test_zclip_state_continues_exactly() -> None:
    one, two = ZClip(warmup=3).build(), ZClip(warmup=3).build()
    for norm in (0.4, 0.5, 0.45, 0.9, 0.5):
        one(with_norm(norm))
    two.restore(one.state())
    a, b = with_norm(3.0), with_norm(3.0)
    assert one(a) == two(b)
    assert torch.equal(grads(a)[0], grads(b)[0])
    assert one.state() == two.state()


@pytest.mark.parametrize("clip", [NormClip(), ZClip(warmup=2), NoClip(), AGC(), ValueClip()])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norm_tells_of_nan_and_learns_nothing_from_it(clip: Clip, bad: float) -> None:
    clipper = clip.build()
    before = clipper.state()
    assert not math.isfinite(clipper(with_norm(bad)))
    assert clipper.state() == before


def test_half_precision_norms_do_not_overflow() -> None:
    p = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    p.grad = torch.full((1000,), 6e4, dtype=torch.float16)
    assert gradient_norm([p]) == pytest.approx(6e4 * math.sqrt(1000), rel=1e-3)
    assert gradient_norm([]) == 0.0
