"""The harness: against lm-eval, what it keeps, what it spares, what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evals.lm_eval_oracle import TASKS, Tiny, lm_eval_samples, tiny

from treadle.core.config import dump, parse
from treadle.core.errors import TreadleError
from treadle.core.progress import Progress, Task
from treadle.evals.commonsense import ARC
from treadle.evals.generative import ChatPrompt, Extraction
from treadle.evals.gsm8k import GSM8K
from treadle.evals.harness import Results, evaluate
from treadle.evals.perplexity import windows
from treadle.evals.rows import Examples
from treadle.evals.shots import FirstShots, RandomShots, before
from treadle.evals.statistics import ratio
from treadle.evals.wikitext import WikiText
from treadle.models.decoder import DecoderModel
from treadle.models.hub.load import load_model
from treadle.tokenizers.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("model"), context=1024)


@pytest.fixture
def loaded(model: Tiny) -> tuple[DecoderModel, Tokenizer]:
    return load_model(model.folder).model, Tokenizer.load(model.folder)


def write_rows(path: Path, count: int = 9) -> Examples:
    rows = [
        {
            "question": f"Which is number {i}?",
            "choices": {"text": ["water", "the sun", f"{i}"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Examples(path=str(path))


def kept(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda r: r["index"])


def test_multiple_choice_matches_lm_eval(
    model: Tiny, loaded: tuple[DecoderModel, Tokenizer], shared_data: Path, tmp_path: Path
) -> None:
    """Three shots from the training split, on real questions."""
    rows = []
    for row in Examples(path=str(shared_data / "eval/arc_challenge.jsonl.gz")).take(43):
        labels = ["A", "B", "C", "D", "E"][: len(row["choices"])]
        question = row["query"].removeprefix("Question: ")
        choices = {"text": row["choices"], "label": labels}
        rows.append({"question": question, "choices": choices, "answerKey": labels[row["gold"]]})
    theirs = lm_eval_samples(
        model.lm,
        {
            "include": str(TASKS / "arc/arc_challenge.yaml"),
            "num_fewshot": 3,
            "fewshot_config": {"sampler": "first_n"},
        },
        {"test": rows[3:], "train": rows[:3]},
        tmp_path,
    )
    shots = FirstShots(rows=Examples(path=str(tmp_path / "train.jsonl")), count=3)
    task = ARC(rows=Examples(path=str(tmp_path / "test.jsonl")), shots=shots)
    result = evaluate(*loaded, [task], records=tmp_path / "records").tasks["arc"]
    for ours, other in zip(kept(tmp_path / "records"), theirs, strict=True):
        expected = [float(response[0][0]) for response in other["resps"]]
        assert ours["output"]["log_likelihoods"] == pytest.approx(expected, abs=2e-3)
        assert (ours["metrics"]["acc"], ours["metrics"]["acc_norm"]) == (
            other["acc"],
            other["acc_norm"],
        )
    for metric in ("acc", "acc_norm"):
        figure = result.scores[metric]
        assert figure["value"] == pytest.approx(np.mean([other[metric] for other in theirs]))
        assert figure["n"] == 40


def test_a_second_run_answers_nothing_twice(
    loaded: tuple[DecoderModel, Tokenizer], tmp_path: Path
) -> None:
    task = ARC(rows=write_rows(tmp_path / "rows.jsonl"), limit=4)
    folder = tmp_path / "records"
    first = evaluate(*loaded, [task], records=folder).tasks["arc"]
    again = evaluate(*loaded, [task], records=folder).tasks["arc"]
    longer = evaluate(*loaded, [task.replace(limit=None)], records=folder).tasks["arc"]
    assert (first.answered, again.answered, longer.answered) == (4, 0, 5)
    assert again.scores == first.scores
    assert longer.scores["acc"]["n"] == 9
    assert longer.scores == evaluate(*loaded, [task.replace(limit=None)]).tasks["arc"].scores


def test_records_show_question_and_answer(
    loaded: tuple[DecoderModel, Tokenizer], tmp_path: Path
) -> None:
    evaluate(*loaded, [ARC(rows=write_rows(tmp_path / "r.jsonl", 2))], records=tmp_path / "out")
    record = kept(tmp_path / "out")[1]
    assert record["contexts"][0] == "Question: Which is number 1?\nAnswer:"
    assert record["continuations"] == [" water", " the sun", " 1"]
    assert record["gold"] == 1
    assert set(record["metrics"]) == {"acc", "acc_norm", "acc_bytes"}
    picked = int(np.argmax(record["output"]["log_likelihoods"]))
    assert record["output"]["picked"]["acc"] == picked


def test_other_weights_and_other_tasks_are_asked_anew(
    loaded: tuple[DecoderModel, Tokenizer], tmp_path: Path
) -> None:
    network, tokenizer = loaded
    task = ARC(rows=write_rows(tmp_path / "rows.jsonl"))
    shots = FirstShots(rows=task.rows, count=1)
    folder = tmp_path / "records"
    evaluate(network, tokenizer, [task], records=folder)
    asked = evaluate(network, tokenizer, [task.replace(shots=shots)], records=folder)
    assert asked.tasks["arc"].answered == 9
    network.head.weight.data[3] += 1e-3
    assert evaluate(network, tokenizer, [task], records=folder).tasks["arc"].answered == 9


def test_a_torn_line_is_asked_again(loaded: tuple[DecoderModel, Tokenizer], tmp_path: Path) -> None:
    task = ARC(rows=write_rows(tmp_path / "rows.jsonl"))
    first = evaluate(*loaded, [task], records=tmp_path / "records").tasks["arc"]
    (path,) = (tmp_path / "records").rglob("*.jsonl")
    path.write_text(path.read_text()[:-40])
    second = evaluate(*loaded, [task], records=tmp_path / "records").tasks["arc"]
    assert second.answered == 1
    assert second.scores == first.scores
    assert len(kept(tmp_path / "records")) == 9


class Watch(Progress):
    """Remembers what it is told, and fails after a while."""

    def __init__(self, patience: int) -> None:
        self.told: list[float] = []
        self.patience = patience

    def task(self, name: str, total: float | None, *, expected: float | None = None) -> Task:
        self.told.append(total)
        watch = self

        class Bar(Task):
            def update(self, completed: float, *, note: str = "") -> None:
                watch.told.append(completed)
                if len(watch.told) > watch.patience:
                    raise KeyboardInterrupt

            def close(self) -> None:
                return

        return Bar()

    def say(self, line: str) -> None:
        return


def test_an_interrupted_run_goes_on(loaded: tuple[DecoderModel, Tokenizer], tmp_path: Path) -> None:
    task, folder = ARC(rows=write_rows(tmp_path / "rows.jsonl")), tmp_path / "records"
    watch = Watch(patience=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*loaded, [task], records=folder, tokens=64, progress=watch)
    assert watch.told == [9, 1, 2, 3, 4]
    rest = evaluate(*loaded, [task], records=folder, progress=(watch := Watch(99)))
    assert rest.tasks["arc"].answered == 5
    assert watch.told == [9, 5, 6, 7, 8, 9]


def test_results_are_plain(loaded: tuple[DecoderModel, Tokenizer], tmp_path: Path) -> None:
    results = evaluate(*loaded, [ARC(rows=write_rows(tmp_path / "rows.jsonl"))])
    assert isinstance(results, Results)
    results.save(tmp_path / "results.json")
    read = json.loads((tmp_path / "results.json").read_text())
    assert read == results.plain()
    figure = read["tasks"]["arc"]["scores"]["acc"]
    assert figure["low"] < figure["value"] < figure["high"]
    assert (figure["n"], figure["unit"]) == (9, "accuracy")


def test_the_mode_of_the_model_is_left_as_it_was(
    loaded: tuple[DecoderModel, Tokenizer], tmp_path: Path
) -> None:
    network, tokenizer = loaded
    network.train()
    evaluate(network, tokenizer, [ARC(rows=write_rows(tmp_path / "rows.jsonl"))])
    assert network.training


def test_tasks_are_configurations() -> None:
    shots = RandomShots(rows=Examples(path="train.jsonl"), count=2, seed=7)
    for task in (
        ARC(rows=Examples(path="hf:allenai/ai2_arc", subset="ARC-Easy"), shots=shots),
        GSM8K(rows=Examples(path="t.jsonl"), shots=shots, prompting=ChatPrompt()),
        WikiText(rows=Examples(path="wiki.txt"), window=256, limit=3),
    ):
        assert parse(dump(task), expect=type(task)) == task


def test_mistakes_are_named(loaded: tuple[DecoderModel, Tokenizer], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    task = ARC(rows=rows)
    with pytest.raises(TreadleError, match="two tasks are called `arc`: give one another `name`"):
        evaluate(*loaded, [task, task])
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(TreadleError, match="task `arc` has no rows"):
        evaluate(*loaded, [ARC(rows=Examples(path=str(tmp_path / "none.jsonl")))])
    with pytest.raises(TreadleError, match=r"5 shots are wanted, but there are 1 .* to choose"):
        evaluate(*loaded, [task.replace(shots=FirstShots(rows=rows, count=5))])
    with pytest.raises(TreadleError, match=r"overlap=9 exceeds the window of 8 tokens"):
        evaluate(*loaded, [WikiText(rows=Examples(path=__file__), window=8, overlap=9, limit=1)])


def test_random_shots_depend_on_the_question_and_the_seed_alone() -> None:
    pool = [f"shot {i}" for i in range(20)]

    def chosen(seed: int, index: int, own: str = "") -> str:
        shots = RandomShots(rows=Examples(path="unused"), count=4, seed=seed)
        return before(shots, pool, index, own)

    assert chosen(0, 3) == chosen(0, 3)
    assert len({chosen(seed, index) for seed in (0, 1) for index in range(5)}) == 10
    assert len(set(chosen(0, 0).split("\n\n")) - {""}) == 4
    assert all("shot 7\n" not in chosen(0, index, own="shot 7") for index in range(50))


@pytest.mark.parametrize(
    ("pattern", "match", "text", "found"),
    [
        (r"\d+", 0, "12 and 34", "12"),
        (r"\d+", -1, "12 and 34", "34"),
        (r"\d+", 2, "12 and 34", None),
        (r"\d+", -3, "12 and 34", None),
        (r"#(\d+)|=(\d+)", 0, "x =5", "5"),
        (r"answer: (.*)", 0, "answer:  yes ", "yes"),
    ],
)
def test_extraction(pattern: str, match: int, text: str, found: str | None) -> None:
    assert Extraction(name="x", pattern=pattern, match=match)(text) == found


def test_interval_of_a_ratio_covers_the_truth() -> None:
    """In about 95 of 100 samples of documents of unequal length."""
    generator = np.random.default_rng(0)
    hits = 0
    for number in range(200):
        lengths = generator.integers(20, 400, 60).astype(float)
        losses = lengths * 2.0 + generator.normal(0, 1, 60) * lengths * 0.3
        figure = ratio(losses, lengths, np.exp, "perplexity", seed=number)
        low, high = figure["low"], figure["high"]
        assert low is not None
        assert high is not None
        hits += low < math.exp(2.0) < high
    assert 180 <= hits <= 199
    assert ratio([3.0], [2.0], np.exp, "perplexity")["low"] is None


def test_windows_of_nothing() -> None:
    empty: Sequence[int] = []
    assert list(windows(0, empty, 4, 1)) == []
