"""Native products against their definition, on every instruction set that is here."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from treadle.core.errors import TreadleError
from treadle.kernels.blocks import FORMATS, dequantise, quantise
from treadle.kernels.compiler import COMPILERS
from treadle.kernels.native import build as native
from treadle.kernels.native import levels
from treadle.kernels.native.build import compiled, library
from treadle.kernels.native.levels import LEVELS, features, find_level
from treadle.kernels.native.matrix import FORMATS as NATIVE_FORMATS
from treadle.kernels.native.matrix import (
    Arena,
    NativeMatrix,
    multiply_reference,
    packed_bytes,
    round_groups,
)

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
SHAPES = [(16, 32, 1), (48, 64, 8), (100, 96, 3), (576, 576, 11), (7, 160, 70)]
SUPER_SHAPES = [(16, 256, 1), (48, 512, 8), (100, 768, 3), (7, 256, 70)]
HERE = [level.name for level in LEVELS if level.needs <= features()]


@needs_compiler
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("format", NATIVE_FORMATS)
def test_products_match_the_definition(format: str, level: str) -> None:
    """Whole and broken strips and tiles of rows, on every instruction set of this processor."""
    torch.manual_seed(0)
    kind = FORMATS[format]
    for rows, columns, count in SUPER_SHAPES if kind.block_size > 32 else SHAPES:
        blocks = quantise(torch.randn(rows, columns) + 0.3, kind)
        x = torch.randn(count, columns) * torch.rand(count, 1)
        x[0, :32] = 0
        dense = dequantise(blocks, kind)
        matrix = NativeMatrix(blocks, format, Arena(packed_bytes(rows, columns, format), level))
        y = matrix.multiply(x)
        assert_close(y, multiply_reference(x, blocks, kind), atol=1e-4, rtol=1e-5)
        exact = round_groups(x).double() @ dense.double().T
        assert float((y - exact).abs().max()) <= 2e-6 * float(exact.abs().max())
        for row in range(rows):
            assert torch.equal(matrix.row(row), dense[row])


@needs_compiler
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("format", NATIVE_FORMATS)
def test_extreme_codes_and_activations_do_not_overflow(format: str, level: str) -> None:
    """All bits set or none, times activations at the ends of their range."""
    kind = FORMATS[format]
    x = torch.ones(3, kind.block_size)
    x[1] *= -1
    x[2, ::2] *= -1
    for byte in (0x00, 0xFF, 0x80, 0x7F):
        blocks = torch.full((32, kind.block_bytes), byte, dtype=torch.uint8)
        scale = torch.tensor([0.5, 0.25], dtype=torch.float16).view(torch.uint8)
        at = -2 if format == "Q6_K" else 0
        blocks[:, at : (at + 2) or None] = scale[:2]
        if kind.name.endswith("_1") or format in ("Q4_K", "Q5_K"):
            blocks[:, 2:4] = scale[2:]
        dense = dequantise(blocks, kind).double()
        y = NativeMatrix(
            blocks, format, Arena(packed_bytes(32, kind.block_size, format), level)
        ).multiply(x)
        assert_close(y.double(), x.double() @ dense.T, atol=1e-4, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("format", NATIVE_FORMATS)
def test_products_match_the_field_s_own_unpacking(format: str) -> None:
    """Bytes as the gguf package packs or unpacks them, in products of float64."""
    import gguf

    torch.manual_seed(1)
    kind = FORMATS[format]
    blocks = quantise(torch.randn(40, 512), kind)
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[format])
    x = torch.randn(9, 512)
    exact = round_groups(x).double() @ torch.from_numpy(theirs).double().T
    y = NativeMatrix(blocks, format).multiply(x)
    assert float((y - exact).abs().max()) <= 2e-6 * float(exact.abs().max())


@needs_compiler
def test_weights_take_the_memory_of_their_file() -> None:
    """Nothing is expanded: only whole strips and 32-bit alignment add bytes."""
    for format in NATIVE_FORMATS:
        kind = FORMATS[format]
        stored = 576 * 768 // kind.block_size * kind.block_bytes
        assert stored <= packed_bytes(576, 768, format) <= 1.03 * stored


def test_rounding_is_to_the_nearest_of_255_steps() -> None:
    x = torch.randn(5, 96)
    step = x.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    error = (round_groups(x) - x).unflatten(1, (-1, 32)).abs()
    assert (error <= 0.5001 * step).all()
    assert not round_groups(torch.zeros(1, 32)).any()


@needs_compiler
def test_bad_matrices_are_refused() -> None:
    with pytest.raises(TreadleError, match="no products of F16; choose Q4_0, Q4_1, Q5_0"):
        NativeMatrix(torch.zeros(2, 64, dtype=torch.uint8), "F16")
    with pytest.raises(TreadleError, match="rows of 33 bytes are not whole blocks of Q8_0"):
        NativeMatrix(torch.zeros(2, 33, dtype=torch.uint8), "Q8_0")
    matrix = NativeMatrix(torch.zeros(2, 34, dtype=torch.uint8), "Q8_0")
    with pytest.raises(TreadleError, match=re.escape("32 columns times (1, 64)")):
        matrix.multiply(torch.zeros(1, 64))
    with pytest.raises(TreadleError, match="row 2 of a matrix of 2"):
        matrix.row(2)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TreadleError, match=r"no C\+\+ compiler \(no-such-compiler\).*set CXX"):
        compiled(find_level("portable"))


def test_levels_are_chosen_by_the_processor_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(levels, "CPUINFO", cpuinfo)
    monkeypatch.delenv("TREADLE_NATIVE", raising=False)
    for text, name in (
        ("flags\t\t: fma f16c avx2 avx512f avx512bw avx512dq avx512vl avx512_vnni", "avx512"),
        ("flags\t\t: fma f16c avx2 avx512f avx512bw avx512dq avx512vl", "avx2"),
        ("flags\t\t: fma f16c avx2 avx_vnni", "avx-vnni"),
        ("Features\t: fp asimd asimdhp asimddp", "neon-dotprod"),
        ("Features\t: fp asimd", "neon"),
        ("flags\t\t: sse2", "portable"),
    ):
        cpuinfo.write_text(f"processor\t: 0\n{text}\n")
        assert find_level().name == name
    monkeypatch.setenv("TREADLE_NATIVE", "portable")
    assert find_level().name == "portable"
    with pytest.raises(TreadleError, match=r"lacks avx2, f16c, fma, which.*avx2.*take one of port"):
        find_level("avx2")
    with pytest.raises(TreadleError, match="no level `avx3`"):
        find_level("avx3")


@needs_compiler
@pytest.mark.parametrize("level", HERE)
def test_each_level_is_compiled_as_itself(level: str) -> None:
    assert library(find_level(level)).treadle_level() == level.encode()


@needs_compiler
def test_compiled_once_for_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "library.cpp").write_text('extern "C" int f() { return 1; }')
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "SOURCES", sources)
    level = find_level("portable")
    first = compiled(level)
    stamp = first.stat().st_mtime_ns
    assert compiled(level) == first
    assert first.stat().st_mtime_ns == stamp
    assert compiled(replace(level, flags=("-DOTHER",))) != first
    (sources / "library.cpp").write_text("no C++ at all")
    with pytest.raises(TreadleError, match=r"could not compile.*GCC 12"):
        compiled(level)
    assert len(list((tmp_path / "cache" / "native").iterdir())) == 2
