"""Labels of steps without anyone who labels them: go on from each step, and see who arrives.

    y_t = share of K continuations from steps 1..t that the verifier accepts,     y_T = accepted

Math-Shepherd, Wang et al. 2023, arXiv:2312.08935. A step is a line of a solution.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from treadle.alignment.iterate import opened_thinker
from treadle.alignment.solutions import STEPS, Solution, Solutions, solution_tree, step_batch
from treadle.alignment.trees import Tree, tree_size, usable
from treadle.core.errors import TreadleError
from treadle.core.files import write_text
from treadle.core.pipeline import Step, Workspace
from treadle.core.results import EVALUATION, Figure, accuracy
from treadle.data.batch import within_budget
from treadle.data.problems import Problems
from treadle.data.rating import Scored, require_sound, scorer
from treadle.data.records import Problem
from treadle.data.source import Env
from treadle.inference.reasoning.strategy import Ask, Thinker, Turns
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource
from treadle.objectives.process_reward import step_scores, worst_steps
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision

MOST = 12
"""Steps of a solution at the most: what writes more lines has lost its way."""


@dataclass(frozen=True)
class Prefix:
    """The first lines of solutions to a problem; of all solutions that begin so, the same."""

    problem: int
    lines: tuple[str, ...]


class RollOut(Step):
    """A model's solutions to problems, with a label on each of their steps."""

    model: ModelSource
    problems: Problems
    count: int = Field(32, ge=1)
    """Problems."""
    first: int = Field(0, ge=0)
    """Number of the first problem."""
    solutions: int = Field(4, ge=1)
    """Of each problem."""
    continuations: int = Field(4, ge=1)
    """K, from each step."""
    sampling: Sampling = Sampling(max_tokens=112)
    patience: float = Field(10.0, gt=0.0)
    """Seconds after which a verifier is given up."""
    precision: Precision = Auto()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        problems = [self.problems.problem(self.first + i) for i in range(self.count)]
        turns: list[Turns] = [tuple(m.plain() for m in p.prompt) for p in problems]
        thinker = opened_thinker(self.model, workspace, self.precision)
        asks = [Ask(i, asked) for i, asked in enumerate(turns)]
        drawn = thinker.ask(asks, self.sampling, self.solutions)
        found = [
            (i, tuple(steps))
            for i, row in enumerate(drawn)
            for completion in row
            if completion.finish == "stop" and 0 < len(steps := lines_of(completion.text)) <= MOST
        ]
        wanted = dict.fromkeys(Prefix(i, s[:t]) for i, s in found for t in range(1, len(s)))
        whole = dict.fromkeys(Prefix(i, s) for i, s in found)
        score = scorer(self.problems, self.patience)
        marks = self._continued(thinker, list(wanted), turns)
        scores = {p: [score(problems[p.problem], text) for text in row] for p, row in marks.items()}
        scores |= {p: [score(problems[p.problem], "\n".join(p.lines))] for p in whole}
        verified = [s for row in scores.values() for s in row]
        require_sound(verified)
        share = {p: reached(row) for p, row in scores.items()}
        rows = [
            row_of(problems[i], s, [share[Prefix(i, s[:t])] for t in range(1, len(s) + 1)])
            for i, s in found
        ]
        if not rows:
            raise TreadleError(
                f"{self.name}: none of {self.count * self.solutions} solutions came to its end in "
                f"{self.sampling.max_tokens} tokens and {MOST} lines: allow more, or train on "
                "solutions first"
            )
        write_text(workspace.folder / STEPS, "".join(json.dumps(r) + "\n" for r in rows))
        labels = [y for row in rows for y in row["labels"]]
        return {
            "kind": "steps",
            "solutions": len(rows),
            "unfinished": self.count * self.solutions - len(rows),
            "steps": len(labels),
            "steps_right": sum(y >= 0.5 for y in labels) / len(labels),
            "solutions_right": sum(row["labels"][-1] for row in rows) / len(rows),
            "prompts_too_long": thinker.overflows,
            "verifications_failed": sum(bool(s.failure) for s in verified),
        }

    def _continued(
        self, thinker: Thinker, prefixes: Sequence[Prefix], turns: Sequence[Turns]
    ) -> dict[Prefix, list[str]]:
        """K whole solutions from each prefix."""
        begun = ["\n".join(p.lines) + "\n" for p in prefixes]
        # Each with draws of its own: by those that made the prefix it would go on as it began.
        asks = [
            Ask(number, turns[p.problem], text)
            for number, (p, text) in enumerate(zip(prefixes, begun, strict=True), len(turns))
        ]
        drawn = thinker.ask(asks, self.sampling, self.continuations)
        rows = zip(prefixes, begun, drawn, strict=True)
        return {p: [text + c.text for c in row] for p, text, row in rows}


