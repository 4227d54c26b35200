"""What the races share: SmolLM2 as a Hugging Face folder that every contestant loads."""

from __future__ import annotations

import gzip
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "cache" / "smollm2"
DATA = Path(os.environ.get("TREADLE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def model_folder() -> Path:
    """SmolLM2-135M-Instruct in fp32, written once from the file that `treadle pull` finds."""
    if not (FOLDER / "config.json").exists():
        from treadle.models.hub.load import load_model
        from treadle.models.hub.pull import pull
        from treadle.models.hub.save import save_hf
        from treadle.tokenizers.tokenizer import Tokenizer

        loaded = load_model(pull("smollm2-135m-instruct").path)
        save_hf(loaded.model, FOLDER)
        Tokenizer.from_gguf(loaded.metadata).save(FOLDER)
    return FOLDER


def gsm8k(count: int) -> list[list[dict[str, str]]]:
    """Real conversations of unequal length: GSM8K's questions and worked answers."""
    with gzip.open(DATA / "sft" / "gsm8k_train.jsonl.gz", "rt") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in islice(file, count)]
    return [
        [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        for row in rows
    ]
