"""Ways that were tried beside each other are put in order of what was measured."""

from __future__ import annotations

from treadle.reports.stages import Stage
from treadle.reports.words import order, sentences


def figure(value: float, unit: str, half: float | None = None):
    low, high = (None, None) if half is None else (value - half, value + half)
    return {"value": value, "unit": unit, "n": 64, "low": low, "high": high}


def stage(subject: str, perplexity: float, accuracy: float, half: float = 0.05) -> Stage:
    results = {
        "task": figure(accuracy, "accuracy", half),
        "answers": figure(perplexity, "perplexity"),
    }
    return Stage(subject=subject, baseline=False, results=results)


STAGES = [stage("alone", 5.0, 0.1), stage("soft", 2.0, 0.4), stage("hard", 3.0, 0.42)]


def test_best_first_whichever_way_is_better() -> None:
    by_accuracy, by_perplexity = order(STAGES)
    assert by_accuracy == (
        "By task, best first: hard 42.0%, soft 40.0%, alone 10.0%; the first two may differ by "
        "chance."
    )
    places = [by_perplexity.index(name) for name in ("soft", "hard", "alone")]
    assert places == sorted(places)
    assert "chance" not in by_perplexity


def test_clear_winner_is_not_called_chance() -> None:
    assert "chance" not in order([STAGES[0], STAGES[2]])[0]


def test_results_that_some_lack_are_not_compared() -> None:
    lacking = Stage(subject="new", baseline=False, results={"task": figure(0.5, "accuracy", 0.1)})
    assert [said.split(",")[0] for said in order([*STAGES, lacking])] == ["By task"]


def test_only_a_run_that_lays_side_by_side_says_the_order() -> None:
    steps = [
        {"name": "t", "kind": kind, "state": "done", "seconds": None}
        for kind in ("Run", "SideBySide")
    ]
    assert "best first" in " ".join(sentences("x", STAGES, None, steps, [], []))
    assert "best first" not in " ".join(sentences("x", STAGES, None, steps[:1], [], []))
