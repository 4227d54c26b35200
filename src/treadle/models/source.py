"""Where a run's model comes from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from treadle.core.config import Config
from treadle.core.pipeline import Reads, Workspace
from treadle.models.decoder import Decoder, DecoderModel


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


def weight_bytes(path: Path) -> int:
    """Size of a weight file, or of all weight files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.iterdir() if f.suffix in (".safetensors", ".gguf"))
