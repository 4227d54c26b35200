"""`treadle embed`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from treadle.cli.chat import Model
from treadle.cli.command import Command
from treadle.cli.texts import File, Key, Longest, Texts, texts_of


def embed(
    model: Model,
    texts: Texts = None,
    file: File = None,
    key: Key = "text",
    dims: Annotated[
        int | None, typer.Option("--dims", help="Only the first so many numbers (Matryoshka).")
    ] = None,
    near: Annotated[
        str | None, typer.Option("--near", help="Rank the texts by their likeness to this one.")
    ] = None,
    longest: Longest = 256,
) -> None:
    """Turn texts into vectors of unit length, one JSON object a line, or rank them by likeness."""
    from treadle.cli.models import open_model
    from treadle.inference.reader import Reader, unit
    from treadle.models.hub.sentence import with_vectors
    from treadle.tokenizers.load import tokenizer_of

    found = texts_of(texts, file, key)
    opened = open_model(model)
    ready = with_vectors(opened).requires_grad_(False).eval()
    reader = Reader(ready, tokenizer_of(opened), longest=longest)
    vectors = unit(reader.texts(found), dims)
    if near is None:
        for (text, _), vector in zip(found, vectors.tolist(), strict=True):
            typer.echo(json.dumps({"text": text, "embedding": vector}, ensure_ascii=False))
        return
    likeness = (vectors @ unit(reader.texts([(near, None)]), dims)[0]).tolist()
    for value, (text, _) in sorted(zip(likeness, found, strict=True), key=lambda row: -row[0]):
        typer.echo(f"{value:.4f}\t{text}")


COMMAND = Command(
    name="embed",
    run=embed,
    examples=(
        "treadle embed all-minilm-l6-v2 'The loom was warm.'",
        "treadle embed runs/embed-train --file texts.jsonl --dims 64 > vectors.jsonl",
        "treadle embed all-minilm-l6-v2 --file notes.txt --near 'how do I thread it?'",
    ),
)
