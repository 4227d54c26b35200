from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles.ggml import ggml_quantise
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.kernels.blocks import FORMATS, BlockFormat, block_format, dequantise, quantise
from treadle.kernels.k_quants import fit_affine, fit_pair, fit_symmetric

gguf = pytest.importorskip("gguf")

K_FORMATS = ["Q4_K", "Q5_K", "Q6_K"]
OTHERS = [name for name in FORMATS if name not in K_FORMATS]


def kind(format: BlockFormat):
    return gguf.GGMLQuantizationType[format.name]


def gguf_reads(data: Tensor, format: BlockFormat) -> np.ndarray:
    rows = data.numpy().reshape(-1, format.block_bytes)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, kind(format)).reshape(-1)


def weights(shape: str) -> Tensor:
    """Rows of 2048 of the kind that `shape` names."""
    random = torch.Generator().manual_seed(7)
    x = torch.randn(64, 2048, generator=random)
    match shape:
        case "normal":
            return x * 0.02
        case "heavy":
            return 0.02 * x / x.roll(1, 1).abs().clamp(min=0.01)
        case "offset":
            return x * 0.01 + 0.3
        case "negative":
            return -x.abs() - 1
        case "grid":  # many ties of +peak and -peak, many exact halves
            return (x * 3).round().clamp(-4, 4) / 2
        case "sparse":
            return torch.where(x.abs() > 2, x, torch.zeros(()))
        case "zeros":
            return torch.zeros(64, 2048)
        case "constant":
            return x[:, :1].repeat(1, 2048)
        case "tiny":
            return x * 1e-30
    raise AssertionError(shape)


SHAPES = ["normal", "heavy", "offset", "negative", "grid", "sparse", "zeros", "constant", "tiny"]


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_the_format(name):
    format = FORMATS[name]
    assert int(kind(format)) == format.ggml_type
    assert gguf.GGML_QUANT_SIZES[kind(format)] == (format.block_size, format.block_bytes)
    assert format.bits_per_weight == pytest.approx(8 * format.block_bytes / format.block_size)


@pytest.mark.parametrize("name", FORMATS)
def test_reads_what_gguf_reads(name):
    """Every bit pattern, NaN scales included."""
    format = FORMATS[name]
    random = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (7, 300 * format.block_bytes), generator=random)
    data = data.to(torch.uint8)
    ours = dequantise(data, format)
    assert ours.shape == (7, 300 * format.block_size)
    np.testing.assert_array_equal(ours.numpy().reshape(-1), gguf_reads(data, format))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OTHERS)
