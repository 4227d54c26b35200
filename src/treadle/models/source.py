"""Where a run's model comes from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from treadle.core.config import Config, digest, dump
from treadle.core.files import sha256
from treadle.core.pipeline import MANIFEST, Reads, Workspace, parts_of, read_manifest
from treadle.models.decoder import Decoder, DecoderModel
from treadle.models.outline import Unfilled, outline
from treadle.models.transform import Transform, transformed

_WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Opened:
    """A model, and where its tokenizer is found."""

    model: DecoderModel
    origin: Path
    """A folder with tokenizer.json, or a GGUF file whose metadata hold the vocabulary."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """config.json, or the GGUF file's key-value pairs."""
    bytes_on_disk: int | None = None
    """Of all files that make up the model."""


class ModelSource(Config):
    """A shape: gives a model to a step."""

    @abstractmethod
    def open(self, workspace: Workspace) -> Opened:
        """The model in float32 on the CPU, all parameters requiring gradients."""

    def outline(self, workspace: Workspace) -> DecoderModel | None:
        """The model without its values; None where only `open` can tell what it is made of.

        Raises:
            TreadleError: there is no such model.
        """
        return None

    def origins(self, workspace: Workspace) -> Iterator[Path]:
        """Files and folders of its weights, less those of sources within it and of the step that it
        names; nothing is fetched."""
        yield from ()


def outlined(
    source: ModelSource, transforms: Sequence[Transform], workspace: Workspace
) -> DecoderModel | None:
    """The outline of a model that transforms have rewritten, or None.

    Raises:
        TreadleError: there is no such model, or a transform does not fit it.
    """
    model = source.outline(workspace)
    if model is None:
        return None
    try:
        with Unfilled(), torch.random.fork_rng(devices=()):
            return transformed(model, transforms)
    except (NotImplementedError, RuntimeError):
        return None  # a transform that wants values, which torch refuses: only the run can tell


class Pretrained(ModelSource):
    """A known model, a hub id, a folder or a GGUF file."""

    name: str
    """`smollm2-135m-instruct`, `org/name`, `path/to/folder` or `path/to/file.gguf`."""

    def open(self, workspace: Workspace) -> Opened:
        from treadle.models.hub.load import load_model
        from treadle.models.hub.pull import pull

        pulled = pull(self.name, progress=workspace.progress.say)
        loaded = load_model(pulled.path, dtype=torch.float32)
        return Opened(loaded.model, pulled.path, loaded.metadata, weight_bytes(pulled.path))

    def outline(self, workspace: Workspace) -> DecoderModel:
        from treadle.models.hub.load import read_decoder
        from treadle.models.hub.pull import pull

        return outline(read_decoder(pull(self.name, progress=workspace.progress.say).path))

    def origins(self, workspace: Workspace) -> Iterator[Path]:
        """Of a known name or a hub id nothing: the name says which weights they are."""
        path = Path(self.name).expanduser()
        if path.exists():
            yield path


class Fresh(ModelSource, Reads):
    """New weights, with the tokenizer that an earlier step trained."""

    decoder: Decoder
    seed: int = 0

    def open(self, workspace: Workspace) -> Opened:
        state = torch.get_rng_state()
        torch.manual_seed(self.seed)
        model = self.decoder.build()
        torch.set_rng_state(state)
        return Opened(model, workspace.output(self.step) / "tokenizer")

    def outline(self, workspace: Workspace) -> DecoderModel:
        return outline(self.decoder)


def fingerprint(source: ModelSource, workspace: Workspace) -> str:
    """A digest of all that decides a model's weights, without opening it.

    Configurations count, and so does the content of files: what a finished step's manifest says of
    its weights, and outside of the run all bytes of a model's files, at about 0.6 s a GB.
    """
    return digest([dump(source), [_content(path) for path in origins(source, workspace)]])


def origins(source: ModelSource, workspace: Workspace) -> list[Path]:
    """Files and folders that a model's weights come from, sources within it included."""
    found: list[Path] = []
    for part in parts_of(source):
        if isinstance(part, Reads):
            found.append(workspace.output(part.step))
        if isinstance(part, ModelSource):
            found += part.origins(workspace)
    return found


def _content(path: Path) -> dict[str, str]:
    if (path / MANIFEST).is_file():
        record = read_manifest(path)
        files = {name: entry["sha256"] for name, entry in record.get("files", {}).items()}
        weights = {name: sha for name, sha in files.items() if Path(name).suffix in _WEIGHTS}
        return {"key": record["key"], **weights}
    there = [path] if path.is_file() else sorted(path.iterdir())
    return {f.name: sha256(f) for f in there if f.suffix in (*_WEIGHTS, ".json")}


def weight_bytes(path: Path) -> int:
    """Size of a weight file, or of all weight files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.iterdir() if f.suffix in _WEIGHTS)
