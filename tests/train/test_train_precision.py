"""Precision: loss curves of all formats agree, overflows are survived, scaling as torch does it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from train.tiny import TinyStream, tiny_model

from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.clipping import NormClip
from treadle.train import precision as module
from treadle.train.precision import BF16, FP16, FP32, Auto, DynamicScaler, Precision, Race


def curve(precision: Precision, steps: int = 30) -> tuple[list[float], int]:
    """Losses of a small run, and how many steps overflowed."""
    model = tiny_model()
    precision.prepare(model)
    stream, objective, clip = TinyStream(cycle=4), CausalLM(), NormClip().build()
    optimizer = AdamW(lr=1e-2).build(list(model.named_parameters()))
    scaler, losses, overflows = precision.scaler(), [], 0
    for _ in range(steps):
        (batch,) = next(stream).batches
        with precision.autocast("cpu"):
            out = objective(model, batch)
        scaler.scale(out.total / out.weight).backward()
        finite = scaler.unscale(list(model.parameters()))
        if finite:
            clip(list(model.parameters()))
            optimizer.step()
        optimizer.zero_grad()
        scaler.update(finite)
        losses.append((out.total / out.weight).item())
        overflows += not finite
    return losses, overflows


def test_loss_curves_agree() -> None:
    reference, _ = curve(FP32())
    assert reference[-1] < 0.7 * reference[0], "the run learns, so that curves can differ"
    for precision, tolerance in ((BF16(), 0.05), (FP16(), 0.02)):
        losses, overflows = curve(precision)
        assert overflows == 0
        assert losses == pytest.approx(reference, rel=tolerance)


def test_fp16_survives_overflow() -> None:
    reference, _ = curve(FP16())
    losses, overflows = curve(FP16(initial_scale=2.0**24))
    assert 4 <= overflows <= 16
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.7 * losses[0]
    assert losses[overflows:] == pytest.approx(reference[: len(losses) - overflows], rel=0.5)


def test_scale_follows_torch_grad_scaler() -> None:
    """The same good and bad steps through torch's scaler and ours."""
    theirs = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3, backoff_factor=0.5)
    ours = FP16(initial_scale=64.0, growth=3).scaler()
    for value in (1.0, 1.0, math.inf, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
        optimizer = torch.optim.SGD([a], lr=1.0)
        theirs.scale((a * value).sum()).backward()
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.scale((b * value).sum()).backward()
        finite = ours.unscale([b])
        assert finite == math.isfinite(value)
        assert b.grad is not None
        if finite:
            torch.testing.assert_close(a.grad, b.grad)
        ours.update(finite)
        assert ours.state()["factor"] == theirs.get_scale()


def test_small_gradients_need_the_scale() -> None:
    """A gradient of 2^-26 is zero in fp16, and survives with a scale."""
    for scale, expected in ((1.0, 0.0), (65536.0, 2.0**-26)):
        scaler = FP16(initial_scale=scale).scaler()
        p = nn.Parameter(torch.ones(1))
        loss = (p.half() * 2.0**-13).float() * 2.0**-13
        scaler.scale(loss.sum()).backward()
        assert scaler.unscale([p])
        assert p.grad is not None
        assert p.grad.item() == expected


def test_scaler_state_continues() -> None:
    one = FP16(initial_scale=8.0, growth=4).scaler()
    for finite in (True, True, False, True, True, True):
        one.update(finite)
    two = FP16().scaler()
    two.restore(one.state())
    assert isinstance(two, DynamicScaler)
    assert (two.factor, two.good) == (4.0, 3)


def test_prepare_keeps_master_weights() -> None:
    model = tiny_model()
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    model.blocks[1].mixer.q.weight.data = model.blocks[1].mixer.q.weight.data.bfloat16()
    tied = model.head.weight is model.embedding.weight
    BF16().prepare(model)
    assert all(p.dtype == torch.bfloat16 for p in model.blocks[0].parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert tied
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("measured", "expected"),
    [(Race(fp32=100.0, bf16=300.0), BF16()), (Race(fp32=100.0, bf16=30.0), FP32())],
)
def test_auto_takes_the_faster_and_says_so(
    monkeypatch: pytest.MonkeyPatch, measured: Race, expected: Precision
) -> None:
    monkeypatch.setattr(module, "race", lambda device: measured)
    said: list[str] = []
    assert Auto().resolve("cpu", said.append) == expected
    assert type(expected).__name__ in said[0]
    assert f"{measured.bf16:.0f} GFLOP/s" in said[0]


def test_a_run_goes_on_in_the_precision_it_began_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memo = tmp_path / "precision.yaml"
    monkeypatch.setattr(module, "race", lambda device: Race(fp32=1.0, bf16=9.0))
    assert module.settle(Auto(), "cpu", memo) == BF16()
    monkeypatch.setattr(module, "race", lambda device: Race(fp32=9.0, bf16=1.0))
    assert module.settle(Auto(), "cpu", memo) == BF16()
    half = FP16(initial_scale=8.0)
    assert module.settle(half, "cpu", tmp_path / "other.yaml") == half
    assert module.settle(Auto(), "cpu", tmp_path / "other.yaml") == half


def test_race_measures_and_leaves_random_state_alone() -> None:
    state = torch.get_rng_state()
    result = module.race("cpu", rows=8, inner=16, outer=16)
    assert result.fp32 > 0
    assert result.bf16 > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert FP32().resolve("cpu") == FP32()
    with pytest.raises(TypeError, match="resolve"):
        Auto().dtype()
