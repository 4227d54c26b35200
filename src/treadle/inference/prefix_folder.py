"""Pages on disk: a beginning that an earlier process computed is read instead of computed.

    <folder>/<fingerprint of the weights>/<key of the page>.safetensors

Keys are those of the hash chain in memory, so a file is valid for the very tokens that it stands
for. Files are written whole or not at all; beyond the limit those that were not used for longest
go. Several processes may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from treadle.core.config import dump
from treadle.core.files import atomic_file
from treadle.models.decoder import DecoderModel


def fingerprint(
    model: DecoderModel,
    page: int,
    autocast: Callable[[], AbstractContextManager[object]],
    cache: str,
) -> str:
    """Equal where pages are interchangeable: shape, weights, precision, page size, cache."""
    hasher = hashlib.blake2b(json.dumps(dump(model.config), sort_keys=True).encode())
    device = model.embedding.weight.device.type
    with autocast():
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else None
    hasher.update(f"{page} {dtype} {cache}".encode())
    for name, tensor in model.state_dict().items():
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        hasher.update(memoryview(raw.numpy()))
    return hasher.hexdigest()[:32]


class PrefixFolder:
    """Pages of one model, at most `limit` bytes."""

    def __init__(self, folder: Path, mark: str, limit: int) -> None:
        self.folder, self.limit = folder / mark, limit
        self.folder.mkdir(parents=True, exist_ok=True)
        self.size = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def get(self, key: bytes) -> Tensor | None:
        """The page's content; None where it is unknown, or its file is damaged."""
        path = self._path(key)
        try:
            content = load_file(path)["page"]
            os.utime(path)
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
        return content

    def put(self, key: bytes, content: Tensor) -> None:
        """Keep a page, unless it is there."""
        path, size = self._path(key), content.numel() * content.element_size()
        if path.exists() or size > self.limit:
            return
        with atomic_file(path, needed=size) as temporary:
            save_file({"page": content.cpu().contiguous()}, temporary)
        self.size += path.stat().st_size
        if self.size > self.limit:
            self._shrink()

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}.safetensors"

    def _shrink(self) -> None:
        """Drop the oldest files until a tenth of the limit is free."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            try:
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            except FileNotFoundError:
                continue
        self.size = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if self.size <= 0.9 * self.limit:
                break
            path.unlink(missing_ok=True)
            self.size -= size
