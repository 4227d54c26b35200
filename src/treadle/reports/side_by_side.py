"""A run's stages side by side: one row for each way that was tried, with what it cost.

<step>/table.md     the table as Markdown
the manifest        the same numbers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from treadle.core.errors import TreadleError
from treadle.core.files import write_text
from treadle.core.pipeline import Summary, Workspace
from treadle.reports import numbers
from treadle.reports.folder import RunFolder, read_run
from treadle.reports.stages import Column, Stage, columns_of, stages_of

TABLE, TRAINED = "table.md", "trained.safetensors"


class SideBySide(Summary):
    """Prints and keeps the table."""

    name: str = "table"
    minutes: float = Field(0.1, gt=0.0)

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        run = read_run(workspace.root, leave_out=self.name)
        stages = stages_of(run)
        if not stages:
            raise TreadleError(
                f"{workspace.root}: nothing was measured, so there is nothing to lay side by side: "
                "add evaluation steps before this one"
            )
        lines = table(stages, columns_of(stages), learned_bytes(run))
        write_text(workspace.folder / TABLE, "\n".join(lines) + "\n")
        for line in lines:
            workspace.progress.say(line)
        return {"kind": "table", "rows": len(stages)}


def learned_bytes(run: RunFolder) -> dict[str, int]:
    """By training step the size of what it learned: an adapter, or all weights."""
    return {
        step.name: int(step.manifest["files"][TRAINED]["bytes"])
        for step in run.done()
        if TRAINED in step.manifest["files"]
    }


def table(
    stages: Sequence[Stage], columns: Sequence[Column], learned: Mapping[str, int]
) -> list[str]:
    """Lines of a Markdown table; a dash is what was not measured."""
    heads = [*(c.name for c in columns), "trained", "memory", "time", "size of it", "tokens/s"]
    rows = [
        [
            stage.subject,
            *(_figure(stage, column) for column in columns),
            _or_dash(stage.parameters_trained, numbers.count),
            _or_dash(stage.making_peak_bytes, numbers.size),
            _or_dash(stage.seconds, numbers.duration),
            _or_dash(learned.get(stage.subject), numbers.size),
            _or_dash(stage.tokens_per_second, lambda value: f"{value:.0f}"),
        ]
        for stage in stages
    ]
    return [_line(["", *heads]), _line(["---"] * (len(heads) + 1)), *map(_line, rows)]


def _figure(stage: Stage, column: Column) -> str:
    figure = stage.results.get(column.name)
    if figure is None:
        return "-"
    return f"{numbers.figure(figure)} {numbers.interval(figure)}".strip()


def _or_dash(value: Any, say: Any) -> str:
    return "-" if value is None else str(say(value))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
