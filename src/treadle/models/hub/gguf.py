"""GGUF files, as llama.cpp reads and writes them: metadata and tensors in block formats.

    magic "GGUF", version, number of tensors, number of metadata entries
    metadata: key, type, value          tensor list: name, shape, format, offset
    padding to the alignment            the tensors, each aligned

Reading maps the file into memory and decodes a tensor when it is asked for. Every count, length
and offset is checked against the file's size before it is used, so a truncated or hostile file
gives a FileFormatError. `gguf_write.py` writes.

Source: the GGUF specification, versions 2 and 3 (Gerganov and contributors, 2023).
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from treadle.core.errors import FileFormatError, TreadleError, did_you_mean
from treadle.core.files import StrPath
from treadle.kernels.blocks import FORMATS, dequantise
from treadle.models.hub.gguf_values import Cursor, Value

MAGIC = b"GGUF"
ALIGNMENT = 32
MOST_DIMENSIONS = 4
"""Of a tensor in ggml."""

_OTHER_FORMATS: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1),
        25: ("I16", 1, 2),
        26: ("I32", 1, 4),
        27: ("I64", 1, 8),
        28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36),
        41: ("Q1_0", 128, 18),
    }
)
"""Formats that a file may hold and be listed with, though not decoded: weights, bytes a block."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor of a file, not yet read."""

    name: str
    shape: tuple[int, ...]
    """In torch's order, the last dimension contiguous."""
    format: str
    row_bytes: int
    offset: int
    """From the start of the file."""

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """An open file. Get one by `GGUFFile.open`."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    types: Mapping[str, str]
    """Metadata key -> type, as `uint32` or `[string]`; `write_gguf` takes it back."""
    tensors: Mapping[str, TensorInfo]
    _bytes: UInt8[Tensor, " size"]
    _map: mmap.mmap

    @staticmethod
    def open(path: StrPath) -> GGUFFile:
        """Read metadata and the list of tensors.

        Raises:
            FileFormatError: the file is cut off, corrupt, or not GGUF.
            TreadleError: there is no such file.
        """
        path = Path(path)
        if not path.is_file():
            raise TreadleError(f"{path}: no such file; name a .gguf file")
        if path.stat().st_size < 24:
            raise FileFormatError(f"{path}: too short for a GGUF file; fetch the file again")
        with path.open("rb") as file:  # a private map: torch wants memory that may be written
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        cursor = Cursor(path, memoryview(mapped))
        version = _read_version(cursor)
        tensor_count = cursor.count(24, "tensors")
        entry_count = cursor.count(13, "metadata entries")
        metadata: dict[str, Value] = {}
        types: dict[str, str] = {}
        for _ in range(entry_count):
            key = cursor.string("a metadata key")
            if key in metadata:
                raise cursor.fail(f"metadata key `{key}` comes twice")
            metadata[key], types[key] = cursor.value(f"metadata `{key}`")
        if metadata.get("split.count", 1) not in (0, 1):
            raise FileFormatError(
                f"{path}: one of {metadata['split.count']} parts of a model; join them first with "
                "`llama-gguf-split --merge`"
            )
        return GGUFFile(
            path=path,
            version=version,
            metadata=MappingProxyType(metadata),
            types=MappingProxyType(types),
            tensors=MappingProxyType(_read_tensor_list(cursor, tensor_count, metadata)),
            _bytes=torch.frombuffer(mapped, dtype=torch.uint8),
            _map=mapped,
        )

    def read(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, "..."]:
        """The tensor `name`, decoded on `device`, in memory of its own.

        Raises:
            TreadleError: no such tensor, or its format is one that treadle does not decode.
        """
        info = self._info(name)
        if info.format not in FORMATS:
            raise TreadleError(
                f"{self.path}: `{name}` is stored as {info.format}, which treadle does not "
                f"decode; take a file in one of {', '.join(FORMATS)}"
            )
        data = self.raw(name).to(device)
        return dequantise(data, FORMATS[info.format], dtype)

    def raw(self, name: str) -> UInt8[Tensor, "*rows row_bytes"]:
        """The stored bytes of the tensor `name`, row by row: a view of the file, to be read only.

        Raises:
            TreadleError: no such tensor.
        """
        info = self._info(name)
        data = self._bytes[info.offset : info.offset + info.nbytes]
        return data.view(*info.shape[:-1], info.row_bytes)

    def release(self, name: str) -> None:
        """Gives back the memory that holds the bytes of `name`; it fills again when they are read.

        Raises:
            TreadleError: no such tensor.
        """
        info = self._info(name)
        first = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (info.offset + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and sys.platform != "win32":
            self._map.madvise(mmap.MADV_DONTNEED, first, length)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            hint = did_you_mean(name, self.tensors)
            raise TreadleError(f"{self.path}: no tensor `{name}`{hint}")
        return self.tensors[name]


def _read_version(cursor: Cursor) -> int:
    start = bytes(cursor.data[:16])
    if start[:4] != MAGIC:
        hint = "name a .gguf file"
        if start.startswith(b"version https:/"):
            hint = "this is a Git LFS pointer: run `git lfs pull`"
        raise FileFormatError(
            f"{cursor.path}: not a GGUF file (it starts with {start[:4]!r}); {hint}"
        )
    cursor.at = 4
    version = cursor.uint32("the version")
    if version & 0xFFFF == 0:
        raise FileFormatError(
            f"{cursor.path}: written for big-endian machines; convert it with "
            "`gguf-convert-endian FILE little`"
        )
    if version not in (2, 3):
        raise FileFormatError(
            f"{cursor.path}: GGUF version {version}, treadle reads 2 and 3; "
            "convert the model again with a current llama.cpp"
        )
    return version


def _read_tensor_list(
    cursor: Cursor, count: int, metadata: Mapping[str, Value]
) -> dict[str, TensorInfo]:
    entries = [_read_tensor_entry(cursor) for _ in range(count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"alignment {alignment!r} is not a power of two")
    start, size = _aligned(cursor.at, alignment), len(cursor.data)
    tensors: dict[str, TensorInfo] = {}
    end = start
    for name, shape, format, row_bytes, offset in sorted(entries, key=lambda entry: entry[-1]):
        info = TensorInfo(
            name=name, shape=shape, format=format, row_bytes=row_bytes, offset=start + offset
        )
        if offset % alignment:
            raise cursor.fail(f"tensor `{name}` is not aligned to {alignment} bytes")
        if info.offset + info.nbytes > size:
            raise FileFormatError(
                f"{cursor.path}: cut off: tensor `{name}` ends at byte "
                f"{info.offset + info.nbytes:,}, the file has {size:,}; fetch the file again"
            )
        if info.offset < end:
            raise cursor.fail(f"tensor `{name}` overlaps the one before it")
        end = info.offset + info.nbytes
        if name in tensors:
            raise cursor.fail(f"tensor `{name}` comes twice")
        tensors[name] = info
    return {name: tensors[name] for name, *_ in entries}


def _read_tensor_entry(cursor: Cursor) -> tuple[str, tuple[int, ...], str, int, int]:
    """Name, shape, format, bytes a row, offset from the first tensor."""
    name = cursor.string("a tensor's name")
    dimensions = cursor.uint32(f"the shape of `{name}`")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise cursor.fail(f"tensor `{name}` has {dimensions:,} dimensions, 1 to 4 are possible")
    raw = cursor.take(8 * dimensions, f"the shape of `{name}`")
    shape: tuple[int, ...] = struct.unpack(f"<{dimensions}Q", raw)[::-1]
    code = cursor.uint32(f"the format of `{name}`")
    known = {f.ggml_type: (f.name, f.block_size, f.block_bytes) for f in FORMATS.values()}
    if (found := known.get(code) or _OTHER_FORMATS.get(code)) is None:
        raise cursor.fail(f"tensor `{name}` is of unknown format {code}")
    format, block_size, block_bytes = found
    if shape[-1] % block_size:
        raise cursor.fail(
            f"tensor `{name}` has rows of {shape[-1]:,}, not a multiple of {format}'s {block_size}"
        )
    row_bytes = shape[-1] // block_size * block_bytes
    return name, shape, format, row_bytes, cursor.uint64(f"the offset of `{name}`")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
