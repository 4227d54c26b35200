"""The shapes that steps record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from treadle.core.errors import FileFormatError
from treadle.core.results import (
    SAMPLES,
    Z95,
    Sample,
    accuracy,
    pooled,
    read_samples,
    wilson,
    write_samples,
)


@pytest.mark.parametrize(("right", "n"), [(0, 5), (1, 7), (30, 100), (100, 100), (12.5, 40)])
def test_wilson_solves_its_equation(right: float, n: int) -> None:
    """Its ends are the p for which the observed share lies z standard errors away."""
    p = right / n
    for end in wilson(right, n):
        assert (p - end) ** 2 == pytest.approx(Z95**2 * end * (1 - end) / n, abs=1e-12)


def test_wilson_of_published_values() -> None:
    """Newcombe 1998, table I, method 3."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_no_problems_say_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_pooled_is_the_accuracy_over_all() -> None:
    a, b = [1.0, 0.0, 1.0], [0.0] * 6 + [0.5]
    assert pooled([accuracy(a), accuracy(b)]) == pytest.approx(accuracy(a + b))


ROW = Sample(problem="sum-1", task="sum", prompt="1+1?", answer="2\n\u2028é", expected="2", score=1)


def test_samples_round_trip(tmp_path: Path) -> None:
    assert read_samples(tmp_path) == []
    write_samples(tmp_path, [ROW, ROW])
    assert read_samples(tmp_path) == [ROW, ROW]


@pytest.mark.parametrize("line", ["{", "[]", json.dumps({**ROW, "task": 1}).replace("task", "tsk")])
def test_a_broken_sample_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / SAMPLES).write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(FileFormatError, match=r"samples\.jsonl:2: not a sample"):
        read_samples(tmp_path)
