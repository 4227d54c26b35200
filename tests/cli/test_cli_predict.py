"""`treadle predict` and `treadle embed` on models that a run has just trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_readers import WORDS, framed_tokenizer, tiny_encoder, write_rows
from typer.testing import CliRunner, Result

from treadle.cli.app import build
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline
from treadle.core.progress import Silent
from treadle.data.labelled import ClassTexts, RatedTexts, TaggedTexts, TaskFiles
from treadle.data.matches import Matches
from treadle.data.source import Source
from treadle.data.split import LeakFreeSplit
from treadle.data.task_formats import ClassFormat, MatchFormat, RatedFormat, TagFormat
from treadle.models.heads import ClassHead, EmbeddingHead, NumberHead, TokenHead
from treadle.models.hub.save import save_hf
from treadle.models.source import Pretrained
from treadle.models.transform import Transform
from treadle.objectives.classify import Classify, Relevance
from treadle.objectives.embed import Embed
from treadle.objectives.objective import Objective
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit
from treadle.train.run import Run

HOT = {"warm", "red"}


def treadle(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(build(), list(arguments), input=typed)


def trained(
    folder: Path, head: Transform, source: Source, objective: Objective, steps: int = 40
) -> str:
    """A run's folder with a tiny encoder that has learned its few examples."""
    base = folder / "base"
    if not base.exists():
        save_hf(tiny_encoder(), base)
        framed_tokenizer().save(base)
    run = Run(
        model=Pretrained(name=str(base)),
        transforms=(head,),
        source=source,
        objective=objective,
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(),
        fit=Fit(steps=steps),
    )
    out = folder / type(head).__name__
    execute(Pipeline(name="tiny", steps=(run,)), out, Silent())
    return str(out)


