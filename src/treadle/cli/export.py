"""`treadle export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.chat import Model
from treadle.cli.command import Command

HUGGING_FACE, GGUF, PEFT = "hf", "gguf", "peft"


def export(
    model: Model,
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder, or .gguf file [named after the model].")
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="hf, gguf (Q8_0), F16, Q8_0, Q6_K, Q4_K, Q4_0 ..., or peft: the adapter alone.",
        ),
    ] = HUGGING_FACE,
    dtype: Annotated[str, typer.Option("--dtype", help="Of hf weights.")] = "bfloat16",
) -> None:
    """Write a model for other programs: a Hugging Face folder, or a GGUF file for llama.cpp.

    Adapters are merged into the weights first, unless it is the adapter alone that is written.
    """
    import torch

    from treadle.cli.models import open_model
    from treadle.core.errors import TreadleError, did_you_mean
    from treadle.models.hub.save import save_gguf, save_hf
    from treadle.models.reward_head import ScalarHead
    from treadle.peft.adapter import merge
    from treadle.peft.folders import save_tuned
    from treadle.tokenizers.load import tokenizer_of

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise TreadleError(f"--dtype {dtype}: no such type{did_you_mean(dtype, dtypes)}")
    opened = open_model(model)
    if form == PEFT:
        target = to or Path(f"{Path(model).stem}-adapter")
        save_tuned(opened.model, target)
        typer.echo(target)
        return
    tokenizer = tokenizer_of(opened)
    merged = merge(opened.model)
    name = Path(model).stem
    if form == HUGGING_FACE:
        target = to or Path(f"{name}-hf")
        if isinstance(merged.config.head, ScalarHead):
            pad = merged.config.head.pad
            tokenizer = (
                tokenizer.padded_apart()
                if pad is None
                else tokenizer.with_special(pad=tokenizer.spelling(pad))
            )
        ids = {f"{r}_token_id": getattr(tokenizer, f"{r}_id") for r in ("bos", "eos", "pad")}
        save_hf(merged, target, dtype=dtypes[dtype], fields=ids)
        tokenizer.save(target)
    else:
        form = "Q8_0" if form == GGUF else form
        target = to or Path(f"{name}.{form}.gguf")
        keys = tokenizer.to_gguf_metadata(vocab_size=merged.config.vocab)
        save_gguf(merged, target, format=form, metadata=keys)
    typer.echo(target)


COMMAND = Command(
    name="export",
    run=export,
    examples=(
        "treadle export runs/quickstart",
        "treadle export runs/quickstart --format peft --to adapters/mine",
        "treadle export runs/quickstart --format Q4_K --to mine.gguf",
        "treadle export smollm2-135m-instruct --to smollm2 --dtype float32",
    ),
)
