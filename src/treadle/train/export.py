"""Export: a trained model in the files that other programs run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from treadle.core.pipeline import Reads, Step, Workspace
from treadle.data.source import Env
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_gguf, save_hf
from treadle.models.source import ModelSource, Opened, weight_bytes
from treadle.peft.adapter import merge
from treadle.quantization.rounding import FileRounding, Nearest
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision

GGUF, HUGGING_FACE = "model.gguf", "huggingface"


class Export(Step):
    """Merge adapters, write a Hugging Face folder in bfloat16 and a quantised GGUF file."""

    name: str = "export"
    model: ModelSource
    format: str = "Q4_1"
    """Block format of the GGUF file's matrices; its embedding is one step better."""
    embedding: str = "Q8_0"
    rounding: FileRounding = Nearest()
    precision: Precision = Auto()
    """Of the passes over calibration data, where the rounding has any."""

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        opened = self.model.open(workspace)
        tokenizer = tokenizer_of(opened)
        model = merge(opened.model)
        folder = workspace.folder
        workspace.progress.say(f"{self.name}: writing {folder / HUGGING_FACE}")
        save_hf(
            model,
            folder / HUGGING_FACE,
            dtype=torch.bfloat16,
            fields={
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": tokenizer.eos_id,
                "pad_token_id": tokenizer.pad_id,
            },
        )
        tokenizer.save(folder / HUGGING_FACE)
        workspace.progress.say(f"{self.name}: quantising to {self.format}, {folder / GGUF}")
        precision = self.precision.resolve("cpu")
        env = Env(
            model=model,
            tokenizer=tokenizer,
            scratch=folder,
            autocast=partial(precision.autocast, "cpu"),
        )
        save_gguf(
            model,
            folder / GGUF,
            format=self.format,
            embedding=self.embedding,
            packed=self.rounding(model, env, self.format, workspace.progress),
            metadata=tokenizer.to_gguf_metadata(vocab_size=model.config.vocab),
        )
        return {
            "kind": "export",
            "format": self.format,
            "gguf_bytes": weight_bytes(folder / GGUF),
            "huggingface_bytes": weight_bytes(folder / HUGGING_FACE),
        }


class Exported(ModelSource, Reads):
    """The GGUF file that an earlier `Export` wrote."""

    def open(self, workspace: Workspace) -> Opened:
        path = workspace.output(self.step) / GGUF
        loaded = load_model(path, dtype=torch.float32)
        return Opened(loaded.model, path, loaded.metadata, weight_bytes(path))
