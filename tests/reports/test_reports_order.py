"""Ways that were tried beside each other are put in order of what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from reports.fake_run import FakeEvaluate, FakeModel, FakeTrain

from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Step, Workspace
from treadle.reports.document import document
from treadle.reports.folder import read_run
from treadle.reports.report import render
from treadle.reports.seeds import SeedTable
from treadle.reports.stages import Stage
from treadle.reports.words import order, sentences


def figure(value: float, unit: str, half: float | None = None):
    low, high = (None, None) if half is None else (value - half, value + half)
    return {"value": value, "unit": unit, "n": 64, "low": low, "high": high}


PATH = ("alone", "soft", "hard")


def stage(subject: str, perplexity: float, accuracy: float, half: float = 0.05) -> Stage:
    results = {
        "task": figure(accuracy, "accuracy", half),
        "answers": figure(perplexity, "perplexity"),
    }
    made_from = PATH[: PATH.index(subject)]
    return Stage(subject=subject, baseline=False, made_from=made_from, results=results)


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


def test_a_path_is_put_in_order_only_where_it_is_laid_side_by_side() -> None:
    steps = [
        {"name": "t", "kind": kind, "state": "done", "seconds": None}
        for kind in ("Run", "SideBySide")
    ]
    assert "best first" in " ".join(sentences("x", STAGES, None, steps, [], []))
    assert "best first" not in " ".join(sentences("x", STAGES, None, steps[:1], [], []))


class FakeJoin(Step):
    """Puts models together."""

    models: tuple[FakeModel, ...]

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        return {"kind": "merge"}


def made(root: Path, *steps: Step) -> dict[str, Any]:
    """The report of a run of these."""
    execute(Pipeline(name="fork", steps=steps), root)
    return document(read_run(root), samples=1)


def trained(name: str, after: str = "") -> tuple[Step, Step]:
    model = FakeModel(step=after) if after else None
    return FakeTrain(name=name, model=model), measured(name)


def measured(name: str) -> Step:
    return FakeEvaluate(name=f"measure-{name}", subject=name, model=FakeModel(step=name))


def test_alternatives_are_no_path(tmp_path: Path) -> None:
    """Both ways start from sft; neither is what the other was before, nor the final model."""
    base = FakeEvaluate(name="measure-base", subject="base")
    ways = (*trained("quantised", after="sft"), *trained("grpo", after="sft"))
    found = made(tmp_path, base, *trained("sft"), *ways)
    said = " ".join(found["result"])
    begin = (
        "quantised and grpo are alternatives: each starts from sft. By chain_sum, best first: grpo"
    )
    assert said.startswith(begin)
    assert "final model" not in said
    assert "before" not in said
    assert found["comparison"] is None
    lines = {s["subject"]: s["made_from"] for s in found["stages"]}
    assert lines["grpo"] == lines["quantised"] == ["base", "sft"]


def test_ways_that_meet_again_are_a_path(tmp_path: Path) -> None:
    joined = FakeJoin(name="quantised", models=(FakeModel(step="sft"), FakeModel(step="grpo")))
    found = made(tmp_path, *trained("sft"), *trained("grpo"), joined, measured("quantised"))
    assert found["result"][0].startswith("The final model (quantised) answers")
    assert found["comparison"]["after"] == "quantised"


def test_methods_over_seeds_are_told_together(tmp_path: Path) -> None:
    """In words and in a table, with means taken here by hand; a run without the table has none."""
    base = FakeEvaluate(name="measure-base", subject="base")
    names = [f"{method}-s{seed}" for seed in range(3) for method in ("sft", "grpo")]
    runs = [step for name in names for step in trained(name)]
    found = made(tmp_path / "seeds", base, *runs, SeedTable())
    values = {s["subject"]: s["results"]["overall"]["value"] for s in found["stages"]}
    sft, grpo = (fmean(values[f"{m}-s{i}"] for i in range(3)) for m in ("sft", "grpo"))
    begin = f"Means over 3 seeds, best first: grpo {100 * grpo:.1f}%, sft {100 * sft:.1f}%."
    said = " ".join(found["result"])
    assert said.startswith(begin)
    assert f"The start, base, has {100 * values['base']:.1f}%; the gain is beyond" in said
    assert "for grpo, sft." in said
    assert "alternatives" not in said
    page = re.sub(r"<[^>]+>", "", render(found))
    assert "Methods over seeds" in page
    shown = ", ".join(f"{100 * values[f'grpo-s{i}']:.1f}%" for i in range(3))
    assert shown in page
    assert f"+{100 * (grpo - values['base']):.1f}" in page
    plain = made(tmp_path / "plain", base, *runs)
    assert plain["spread"] is None
    assert "Methods over seeds" not in render(plain)
