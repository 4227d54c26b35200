"""Measuring a model that reasons: right answers, and what reinforcement does besides.

Accuracy of what the user sees, length of the answers, how many keep to the format, and how far the
model is from another one: along its own answers, over the whole vocabulary,

    KL = mean_t sum_v p(v | x_<t) log p(v | x_<t) / q(v | x_<t)
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import Field

from treadle.alignment.rewards import PrivatelyReasoned, Reward
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Step, Workspace
from treadle.core.results import (
    EVALUATION,
    OVERALL,
    Figure,
    Sample,
    Unit,
    accuracy,
    pooled,
    write_samples,
)
from treadle.data.batch import Piece, assemble, within_budget
from treadle.data.rating import require_sound, scorer
from treadle.evals.evaluate import Exam, sample_of
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.reasoning.strategy import visible
from treadle.inference.request import Completion, Request
from treadle.inference.sampling import Sampling
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource
from treadle.tokenizers.chat import encode_prompt
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision

ROWS = 256
"""Predictions whose whole distributions are held at once."""


class MeasureThinking(Step):
    """Ask a model held-out problems and look at how it answers."""

    model: ModelSource
    subject: str
    """The stage that is measured: `base`, or the name of the step that made the model."""
    exams: tuple[Exam, ...] = Field(min_length=1)
    format: Reward = PrivatelyReasoned()
    """1 where an answer has the form that it should have."""
    against: ModelSource | None = None
    """The model to which the distance is measured."""
    sampling: Sampling = Sampling(temperature=0.0, max_tokens=128)
    tokens: int = Field(2048, ge=1)
    """Most tokens in a pass of the distance."""
    precision: Precision = Auto()
    engine: EngineConfig = EngineConfig()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        opened = self.model.open(workspace)
        model, tokenizer = opened.model.eval().requires_grad_(False), tokenizer_of(opened)
        precision = self.precision.resolve("cpu")
        precision.prepare(model)
        other = self._other(workspace, model.config.vocab)
        if other is not None:
            precision.prepare(other)
        autocast = partial(precision.autocast, "cpu")
        engine = Engine(model, tokenizer, self.engine, autocast=autocast)
        put = [(exam, exam.first + i) for exam in self.exams for i in range(exam.count)]
        problems = [exam.problems.problem(i) for exam, i in put]
        prompts = [tuple(encode_prompt(tokenizer, [m.plain() for m in p.prompt])) for p in problems]
        started = time.monotonic()
        with workspace.progress.task(self.name, len(prompts)) as task:
            answers = engine.generate(
                [Request(prompt, self.sampling) for prompt in prompts],
                lambda done, total: task.update(done),
            )
        seconds = time.monotonic() - started
        given = [completions[0] for completions in answers]
        scores = [
            scorer(exam.problems, exam.patience)(problem, visible(completion.text))
            for (exam, _), problem, completion in zip(put, problems, given, strict=True)
        ]
        require_sound(scores)
        samples = [
            sample_of(exam, i, problem, completion, score)
            for (exam, i), problem, completion, score in zip(
                put, problems, given, scores, strict=True
            )
        ]
        write_samples(workspace.folder, samples)
        results = by_family(samples)
        lengths = [float(len(c.tokens)) for c in given]
        results["answer length"] = mean_of(lengths, "tokens")
        forms = [self.format(p, c.text) for p, c in zip(problems, given, strict=True)]
        results["format kept"] = mean_of(forms, "score")
        if other is not None:
            pieces = [_piece(p, c) for p, c in zip(prompts, given, strict=True) if c.tokens]
            with autocast():
                results["KL"] = mean_of(distances(model, other, pieces, self.tokens), "nats")
        return {
            "kind": EVALUATION,
            "subject": self.subject,
            "results": results,
            "tokens_per_second": sum(lengths) / seconds if seconds else None,
            "size_bytes": opened.bytes_on_disk,
            "parameters": sum(p.numel() for p in model.parameters()),
            "cut_off": sum(c.finish == "length" for c in given) / len(given),
            "verifications_failed": sum(bool(s.failure) for s in scores),
        }

    def _other(self, workspace: Workspace, vocab: int) -> DecoderModel | None:
        """Opened before anything is generated: what does not fit is known at once."""
        if self.against is None:
            return None
        other = self.against.open(workspace).model.eval().requires_grad_(False)
        if other.config.vocab != vocab:
            raise TreadleError(
                f"{self.name}: the model to compare with has {other.config.vocab} tokens, the one "
                f"that is measured {vocab}: name in `against` the model that it was made of"
            )
        return other


def by_family(samples: Sequence[Sample]) -> dict[str, Figure]:
    """Accuracy over all problems, and of each family where there are several."""
    families = list(dict.fromkeys(s["task"] for s in samples))
    found = {f: accuracy([s["score"] for s in samples if s["task"] == f]) for f in families}
    return {OVERALL: pooled(found.values()), **found} if len(found) > 1 else found


def mean_of(values: Sequence[float], unit: Unit) -> Figure:
    """Mean with its 95% interval by the normal approximation."""
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    half = None
    if n > 1:
        variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
        half = 1.96 * math.sqrt(variance / n)
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"value": mean, "low": low, "high": high, "n": n, "unit": unit}


@torch.inference_mode()
def distances(
    model: DecoderModel, other: DecoderModel, answers: Sequence[Piece], tokens: int
) -> list[float]:
    """Of each answer the mean KL(model || other) of a token, at temperature 1."""
    found: list[float] = []
    for run in within_budget([len(a.tokens) for a in answers], tokens):
        batch = assemble([answers[i] for i in run])
        context = batch.context()
        hidden = [m(batch.tokens, context)[batch.sources] for m in (model, other)]
        kl = torch.cat(
            [
                _kl(model.logits(a), other.logits(b))
                for a, b in zip(*(h.split(ROWS) for h in hidden), strict=True)
            ]
        )
        found += (batch.per_sequence(kl) / batch.per_sequence(batch.weights)).tolist()
    return found


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _piece(prompt: tuple[int, ...], completion: Completion) -> Piece:
    learned = [False] * len(prompt) + [True] * len(completion.tokens)
    return Piece((*prompt, *completion.tokens), learned)
