"""`treadle reason`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.chat import Model
from treadle.cli.command import Command
from treadle.cli.run import Overrides

if TYPE_CHECKING:
    from treadle.core.pipeline import Pipeline
    from treadle.evals.evaluate import Exam


def reason(
    model: Model,
    overrides: Overrides = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option("--strategy", "-s", help="Kind, or YAML such as '{kind: BestOfN, n: 4}'."),
    ] = None,
    like: Annotated[
        str, typer.Option("--like", help="Recipe, file or run whose exams are put.")
    ] = "quickstart",
    count: Annotated[int, typer.Option("--count", "-c", min=1, help="Problems of each exam.")] = 20,
    directory: Annotated[
        Path | None, typer.Option("--dir", "-d", help="Folder of the results [runs/reason-NAME].")
    ] = None,
) -> None:
    """Solve problems by reasoning strategies: accuracy against the tokens that they spend.

    Several --strategy are compared on the same problems. Private reasoning is in the results'
    answers.json and nowhere else.
    """
    from treadle.cli.kinds import named
    from treadle.cli.models import source_of
    from treadle.cli.targets import load
    from treadle.core.config import override
    from treadle.core.errors import TreadleError
    from treadle.core.execute import execute
    from treadle.core.pipeline import Pipeline, read_manifest
    from treadle.core.progress import standard
    from treadle.evals.reason import Reason, table
    from treadle.inference.reasoning.strategy import Strategy

    exams = exams_of(load(like))
    if not exams:
        raise TreadleError(f"{like} has no exams: name a recipe that puts problems, in --like")
    step = Reason(
        name="reason",
        model=source_of(model),
        strategies=tuple(
            named(text, Strategy, "--strategy")  # type: ignore[type-abstract]
            for text in strategy or ["OneAnswer"]
        ),
        exams=tuple(e.replace(count=count) for e in {e.name: e for e in exams}.values()),
    )
    name = "reason-" + "".join(c if c.isalnum() else "-" for c in Path(model).name)
    folder = directory or Path("runs") / name
    progress = standard()
    try:
        execute(Pipeline(name=name, steps=(override(step, overrides or ()),)), folder, progress)
    finally:
        progress.close()
    for line in table(read_manifest(folder / "reason")["metrics"]["rows"]):
        typer.echo(line)


def exams_of(pipeline: Pipeline) -> list[Exam]:
    """All exams that a pipeline's steps put, in order."""
    from treadle.evals.evaluate import Evaluate
    from treadle.evals.reason import Reason
    from treadle.evals.thinking import MeasureThinking

    sat = (Evaluate, Reason, MeasureThinking)
    return [exam for step in pipeline.steps if isinstance(step, sat) for exam in step.exams]


COMMAND = Command(
    name="reason",
    run=reason,
    examples=(
        "treadle reason smollm2-135m-instruct -s OneAnswer -s '{kind: SelfConsistency, n: 8}'",
        "treadle reason runs/quickstart -s TreeOfThoughts --count 50",
    ),
)
