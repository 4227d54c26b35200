"""Where in its file each tensor of a safetensors checkpoint lies, and reading just that.

    8 bytes: n     n bytes of JSON: name -> dtype, shape, [start, end]     the data, from 8 + n on

Unlike a mapped file, what is read is in memory of the reader's own and nowhere else.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from treadle.core.errors import FileFormatError
from treadle.core.files import StrPath
from treadle.models.hub.safetensors import open_safetensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class ByteRange:
    """A tensor in a file, which stays open."""

    file: FileIO
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, fresh from the file.

        Raises:
            FileFormatError: the file has become shorter, or cannot be read any more.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        view = tensor.view(-1).view(torch.uint8).numpy().data
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self.file.fileno(), [view[done:]], self.start + done)
                if not count:
                    raise FileFormatError(f"{self.file.name}: cut off while it was in use")
                done += count
        except OSError as error:
            raise FileFormatError(f"{self.file.name}: cannot be read any more: {error}") from None
        return tensor


def byte_ranges(folder: StrPath) -> dict[str, ByteRange]:
    """Every tensor of a folder of safetensors by its name.

    Raises:
        FileFormatError: a file is cut off or corrupt, or a tensor is no floating point.
        TreadleError: there are no safetensors.
    """
    opened = open_safetensors(folder)  # checks the files, shards and index included
    shards = sorted({opened.path.parent / name for name in _shards(opened.path)})
    return {name: found for path in shards for name, found in _read_header(path).items()}


def _shards(path: Path) -> set[str]:
    if path.suffix == ".json":
        return set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    return {path.name}


def _read_header(path: Path) -> dict[str, ByteRange]:
    file = FileIO(path)
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    unknown = {fields["dtype"] for fields in header.values()} - DTYPES.keys()
    if unknown:
        raise FileFormatError(f"{path}: holds {', '.join(sorted(unknown))}, not floating point")
    start = 8 + size
    return {
        name: ByteRange(file, start + f["data_offsets"][0], DTYPES[f["dtype"]], tuple(f["shape"]))
        for name, f in header.items()
    }
