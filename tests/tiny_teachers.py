"""A teacher of random weights, and what a source needs to open."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.pipeline import Pipeline, Workspace
from treadle.data.documents import Documents
from treadle.data.records import Text
from treadle.data.source import Env
from treadle.models.decoder import DecoderModel, LinearHead
from treadle.models.source import ModelSource, Opened

OPENED: list[int] = []


class TinyTeacher(ModelSource):
    """A model of random weights with the tokenizer of bytes; its logits are biased and capped."""

    vocab: int = 257
    layers: int = 4

    def open(self, workspace: Workspace) -> Opened:
        OPENED.append(self.layers)
        folder = workspace.root / "tokenizer"
        byte_tokenizer().save(folder)
        config = tiny_model(*(None,) * self.layers, seed=4).config
        torch.manual_seed(4)
        model = config.replace(vocab=self.vocab, head=LinearHead(bias=True), softcap=9.0).build()
        torch.nn.init.normal_(model.head.bias)
        return Opened(model.eval(), folder)


class Lines(Documents):
    """A few lines."""

    def training(self):
        return (Text(f"line {i}: the number after {i} is {i + 1}.") for i in range(24))

    def held_out(self):
        return iter(())


def workspace(tmp_path: Path) -> Workspace:
    folder = tmp_path / "step"
    folder.mkdir(exist_ok=True)
    return Workspace(tmp_path, folder, Pipeline(name="p", steps=()))


def env(tmp_path: Path, model: DecoderModel | None = None) -> Env:
    work = workspace(tmp_path)
    model = model or tiny_model()
    return Env(model=model, tokenizer=byte_tokenizer(), scratch=work.folder, workspace=work)
