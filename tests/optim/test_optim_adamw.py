"""AdamW against torch's unfused implementation and a float64 loop written from the paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from treadle.core.errors import ConfigError
from treadle.optim.adamw import AdamW
from treadle.optim.decay import DecayAll, DecayMatrices


def parameters(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embedding.weight": (7, 4), "blocks.0.q.weight": (4, 4), "norm.weight": (4,)}
    return [
        (n, nn.Parameter(torch.randn(s, generator=generator).to(dtype))) for n, s in shapes.items()
    ]


def gradients(step: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + step))


def test_matches_naive_float64_loop() -> None:
    named = parameters(torch.float64)
    optimizer = AdamW(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3).build(named)
    weights = {n: p.detach().clone() for n, p in named}
    m = {n: torch.zeros_like(p) for n, p in weights.items()}
    v = {n: torch.zeros_like(p) for n, p in weights.items()}
    for t in range(1, 8):
        for name, p in named:
            g = gradients(t, p.shape).double()
            p.grad = g.clone()
            decay = 0.3 if name == "blocks.0.q.weight" else 0.0
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            step = (m[name] / (1 - 0.8**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-6)
            weights[name] = weights[name] - 0.1 * decay * weights[name] - 0.1 * step
        optimizer.step()
    for name, p in named:
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-12, atol=1e-12)


def test_fused_matches_torch_unfused() -> None:
    ours, theirs = parameters(), parameters()
    a = AdamW(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, decay=DecayAll()).build(ours)
    b = torch.optim.AdamW(
        [p for _, p in theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, foreach=False
    )
    assert a.param_groups[0]["fused"]
    for step in range(10):
        for (_, p), (_, q) in zip(ours, theirs, strict=True):
            p.grad, q.grad = gradients(step, p.shape), gradients(step, p.shape)
        a.step()
        b.step()
    for (_, p), (_, q) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "decays"),
    [
        (DecayMatrices(), {"blocks.0.q.weight"}),
        (DecayMatrices(embeddings=()), {"blocks.0.q.weight", "embedding.weight"}),
        (DecayAll(), {"blocks.0.q.weight", "embedding.weight", "norm.weight"}),
    ],
)
def test_which_parameters_decay(rule: DecayMatrices | DecayAll, decays: set[str]) -> None:
    named = parameters()
    optimizer = AdamW(lr=1.0, weight_decay=0.5, decay=rule).build(named)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5  # those that decay come first
    for _, p in named:
        p.grad = torch.zeros_like(p)
    before = {n: p.detach().clone() for n, p in named}
    optimizer.step()
    changed = {n for n, p in named if not torch.equal(p, before[n])}
    assert changed == decays
    for name in decays:
        torch.testing.assert_close(dict(named)[name].detach(), 0.5 * before[name])


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="nothing trains"):
        AdamW(lr=0.1).build([])
    with pytest.raises(ValueError, match="weight_decay"):
        AdamW(lr=0.1, weight_decay=-1.0)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        AdamW(lr=-math.inf)
