"""Commonsense tasks against lm-eval's own task files, example by example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evals.lm_eval_oracle import TASKS, Tiny, lm_eval_samples, tiny

from treadle.core.errors import FileFormatError
from treadle.evals.commonsense import ARC, PIQA, BoolQ, HellaSwag, Winogrande
from treadle.evals.harness import evaluate
from treadle.evals.multiple_choice import MultipleChoice
from treadle.evals.rows import Examples
from treadle.models.hub.load import load_model
from treadle.tokenizers.tokenizer import Tokenizer

ROWS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("model"))


def arc(row: dict[str, Any]) -> dict[str, Any]:
    labels = ["A", "B", "C", "D", "E"][: len(row["choices"])]
    return {
        "question": row["query"].removeprefix("Question: "),
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def piqa(row: dict[str, Any]) -> dict[str, Any]:
    one, two = row["choices"]
    goal = row["query"].removeprefix("Question: ").rstrip()
    return {"goal": goal, "sol1": one, "sol2": two, "label": row["gold"]}


def hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    first, second = row["query"].split()[:2]
    return {
        "activity_label": "Making  things",
        "ctx_a": f"[header] How to [title] {first}",
        "ctx_b": f"{second} in the kitchen",
        "endings": [f"[step] {c} [title] done" for c in row["choices"]],
        "label": str(row["gold"]),
    }


def boolq(row: dict[str, Any]) -> dict[str, Any]:
    passage, _, question = row["query"].removeprefix("Passage: ").partition("\nQuestion: ")
    return {"passage": passage, "question": question.strip().rstrip("?"), "label": row["gold"]}


def winogrande(row: dict[str, Any]) -> dict[str, Any]:
    one, two = (text.split()[-1] for text in row["context_options"])
    start = row["context_options"][0].removesuffix(one)
    return {
        "sentence": f"{start}_ {row['continuation']}",
        "option1": one,
        "option2": two,
        "answer": str(row["gold"] + 1),
    }


CASES = {
    "arc": ("eval/arc_easy.jsonl.gz", arc, ARC, "arc/arc_easy.yaml"),
    "piqa": ("eval/piqa.jsonl.gz", piqa, PIQA, "piqa/piqa.yaml"),
    "hellaswag": ("eval/arc_challenge.jsonl.gz", hellaswag, HellaSwag, "hellaswag/hellaswag.yaml"),
    "boolq": ("eval/boolq.jsonl.gz", boolq, BoolQ, "super_glue/boolq/default.yaml"),
    "winogrande": (
        "eval/winogrande.jsonl.gz",
        winogrande,
        Winogrande,
        "winogrande/default.yaml",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_lm_eval(case: str, model: Tiny, shared_data: Path, tmp_path: Path) -> None:
    file, form, kind, yaml = CASES[case]
    prepared = Examples(path=str(shared_data / file)).take(ROWS)
    hub = [form(dict(row)) for row in prepared]
    theirs = lm_eval_samples(model.lm, {"include": str(TASKS / yaml)}, {"test": hub}, tmp_path)

    loaded, tokenizer = load_model(model.folder).model, Tokenizer.load(model.folder)
    task: MultipleChoice = kind(rows=Examples(path=str(tmp_path / "test.jsonl")))
    result = evaluate(loaded, tokenizer, [task], records=tmp_path / "records", tokens=1500)
    ours = list(Examples(path=str(next((tmp_path / "records").rglob("*.jsonl")))).open())
    ours.sort(key=lambda record: record["index"])

    assert len(ours) == len(theirs) == ROWS
    for mine, other in zip(ours, theirs, strict=True):
        expected = [float(response[0][0]) for response in other["resps"]]
        assert mine["output"]["log_likelihoods"] == pytest.approx(expected, abs=2e-3)
        for metric in ("acc", "acc_norm"):
            if metric in other:
                assert mine["metrics"][metric] == other[metric], (mine, other)
    hits = sum(other["acc"] for other in theirs)
    assert 0 < hits < ROWS
    assert result.tasks[case].scores["acc"]["value"] == pytest.approx(hits / ROWS)


@pytest.mark.parametrize("case", ["arc", "piqa", "winogrande"])
def test_prepared_rows_are_the_same_questions(case: str, shared_data: Path) -> None:
    file, form, kind, _ = CASES[case]
    rows = Examples(path=str(shared_data / file))
    task = kind(rows=rows)
    for row in rows.take(50):
        assert task.question(row) == task.question(form(dict(row)))


def test_unknown_rows_are_named() -> None:
    task = ARC(rows=Examples(path="unused.jsonl"))
    with pytest.raises(FileFormatError, match=r"task `arc` cannot read .* fields prompt, target"):
        task.question({"prompt": "?", "target": "!"})
