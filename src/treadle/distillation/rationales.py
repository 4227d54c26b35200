"""A teacher writes down how it solves problems; a student learns the way and the result.

`Rationales` asks the teacher and keeps what the verifier accepts. `StepByStep` makes two tasks of
each solution, told apart by what the question ends with, and weighs them:

    L = 1/|label| sum_label -log p(y | x, "only the result")
      + lambda 1/|steps| sum_steps -log p(r | x, "step by step")

A student that is asked for the result alone has still learned why, and answers in a few tokens.

Hsieh et al. 2023, Distilling Step-by-Step, arXiv:2305.02301, equations 3 and 4; the filter by a
verifier is that of Zelikman et al. 2022, arXiv:2203.14465.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from treadle.core.cards import Card
from treadle.core.errors import ConfigError, FileFormatError, TreadleError
from treadle.core.files import write_text
from treadle.core.pipeline import Reads, Step, Workspace
from treadle.data.batch import Batch, Piece, assemble, within_budget
from treadle.data.order import Order, Place
from treadle.data.problems import Problems
from treadle.data.rating import Scored, patiently, require_sound
from treadle.data.records import Problem
from treadle.data.source import Env, Source, Stream, Work
from treadle.inference.engine import Engine
from treadle.inference.request import Completion, Request
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource
from treadle.tokenizers.chat import encode_chat, encode_prompt
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision

CARD = Card(
    id="kd.reasoning",
    paper="Hsieh et al. 2023, arXiv:2305.02301; Zelikman et al. 2022, arXiv:2203.14465",
    summary="A teacher's chains of thought that a verifier accepts, as a task beside the answers.",
    recipe="treadle run distill-steps",
    oracle="tests/distillation/test_distillation_rationales.py::test_loss_is_the_papers",
)
FILE = "rationales.jsonl"
MARK = "Answer:"
"""What the teacher's last line begins with."""


class Rationales(Step):
    """The teacher's accepted solutions of some problems."""

    name: str = "rationales"
    teacher: ModelSource
    problems: Problems
    count: int = Field(256, ge=1)
    tries: int = Field(1, ge=1)
    """Answers to a problem, until one is accepted."""
    sampling: Sampling = Sampling(temperature=0.0, max_tokens=128)
    precision: Precision = Auto()
    patience: float = Field(10.0, gt=0.0)
    """Seconds after which a verifier is given up."""

    def check(self, workspace: Workspace) -> None:
        if self.tries > 1 and self.sampling.temperature == 0.0:
            raise ConfigError(
                f"{self.tries} tries at temperature 0 are one answer, given {self.tries} times: "
                "raise `sampling.temperature`, or let `tries` be 1"
            )

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        opened = self.teacher.open(workspace)
        model = opened.model.eval().requires_grad_(False)
        precision = self.precision.resolve("cpu")
        precision.prepare(model)
        tokenizer = tokenizer_of(opened)
        engine = Engine(model, tokenizer, autocast=partial(precision.autocast, "cpu"))
        problems = [self.problems.problem(i) for i in range(self.count)]
        prompts = [
            tuple(encode_prompt(tokenizer, [m.plain() for m in problem.prompt]))
            for problem in problems
        ]
        kept: dict[int, dict[str, str]] = {}
        verified: list[Scored] = []
        asked = 0
        for attempt in range(self.tries):
            left = [i for i in range(self.count) if i not in kept]
            requests = [Request(prompts[i], self._sampling(attempt, i)) for i in left]
            answers = self._answers(engine, requests, workspace)
            asked += len(left)
            for i, (answer,) in zip(left, answers, strict=True):
                steps, mark, result = answer.text.rpartition(MARK)
                if not (mark and result.strip()):
                    continue
                verified.append(self._scored(problems[i], answer.text))
                if verified[-1].value >= 1.0:
                    last = problems[i].prompt[-1].content
                    question = str(problems[i].metadata.get("question", last))
                    kept[i] = {
                        "question": question.strip(),
                        "steps": steps.strip(),
                        "result": result.strip(),
                    }
        require_sound(verified)
        if not kept:
            raise TreadleError(
                f"{self.name}: the verifier accepted none of {asked} answers: take a "
                "better teacher, easier problems or more `tries`, and see that its last line "
                f"begins with `{MARK}`"
            )
        write_text(
            workspace.folder / FILE, "".join(json.dumps(kept[i]) + "\n" for i in sorted(kept))
        )
        return {
            "kind": "rationales",
            "problems": self.count,
            "asked": asked,
            "kept": len(kept),
            "verifications_failed": sum(bool(s.failure) for s in verified),
        }

    def _scored(self, problem: Problem, text: str) -> Scored:
        return patiently(self.problems.score, problem, text, self.patience)

    def _answers(
        self, engine: Engine, requests: list[Request], workspace: Workspace
    ) -> list[list[Completion]]:
        with workspace.progress.task(self.name, len(requests)) as task:
            return engine.generate(requests, lambda done, total: task.update(done))

    def _sampling(self, attempt: int, problem: int) -> Sampling:
        """One seed for each answer."""
        return self.sampling.replace(seed=self.sampling.seed + attempt * self.count + problem)


