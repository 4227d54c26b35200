"""Reasoning strategies side by side: accuracy against the tokens that they spend."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import Field

from treadle.alignment.verifiers import extract_answer
from treadle.core.config import Config
from treadle.core.files import write_json
from treadle.core.pipeline import Step, Workspace
from treadle.core.progress import Progress
from treadle.core.results import REASONING, Reasoned, accuracy
from treadle.data.rating import Rater, Rating, require_sound, scorer
from treadle.data.records import Problem
from treadle.data.source import Env
from treadle.evals.evaluate import Exam
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.reasoning.strategy import Strategy, Thinker, Turns, private, visible
from treadle.models.source import ModelSource
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision

ANSWERS = "answers.json"


class Reason(Step):
    """Let a model solve the same problems by several strategies."""

    model: ModelSource
    strategies: tuple[Strategy, ...] = Field(min_length=1)
    exams: tuple[Exam, ...] = Field(min_length=1)
    precision: Precision = Auto()
    engine: EngineConfig = EngineConfig()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        opened = self.model.open(workspace)
        precision = self.precision.resolve("cpu")
        model, tokenizer = opened.model.eval().requires_grad_(False), tokenizer_of(opened)
        precision.prepare(model)
        engine = Engine(model, tokenizer, self.engine, autocast=partial(precision.autocast, "cpu"))
        env = Env(model, tokenizer, workspace.folder, workspace=workspace)
        rows: list[Reasoned] = []
        answers: list[dict[str, Any]] = []
        with workspace.progress.task(self.name, len(self.strategies) * len(self.exams)) as task:
            for strategy in self.strategies:
                for exam in self.exams:
                    row, said = sit(engine, strategy, exam, env, workspace.progress)
                    rows.append(row)
                    answers += said
                    task.update(len(rows), note=label(strategy))
        write_json(workspace.folder / ANSWERS, answers)
        failed = float(sum(bool(a["failure"]) for a in answers))
        return {"kind": REASONING, "rows": rows, "verifications_failed": failed}


def sit(
    engine: Engine, strategy: Strategy, exam: Exam, env: Env, progress: Progress
) -> tuple[Reasoned, list[dict[str, Any]]]:
    """One strategy on one exam: the figures, and every answer with its private reasoning.

    Args:
        env: what rewards may use when they open.

    Raises:
        TreadleError: the verifier failed for every answer.
    """
    problems = [exam.problems.problem(exam.first + i) for i in range(exam.count)]
    check = scorer(exam.problems, exam.patience)
    raters: dict[Rating, Rater] = {}

    def rate(rating: Rating, question: int, texts: Sequence[str]) -> list[float]:
        if rating not in raters:
            raters[rating] = rating.open(env, exam.patience)
        return [scored.value for scored in raters[rating](problems[question], texts)]

    thinker = Thinker(
        engine,
        extract_answer,
        verify=lambda i, text: check(problems[i], text).value,
        rate=rate,
        progress=progress,
    )
    started = time.monotonic()
    thoughts = strategy(thinker, [turns_of(problem) for problem in problems])
    seconds = time.monotonic() - started
    scores = [
        check(problem, visible(thought.text))
        for problem, thought in zip(problems, thoughts, strict=True)
    ]
    require_sound(scores)
    row: Reasoned = {
        "strategy": label(strategy),
        "exam": exam.name,
        "accuracy": accuracy([s.value for s in scores]),
        "tokens": sum(t.tokens for t in thoughts) / len(thoughts),
        "seconds": seconds,
        "overflows": thinker.overflows,
    }
    said = [
        {
            "strategy": row["strategy"],
            "problem": f"{exam.name}-{exam.first + i}",
            "question": problems[i].prompt[-1].content,
            "answer": visible(thought.text),
            "reasoning": private(thought.text),
            "score": scores[i].value,
            "failure": scores[i].failure,
            "tokens": thought.tokens,
        }
        for i, thought in enumerate(thoughts)
    ]
    return row, said


def turns_of(problem: Problem) -> Turns:
    return tuple({"role": m.role, "content": m.content} for m in problem.prompt)


def label(strategy: Strategy) -> str:
    """Its kind, and what differs from the default: `TreeOfThoughts search=Beam(width=4)`."""
    return " ".join([type(strategy).__name__, *_differing(strategy)])


def _differing(config: Config) -> list[str]:
    fields = type(config).model_fields
    given = {name: getattr(config, name) for name in fields}
    return [f"{name}={_said(x)}" for name, x in given.items() if x != fields[name].default]


def _said(value: object) -> str:
    match value:
        case Config():
            parts = ", ".join(_differing(value))
            return type(value).__name__ + (f"({parts})" if parts else "")
        case tuple():
            return str(len(value))
        case _:
            return str(value)


def table(rows: Sequence[Reasoned]) -> list[str]:
    """Lines of text, the cheapest strategy of each exam first."""
    # What tells two strategies apart may stand at the end of their names.
    wide = max(len("strategy"), *(len(row["strategy"]) for row in rows))
    lines = [
        f"{'strategy':{wide}} {'exam':16} {'accuracy':>8}  {'95%':13} {'tokens':>8} {'seconds':>8}"
    ]
    for row in sorted(rows, key=lambda r: (r["exam"], r["tokens"])):
        figure = row["accuracy"]
        interval = f"{figure['low']:.2f} to {figure['high']:.2f}"
        lines.append(
            f"{row['strategy']:{wide}} {row['exam'][:16]:16} {figure['value']:8.3f}  "
            f"{interval:13} {row['tokens']:8.0f} {row['seconds']:8.1f}"
        )
    return lines
