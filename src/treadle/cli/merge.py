"""`treadle merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from treadle.cli.command import Command


def merge(
    models: Annotated[list[str], typer.Argument(help="Runs, known models, folders or files.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for the merged model.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="linear, slerp, task-arithmetic, ties, dare, dare-ties; or one in full, such as "
            "'{kind: Average, weights: [1, 3]}'.",
        ),
    ] = "linear",
    base: Annotated[
        str | None, typer.Option("--base", help="The model that all were tuned from.")
    ] = None,
) -> None:
    """Merge models of one shape into one, without training; written as a Hugging Face folder."""
    from treadle.cli.models import source_of
    from treadle.core.config import from_yaml
    from treadle.core.errors import TreadleError, did_you_mean
    from treadle.core.pipeline import Pipeline, Workspace
    from treadle.core.progress import standard
    from treadle.merging.method import MergeMethod
    from treadle.merging.task_vectors import named_methods
    from treadle.models.hub.save import save_hf
    from treadle.tokenizers.load import tokenizer_of
    from treadle.train.merged import Merged

    known = named_methods()
    if method.startswith("{"):
        shape: Any = MergeMethod
        chosen = from_yaml(method, expect=shape, name="--method")
    elif method in known:
        chosen = known[method]
    else:
        raise TreadleError(f"--method {method}: no such method{did_you_mean(method, known)}")
    source = Merged(
        models=tuple(map(source_of, models)),
        base=None if base is None else source_of(base),
        method=chosen,
    )
    progress = standard()
    try:
        nowhere = Pipeline(name="none", steps=())
        opened = source.open(Workspace(Path(), Path(), nowhere, progress))
    finally:
        progress.close()
    tokenizer = tokenizer_of(opened)
    ids = {f"{r}_token_id": getattr(tokenizer, f"{r}_id") for r in ("bos", "eos", "pad")}
    save_hf(opened.model, to, fields=ids)
    tokenizer.save(to)
    typer.echo(to)


COMMAND = Command(
    name="merge",
    run=merge,
    examples=(
        "treadle merge runs/a runs/b --to soup",
        "treadle merge runs/a runs/b --base smollm2-135m-instruct --method ties --to merged",
        "treadle merge runs/a other-model --method '{kind: Slerp, t: 0.3}' --to between",
    ),
)
