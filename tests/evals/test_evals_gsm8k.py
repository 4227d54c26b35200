"""GSM8K: extraction, comparison and prompts against lm-eval's own task file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evals.lm_eval_oracle import TASKS, lm_eval_samples, tiny
from lm_eval.models.huggingface import HFLM

from treadle.evals.gsm8k import GSM8K
from treadle.evals.harness import evaluate
from treadle.evals.rows import Examples
from treadle.evals.shots import FirstShots
from treadle.inference.sampling import Sampling
from treadle.models.hub.load import load_model
from treadle.tokenizers.tokenizer import Tokenizer

YAML = {"include": str(TASKS / "gsm8k/gsm8k.yaml")}


class Recital(HFLM):
    """Says what it is given, whatever it is asked."""

    answers: list[str]
    asked: list[str]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self.asked = [request.args[0] for request in requests]
        return self.answers


def ending(answer: str, number: int) -> str:
    """Answers of many shapes: right, wrong, right in another dress, cut off."""
    steps, _, value = answer.partition("#### ")
    shapes = [
        answer,
        f"{steps}#### {int(value.replace(',', '')):,}",
        f"{steps}#### ${value}.",
        f"{steps}So it is {value}.",
        f"{steps}The answer is ${value}.00 in all.",
        steps,
        f"#### {value} and not #### 7",
        f"{value} ducks, minus-{value}",
        "I do not know...",
        "",
        f" {value}\n\nSo there are -{value} left",
        f"{steps}#### {value}0",
    ]
    return shapes[number % len(shapes)]


def test_matches_lm_eval(shared_data: Path, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    train = Examples(path=str(shared_data / "sft/gsm8k_train.jsonl.gz")).take(5)
    test = Examples(path=str(shared_data / "sft/gsm8k_test.jsonl.gz")).take(60)
    lm = Recital(pretrained=model.lm.model, tokenizer=model.lm.tokenizer)
    lm.answers = [ending(row["answer"], i) for i, row in enumerate(test)]
    rows = {"test": test, "train": train}
    theirs = lm_eval_samples(
        lm, {**YAML, "num_fewshot": 5, "fewshot_config": {"sampler": "first_n"}}, rows, tmp_path
    )
    task = GSM8K(
        rows=Examples(path=str(tmp_path / "test.jsonl")),
        shots=FirstShots(rows=Examples(path=str(tmp_path / "train.jsonl")), count=5),
    )
    items = task.items()
    assert [item.prompt for item in items] == lm.asked
    verdicts = set()
    for item, text in zip(items, lm.answers, strict=True):
        ours = task.marks(item, text)
        filters = {"strict-match": "strict", "flexible-extract": "flexible"}
        for other in (s for s in theirs if s["doc_id"] == item.index):
            name = filters[other["filter"]]
            assert ours[name] == other["exact_match"], (name, text, item.target)
            verdicts.add((name, ours[name]))
    assert len(verdicts) == 4


@pytest.mark.parametrize("prompt_length", ["short", "shots"])
def test_generates_what_transformers_generates(
    prompt_length: str, shared_data: Path, tmp_path: Path
) -> None:
    model = tiny(tmp_path / "model", context=2048)
    train = Examples(path=str(shared_data / "sft/gsm8k_train.jsonl.gz")).take(2)
    test = Examples(path=str(shared_data / "sft/gsm8k_test.jsonl.gz")).take(6)
    shots = 2 if prompt_length == "shots" else 0
    theirs = lm_eval_samples(
        model.lm,
        {
            **YAML,
            "num_fewshot": shots,
            "fewshot_config": {"sampler": "first_n"},
            "generation_kwargs": {"until": ["Question:", "water"], "max_gen_toks": 24},
        },
        {"test": test, "train": train},
        tmp_path,
    )
    path = Examples(path=str(tmp_path / "train.jsonl"))
    task = GSM8K(
        rows=Examples(path=str(tmp_path / "test.jsonl")),
        shots=FirstShots(rows=path, count=shots) if shots else None,
        sampling=Sampling(temperature=0.0, max_tokens=24, stop=("Question:", "water")),
    )
    loaded, tokenizer = load_model(model.folder).model, Tokenizer.load(model.folder)
    result = evaluate(loaded, tokenizer, [task], records=tmp_path / "records")
    records = Examples(path=str(next((tmp_path / "records").rglob("*.jsonl")))).take()
    texts = {record["index"]: record["output"]["text"] for record in records}
    expected = {s["doc_id"]: s["resps"][0][0] for s in theirs}
    assert texts == expected
    assert set(result.tasks["gsm8k"].scores) == {"strict", "flexible"}
