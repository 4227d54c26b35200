"""Writing GGUF files: one tensor at a time, and the file is replaced in one step."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.core.files import StrPath, atomic_file
from treadle.kernels.blocks import FORMATS, BlockFormat, block_format, quantise
from treadle.models.hub.gguf import ALIGNMENT, MAGIC, MOST_DIMENSIONS
from treadle.models.hub.gguf_values import Value, encode, encode_string, guess_type

LONGEST_NAME = 63
"""Bytes of a tensor's name in ggml."""


def write_gguf(
    path: StrPath,
    metadata: Mapping[str, Value],
    tensors: Iterable[tuple[str, Tensor, str]],
    *,
    types: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a file that llama.cpp reads; it appears, or replaces the old one, when complete.

    Args:
        metadata: `general.architecture` comes first by custom; `general.alignment` is obeyed.
        tensors: name, weights and format (a name in `FORMATS`), taken one at a time. A uint8
            tensor is taken as bytes already in the format, as `GGUFFile.raw` gives them.
        types: metadata key -> type, where the usual one (see `guess_type`) is not meant.

    Raises:
        TreadleError: a value that does not fit its type, a tensor that does not fit its format,
            a name that is too long or comes twice, or a full disk.
    """
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise TreadleError(f"general.alignment {alignment!r} is not a power of two from 8 up")
    with atomic_file(path) as temporary:
        data_path = temporary.with_name("tensors")  # their number and shapes go into the header
        names: set[str] = set()
        entries: list[bytes] = []
        with data_path.open("wb") as data:
            for name, tensor, format in tensors:
                try:
                    raw, shape = _encode_tensor(tensor, block_format(format))
                    entry = _tensor_entry(name, names, shape, FORMATS[format], data.tell())
                except TreadleError as error:
                    raise TreadleError(f"{path}: tensor `{name}`: {error}") from None
                names.add(name)
                entries.append(entry)
                data.write(raw.numpy().data)
                data.write(bytes(-data.tell() % alignment))
                del tensor, raw  # before the next one is made
        header = b"".join(
            [
                MAGIC,
                struct.pack("<IQQ", 3, len(entries), len(metadata)),
                *(_metadata_entry(path, k, v, types) for k, v in metadata.items()),
                *entries,
            ]
        )
        with temporary.open("wb") as out, data_path.open("rb") as data:
            out.write(header)
            out.write(bytes(-len(header) % alignment))
            shutil.copyfileobj(data, out, 1 << 24)
        os.unlink(data_path)


def _encode_tensor(tensor: Tensor, format: BlockFormat) -> tuple[Tensor, tuple[int, ...]]:
    """Bytes on the CPU, and the shape in weights."""
    if not 1 <= tensor.dim() <= MOST_DIMENSIONS:
        raise TreadleError(f"{tensor.dim()} dimensions, GGUF holds 1 to {MOST_DIMENSIONS}")
    if tensor.dtype == torch.uint8:
        columns, rest = divmod(tensor.shape[-1], format.block_bytes)
        if rest:
            raise TreadleError(
                f"rows of {tensor.shape[-1]} bytes are not whole {format.name} blocks of "
                f"{format.block_bytes}"
            )
        shape = (*tensor.shape[:-1], columns * format.block_size)
        return tensor.contiguous().cpu(), shape
    if not tensor.is_floating_point():
        raise TreadleError(f"weights are floating point (or bytes), not {tensor.dtype}")
    return quantise(tensor, format).cpu(), tuple(tensor.shape)


def _tensor_entry(
    name: str, taken: set[str], shape: tuple[int, ...], format: BlockFormat, offset: int
) -> bytes:
    if name in taken:
        raise TreadleError("the name comes twice")
    if len(name.encode()) > LONGEST_NAME:
        raise TreadleError(f"the name is longer than ggml's {LONGEST_NAME} bytes")
    numbers = struct.pack(
        f"<I{len(shape)}QIQ", len(shape), *reversed(shape), format.ggml_type, offset
    )
    return encode_string(name) + numbers


def _metadata_entry(path: StrPath, key: str, value: Value, types: Mapping[str, str]) -> bytes:
    try:
        kind = types[key] if key in types else guess_type(value)
        return encode_string(key) + encode(value, kind)
    except TreadleError as error:
        raise TreadleError(f"{path}: metadata `{key}`: {error}") from None
