"""An n-gram model as baseline: what a trained language model has to beat.

It counts the text that the model trains on and predicts the very tokens that `Evaluate` has the
model predict, so the two perplexities compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        results: dict[str, Figure] = {}
        for reading in self.readings:
            results |= read(ngrams, tokenizer, reading)
        return {
            "kind": EVALUATION,
            "subject": f"{self.ngrams.order}-gram",
            "baseline": True,
            "results": results,
            "tokens_per_second": None,
            "size_bytes": None,
            "training_tokens": counted,
            "grams": ngrams.grams,
        }

    def _encoded(self, tokenizer: Tokenizer) -> Iterator[list[int]]:
        left = self.tokens
        for document in self.documents.training():
            ids = tokenizer.encode(document.text + "\n\n", parse_special=False)[:left]
            left -= len(ids)
            yield ids
            if left == 0:
                return


def read(ngrams: NgramModel, tokenizer: Tokenizer, reading: Reading) -> dict[str, Figure]:
    """Perplexity of a reading, and its bits per byte, which compare across tokenizers."""
    windows = windows_of(tokenizer, reading)
    logprobs = ngrams.logprobs(windows)
    ends = np.cumsum([0, *(len(w) - 1 for w in windows)])
    losses = [-float(logprobs[a:b].sum()) for a, b in pairwise(ends)]
    sizes = [len(tokenizer.decode_bytes(w[1:])) for w in windows]
    perplexity = ratio(losses, np.diff(ends).tolist(), np.exp, "perplexity")
    per_byte = ratio(losses, sizes, bits, "bits/byte")
    predicted = int(ends[-1])
    return {
        reading.name: {**perplexity, "n": predicted},
        f"{reading.name}, bits": {**per_byte, "n": predicted},
    }
