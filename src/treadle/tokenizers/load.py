"""The tokenizer that belongs to a model."""

from __future__ import annotations

from treadle.models.source import Opened
from treadle.tokenizers.tokenizer import Tokenizer


def tokenizer_of(opened: Opened) -> Tokenizer:
    """From the folder that the model came from, or from the metadata of its GGUF file."""
    if opened.origin.suffix == ".gguf":
        return Tokenizer.from_gguf(opened.metadata)
    return Tokenizer.load(opened.origin)
