"""The evaluation step: held-out problems and general text, the same for every stage of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import Field

from treadle.core.config import Config
from treadle.core.errors import ConfigError, TreadleError
from treadle.core.pipeline import Step, Workspace
from treadle.core.progress import Progress
from treadle.core.results import (
    EVALUATION,
    OVERALL,
    Figure,
    Sample,
    accuracy,
    pooled,
    write_samples,
)
from treadle.data.documents import Documents
from treadle.data.problems import Problems
from treadle.data.rating import Scored, require_sound, scorer
from treadle.data.records import Problem
from treadle.evals.harness import evaluate
from treadle.evals.task import Benchmark
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Completion, Request
from treadle.inference.sampling import Sampling
from treadle.kernels.linear_cross_entropy import token_statistics
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, outlined
from treadle.models.transform import Transform, transformed
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.nn.linear import bias_of
from treadle.objectives.objective import head_rule
from treadle.tokenizers.chat import encode_prompt
from treadle.tokenizers.load import tokenizer_of
from treadle.tokenizers.tokenizer import Tokenizer
from treadle.train.precision import Auto, Precision


class Exam(Config):
    """A family of problems, and how many of them are put."""

    name: str
    problems: Problems
    count: int = Field(100, ge=1)
    first: int = Field(0, ge=0)
    """Index of the first problem: where what was trained on ends."""
    patience: float = Field(10.0, gt=0.0)
    """Seconds after which the verifier of an answer is given up; it counts as wrong."""


class Reading(Config):
    """General text whose perplexity shows what was forgotten."""

    name: str
    documents: Documents
    tokens: int = Field(20_000, ge=2)
    """How many tokens are read, after the first; of each window one is not predicted."""
    context: int = Field(512, ge=2)


class Evaluate(Step):
    """Ask a model problems that it was not trained on, and let it read."""

    model: ModelSource
    subject: str
    """The stage that is measured: `base`, or the name of the step that made the model."""
    transforms: tuple[Transform, ...] = ()
    """Rewrites of the model before it is measured, such as quantisation."""
    exams: tuple[Exam, ...] = ()
    readings: tuple[Reading, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()
    """Put by the harness; its records stay in the step's folder."""
    sampling: Sampling = Sampling(temperature=0.0, max_tokens=128)
    precision: Precision = Auto()
    engine: EngineConfig = EngineConfig()

    def check(self, workspace: Workspace) -> None:
        names = [OVERALL, *(e.name for e in self.exams), *(r.name for r in self.readings)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(
                f"two results would be called `{min(twice)}`: give one another `name`"
            )
        model = outlined(self.model, self.transforms, workspace)
        if model is not None:
            for reading in self.readings:
                _require_room(reading, model.config.context)

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        opened = self.model.open(workspace)
        model, tokenizer = opened.model.eval().requires_grad_(False), tokenizer_of(opened)
        precision = self.precision.resolve("cpu")
        precision.prepare(model)
        model = transformed(model, self.transforms)
        engine = Engine(model, tokenizer, self.engine, autocast=partial(precision.autocast, "cpu"))
        results: dict[str, Figure] = {}
        samples: list[Sample] = []
        generated, seconds, failed = 0, 0.0, 0
        for exam in self.exams:
            sitting = sit(engine, exam, self.sampling, workspace.progress)
            results[exam.name] = accuracy([s["score"] for s in sitting.samples])
            samples += sitting.samples
            generated, seconds = generated + sitting.tokens, seconds + sitting.seconds
            failed += sitting.failed
        if len(self.exams) > 1:
            results = {OVERALL: pooled(results.values()), **results}
        for reading in self.readings:
            with precision.autocast("cpu"):
                results[reading.name] = perplexity(model, tokenizer, reading, workspace.progress)
        if self.benchmarks:
            found = evaluate(
                model,
                tokenizer,
                self.benchmarks,
                records=workspace.folder / "records",
                engine=self.engine,
                autocast=partial(precision.autocast, "cpu"),
                progress=workspace.progress,
            )
            found.save(workspace.folder / "benchmarks.json")
            results |= found.by_name()
        write_samples(workspace.folder, samples)
        return {
            "kind": EVALUATION,
            "subject": self.subject,
            "results": results,
            "tokens_per_second": generated / seconds if seconds else None,
            "size_bytes": opened.bytes_on_disk,
            "parameters": sum(p.numel() for p in model.parameters()),
            "precision": str(precision.dtype()).removeprefix("torch."),
            "verifications_failed": failed,
        }


@dataclass(frozen=True)
class Sitting:
    """An exam that was taken."""

    samples: list[Sample]
    tokens: int
    """Generated."""
    seconds: float
    failed: int
    """Answers whose verifier failed; they count as wrong."""


def sit(engine: Engine, exam: Exam, sampling: Sampling, progress: Progress) -> Sitting:
    """Put an exam's problems to a model and score the answers.

    Raises:
        TreadleError: the verifier failed for every answer.
    """
    problems = [exam.problems.problem(exam.first + i) for i in range(exam.count)]
    requests = [
        Request(tuple(encode_prompt(engine.tokenizer, _plain(p))), sampling) for p in problems
    ]
    start = time.monotonic()
    with progress.task(exam.name, len(requests)) as task:
        answers = engine.generate(requests, lambda done, total: task.update(done))
    seconds = time.monotonic() - start
    firsts = [completions[0] for completions in answers]
    check = scorer(exam.problems, exam.patience)
    scores = [check(problem, c.text) for problem, c in zip(problems, firsts, strict=True)]
    require_sound(scores)
    return Sitting(
        samples=[
            sample_of(exam, exam.first + i, problem, completion, score)
            for i, (problem, completion, score) in enumerate(
                zip(problems, firsts, scores, strict=True)
            )
        ],
        failed=sum(bool(s.failure) for s in scores),
        tokens=sum(len(c.tokens) for c in firsts),
        seconds=seconds,
    )


@torch.inference_mode()
def perplexity(
    model: DecoderModel, tokenizer: Tokenizer, reading: Reading, progress: Progress
) -> Figure:
    """exp of the mean negative log-probability of a token, with its interval over windows.

    Raises:
        TreadleError: there is next to no text, or its windows are longer than the model reads.
    """
    _require_room(reading, model.config.context)
    windows = windows_of(tokenizer, reading)
    if not windows:
        raise TreadleError(f"reading `{reading.name}`: its documents hold out no text to read")
    losses: list[float] = []
    counts: list[int] = []
    with progress.task(reading.name, len(windows)) as task:
        for number, window in enumerate(windows, 1):
            flat = torch.tensor(window)
            hidden = model(flat, Packed.of(Layout((len(window),))))
            statistics = token_statistics(
                hidden[:-1],
                model.head_weight(),
                flat[1:],
                bias=bias_of(model.head),
                rule=head_rule(model),
            )
            losses.append(float(-statistics.logprobs.sum()))
            counts.append(len(window) - 1)
            task.update(number)
    return _perplexity(losses, counts)


def _require_room(reading: Reading, context: int) -> None:
    if reading.context > context:
        raise TreadleError(
            f"reading `{reading.name}`: windows of {reading.context} tokens are longer than the "
            f"model's context of {context}: lower `context`"
        )


def windows_of(tokenizer: Tokenizer, reading: Reading) -> list[list[int]]:
    """The reading's tokens as a model sees them; the first of each window is not predicted."""
    tokens, size = take_tokens(tokenizer, reading), reading.context
    windows = (tokens[i : i + size] for i in range(0, len(tokens) - 1, size))
    return [w for w in windows if len(w) > 1]


def take_tokens(tokenizer: Tokenizer, reading: Reading) -> list[int]:
    """The first tokens of the reading's documents, one document after another."""
    tokens: list[int] = []
    for document in reading.documents.held_out():
        tokens += tokenizer.encode(document.text + "\n\n", parse_special=False)
        if len(tokens) > reading.tokens:
            break
    return tokens[: reading.tokens + 1]


def _perplexity(losses: Sequence[float], counts: Sequence[int]) -> Figure:
    total, n = math.fsum(losses), sum(counts)
    mean = total / n
    # The ratio's standard error, with windows as the independent units.
    residuals = [loss - mean * count for loss, count in zip(losses, counts, strict=True)]
    k = len(losses)
    spread = math.sqrt(k / (k - 1) * math.fsum(r * r for r in residuals)) / n if k > 1 else None
    return {
        "value": math.exp(mean),
        "low": None if spread is None else math.exp(mean - 1.96 * spread),
        "high": None if spread is None else math.exp(mean + 1.96 * spread),
        "n": n,
        "unit": "perplexity",
    }


def _plain(problem: Problem) -> list[dict[str, Any]]:
    return [m.plain() for m in problem.prompt]


def sample_of(
    exam: Exam, index: int, problem: Problem, completion: Completion, score: Scored
) -> Sample:
    """Problem number `index` of an exam, what was answered, and its marks."""
    return {
        "problem": f"{exam.name}-{index}",
        "task": exam.name,
        "prompt": problem.prompt[-1].content,
        "answer": completion.text,
        "expected": problem.answer,
        "score": score.value,
    }
