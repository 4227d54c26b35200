"""Forgetting: what became of earlier tasks after each new one.

    R_ij   accuracy on task j after learning tasks 1 ... i
    accuracy            mean_j R_Tj
    backward transfer   mean_{j<T} (R_Tj - R_jj)            negative: forgotten
    forgetting          mean_{j<T} (max_{i<T} R_ij - R_Tj)

Lopez-Paz and Ranzato 2017, arXiv:1706.08840; Chaudhry et al. 2018, arXiv:1801.10112.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from treadle.core.errors import TreadleError, did_you_mean
from treadle.core.pipeline import Reads, Step, Workspace


@dataclass(frozen=True)
class Forgetting:
    """The three scores of a sequence of tasks."""

    accuracy: float
    backward_transfer: float
    forgetting: float


class Stage(Reads):
    """An `Evaluate` after one of the tasks was learned."""

    task: str
    """Name of the exam of that task."""


class ForgettingScore(Step):
    """Scores of tasks that were learned one after another, from what was measured after each."""

    stages: tuple[Stage, ...] = Field(min_length=2)

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        rows = [self._row(stage, workspace) for stage in self.stages]
        score = forgetting(rows)
        workspace.progress.say(
            f"{self.name}: accuracy {score.accuracy:.0%} over all tasks, forgotten "
            f"{score.forgetting:.0%}, backward transfer {score.backward_transfer:+.0%}"
        )
        return {
            "kind": "forgetting",
            "tasks": [stage.task for stage in self.stages],
            "accuracies": [list(row) for row in rows],
            "accuracy": score.accuracy,
            "backward_transfer": score.backward_transfer,
            "forgetting": score.forgetting,
        }

    def _row(self, stage: Stage, workspace: Workspace) -> list[float]:
        results = workspace.manifest(stage.step)["metrics"].get("results", {})
        row = []
        for other in self.stages:
            if other.task not in results:
                raise TreadleError(
                    f"ForgettingScore: `{stage.step}` has no result for `{other.task}`"
                    f"{did_you_mean(other.task, results)}; put the exams of all tasks at each stage"
                )
            row.append(float(results[other.task]["value"]))
        return row


def forgetting(table: Sequence[Sequence[float]]) -> Forgetting:
    """The scores of R, a row for each task learned and a column for each task measured."""
    last, early = table[-1], range(len(table) - 1)
    return Forgetting(
        accuracy=sum(last) / len(last),
        backward_transfer=sum(last[j] - table[j][j] for j in early) / len(early),
        forgetting=sum(max(row[j] for row in table[:-1]) - last[j] for j in early) / len(early),
    )
