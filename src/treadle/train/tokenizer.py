"""The step that trains a tokenizer on documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from treadle.core.pipeline import Step, Workspace
from treadle.data.documents import Documents
from treadle.tokenizers.train import ByteLevelBPE

FOLDER = "tokenizer"


class TrainTokenizer(Step):
    """Learn a vocabulary from the training part of some documents."""

    name: str = "tokenizer"
    documents: Documents
    tokenizer: ByteLevelBPE

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        characters = 0

        def texts() -> Iterator[str]:
            nonlocal characters
            for document in self.documents.training():
                characters += len(document.text)
                yield document.text

        tokenizer = self.tokenizer(texts())
        tokenizer.save(workspace.folder / FOLDER)
        held = [document.text for document in self.documents.held_out()]
        tokens = sum(map(len, tokenizer.encode_batch(held, parse_special=False)))
        return {
            "kind": "tokenizer",
            "vocabulary": tokenizer.vocab_size,
            "characters": characters,
            "bytes_per_token": sum(len(t.encode()) for t in held) / max(1, tokens),
        }
