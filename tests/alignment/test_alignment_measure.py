"""Agreement with held-out pairs against a loop over separate rows, alone and as a change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pair_rows import answer_logprobs
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.measure import Judge, LikelihoodOf, MeasurePreferences, SumOfLikelihoods
from treadle.alignment.preferences import PairFiles
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace, read_manifest
from treadle.data.split import LeakFreeSplit
from treadle.models.source import ModelSource, Opened
from treadle.train.precision import FP32

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
ROWS = [
    {"prompt": f"q{i}", "chosen": f"{i} yes", "rejected": f"never {i * 7}"} for i in range(12)
] + [{"prompt": "q", "chosen": "same", "rejected": "same"}]


class SeededModel(ModelSource):
    """A tiny model of bytes with some likings."""

    seed: int = 0

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.folder / "tokenizer"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(tiny_model(seed=self.seed), folder)


def by_hand(seed: int, mean: bool) -> list[tuple[float, float]]:
    model, encode = tiny_model(seed=seed), byte_tokenizer().encode
    found = []
    for row in ROWS[:-1]:
        prompt = encode(f"u:{row['prompt']}\na:", parse_special=False)
        rows = [
            answer_logprobs(model, prompt, ids).detach()
            for ids in (encode(f"{row[k]}\n", parse_special=False) for k in ("chosen", "rejected"))
        ]
        found.append(tuple(float(r.mean() if mean else r.sum()) for r in rows))
    return found


@pytest.mark.parametrize("judge", [LikelihoodOf(), SumOfLikelihoods()])
@pytest.mark.parametrize("against", [None, SeededModel(seed=1)])
def test_agreement_is_that_of_separate_rows(
    judge: Judge, against: SeededModel | None, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    step = MeasurePreferences(
        name="measure",
        subject="tiny",
        model=SeededModel(),
        pairs=PairFiles(path=str(path), parts=LeakFreeSplit(validation=0, test=0)),
        judge=judge,
        against=against,
        tokens=60,
        precision=FP32(),
    )
    execute(Pipeline(name="p", steps=(step,)), tmp_path / "run")
    metrics = read_manifest(tmp_path / "run" / "measure")["metrics"]
    mean = isinstance(judge, LikelihoodOf)
    margins = [a - b for a, b in by_hand(0, mean)]
    if against is not None:
        margins = [m - (a - b) for m, (a, b) in zip(margins, by_hand(1, mean), strict=True)]
    name = "agreement" if against is None else "agreement of the change"
    assert metrics["results"][name]["value"] == pytest.approx(sum(m > 0 for m in margins) / 12)
    assert metrics["mean_margin"] == pytest.approx(sum(margins) / 12, rel=1e-3, abs=1e-3)
    assert metrics["pairs_left_out"] == 1
