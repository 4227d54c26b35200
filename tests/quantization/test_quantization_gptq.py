"""GPTQ against optimal brain surgeon written out, and against plain rounding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from treadle.core.errors import ConfigError, TreadleError
from treadle.core.progress import Silent
from treadle.data.batch import Piece, assemble
from treadle.data.source import Env, Source, Stream, Work
from treadle.kernels.blocks import FORMATS, dequantise, quantise
from treadle.models.decoder import DecoderModel
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_gguf
from treadle.models.llama import tiny_llama
from treadle.quantization.gptq import BITS, GPTQ, calibration, gptq, hessians
from treadle.quantization.rounding import Nearest


class GPTQCounting(Source):
    """Random tokens, 4 documents a step."""

    def open(self, env: Env) -> Stream:
        return CountingStream()


class CountingStream(Stream):
    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)

    def __next__(self) -> Work:
        rows = torch.randint(0, 96, (4, 24), generator=self.random).tolist()
        return Work((assemble([Piece(row, [True] * 24) for row in rows]),))

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None: ...


def inputs(features: int, seed: int = 0) -> Tensor:
    """Activations whose features go together, as those of real models do."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=random) / features**0.5
    scales = torch.rand(features, generator=random) * 3 + 0.1
    return torch.randn(4 * features, features, generator=random) @ mixing * scales


def output_error(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float(((weight - rounded) @ x.T).square().sum())


def brain_surgeon(weight: Tensor, h: Tensor, name: str, damp: float) -> Tensor:
    """Hassibi and Stork 1993 in float64: after each rounded weight, the free ones of its row move
    to where the layer's error is least, by the inverse of their own part of H."""
    blocks = quantise(weight, FORMATS[name])
    half, size = 1 << BITS[name] - 1, FORMATS[name].block_bytes
    raw = blocks.view(len(weight), -1, size)
    header = raw[..., :4].contiguous().view(torch.float16).double()
    step = header[..., 0]
    low = header[..., 1] if name.endswith("_1") else -half * step
    h = h.double() + damp * h.double().diagonal().mean() * torch.eye(len(h))
    w, out = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    free = h.diagonal().argsort(descending=True).tolist()
    while free:
        j = free[0]
        s, m = step[:, j // 32], low[:, j // 32]
        out[:, j] = ((w[:, j] - m) / s).round().clamp(0, 2 * half - 1) * s + m
        inverse = torch.linalg.inv(h[free][:, free])
        w[:, free] -= torch.outer((w[:, j] - out[:, j]) / inverse[0, 0], inverse[0])
        free.pop(0)
    return out


@pytest.mark.parametrize("name", BITS)
def test_follows_optimal_brain_surgeon(name: str) -> None:
    weight = torch.randn(6, 160, generator=torch.Generator().manual_seed(1))
    x = inputs(160)
    rounded = dequantise(gptq(weight, x.T @ x, FORMATS[name], damp=0.01), FORMATS[name])
    expected = brain_surgeon(weight, x.T @ x, name, 0.01)
    torch.testing.assert_close(rounded.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BITS)
def test_error_is_below_that_of_plain_rounding(name: str) -> None:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(2))
    x, format = inputs(256), FORMATS[name]
    plain = dequantise(quantise(weight, format), format)
    rounded = dequantise(gptq(weight, x.T @ x, format, damp=0.01), format)
    assert output_error(weight, rounded, x) < 0.6 * output_error(weight, plain, x)


def test_small_changes_of_a_quantised_model_survive() -> None:
    """Plain rounding puts a model that came out of the format back to where it was."""
    random, format = torch.Generator().manual_seed(3), FORMATS["Q4_1"]
    base = dequantise(quantise(torch.randn(64, 256, generator=random), format), format)
    change = torch.randn(64, 4, generator=random) @ torch.randn(4, 256, generator=random) * 0.01
    x = inputs(256)
    learned = change @ x.T

    def kept(rounded: Tensor) -> float:
        return float(((rounded - base) @ x.T * learned).sum() / learned.square().sum())

    assert kept(dequantise(quantise(base + change, format), format)) < 0.1
    assert kept(dequantise(gptq(base + change, x.T @ x, format, damp=0.01), format)) > 0.3


def tiny() -> DecoderModel:
    torch.manual_seed(0)
    return tiny_llama(96, dim=64, layers=2, heads=4, kv_heads=2, hidden=128).build()


def rounded_model(tmp_path: Path, format: str = "Q4_1") -> tuple[DecoderModel, dict[str, Tensor]]:
    model = tiny().requires_grad_(False)
    env = Env(model=model, tokenizer=None, scratch=tmp_path)  # type: ignore[arg-type]
    return model, GPTQ(source=GPTQCounting(), tokens=960)(model, env, format, Silent())


def test_the_file_holds_what_was_rounded(tmp_path: Path) -> None:
    model, packed = rounded_model(tmp_path)
    assert len(packed) == 14
    save_gguf(model, tmp_path / "m.gguf", format="Q4_1", embedding="Q8_0", packed=packed)
    loaded = dict(load_model(tmp_path / "m.gguf", dtype=torch.float32).model.named_parameters())
    plain = dict(tiny().named_parameters())
    for name, parameter in model.named_parameters():
        if name in packed:
            assert torch.equal(loaded[name], parameter)
            assert not torch.equal(parameter, plain[name])


def test_later_blocks_see_the_rounded_ones(tmp_path: Path) -> None:
    """H of the second block is of the outputs of the rounded first."""
    model, packed = rounded_model(tmp_path)
    config = GPTQ(source=GPTQCounting(), tokens=960)
    env = Env(model=model, tokenizer=None, scratch=tmp_path)  # type: ignore[arg-type]
    half = tiny().requires_grad_(False)
    half.blocks[0] = model.blocks[0]
    runs = calibration(config, half, env)
    for run in runs:
        run.x = half.blocks[0](run.x, run.context)
    q = half.blocks[1].mixer.q
    h = hessians(half.blocks[1], {"q": q}, runs, env)["q"]
    expected = gptq(q.weight.detach(), h, FORMATS["Q4_1"], damp=0.01)
    assert torch.equal(packed["blocks.1.mixer.q.weight"], expected)


def test_what_cannot_be_rounded_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"GPTQ rounds to Q4_0, .*, not to Q4_K"):
        rounded_model(tmp_path, "Q4_K")
    broken = torch.full((32, 32), float("nan"))
    with pytest.raises(TreadleError, match="activations are not finite"):
        gptq(torch.ones(4, 32), broken, FORMATS["Q4_0"], damp=0.01)


def test_nearest_leaves_all_to_the_writer(tmp_path: Path) -> None:
    env = Env(model=tiny(), tokenizer=None, scratch=tmp_path)  # type: ignore[arg-type]
    assert Nearest()(env.model, env, "Q4_K", Silent()) == {}