class StepByStep(Source, Reads):
    """Two tasks of every solution that an earlier step kept: its result, and its steps."""

    rationale: float = Field(1.0, ge=0.0)
    """lambda; at 0 only results are learned."""
    ask_result: str = "Give only the result."
    ask_steps: str = "Explain it step by step."
    per_step: int = Field(8, ge=1)
    """Solutions in an optimiser step."""
    tokens: int = Field(2048, ge=8)
    """Most tokens in a micro-batch."""

    def open(self, env: Env) -> StepByStepStream:
        if env.workspace is None:
            raise TreadleError("StepByStep reads another step's output: give Env a workspace")
        return StepByStepStream(self, read_rationales(env.workspace.output(self.step) / FILE), env)


def read_rationales(path: Path) -> list[dict[str, str]]:
    """What `Rationales` kept.

    Raises:
        FileFormatError: the file is no such file.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{key: str(row[key]) for key in ("question", "steps", "result")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path}: no solutions of a teacher ({error}): name a step of kind Rationales"
        ) from None


class StepByStepStream(Stream):
    """Its state is the place in the order of solutions."""

    def __init__(self, config: StepByStep, rows: list[dict[str, str]], env: Env) -> None:
        self.config, self.rows, self.env = config, rows, env
        self.order, self.place = Order(len(rows), env.seed), Place()

    def __next__(self) -> Work:
        config, env = self.config, self.env
        step = self.order.take(self.place, config.per_step)
        self.place = self.order.after(self.place, config.per_step)
        results = [self._piece(i, config.ask_result, "result") for i in step]
        # A teacher that gave the result at once explained nothing: its silence is no lesson.
        told = [i for i in step if config.rationale and self.rows[i]["steps"]]
        steps = [self._piece(i, config.ask_steps, "steps") for i in told]
        # Shares are of the whole step: a token weighs the same whichever rank it comes to.
        tasks = ((results, _share(results)), (steps, config.rationale * _share(steps)))
        mine = [(p, w) for pieces, w in tasks for p in pieces[env.rank :: env.world]]
        runs = within_budget([len(piece.tokens) for piece, _ in mine], config.tokens)
        batches = tuple(_weighted([mine[i] for i in run]) for run in runs)
        return Work(batches, {"solutions": float(len(self.rows))})

    def _piece(self, number: int, ask: str, key: str) -> Piece:
        row = self.rows[number]
        question = {"role": "user", "content": f"{row['question']}\n{ask}"}
        answer = {"role": "assistant", "content": row[key]}
        encoded = encode_chat(self.env.tokenizer, [question, answer])
        return Piece(encoded.ids, encoded.mask)

    def state(self) -> dict[str, Any]:
        return {"solutions": len(self.rows), **self.place.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["solutions"] != len(self.rows):
            raise TreadleError(
                "the teacher's solutions have changed since this run was saved: start it anew"
            )
        self.place = Place.restore(state)


def _share(pieces: list[Piece]) -> float:
    """So that the weights of a task's tokens sum to the number of its pieces."""
    learned = sum(sum(piece.learn) for piece in pieces)
    return len(pieces) / learned if learned else 0.0


def _weighted(pieces: list[tuple[Piece, float]]) -> Batch:
    batch = assemble([piece for piece, _ in pieces])
    weights = torch.tensor([weight for _, weight in pieces])
    return replace(batch, weights=weights[batch.sequences])
