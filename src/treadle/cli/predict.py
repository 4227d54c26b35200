"""`treadle predict`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli.chat import Model
from treadle.cli.command import Command
from treadle.cli.texts import File, Key, Longest, Texts, texts_of

if TYPE_CHECKING:
    from treadle.inference.reader import Pair, Reader


def predict(
    model: Model,
    texts: Texts = None,
    file: File = None,
    key: Key = "text",
    second: Annotated[
        str | None, typer.Option("--second", help="Second text of a pair, the same for all.")
    ] = None,
    second_key: Annotated[
        str | None, typer.Option("--second-key", help="Field of a row that holds the second text.")
    ] = None,
    longest: Longest = 256,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Say what a model with a head for a task finds in texts: labels, spans or numbers.

    A model that labels words is given texts whose words spaces divide.
    """
    from treadle.cli.models import open_model
    from treadle.core.errors import TreadleError
    from treadle.inference.reader import Reader
    from treadle.models.heads import TokenReadout, VectorReadout, task_head
    from treadle.tokenizers.load import tokenizer_of

    pairs = texts_of(texts, file, key, second, second_key)
    opened = open_model(model)
    reader = Reader(
        opened.model.requires_grad_(False).eval(), tokenizer_of(opened), longest=longest
    )
    head = task_head(reader.model)
    if isinstance(head, VectorReadout):
        raise TreadleError("the model gives vectors: use `treadle embed`")
    if isinstance(head, TokenReadout) and any(second is not None for _, second in pairs):
        raise TreadleError("the model labels words: it reads one text, not a pair")
    found = _spans(reader, pairs) if isinstance(head, TokenReadout) else _whole(reader, pairs)
    for row in found:
        typer.echo(json.dumps(row, ensure_ascii=False) if as_json else _line(row))


def _whole(reader: Reader, pairs: list[Pair]) -> list[dict[str, Any]]:
    """A label with its probability, or a number, for each text or pair."""
    outputs, labels = reader.texts(pairs), reader.head.labels
    rows = []
    for (first, second), output in zip(pairs, outputs, strict=True):
        row: dict[str, Any] = {"text": first}
        if second is not None:
            row["second"] = second
        if labels:
            shares = output.softmax(-1).tolist()
            best = max(range(len(labels)), key=shares.__getitem__)
            row["label"], row["probability"] = labels[best], shares[best]
            row["probabilities"] = dict(zip(labels, shares, strict=True))
        else:
            row["score"] = float(output[0])
        rows.append(row)
    return rows


def _spans(reader: Reader, pairs: list[Pair]) -> list[dict[str, Any]]:
    """The spans of each text, and its words with their labels."""
    from treadle.evals.spans import OUTSIDE, spans_of

    words = [first.split() for first, _ in pairs]
    rows = []
    for mine, logits in zip(words, reader.words(words), strict=True):
        tags = [reader.head.labels[i] for i in logits.argmax(-1).tolist()]
        tags += [OUTSIDE] * (len(mine) - len(tags))
        spans = [
            {
                "type": s.type,
                "text": " ".join(mine[s.start : s.end]),
                "start": s.start,
                "end": s.end,
            }
            for s in sorted(spans_of(tags), key=lambda s: s.start)
        ]
        rows.append({"text": " ".join(mine), "spans": spans, "words": mine, "tags": tags})
    return rows


def _line(row: dict[str, Any]) -> str:
    if "spans" in row:
        marked = ", ".join(f"{s['text']} ({s['type']})" for s in row["spans"])
        return f"{marked or '-'}\t{row['text']}"
    text = "\t".join(row[name] for name in ("text", "second") if name in row)
    if "label" in row:
        return f"{row['label']}\t{row['probability']:.3f}\t{text}"
    return f"{row['score']:.4f}\t{text}"


COMMAND = Command(
    name="predict",
    run=predict,
    examples=(
        "treadle predict runs/classify 'what a lovely loom'",
        "treadle predict runs/ner --file tweets.jsonl --json",
        "treadle predict runs/cross-encoder 'who wove it?' --second 'A weaver did.'",
    ),
)
