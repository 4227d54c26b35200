"""The block formats of GGUF: small groups of weights that share a scale, as bytes.

    Q4_0 Q4_1 Q5_0 Q5_1 Q8_0    32 weights, one scale: `round_quants`
    Q4_K Q5_K Q6_K              256 weights, two-level scales: `k_quants`
    F16 BF16 F32                one weight, plain

Each format is one `BlockFormat` value in `FORMATS`. `quantise` and `dequantise` take whole
tensors and work through them in pieces that stay in the processor's cache, so that beside the
result they need a few megabytes. Reading is bit-exact with ggml for every format, writing for
all but the K formats, where the format leaves the choice of scales to the writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import TreadleError, did_you_mean
from treadle.kernels import k_quants, round_quants

CARD = Card(
    id="q.gguf",
    paper="Gerganov 2023, ggml and the GGUF format; Kawrakow 2023, k-quants",
    summary="Store weights in the block formats of llama.cpp, from 4.5 to 8.5 bits a weight.",
    recipe="treadle generate smollm2-135m-instruct 'The capital of France is'",
    oracle="tests/kernels/test_kernels_blocks.py::test_reads_what_gguf_reads",
)


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """One way to store weights."""

    name: str
    ggml_type: int
    """Its number in GGUF files."""
    block_size: int
    """Weights a block; the last dimension of a tensor is a multiple of it."""
    block_bytes: int
    quantise: Callable[[Tensor], Tensor]
    """Rows of float32 weights [N block_size] to bytes [N block_bytes]."""
    dequantise: Callable[[Tensor], Tensor]
    """Bytes [N block_bytes] to float32 weights [N block_size]."""
    largest: float
    """Magnitude up to which weights can be stored: that of its float16 scales, or its own."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size


def quantise(weights: Float[Tensor, "*rows n"], format: BlockFormat) -> UInt8[Tensor, "*rows b"]:
    """The bytes of `weights`, on their device; b = n / block_size * block_bytes.

    Raises:
        TreadleError: n is not a multiple of the block size, or a weight is NaN or too large.
    """
    *rows, columns = weights.shape
    if columns % format.block_size:
        raise TreadleError(
            f"rows of {columns} weights do not divide into {format.name}'s blocks of "
            f"{format.block_size}; choose a format of smaller blocks, such as Q8_0 or F16"
        )
    blocks = weights.detach().reshape(-1, format.block_size)
    out = blocks.new_empty(len(blocks), format.block_bytes, dtype=torch.uint8)
    step = _blocks_at_once(format, blocks.device)
    with _one_thread():
        for start in range(0, len(blocks), step):
            piece = blocks[start : start + step].float()
            if not (peak := float(piece.abs().amax())) <= format.largest:
                raise TreadleError(
                    f"{format.name} holds weights up to {format.largest:g}, here is one of "
                    f"{peak:g}; look for a diverged run, or choose BF16"
                )
            out[start : start + step] = format.quantise(piece)
    return out.view(*rows, columns // format.block_size * format.block_bytes)


def dequantise(
    data: UInt8[Tensor, "*rows b"], format: BlockFormat, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*rows n"]:
    """The weights that `data` holds, on its device.

    Raises:
        TreadleError: the length of a row is not a multiple of the block's bytes.
    """
    *rows, length = data.shape
    if length % format.block_bytes:
        raise TreadleError(
            f"rows of {length} bytes do not divide into {format.name}'s blocks of "
            f"{format.block_bytes} bytes; the data are of another format or cut off"
        )
    blocks = data.reshape(-1, format.block_bytes)
    out = blocks.new_empty(len(blocks), format.block_size, dtype=dtype)
    step = _blocks_at_once(format, blocks.device)
    with _one_thread():
        for start in range(0, len(blocks), step):
            out[start : start + step] = format.dequantise(blocks[start : start + step])
    return out.view(*rows, length // format.block_bytes * format.block_size)


def block_format(name: str) -> BlockFormat:
    """The format called `name`.

    Raises:
        TreadleError: there is none of that name.
    """
    if name not in FORMATS:
        raise TreadleError(f"unknown block format `{name}`{did_you_mean(name, FORMATS)}")
    return FORMATS[name]


@contextmanager
def _one_thread() -> Iterator[None]:
    """A piece is a few microseconds of work: to share it among threads costs more than it gains,
    and thirty times more where other programs hold the processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _blocks_at_once(format: BlockFormat, device: torch.device) -> int:
    weights = 1 << 17 if device.type == "cpu" else 1 << 25
    return weights // format.block_size


def _store(x: Float[Tensor, "N 1"], dtype: torch.dtype) -> UInt8[Tensor, "N B"]:
    return x.to(dtype).view(torch.uint8)


def _load(blocks: UInt8[Tensor, "N B"], dtype: torch.dtype) -> Float[Tensor, "N 1"]:
    return blocks.contiguous().view(dtype).float()


def _format(
    name: str,
    ggml_type: int,
    block_size: int,
    block_bytes: int,
    quantise: Callable[[Tensor], Tensor],
    dequantise: Callable[[Tensor], Tensor],
    largest: float = 65504,
) -> BlockFormat:
    return BlockFormat(
        name=name,
        ggml_type=ggml_type,
        block_size=block_size,
        block_bytes=block_bytes,
        quantise=quantise,
        dequantise=dequantise,
        largest=largest,
    )


def _plain(name: str, ggml_type: int, dtype: torch.dtype) -> BlockFormat:
    store, load = partial(_store, dtype=dtype), partial(_load, dtype=dtype)
    return _format(name, ggml_type, 1, dtype.itemsize, store, load, torch.finfo(dtype).max)


def _small(name: str, ggml_type: int, block_bytes: int, bits: int) -> BlockFormat:
    if name.endswith("_0"):
        pair = (
            partial(round_quants.quantise_symmetric, bits=bits),
            partial(round_quants.dequantise_symmetric, bits=bits),
        )
    else:
        pair = (
            partial(round_quants.quantise_affine, bits=bits),
            partial(round_quants.dequantise_affine, bits=bits),
        )
    return _format(name, ggml_type, 32, block_bytes, *pair)


def _super(name: str, ggml_type: int, block_bytes: int, bits: int) -> BlockFormat:
    quantise = partial(k_quants.quantise_affine, bits=bits)
    dequantise = partial(k_quants.dequantise_affine, bits=bits)
    return _format(name, ggml_type, 256, block_bytes, quantise, dequantise)


FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        format.name: format
        for format in (
            _plain("F32", 0, torch.float32),
            _plain("F16", 1, torch.float16),
            _plain("BF16", 30, torch.bfloat16),
            _small("Q4_0", 2, 18, 4),
            _small("Q4_1", 3, 20, 4),
            _small("Q5_0", 6, 22, 5),
            _small("Q5_1", 7, 24, 5),
            _format("Q8_0", 8, 32, 34, round_quants.quantise_q8, round_quants.dequantise_q8),
            _super("Q4_K", 12, 144, 4),
            _super("Q5_K", 13, 176, 5),
            _format("Q6_K", 14, 256, 210, k_quants.quantise_q6, k_quants.dequantise_q6),
        )
    }
)
