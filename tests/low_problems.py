"""Problems whose right answers begin with a sign below a bound, and a model whose texts end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny_generation import END, byte_tokenizer, tiny_model

from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.inference.request import Completion
from treadle.models.decoder import DecoderModel


class Low(Problems):
    """Right is a text of at least one sign whose first is below a bound."""

    bound: int = 128
    told: bool = False
    """Only a question that tells the answer can be answered."""

    def problem(self, index: int) -> Problem:
        return Problem((user(f"q{index}"),), "low", "low")

    def score(self, problem: Problem, completion: str) -> float:
        if self.told and "low" not in problem.prompt[-1].content:
            return 0.0
        return float(bool(completion) and ord(completion[0]) < self.bound)


def model_that_ends() -> DecoderModel:
    """Its texts end, as a rule within a dozen tokens."""
    model = tiny_model()
    with torch.no_grad():
        model.embedding.weight[END] *= 2.0
    return model


def said(texts: Sequence[str]) -> list[Completion]:
    encode = byte_tokenizer().encode
    return [Completion(tuple(encode(t)), t, (-0.5,) * len(t), "stop") for t in texts]