def files(folder: Path, rows, format) -> TaskFiles:
    path = write_rows(folder / f"{type(format).__name__}.jsonl", rows)
    return TaskFiles(path=path, format=format, parts=LeakFreeSplit(validation=0, test=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def classes(folder: Path) -> str:
    rows = [{"text": w, "label": "hot" if w in HOT else "mild"} for w in WORDS]
    source = ClassTexts(texts=files(folder, rows, ClassFormat()), per_step=10)
    return trained(folder, ClassHead(labels=("mild", "hot")), source, Classify())


@pytest.fixture(scope="module")
def tags(folder: Path) -> str:
    rows = [
        {"tokens": [a, b], "tags": ["B-x" if a in HOT else "O", "I-x" if a in HOT else "O"]}
        for a in WORDS
        for b in ("loom", "thread")
    ]
    source = TaggedTexts(texts=files(folder, rows, TagFormat()), per_step=20)
    return trained(folder, TokenHead(labels=("O", "B-x", "I-x")), source, Classify())


@pytest.fixture(scope="module")
def vectors(folder: Path) -> str:
    rows = [{"query": w, "positive": f"{w} loom"} for w in WORDS]
    source = Matches(texts=files(folder, rows, MatchFormat()), per_step=10)
    return trained(folder, EmbeddingHead(), source, Embed(), steps=20)


def test_labels_of_texts_and_of_files(classes: str, tmp_path: Path) -> None:
    shown = treadle("predict", classes, "warm", "old", "--json")
    assert shown.exit_code == 0, shown.output
    hot, mild = (json.loads(line) for line in shown.stdout.splitlines())
    assert (hot["label"], mild["label"]) == ("hot", "mild")
    assert hot["probabilities"]["hot"] == hot["probability"] > 0.5
    assert sum(hot["probabilities"].values()) == pytest.approx(1)
    path = write_rows(tmp_path / "a.jsonl", [{"said": w} for w in WORDS])
    lines = treadle("predict", classes, "--file", path, "--key", "said").stdout.splitlines()
    assert {line.split("\t")[2] for line in lines if line.startswith("hot")} == HOT
    plain = tmp_path / "a.txt"
    plain.write_text("red\nblue\n")
    assert treadle("predict", classes, "-f", str(plain)).stdout.startswith("hot\t")
    assert treadle("predict", classes, typed="cold\nwarm\n").stdout.splitlines()[1][:3] == "hot"


def test_spans_of_words(tags: str) -> None:
    shown = treadle("predict", tags, "warm loom", "cold thread", "--json")
    first, second = (json.loads(line) for line in shown.stdout.splitlines())
    assert first["spans"] == [{"type": "x", "text": "warm loom", "start": 0, "end": 2}]
    assert second["spans"] == []
    assert second["tags"] == ["O", "O"]
    assert treadle("predict", tags, "red thread").stdout == "red thread (x)\tred thread\n"


def test_scores_of_pairs(folder: Path) -> None:
    rows = [
        {"text": a, "second": b, "score": float((a in HOT) == (b in HOT))}
        for a in WORDS
        for b in WORDS
    ]
    source = RatedTexts(texts=files(folder, rows, RatedFormat(second="second")), per_step=50)
    run = trained(folder, NumberHead(), source, Relevance(), steps=60)
    pairs = write_rows(folder / "p.jsonl", [{"text": "warm", "b": b} for b in ("red", "blue")])
    shown = treadle("predict", run, "-f", pairs, "--second-key", "b", "--json")
    near, far = (json.loads(line)["score"] for line in shown.stdout.splitlines())
    assert near > far
    again = treadle("predict", run, "warm", "--second", "red").stdout
    assert float(again.split("\t")[0]) == pytest.approx(near, abs=1e-3)
    assert again.endswith("\twarm\tred\n")


def test_vectors_and_neighbours(vectors: str) -> None:
    shown = treadle("embed", vectors, "warm", "blue loom")
    assert shown.exit_code == 0, shown.output
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["warm", "blue loom"]
    whole = torch.tensor([row["embedding"] for row in rows])
    assert whole.norm(dim=1).tolist() == pytest.approx([1, 1])
    short = json.loads(treadle("embed", vectors, "warm", "--dims", "4").stdout)["embedding"]
    expected = whole[0, :4] / whole[0, :4].norm()
    assert short == pytest.approx(expected.tolist(), abs=1e-5)
    ranked = treadle("embed", vectors, *(f"{w} loom" for w in WORDS), "--near", "blue").stdout
    assert ranked.splitlines()[0].endswith("\tblue loom")


@pytest.mark.parametrize(
    ("command", "arguments", "found"),
    [
        ("predict", ("warm", ""), "text 1 is empty"),
        ("predict", ("-f", "none.jsonl"), "none.jsonl: no such file"),
        ("predict", ("warm", "-f", "none.jsonl"), "give texts or --file, not both"),
        ("predict", ("warm", "--second-key", "b"), "names a field of the rows of a --file"),
        ("predict", ("warm", "--longest", "4", "--second", "red"), "longest=4 leaves no room"),
        ("embed", ("warm",), "trained for another task: use `treadle predict`"),
    ],
)
def test_mistakes_are_named(
    classes: str, command: str, arguments: tuple[str, ...], found: str
) -> None:
    shown = treadle(command, classes, *arguments)
    assert shown.exit_code == 2, shown.output
    assert found in shown.stderr


def test_models_for_other_things(tags: str, vectors: str, folder: Path) -> None:
    for arguments, found in (
        (("predict", vectors, "warm"), "the model gives vectors: use `treadle embed`"),
        (("predict", tags, "warm", "--second", "red"), "it reads one text, not a pair"),
        (("predict", str(folder / "base"), "warm"), "no head for a task: add one"),
        (("generate", vectors, "warm"), "is an encoder"),
        (("embed", vectors, "warm", "--dims", "99"), "99 dimensions: this model's embeddings"),
        (("embed", vectors), "there is no text"),
    ):
        shown = treadle(*arguments, typed="")
        assert shown.exit_code == 2, shown.output
        assert found in shown.stderr, arguments
