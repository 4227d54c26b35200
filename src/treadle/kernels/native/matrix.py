"""Weights in 4 to 8 bits, repacked from GGUF blocks for the processor's products of bytes.

    y = W r(x)     r rounds each group of 32 inputs to 255 steps of its largest magnitude

`multiply_reference` is the definition; the fast path sums the same integers, and differs from it
by the rounding of float32 sums alone.
"""

from __future__ import annotations

import ctypes
import weakref

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.kernels.blocks import BlockFormat, block_format, dequantise
from treadle.kernels.native.build import library
from treadle.kernels.native.levels import find_level

GROUP = 32
FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""In the order of `Format` of formats.h."""


class Arena:
    """One piece of memory for many matrices; it lives as long as any of them.

    Args:
        level: the instructions, as in `find_level`.

    Raises:
        TreadleError: there is not so much memory.
    """

    def __init__(self, nbytes: int, level: str | None = None) -> None:
        self.nbytes = nbytes
        self.compiled = library(find_level(level))
        self.handle: int | None = self.compiled.treadle_arena(nbytes)
        if self.handle is None:
            raise TreadleError(f"no memory for {nbytes:,} bytes of weights; free some")
        weakref.finalize(self, self.compiled.treadle_free_arena, self.handle)


class NativeMatrix:
    """A matrix [out in] in the memory of the native library, in the file's own numbers.

    Args:
        arena: where it lies; None takes memory for it alone.

    Raises:
        TreadleError: the format is not one of `FORMATS`, or memory does not suffice.
    """

    def __init__(
        self, blocks: UInt8[Tensor, "out b"], format: str, arena: Arena | None = None
    ) -> None:
        self.format = block_format(format)
        self.rows, length = blocks.shape
        if length % self.format.block_bytes:
            raise TreadleError(f"rows of {length} bytes are not whole blocks of {format}")
        self.columns = length // self.format.block_bytes * self.format.block_size
        arena = arena or Arena(packed_bytes(self.rows, self.columns, format))
        self._library = arena.compiled
        blocks = blocks.contiguous()
        self.handle: int | None = self._library.treadle_matrix(
            arena.handle, _number(format), self.rows, self.columns, blocks.data_ptr()
        )
        if self.handle is None:
            raise TreadleError(f"no memory for a matrix of {self.rows} x {self.columns}")
        weakref.finalize(self, self._library.treadle_free_matrix, self.handle)

    def multiply(self, x: Float[Tensor, "N in"]) -> Float[Tensor, "N out"]:
        """x W^T in float32, on one thread."""
        if x.ndim != 2 or x.shape[1] != self.columns:
            raise TreadleError(f"a matrix of {self.columns} columns times {tuple(x.shape)}")
        x = x.float().contiguous()
        y = torch.empty(len(x), self.rows)
        if self._library.treadle_multiply(self.handle, x.data_ptr(), len(x), y.data_ptr()):
            raise TreadleError("no memory for the activations; multiply fewer rows at a time")
        return y

    def row(self, index: int) -> Float[Tensor, " in"]:
        """One row of the weight."""
        if not 0 <= index < self.rows:
            raise TreadleError(f"row {index} of a matrix of {self.rows}")
        y = torch.empty(self.columns)
        self._library.treadle_unpack_row(self.handle, index, ctypes.c_void_p(y.data_ptr()))
        return y


def packed_bytes(rows: int, columns: int, format: str) -> int:
    """What a matrix takes of an arena.

    Raises:
        TreadleError: the format is not one of `FORMATS`.
    """
    compiled = library(find_level())
    return int(compiled.treadle_matrix_bytes(_number(format), rows, columns))


def runnable(format: str) -> str:
    """`format`, if there are native products of it.

    Raises:
        TreadleError: there are none.
    """
    if format not in FORMATS:
        raise TreadleError(
            f"the native path has no products of {format}; choose {', '.join(FORMATS)}"
        )
    return format


def _number(format: str) -> int:
    return FORMATS.index(runnable(format))


def round_groups(x: Float[Tensor, "N in"]) -> Float[Tensor, "N in"]:
    """r(x): each group of 32 to whole multiples of its largest magnitude / 127."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    peak = groups.abs().amax(-1, keepdim=True)
    codes = (groups * (127 / peak).nan_to_num(0, 0, 0)).round()
    rounded: Tensor = (codes * (peak / 127)).flatten(-2)
    return rounded


def multiply_reference(
    x: Float[Tensor, "N in"], blocks: UInt8[Tensor, "out b"], format: BlockFormat
) -> Float[Tensor, "N out"]:
    """The definition."""
    return round_groups(x) @ dequantise(blocks, format).T