def test_writes_what_gguf_writes(name, shape):
    format, x = FORMATS[name], weights(shape)
    theirs = gguf.quants.quantize(x.numpy(), kind(format)).view(np.uint8)
    np.testing.assert_array_equal(quantise(x, format).numpy(), theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", K_FORMATS)
def test_k_formats_round_trip(name, shape):
    """gguf reads what we wrote, and no weight is further off than coarse steps allow."""
    format, x = FORMATS[name], weights(shape)
    data = quantise(x, format)
    back = dequantise(data, format)
    np.testing.assert_array_equal(back.numpy().reshape(-1), gguf_reads(data, format))
    step = {"Q4_K": 3 / 15, "Q5_K": 3 / 31, "Q6_K": 1 / 32}[name]
    peaks = x.view(-1, 256).abs().amax(-1, True)
    error = (back - x).view(-1, 256).abs()
    assert (error <= step * peaks + 1e-7).all()
    if shape == "zeros":
        assert (back == 0).all()


def relative_error(x: Tensor, format: BlockFormat) -> float:
    back = dequantise(quantise(x, format), format)
    return float((back - x).norm() / x.norm())


@pytest.mark.parametrize("shape", ["normal", "heavy"])
def test_k_formats_beat_plain_rounding_of_their_size(shape):
    error = {name: relative_error(weights(shape), format) for name, format in FORMATS.items()}
    assert FORMATS["Q4_K"].bits_per_weight == FORMATS["Q4_0"].bits_per_weight
    assert FORMATS["Q5_K"].bits_per_weight == FORMATS["Q5_0"].bits_per_weight
    assert error["Q4_K"] < 0.9 * error["Q4_0"]
    assert error["Q5_K"] < 0.9 * error["Q5_0"]
    assert error["Q8_0"] < error["Q6_K"] < 0.6 * error["Q5_K"] < 0.4 * error["Q4_K"]


@pytest.mark.parametrize("levels", [15, 31])
def test_affine_search_is_near_the_best_of_all(levels):
    """Against a dense grid of scales and offsets."""
    x = weights("normal")[:4, :64].reshape(-1, 32) * 50
    scale, offset = fit_affine(x, levels)
    assert (offset >= 0).all()

    def error(s: Tensor, m: Tensor) -> Tensor:
        q = ((x + m) / s).round().clamp(0, levels)
        return (s * q - m - x).square().sum(-1)

    span, low = x.amax(-1, True) - x.amin(-1, True), -x.amin(-1, True)
    best = torch.full((len(x),), float("inf"))
    for s in np.linspace(0.75, 1.1, 71):
        for m in np.linspace(0.75, 1.1, 71):
            best = torch.minimum(best, error(span * s / levels, low * m))
    found = error(scale, offset)
    assert (found <= 1.15 * best).all()
    assert found.sum() <= 1.03 * best.sum()


def test_symmetric_search_is_near_the_best_of_all():
    x = weights("normal")[:4, :64].reshape(-1, 16) * 50
    scale = fit_symmetric(x)

    def error(s: Tensor) -> Tensor:
        return (s * (x / s).round().clamp(-32, 31) - x).square().sum(-1)

    peak = x.abs().amax(-1, True)
    best = torch.full((len(x),), float("inf"))
    for s in np.linspace(0.8, 1.2, 2001):
        best = torch.minimum(best, torch.minimum(error(peak * s / 32), error(-peak * s / 32)))
    assert (error(scale) <= 1.5 * best).all()
    assert error(scale).sum() <= 1.12 * best.sum()


def test_two_scales_are_the_least_squares_solution():
    random = torch.Generator().manual_seed(3)
    a = torch.rand(5, 8, 32, generator=random) * 15
    b = torch.rand(5, 8, 32, generator=random) * 63
    x = 0.3 * a - 0.2 * b + torch.randn(5, 8, 32, generator=random)
    given = torch.ones(5, 1, 1)
    d, dmin = fit_pair(a, b, x, given, given)
    for row in range(5):
        matrix = torch.stack([a[row].flatten(), -b[row].flatten()], 1).double()
        best = torch.linalg.lstsq(matrix, x[row].flatten().double()).solution
        assert torch.stack([d[row], dmin[row]]).flatten().tolist() == best.half().tolist()
    flat = fit_pair(a, torch.zeros_like(b), x, given, given)
    assert all(torch.equal(value, given) for value in flat)


@pytest.mark.parametrize("shape", ["normal", "heavy"])
@pytest.mark.parametrize("name", K_FORMATS)
def test_no_worse_than_llama_cpp(name, shape):
    format, x = FORMATS[name], weights(shape)
    data = ggml_quantise(x, format.ggml_type, format.block_size, format.block_bytes)
    theirs = dequantise(data, format)
    assert relative_error(x, format) < float((theirs - x).norm() / x.norm())


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_rows_layout_and_dtype_do_not_matter(name):
    format = FORMATS[name]
    x = torch.randn(3, 200, 512, generator=torch.Generator().manual_seed(2)).bfloat16()
    whole = quantise(x, format)
    row = quantise(x[2, 199].float(), format)
    assert torch.equal(whole[2, 199], row)
    transposed = quantise(x.transpose(0, 1), format)
    assert torch.equal(transposed, whole.transpose(0, 1))
    back = dequantise(whole, format, torch.bfloat16)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, dequantise(whole, format).bfloat16())
    assert torch.equal(
        dequantise(whole.transpose(0, 1), format, torch.bfloat16)[199, 2], back[2, 199]
    )
    assert quantise(x[:0], format).shape == (0, 200, whole.shape[-1])


def test_the_number_of_threads_is_left_alone():
    before = torch.get_num_threads()
    with pytest.raises(TreadleError):
        quantise(torch.full((32,), float("nan")), FORMATS["Q8_0"])
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FORMATS)
def test_a_gpu_gives_the_same(name):
    format, x = FORMATS[name], weights("heavy")
    ours = quantise(x.cuda(), format).cpu()
    if name in OTHERS:
        assert torch.equal(ours, quantise(x, format))
    assert torch.equal(dequantise(ours.cuda(), format).cpu(), dequantise(ours, format))


def test_bad_input_is_named():
    with pytest.raises(TreadleError, match=r"unknown block format `Q4_k`; did you mean `Q4_K`"):
        block_format("Q4_k")
    with pytest.raises(TreadleError, match=r"rows of 48 weights .* Q4_0's blocks of 32; choose"):
        quantise(torch.zeros(2, 48), FORMATS["Q4_0"])
    with pytest.raises(TreadleError, match=r"rows of 20 bytes .* Q4_0's blocks of 18 bytes"):
        dequantise(torch.zeros(20, dtype=torch.uint8), FORMATS["Q4_0"])
    with pytest.raises(TreadleError, match="Q6_K holds weights up to 65504, here is one of nan"):
        quantise(torch.tensor([1.0, float("nan")] * 128), FORMATS["Q6_K"])
    with pytest.raises(TreadleError, match=r"F16 holds weights up to 65504, here is one of 1e\+06"):
        quantise(torch.tensor([1.0, -1e6]), FORMATS["F16"])
    with pytest.raises(TreadleError, match=r"BF16 holds weights .* here is one of inf"):
        quantise(torch.tensor([1.0, float("inf")]), FORMATS["BF16"])
