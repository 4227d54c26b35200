"""`treadle eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.chat import Model
from treadle.cli.command import Command
from treadle.cli.run import Overrides


def evaluate(
    model: Model,
    overrides: Overrides = None,
    like: Annotated[
        str, typer.Option("--like", help="Recipe, file or run whose evaluation is taken.")
    ] = "quickstart",
    directory: Annotated[
        Path | None, typer.Option("--dir", "-d", help="Folder of the results [runs/eval-NAME].")
    ] = None,
) -> None:
    """Measure a model as a recipe measures its own: exams with verifiers, and perplexity.

    Overrides are those of the evaluation step, such as exams.0.count=20.
    """
    from treadle.cli.models import source_of
    from treadle.cli.targets import load
    from treadle.core.config import override
    from treadle.core.errors import TreadleError
    from treadle.core.execute import execute
    from treadle.core.pipeline import Pipeline, read_manifest
    from treadle.core.progress import standard
    from treadle.evals.evaluate import Evaluate

    found = [step for step in load(like).steps if isinstance(step, Evaluate)]
    if not found:
        raise TreadleError(f"{like} has no evaluation step: name a recipe that measures, in --like")
    step = found[0].replace(name="evaluation", model=source_of(model), subject=model)
    name = "eval-" + "".join(c if c.isalnum() else "-" for c in Path(model).name)
    folder = directory or Path("runs") / name
    progress = standard()
    try:
        steps = (override(step, overrides or ()),)
        execute(Pipeline(name=name, steps=steps), folder, progress)
    finally:
        progress.close()
    for task, figure in read_manifest(folder / "evaluation")["metrics"]["results"].items():
        ends = (figure["low"], figure["high"])
        interval = f"  [{ends[0]:.3f}, {ends[1]:.3f}]" if None not in ends else ""
        typer.echo(f"{task:24} {figure['value']:9.3f}{interval}  {figure['unit']}, n={figure['n']}")


COMMAND = Command(
    name="eval",
    run=evaluate,
    examples=(
        "treadle eval smollm2-135m-instruct",
        "treadle eval runs/quickstart exams.0.count=50",
        "treadle eval mine.gguf --like runs/quickstart",
    ),
    stopped="stopped; the same command goes on from where it was",
)
