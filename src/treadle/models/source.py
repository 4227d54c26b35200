"""Where a run's model comes from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from treadle.core.config import Config
from treadle.core.pipeline import Reads, Workspace
from treadle.models.decoder import Decoder, DecoderModel
from treadle.models.outline import Unfilled, outline
from treadle.models.transform import Transform, transformed


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


def weight_bytes(path: Path) -> int:
    """Size of a weight file, or of all weight files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.iterdir() if f.suffix in (".safetensors", ".gguf"))