class MeasureSteps(Step):
    """How often a process reward model is right about steps, and what its choice among the
    solutions of a problem is worth, beside one drawn at random."""

    model: ModelSource
    subject: str
    """The stage that is measured."""
    solutions: Solutions
    tokens: int = Field(4096, ge=8)
    longest: int = Field(512, ge=2)
    precision: Precision = Auto()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        solutions = self.solutions.resolve(workspace)
        opened = self.model.open(workspace)
        model = opened.model.eval().requires_grad_(False)
        self.precision.resolve("cpu").prepare(model)
        env = Env(model=model, tokenizer=tokenizer_of(opened), scratch=workspace.folder)
        tree = partial(_tree, env, solutions, self.longest)
        count = solutions.count()
        kept = usable(count, tree, workspace.folder / "left_out.json", "solution")
        rows = [solutions.solution(i) for i in kept]
        trees = [tree(i) for i in kept]
        found: list[Tensor] = []
        worst: list[float] = []
        runs = within_budget([tree_size(t) for t in trees], self.tokens)
        with torch.inference_mode(), self.precision.resolve("cpu").autocast("cpu"):
            for run in runs:
                batch = step_batch([trees[i] for i in run], [rows[i].labels for i in run])
                scores = step_scores(model, batch).float()
                found.append(scores)
                worst += worst_steps(scores, batch.solutions).tolist()
        labels = torch.tensor([y for row in rows for y in row.labels])
        agreed = ((torch.cat(found) > 0) == (labels >= 0.5)).double().tolist()
        results: dict[str, Figure] = {"steps": accuracy(agreed), **chosen(rows, worst)}
        return {
            "kind": EVALUATION,
            "subject": self.subject,
            "results": results,
            "tokens_per_second": None,
            "size_bytes": None,
            "steps_right": float((labels >= 0.5).double().mean()),
            "solutions_left_out": count - len(kept),
        }


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def reached(scores: Sequence[Scored]) -> float:
    """The share with full marks."""
    return sum(s.value >= 1.0 for s in scores) / len(scores)


def row_of(problem: Problem, steps: Sequence[str], labels: Sequence[float]) -> dict[str, Any]:
    """A solution as `SolutionFiles` reads it."""
    return {
        "prompt": problem.prompt[-1].content,
        "completions": list(steps),
        "labels": list(labels),
    }


def chosen(rows: Sequence[Solution], worst: Sequence[float]) -> dict[str, Figure]:
    """Over problems with several solutions, the share where the one with the best worst step is
    right (of several, any of them), and the share of all that are."""
    by_problem: dict[str, list[tuple[float, float]]] = {}
    for row, score in zip(rows, worst, strict=True):
        by_problem.setdefault(row.prompt[-1].content, []).append((score, row.labels[-1]))
    several = [found for found in by_problem.values() if len(found) > 1]
    if not several:
        return {}
    sizes = Counter(len(found) for found in several)
    first = [[right for score, right in found if score == max(found)[0]] for found in several]
    best = [fmean(rights) for rights in first]
    any_one = [fmean(right for _, right in found) for found in several]
    name = f"best of {max(sizes)}"
    return {name: accuracy(best), "any one": accuracy(any_one)}


def _tree(env: Env, solutions: Solutions, longest: int, index: int) -> Tree:
    solution = solutions.solution(index)
    return solution_tree(env, solution.prompt, solution.steps, longest)
