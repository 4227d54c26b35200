"""MMLU against lm-eval's own task files, shots from the development split."""

from __future__ import annotations

from pathlib import Path

import pytest
from evals.lm_eval_oracle import TASKS, lm_eval_samples, tiny

from treadle.evals.harness import evaluate
from treadle.evals.mmlu import MMLU
from treadle.evals.rows import Examples
from treadle.evals.shots import FirstShots
from treadle.models.hub.load import load_model
from treadle.tokenizers.tokenizer import Tokenizer

SUBJECTS = ("anatomy", "high_school_biology")
ROWS = 12


@pytest.mark.parametrize("bos", [False, True])
def test_matches_lm_eval(bos: bool, shared_data: Path, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", context=2048, bos=bos)
    dev = Examples(path=str(shared_data / "eval/mmlu_dev.jsonl.gz"))
    test = Examples(path=str(shared_data / "eval/mmlu_test.jsonl.gz"))
    chosen = []
    expected = {}
    for subject in SUBJECTS:
        folder = tmp_path / subject
        folder.mkdir()
        train = [dict(r, answer="ABCD".index(r["answer"])) for r in dev.open()
                 if r["subject"] == subject]  # fmt: skip
        rows = [dict(r, answer="ABCD".index(r["answer"])) for r in test.open()
                if r["subject"] == subject][:ROWS]  # fmt: skip
        theirs = lm_eval_samples(
            model.lm,
            {"include": str(TASKS / f"mmlu/default/mmlu_{subject}.yaml"), "num_fewshot": 5},
            {"test": rows, "train": train},
            folder,
        )
        chosen += rows
        expected[subject] = theirs
    path = tmp_path / "chosen.jsonl"
    path.write_text("".join((tmp_path / s / "test.jsonl").read_text() for s in SUBJECTS))
    task = MMLU(rows=Examples(path=str(path)), shots=FirstShots(rows=dev, count=5))
    loaded, tokenizer = load_model(model.folder).model, Tokenizer.load(model.folder)
    result = evaluate(loaded, tokenizer, [task], records=tmp_path / "records", tokens=3000)
    records = Examples(path=str(next((tmp_path / "records").rglob("*.jsonl")))).take()
    records.sort(key=lambda record: record["index"])
    flat = [sample for subject in SUBJECTS for sample in expected[subject]]
    for ours, other in zip(records, flat, strict=True):
        found = [float(response[0][0]) for response in other["resps"]]
        assert ours["output"]["log_likelihoods"] == pytest.approx(found, abs=2e-3)
        assert ours["metrics"]["acc"] == other["acc"]
    scores = result.tasks["mmlu"]
    hits = [other["acc"] for other in flat]
    assert 0 < sum(hits) < len(hits)
    assert scores.scores["acc"]["value"] == pytest.approx(sum(hits) / len(hits))
    for number, subject in enumerate(SUBJECTS):
        part = hits[number * ROWS : (number + 1) * ROWS]
        assert scores.groups[subject]["acc"]["value"] == pytest.approx(sum(part) / ROWS)
