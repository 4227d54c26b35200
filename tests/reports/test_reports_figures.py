"""What a report computes: smoothing, thinning, comparison, samples, numbers."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from treadle.core.results import Figure, Sample, accuracy, write_samples
from treadle.reports import numbers
from treadle.reports.curves import POINTS, read_curves, skipped_steps, smooth, thin
from treadle.reports.document import clean, seeds
from treadle.reports.folder import RunFolder
from treadle.reports.samples import LONGEST, pick, shorten
from treadle.reports.stages import Stage, compare
from treadle.reports.words import sentences

# Curves


def test_smoothing_keeps_a_level_and_follows_a_slope() -> None:
    assert smooth([2.5] * 50) == pytest.approx([2.5] * 50)
    line = [float(i) for i in range(100)]
    assert smooth(line)[5:-5] == pytest.approx(line[5:-5])


def test_smoothing_is_the_mean_of_the_window() -> None:
    draw = random.Random(0)
    values = [draw.random() for _ in range(60)]
    for place, value in enumerate(smooth(values)):
        window = values[max(0, place - 3) : place + 4]
        assert value == pytest.approx(sum(window) / len(window))


def test_thinning_keeps_ends_and_spikes() -> None:
    values = [0.0] * 10_000
    values[4321], values[8765] = 7.0, -7.0
    steps, kept = thin(range(10_000), values)
    assert len(steps) == len(kept) <= POINTS
    assert {(0, 0.0), (4321, 7.0), (8765, -7.0), (9999, 0.0)} <= set(zip(steps, kept, strict=True))
    assert steps == sorted(steps)


def test_few_points_are_all_kept() -> None:
    assert thin([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


def test_curves_of_a_file(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "zeal": 1.0, "lr": 0.1, "loss": 3.0, "tokens": 10, "seconds": 2.0},
        {"step": 2, "lr": 0.2, "loss": None, "skipped": True, "note": "x"},
        {"step": 2, "heldout_loss": 5},
        {"step": 2, "lr": 0.3},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "lo')
    curves = {c.metric: (c.steps, c.values) for c in read_curves(path)}
    assert list(curves) == ["loss", "lr", "zeal", "tokens/s", "heldout_loss"]
    assert curves["lr"] == ((1, 2), (0.1, 0.3))
    assert curves["loss"] == ((1,), (3.0,))
    assert curves["tokens/s"] == ((1,), (5.0,))
    assert skipped_steps(path) == 1
    assert read_curves(tmp_path / "absent") == []


# Comparison


@pytest.mark.parametrize("cells", [(14, 50, 2, 56), (5, 0, 0, 5), (0, 10, 0, 0), (1, 3, 9, 2)])
def test_the_interval_is_that_of_agresti_and_min(
    tmp_path: Path, cells: tuple[int, int, int, int]
) -> None:
    """Against their formula on the table with 0.5 added to each cell."""
    both, fixed, broken, neither = cells
    pairs = [(1, 1)] * both + [(0, 1)] * fixed + [(1, 0)] * broken + [(0, 0)] * neither
    for side, stage in enumerate(("a", "b")):
        (tmp_path / stage).mkdir()
        write_samples(
            tmp_path / stage, [row(str(i), float(pair[side])) for i, pair in enumerate(pairs)]
        )
    found = compare(stage_of("a"), stage_of("b"), RunFolder(tmp_path, "run", "", ()))
    assert found is not None
    n = len(pairs) + 2
    p12, p21 = (broken + 0.5) / n, (fixed + 0.5) / n
    error = math.sqrt((p12 + p21 - (p21 - p12) ** 2) / n)
    middle = p21 - p12
    assert found.low == pytest.approx(max(-1.0, middle - 1.959964 * error), abs=1e-6)
    assert found.high == pytest.approx(min(1.0, middle + 1.959964 * error), abs=1e-6)
    assert found.difference == pytest.approx((fixed - broken) / len(pairs))
    assert (found.right_right, found.wrong_right, found.right_wrong, found.wrong_wrong) == cells


def row(problem: str, score: float) -> Sample:
    return Sample(
        problem=problem, task="sum", prompt="?", answer=f"{score}", expected="1", score=score
    )


def stage_of(name: str) -> Stage:
    return Stage(subject=name, baseline=False, evaluations=(name,))


# Words


PATH = ("base", "sft", "quantised")


def measured(name: str, right: int) -> Stage:
    return Stage(
        subject=name,
        baseline=False,
        made_from=PATH[: PATH.index(name)],
        results={"sum": accuracy([1.0] * right + [0.0] * (100 - right))},
    )


def test_a_better_stage_on_the_way_is_named() -> None:
    stages = [measured("base", 1), measured("sft", 52), measured("quantised", 4)]
    said = " ".join(sentences("run", stages, None, [], [], []))
    assert "The final model (quantised) answers 4.0%" in said
    assert "An earlier stage was better: sft with 52.0%" in said
    fine = [measured("base", 1), measured("sft", 52), measured("quantised", 47)]
    assert "An earlier stage" not in " ".join(sentences("run", fine, None, [], [], []))


def test_a_difference_by_chance_is_called_that() -> None:
    said = " ".join(sentences("run", [measured("base", 10), measured("sft", 14)], None, [], [], []))
    assert "The intervals overlap: chance alone may explain the difference." in said
    said = " ".join(sentences("run", [measured("base", 60), measured("sft", 14)], None, [], [], []))
    assert "It became worse: the intervals do not overlap." in said


def test_before_is_what_was_measured_alike() -> None:
    """A reward model on the way was measured by something else."""
    agreement = {"agreement": accuracy([1.0, 0.0])}
    judge = Stage(subject="reward", baseline=False, made_from=(), results=agreement)
    last = replace(measured("sft", 41), made_from=("reward", "base"))
    said = " ".join(sentences("run", [judge, measured("base", 16), last], None, [], [], []))
    assert "before (base) it was 16.0%" in said
    assert "different tasks" not in said


def test_different_tasks_do_not_compare() -> None:
    gcd = {"gcd": accuracy([1.0])}
    other = Stage(subject="sft", baseline=False, made_from=("base",), results=gcd)
    said = " ".join(sentences("run", [measured("base", 1), other], None, [], [], []))
    assert "different tasks and do not compare" in said


# Samples


def test_samples_come_from_each_kind_of_change() -> None:
    before = {str(i): row(str(i), float(i % 2)) for i in range(40)}
    after = {str(i): row(str(i), float(i % 4 < 2)) for i in range(40)}
    kinds = [(p.before.right, p.after.right) for p in pick(before, after, 8)]  # type: ignore[union-attr]
    assert {k: kinds.count(k) for k in kinds} == {
        (False, True): 2,
        (True, False): 2,
        (True, True): 2,
        (False, False): 2,
    }
    assert pick(before, after, 8) == pick(dict(reversed(before.items())), after, 8)


def test_samples_of_one_side_only() -> None:
    after = {"x": row("x", 1.0)}
    (pair,) = pick({}, after, 5)
    assert pair.before is None
    assert pair.after is not None


def test_long_texts_are_cut_and_say_so() -> None:
    assert shorten("a" * LONGEST) == "a" * LONGEST
    assert shorten("a" * (LONGEST + 1200)).endswith("… (1,200 more characters)")


# Plain data


def test_clean_leaves_valid_json() -> None:
    dirty = {"a\x00": [float("nan"), float("inf"), "x\r\ny\ud800", (1, True)], "b": None}
    assert clean(dirty) == {"a\ufffd": [None, None, "x\ny\ufffd", [1, True]], "b": None}


def test_seeds_are_found_anywhere() -> None:
    config = {"seed": 1, "source": {"sampling": {"seed": 2}}, "parts": [{"seed": 3}, {"seeds": 4}]}
    assert dict(seeds(config)) == {"seed": 1, "source.sampling.seed": 2, "parts.0.seed": 3}


# Numbers


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (numbers.plain, 0.0, "0"),
        (numbers.plain, 0.00012345, "0.000123"),
        (numbers.plain, 3e-6, "3e-06"),
        (numbers.plain, 12345.6, "12,346"),
        (numbers.count, 134_515_008, "134.5 M"),
        (numbers.count, 512, "512"),
        (numbers.size, 98_000_000, "98 MB"),
        (numbers.size, 12, "12 B"),
        (numbers.duration, 99.0, "99 s"),
        (numbers.duration, 754.0, "12.6 min"),
        (numbers.duration, 3600 * 5 + 60 * 7, "5 h 07 min"),
        (numbers.energy, 1234.0, "0.343 Wh"),
        (numbers.energy, 36000.0, "10 Wh"),
        (numbers.energy, 3.6e9, "1,000 kWh"),
        (numbers.points, -0.0312, "−3.1"),
        (numbers.points, 0.0312, "+3.1"),
    ],
)
def test_numbers_read_well(form, value: float, text: str) -> None:  # type: ignore[no-untyped-def]
    assert form(value) == text


@pytest.mark.parametrize(
    ("figure", "value", "ends"),
    [
        (Figure(value=0.5, low=0.4, high=0.6, n=9, unit="accuracy"), "50.0%", "40.0–60.0%"),
        (Figure(value=24.314, low=24.0, high=25.0, n=9, unit="perplexity"), "24.31", "24.00–25.00"),
        (Figure(value=143.27, low=None, high=None, n=9, unit="perplexity"), "143.3", ""),
        (Figure(value=0.98765, low=None, high=None, n=9, unit="bits/byte"), "0.988", ""),
        (Figure(value=31.26, low=None, high=None, n=9, unit="score"), "31.3", ""),
    ],
)
def test_figures_have_the_digits_of_their_unit(figure: Figure, value: str, ends: str) -> None:
    assert numbers.figure(figure) == value
    assert numbers.interval(figure) == ends
