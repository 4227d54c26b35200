"""Solutions in steps with a label on each, as batches for a process reward model.

A row of a file is TRL's stepwise supervision: `{prompt, completions: [step], labels: [bool]}`;
labels may be probabilities as well.
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from pydantic import Field

from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.trees import Tree, TreeStream, assemble_trees, extended
from treadle.alignment.worked_solutions import worked_solution
from treadle.core.config import Config
from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.pipeline import Reads, Workspace
from treadle.data.batch import Piece
from treadle.data.read import read_rows
from treadle.data.records import Messages, user
from treadle.data.source import Env, Source
from treadle.objectives.process_reward import StepBatch
from treadle.tokenizers.chat import encode_prompt

STEPS = "steps.jsonl"
KEYS = ("prompt", "completions", "labels")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Solution:
    """Steps towards an answer, and for each the probability that it is right."""

    prompt: Messages
    steps: tuple[str, ...]
    labels: tuple[float, ...]


class Solutions(Config):
    """A shape: a supply of labelled solutions."""

    @abstractmethod
    def solution(self, index: int) -> Solution:
        """Solution number `index`, from 0."""

    @abstractmethod
    def count(self) -> int:
        """How many there are."""

    def resolve(self, workspace: Workspace | None) -> Solutions:
        """The supply itself, where this one only says in which step to look for it."""
        return self


class SolutionFiles(Solutions):
    """Rows of a file."""

    path: str = Field(min_length=1)

    def solution(self, index: int) -> Solution:
        return _solutions(self.path)[index]

    def count(self) -> int:
        return len(_solutions(self.path))


class SolutionsOf(Solutions, Reads):
    """The labelled solutions that an earlier step wrote."""

    def resolve(self, workspace: Workspace | None) -> Solutions:
        if workspace is None:
            raise TreadleError(f"SolutionsOf(step={self.step}): there are steps in pipelines alone")
        return SolutionFiles(path=str(workspace.output(self.step) / STEPS))

    def solution(self, index: int) -> Solution:
        raise TreadleError(f"SolutionsOf(step={self.step}): not resolved")

    def count(self) -> int:
        raise TreadleError(f"SolutionsOf(step={self.step}): not resolved")


class PlantedErrors(Solutions):
    """Worked solutions, whose steps are right; in half of them the last number of a step is
    changed, and from there on nothing counts as right."""

    problems: ReasoningGym
    amount: int = Field(512, ge=1)
    seed: int = 0

    def solution(self, index: int) -> Solution:
        problem = self.problems.problem(index)
        steps = worked_solution(problem).split("\n")
        draw = random.Random(f"{self.seed}/{index}")
        wrong = draw.randrange(len(steps)) if draw.random() < 0.5 else len(steps)
        labels = tuple(float(i < wrong) for i in range(len(steps)))
        if wrong < len(steps):
            steps[wrong] = changed(steps[wrong], draw)
        return Solution(problem.prompt, tuple(steps), labels)

    def count(self) -> int:
        return self.amount


class Steps(Source):
    """Labelled solutions in a shuffled order that a seed fixes."""

    solutions: Solutions
    per_step: int = Field(16, ge=1)
    """Solutions in an optimiser step, over all ranks."""
    tokens: int = Field(4096, ge=8)
    """Most tokens in a micro-batch."""
    longest: int = Field(512, ge=2)
    """Solutions with more tokens, or more than the model's context, are left out."""

    def open(self, env: Env) -> SolutionStream:
        return SolutionStream(self, env)


class SolutionStream(TreeStream):
    """Trees of a prompt and a solution."""

    def __init__(self, config: Steps, env: Env) -> None:
        config = config.replace(solutions=config.solutions.resolve(env.workspace))
        self.config = config
        count, per_step, tokens = config.solutions.count(), config.per_step, config.tokens
        super().__init__(env, count=count, per_step=per_step, tokens=tokens, what="solution")

    def tree(self, index: int) -> Tree:
        solution = self.config.solutions.solution(index)
        return solution_tree(self.env, solution.prompt, solution.steps, self.config.longest)

    def batch(self, trees: list[Tree], places: list[int]) -> StepBatch:
        rows = [self.config.solutions.solution(self.kept[i]) for i in places]
        return step_batch(trees, [row.labels for row in rows])


def changed(step: str, draw: random.Random) -> str:
    """The step with another number at its end; one without a number is unfinished instead."""
    found = list(_NUMBER.finditer(step))
    if not found:
        return f"{step} ?"
    last = found[-1]
    number = int(last.group())
    other = draw.choice([n for n in range(max(0, number - 9), number + 10) if n != number])
    return f"{step[: last.start()]}{other}{step[last.end() :]}"


def solution_tree(env: Env, prompt: Messages, steps: Sequence[str], longest: int) -> Tree:
    """The prompt, and each step as the continuation of all before it.

    Steps are encoded one by one, each with the line break that ends it, so that a step has the
    same tokens whatever follows.

    Raises:
        TreadleError: there is no step, an empty one, or too many tokens.
    """
    if not steps or not all(s.strip() for s in steps):
        raise TreadleError("a solution has no step" if not steps else "a step is empty")
    pieces = [encode_prompt(env.tokenizer, [m.plain() for m in prompt])]
    pieces += [env.tokenizer.encode(f"{s}\n", parse_special=False) for s in steps]
    size, most = sum(map(len, pieces)), min(longest, env.model.config.context)
    if size > most:
        raise TreadleError(f"it has {size} tokens, more than longest={most}")
    return [Piece(ids, [i > 0] * len(ids), parent=i - 1) for i, ids in enumerate(pieces)]


def step_batch(trees: Sequence[Tree], labels: Sequence[Sequence[float]]) -> StepBatch:
    """Trees of `solution_tree`, and the labels of their steps."""
    batch = assemble_trees(trees)
    layout = batch.layout
    steps = [i for i in range(len(layout.lengths)) if layout.parent(i) >= 0]
    owners = [s for s, tree in enumerate(trees) for _ in tree[1:]]
    return extended(
        StepBatch,
        batch,
        ends=torch.tensor([layout.span(i)[-1] for i in steps]),
        labels=torch.tensor([float(y) for row in labels for y in row]),
        solutions=torch.tensor(owners),
    )


@lru_cache(maxsize=4)
def _solutions(path: str) -> tuple[Solution, ...]:
    return tuple(_read(row, f"{path}: row {i}") for i, row in enumerate(read_rows(path), 1))


def _read(row: Mapping[str, Any], where: str) -> Solution:
    missing = [k for k in KEYS if k not in row]
    if missing:
        raise FileFormatError(f"{where}: it lacks `{missing[0]}`; a row has {', '.join(KEYS)}")
    steps, labels, prompt = row["completions"], row["labels"], row["prompt"]
    if not isinstance(prompt, str) or not isinstance(steps, list) or not isinstance(labels, list):
        raise FileFormatError(f"{where}: `prompt` is a text, the others are lists")
    if len(steps) != len(labels):
        raise FileFormatError(f"{where}: {len(steps)} completions, but {len(labels)} labels")
    if not all(isinstance(y, int | float) and 0 <= y <= 1 for y in labels):
        raise FileFormatError(f"{where}: labels are true, false, or probabilities")
    return Solution((user(prompt),), tuple(map(str, steps)), tuple(map(float, labels)))
