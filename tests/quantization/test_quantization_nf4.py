"""NF4 beside bitsandbytes, bit for bit; and QLoRA's gradients beside a dense base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from treadle.core.errors import ConfigError
from treadle.kernels.dynamic_codes import dynamic_table, from_codes, into_codes
from treadle.models.llama import tiny_llama
from treadle.peft.lora import LoRA
from treadle.quantization.layers import QuantizedLinear
from treadle.quantization.nf4 import LEVELS, NF4, NF4Weight
from treadle.quantization.quantize import unpack

SHAPES = [(64, 64), (192, 576), (300, 128), (1, 64), (513, 64 * 5)]


def weights(shape: tuple[int, int]) -> torch.Tensor:
    torch.manual_seed(0)
    rough = torch.randn(shape) * torch.rand(shape[0], 1).exp()
    rough[0, :5] = torch.tensor([0.0, 3.0, -3.0, 1e-9, -40.0])
    return rough


def nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The distance of each number from the nearest of a table, by trying all, in float64."""
    return (x.double()[..., None] - table.double()).abs().amin(-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_match_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Codes are equal to the bit, and bitsandbytes reads what we stored as we do.

    The 8-bit codes of its CPU kernel are not always the nearest ones; ours are.
    """
    functional = pytest.importorskip("bitsandbytes").functional
    weight = weights(shape).to(dtype)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    ours = NF4Weight(weight)
    assert torch.equal(ours.codes, packed.flatten())
    assert torch.equal(ours.scale_mean, state.offset)
    assert torch.equal(ours.scale_peaks, state.state2.absmax)
    scales = weight.float().view(-1, 64).abs().amax(1)
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert (ours.scales() - scales).norm() <= (theirs - scales).norm() + 1e-6
    state.absmax = ours.scale_codes
    read = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(ours.dense(dtype), read, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_codes_are_the_nearest_of_bitsandbytes_table(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    table = functional.create_dynamic_map(signed=signed)
    assert torch.equal(dynamic_table(signed, torch.device("cpu")), table)
    torch.manual_seed(0)
    x = torch.randn(7, 301).pow(3)
    x[2] = 0
    x = x if signed else x.abs()
    _, state = functional.quantize_blockwise(x, code=table, blocksize=256)
    ours = into_codes(x, signed=signed)
    assert torch.equal(ours.peaks, state.absmax)
    scaled = x.flatten() / ours.peaks.repeat_interleave(256)[: x.numel()]
    found = (scaled - table[ours.codes.flatten().int()]).abs().double()
    torch.testing.assert_close(found, nearest(scaled, table), rtol=1e-5, atol=1e-7)
    expected = functional.dequantize_blockwise(ours.codes, state)
    assert torch.equal(from_codes(ours, signed=signed), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_codes_on_both_sides_of_every_bound(signed: bool) -> None:
    table = dynamic_table(signed, torch.device("cpu"))
    bounds = (table[1:] + table[:-1]) / 2
    beyond = torch.nextafter(bounds, torch.tensor(2.0))
    one = torch.ones(1)  # each block's peak
    codes = [into_codes(torch.cat((one, x)), signed=signed).codes[1:] for x in (bounds, beyond)]
    assert codes[0].tolist() == list(range(255))
    assert codes[1].tolist() == list(range(1, 256))


def test_levels_are_normal_quantiles() -> None:
    """From the definition: quantiles at evenly spaced probabilities on each side of zero."""
    offset = 0.5 * (1 - 1 / 32 + 1 - 1 / 30)
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((below, torch.zeros(1), above.flip(0)))
    torch.testing.assert_close(
        torch.tensor(LEVELS, dtype=torch.float64), levels / levels.max(), rtol=1e-4, atol=2e-5
    )


def test_rows_are_those_of_the_dense_matrix() -> None:
    packed = NF4Weight(weights((300, 96 * 2)))
    ids = torch.tensor([299, 0, 7, 7])
    assert torch.equal(packed.rows(ids, torch.float32), packed.dense(torch.float32)[ids])


def test_bits_and_error() -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 1024)
    packed = NF4Weight(weight)
    bits = 8 * sum(t.nbytes for t in packed.state_dict().values()) / weight.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-3)
    error = (packed.dense(torch.float32) - weight).norm() / weight.norm()
    assert 0.085 < float(error) < 0.1


def test_qlora_equals_lora_on_the_unpacked_base() -> None:
    """Outputs and the gradients of the factors."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return NF4()(tiny_llama(96, dim=64, layers=2, heads=4, kv_heads=2, hidden=128).build())

    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    torch.manual_seed(1)
    ours = LoRA(rank=4)(model())
    torch.manual_seed(1)
    plain = LoRA(rank=4)(unpack(model()))
    assert sum(isinstance(m, QuantizedLinear) for m in ours.modules()) == 14
    for m in (ours, plain):
        torch.manual_seed(2)
        for p in m.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.1)
        m(tokens).pow(2).sum().backward()
    torch.testing.assert_close(ours(tokens), plain(tokens), rtol=1e-4, atol=1e-5)
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    assert len(gradients) == 28
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)


def test_weights_that_do_not_divide_are_named() -> None:
    with pytest.raises(ConfigError, match="NF4 of `0`: 15 weights do not divide into blocks of 64"):
        NF4(targets=("0",))(nn.Sequential(nn.Linear(5, 3)))
    with pytest.raises(ConfigError, match="NF4: target `mixr` matches no layer"):
        NF4(targets=("mixr",))(nn.Sequential(nn.Linear(64, 3)))
