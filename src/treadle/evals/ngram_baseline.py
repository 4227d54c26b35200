"""An n-gram model as baseline: what a trained language model has to beat.

It counts the text that the model trains on and predicts the very tokens that `Evaluate` has the
model predict, so the two perplexities compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import Field

from treadle.core.pipeline import Step, Workspace
from treadle.core.results import EVALUATION, Figure
from treadle.data.documents import Documents
from treadle.evals.evaluate import Reading, windows_of
from treadle.evals.ngram import KneserNey, NgramModel
from treadle.evals.statistics import bits, ratio
from treadle.models.source import ModelSource
from treadle.tokenizers.load import tokenizer_of
from treadle.tokenizers.tokenizer import Tokenizer


class NgramBaseline(Step):
    """Count the n-grams of a text, then predict what the models predict."""

    name: str = "ngram"
    ngrams: KneserNey = KneserNey()
    model: ModelSource
    """The model to compare with: its tokenizer is used, nothing else."""
    documents: Documents
    """What it trains on."""
    tokens: int = Field(2_000_000, ge=1)
    """Most tokens that are counted."""
    readings: tuple[Reading, ...]

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        tokenizer = tokenizer_of(self.model.open(workspace))
        with workspace.progress.task(self.name, self.tokens) as task:
            counted = 0
            documents = []
            for document in self._encoded(tokenizer):
                counted += len(document)
                documents.append(document)
                task.update(counted)
            ngrams = self.ngrams.build(documents, tokenizer.vocab_size)
        read = {r.name: predict(ngrams, tokenizer, r) for r in self.readings}
        return {
            "kind": EVALUATION,
            "subject": f"{self.ngrams.order}-gram",
            "baseline": True,
            "results": {name: prediction.perplexity for name, prediction in read.items()},
            "tokens_per_second": None,
            "size_bytes": None,
            "training_tokens": counted,
            "grams": ngrams.grams,
            **{f"bits_per_byte of {n}": p.bits_per_byte["value"] for n, p in read.items()},
        }

    def _encoded(self, tokenizer: Tokenizer) -> Iterator[list[int]]:
        left = self.tokens
        for document in self.documents.training():
            ids = tokenizer.encode(document.text + "\n\n", parse_special=False)[:left]
            left -= len(ids)
            yield ids
            if left == 0:
                return


@dataclass(frozen=True)
class Prediction:
    """How well a text was predicted, with intervals over its windows."""

    perplexity: Figure
    bits_per_byte: Figure
    """Of the same tokens; it compares across tokenizers."""


def predict(ngrams: NgramModel, tokenizer: Tokenizer, reading: Reading) -> Prediction:
    """Predict the tokens that a model predicts of a reading."""
    windows = windows_of(tokenizer, reading)
    logprobs = ngrams.logprobs(windows)
    ends = np.cumsum([0, *(len(w) - 1 for w in windows)])
    losses = [-float(logprobs[a:b].sum()) for a, b in pairwise(ends)]
    sizes = [len(tokenizer.decode_bytes(w[1:])) for w in windows]
    perplexity = ratio(losses, np.diff(ends).tolist(), np.exp, "perplexity")
    per_byte = ratio(losses, sizes, bits, "bits/byte")
    perplexity["n"] = per_byte["n"] = int(ends[-1])
    return Prediction(perplexity, per_byte)
