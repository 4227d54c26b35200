"""What a model writes when it is left to itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from treadle.core.pipeline import Step, Workspace
from treadle.inference.engine import Engine
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision


class Continuations(Step):
    """Continue some beginnings."""

    model: ModelSource
    beginnings: tuple[str, ...]
    sampling: Sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=80)
    precision: Precision = Auto()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        opened = self.model.open(workspace)
        model, tokenizer = opened.model.eval().requires_grad_(False), tokenizer_of(opened)
        precision = self.precision.resolve("cpu")
        precision.prepare(model)
        engine = Engine(model, tokenizer, autocast=partial(precision.autocast, "cpu"))
        requests = [
            Request(tuple(tokenizer.encode(text)), self.sampling) for text in self.beginnings
        ]
        answers = engine.generate(requests)
        written = {
            text: completions[0].text
            for text, completions in zip(self.beginnings, answers, strict=True)
        }
        return {"kind": "continuations", "written": written}
