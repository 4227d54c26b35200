"""Native products against their definition, on the vector path and on the portable one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from treadle.core.errors import TreadleError
from treadle.kernels.blocks import FORMATS, dequantise, quantise
from treadle.kernels.native import build as native
from treadle.kernels.native.build import PORTABLE, compiled
from treadle.kernels.native.matrix import NativeMatrix, multiply_reference, round_groups

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, native.COMPILERS)), reason="no C++ compiler"
)
SHAPES = [(16, 32, 1), (48, 64, 8), (100, 96, 3), (576, 576, 11), (7, 160, 70)]


@needs_compiler
@pytest.mark.parametrize("flags", [(), (PORTABLE,)], ids=["vector", "portable"])
@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q8_0"])
def test_products_match_the_definition(format: str, flags: tuple[str, ...]) -> None:
    """Whole and broken strips, pairs of groups and tiles of rows."""
    torch.manual_seed(0)
    for rows, columns, count in SHAPES:
        blocks = quantise(torch.randn(rows, columns) + 0.3, FORMATS[format])
        x = torch.randn(count, columns) * torch.rand(count, 1)
        x[0, :32] = 0
        expected = multiply_reference(x, blocks, FORMATS[format])
        matrix = NativeMatrix(blocks, format, *flags)
        assert_close(matrix.multiply(x), expected, atol=1e-4, rtol=1e-5)
        assert torch.equal(matrix.row(rows - 1), dequantise(blocks, FORMATS[format])[-1])


def test_rounding_is_to_the_nearest_of_255_steps() -> None:
    x = torch.randn(5, 96)
    step = x.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    error = (round_groups(x) - x).unflatten(1, (-1, 32)).abs()
    assert (error <= 0.5001 * step).all()
    assert not round_groups(torch.zeros(1, 32)).any()


@needs_compiler
def test_bad_matrices_are_refused() -> None:
    with pytest.raises(TreadleError, match="no products of Q6_K; choose Q4_0, Q4_1, Q8_0"):
        NativeMatrix(torch.zeros(2, 210, dtype=torch.uint8), "Q6_K")
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
        compiled()


@needs_compiler
def test_compiled_once_for_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "library.cpp").write_text('extern "C" int f() { return 1; }')
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "SOURCES", sources)
    first = compiled()
    stamp = first.stat().st_mtime_ns
    assert compiled() == first
    assert first.stat().st_mtime_ns == stamp
    assert compiled("-DOTHER") != first
    (sources / "library.cpp").write_text("no C++ at all")
    with pytest.raises(TreadleError, match=r"could not compile.*GCC 12"):
        compiled()
    assert len(list((tmp_path / "cache" / "native").iterdir())) == 2
