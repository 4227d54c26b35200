"""Folders of safetensors: one file or shards with an index, read lazily, written atomically.

The layout is that of Hugging Face: `model.safetensors`, or `model-00001-of-00003.safetensors`
and so on with `model.safetensors.index.json`, which maps each tensor to its shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from treadle.core.errors import FileFormatError, TreadleError, did_you_mean
from treadle.core.files import StrPath, publish, staging, write_json

_SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class SafetensorsFolder(Mapping[str, Tensor]):
    """Tensor names to tensors; a tensor is read from the disk when it is asked for.

    It is a view of the mapped file: clone it before changing it in place.
    """

    path: Path
    metadata: Mapping[str, str]
    _home: Mapping[str, Any]
    """Tensor name -> the open shard that holds it."""

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._home:
            raise KeyError(f"{self.path}: no tensor `{name}`{did_you_mean(name, self._home)}")
        tensor: Tensor = self._home[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._home[name].get_slice(name).get_shape())


def open_safetensors(path: StrPath) -> SafetensorsFolder:
    """Open a file, or a folder that holds one file or shards with an index.

    Raises:
        FileFormatError: a file is cut off or corrupt, or a shard is missing.
        TreadleError: there are no safetensors at `path`, or several without an index.
    """
    path = Path(path)
    if path.is_dir():
        path = _find(path)
    if not path.is_file():
        raise TreadleError(f"{path}: no such file; name a .safetensors file or its folder")
    if path.name.endswith(_INDEX):
        return _open_shards(path)
    shard = _open_shard(path)
    home = dict.fromkeys(shard.keys(), shard)
    return SafetensorsFolder(path, dict(shard.metadata() or {}), home)


def _find(folder: Path) -> Path:
    """The file to open in `folder`: the one, or the index."""
    whole = folder / f"model{_SUFFIX}"
    indices = sorted(folder.glob(f"*{_INDEX}"))
    files = sorted(folder.glob(f"*{_SUFFIX}"))
    if whole.is_file():
        return whole
    if len(indices) == 1:
        return indices[0]
    if len(files) == 1:
        return files[0]
    if files:
        raise TreadleError(
            f"{folder}: {len(files)} .safetensors files and {len(indices)} indices "
            f"(*{_INDEX}); name the file to open, or fetch the missing index"
        )
    others = {f.suffix for f in folder.iterdir()}
    hint = "name the folder of a model"
    if ".gguf" in others:
        hint = "name its .gguf file instead"
    elif ".bin" in others or ".pt" in others:
        hint = (
            "its weights are pickles, which can run code and are never loaded; "
            "get the model as safetensors"
        )
    raise TreadleError(f"{folder}: no .safetensors file here; {hint}")


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise FileFormatError(
            f"{path}: cut off or corrupt ({error}); fetch the file again"
        ) from None


def _open_shards(index: Path) -> SafetensorsFolder:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        places = dict(content["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise FileFormatError(f"{index}: not an index of shards; fetch the file again") from None
    names = sorted({str(name) for name in places.values()})
    if foreign := [name for name in names if Path(name).name != name]:
        raise FileFormatError(f"{index}: names `{foreign[0]}`, which is outside its folder")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileFormatError(
            f"{index}: {len(missing)} of {len(names)} shards are missing: "
            f"{', '.join(missing)}; fetch them again"
        )
    shards = {name: _open_shard(index.parent / name) for name in names}
    held = {name: set(shard.keys()) for name, shard in shards.items()}
    for tensor, name in places.items():
        if tensor not in held[name]:
            raise FileFormatError(
                f"{index}: `{tensor}` is not in {name}; index and shards are of different models"
            )
    metadata = dict(shards[names[0]].metadata() or {}) if names else {}
    return SafetensorsFolder(index, metadata, {t: shards[name] for t, name in places.items()})


def save_safetensors(
    folder: StrPath,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = 5_000_000_000,
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write tensors to `folder`, as one file if they fit, else as shards and an index.

    Tensors are taken one at a time and one shard is in memory at once. The files appear when all
    are written; the index last, so that a kill leaves the old weights or the new, never a mixture.

    Returns:
        The files of weights written.

    Raises:
        TreadleError: a name comes twice, `folder` holds shards already, or the disk is full.
    """
    folder = Path(folder)
    if old := [*folder.glob(f"{stem}-*-of-*{_SUFFIX}"), *folder.glob(f"{stem}{_INDEX}")]:
        raise TreadleError(f"{folder}: holds sharded weights ({old[0].name}); name a new folder")
    with staging(folder / stem) as temporary:
        groups = []
        for number, group in enumerate(_groups(tensors, max_shard_bytes)):
            part = temporary.with_name(str(number))
            _save(group, part, {"format": "pt", **(metadata or {})})
            groups.append((part, {name: tensor.nbytes for name, tensor in group.items()}))
            group.clear()  # before the next one is gathered
        count = len(groups)
        single = folder / f"{stem}{_SUFFIX}"
        if count == 1:
            publish(groups[0][0], single)
            return [single]
        paths, places, total = [], {}, 0
        for number, (part, sizes) in enumerate(groups, 1):
            path = folder / f"{stem}-{number:05d}-of-{count:05d}{_SUFFIX}"
            publish(part, path)
            paths.append(path)
            places.update(dict.fromkeys(sizes, path.name))
            total += sum(sizes.values())
        write_json(
            folder / f"{stem}{_INDEX}", {"metadata": {"total_size": total}, "weight_map": places}
        )
        single.unlink(missing_ok=True)
        return paths


def _groups(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Tensors gathered in order up to `max_bytes`; at least one group, if an empty one."""
    seen: set[str] = set()
    group: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in seen:
            raise TreadleError(f"two tensors are called `{name}`; names must differ")
        seen.add(name)
        if group and sum(t.nbytes for t in group.values()) + tensor.nbytes > max_bytes:
            yield group
            group = {}
        group[name] = tensor
    yield group


def _save(group: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """The library refuses views and shared memory, and makes files that only their owner reads."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in group.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    path.touch()
    mode = path.stat().st_mode
    save_file(ready, path, metadata=metadata)
    path.chmod(mode)
