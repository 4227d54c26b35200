"""The evaluation step's own figures: exams, and how well a model foresees text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import TreadleError
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace, read_manifest
from treadle.core.progress import Silent
from treadle.core.results import read_samples
from treadle.data.documents import Documents
from treadle.data.problems import Problems
from treadle.data.records import Problem, Text, user
from treadle.evals.evaluate import Evaluate, Exam, Reading, perplexity
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Opened
from treadle.train.precision import FP32

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}:"


class Bytes(ModelSource):
    """A tiny model of bytes."""

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.folder / "tokenizer"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(tiny_model(), folder)


class Shelf(Documents):
    """Texts that are held out."""

    texts: tuple[str, ...] = ("one two three, four five", "six")

    def training(self):
        return iter(())

    def held_out(self):
        return (Text(text) for text in self.texts)


class Known(Problems):
    """Right is every problem below a number."""

    below: int

    def problem(self, index: int) -> Problem:
        return Problem((user(f"problem {index}"),), str(index), "known")

    def score(self, problem: Problem, completion: str) -> float:
        return float(int(problem.answer) < self.below)


def run(folder: Path, **changes) -> dict:
    step = Evaluate(
        name="measure",
        subject="base",
        model=Bytes(),
        sampling=Sampling(temperature=0.0, max_tokens=3),
        precision=FP32(),
        **changes,
    )
    execute(Pipeline(name="p", steps=(step,)), folder, Silent())
    return read_manifest(folder / "measure")["metrics"]


def test_exams_of_unequal_size_are_pooled_by_problem(tmp_path: Path) -> None:
    """Problems 3 to 6, of which 3 and 4 are right; problems 0 to 5, of which one is."""
    exams = (
        Exam(name="late", problems=Known(below=5), first=3, count=4),
        Exam(name="early", problems=Known(below=1), count=6),
    )
    metrics = run(tmp_path, exams=exams)
    values = {name: (f["value"], f["n"]) for name, f in metrics["results"].items()}
    assert values == {
        "overall": (pytest.approx(0.3), 10),
        "late": (0.5, 4),
        "early": (pytest.approx(1 / 6), 6),
    }
    samples = read_samples(tmp_path / "measure")
    assert [s["problem"] for s in samples] == [
        *(f"late-{i}" for i in range(3, 7)),
        *(f"early-{i}" for i in range(6)),
    ]
    assert samples[1]["prompt"] == "problem 4"
    assert [s["score"] for s in samples[:4]] == [1.0, 1.0, 0.0, 0.0]
    (alone,) = run(tmp_path / "alone", exams=exams[:1])["results"].items()
    assert (alone[0], alone[1]["value"]) == ("late", 0.5)


def test_perplexity_is_that_of_each_window_by_itself() -> None:
    """Cross-entropy by torch; the interval by the delta method for a ratio of sums."""
    tokenizer, model = byte_tokenizer(), tiny_model()
    reading = Reading(name="prose", documents=Shelf(), tokens=25, context=10)
    tokens = tokenizer.encode("one two three, four five\n\nsix\n\n")[:26]
    windows = [tokens[:10], tokens[10:20], tokens[20:26]]
    sums = []
    for window in windows:
        flat = torch.tensor(window)
        with torch.no_grad():
            logits = model.logits(model(flat))[:-1].double()
        sums.append(float(F.cross_entropy(logits, flat[1:], reduction="sum")))
    n = torch.tensor([9.0, 9.0, 5.0], dtype=torch.float64)
    losses = torch.tensor(sums, dtype=torch.float64)
    mean = losses.sum() / n.sum()
    found = perplexity(model, tokenizer, reading, Silent())
    assert (found["n"], found["unit"]) == (23, "perplexity")
    assert found["value"] == pytest.approx(float(mean.exp()), rel=1e-4)
    # var(sum l / sum n) = var(l - mean n) k / (sum n)^2
    spread = float((losses - mean * n).var(unbiased=True).mul(3).sqrt() / n.sum())
    assert found["low"] == pytest.approx(float((mean - 1.96 * spread).exp()), rel=1e-4)
    assert found["high"] == pytest.approx(float((mean + 1.96 * spread).exp()), rel=1e-4)
    whole = perplexity(model, tokenizer, reading.replace(context=100), Silent())
    assert (whole["n"], whole["low"], whole["high"]) == (25, None, None)


def test_readings_and_their_mistakes(tmp_path: Path) -> None:
    reading = Reading(name="prose", documents=Shelf(), tokens=25, context=10)
    results = run(tmp_path / "a", readings=(reading,))["results"]
    direct = perplexity(tiny_model(), byte_tokenizer(), reading, Silent())
    assert results == {"prose": pytest.approx(direct)}
    with pytest.raises(TreadleError, match=r"`prose`: windows of 129 tokens .* context of 128"):
        run(tmp_path / "b", readings=(reading.replace(context=129),))
    with pytest.raises(TreadleError, match="`prose`: its documents hold out no text"):
        run(tmp_path / "c", readings=(reading.replace(documents=Shelf(texts=())),))


def test_names_that_would_hide_each_other(tmp_path: Path) -> None:
    exam = Exam(name="prose", problems=Known(below=5))
    reading = Reading(name="prose", documents=Shelf())
    for changes in (
        {"exams": (exam, exam)},
        {"exams": (exam,), "readings": (reading,)},
        {"readings": (reading, reading)},
    ):
        with pytest.raises(TreadleError, match="two results would be called `prose`"):
            run(tmp_path, **changes)
    with pytest.raises(TreadleError, match="two results would be called `overall`"):
        run(tmp_path, exams=(exam.replace(name="overall"),))
