"""The table over seeds against statistics worked out by hand and by scipy's t."""

from __future__ import annotations

import statistics

import pytest

from treadle.alignment.ppo import PPORollouts
from treadle.alignment.value_head import ValueHead
from treadle.cli.targets import load
from treadle.core.errors import TreadleError
from treadle.core.results import accuracy
from treadle.reports.seeds import STUDENT, seed_table, spreads
from treadle.reports.stages import Stage
from treadle.train.run import Run


def stage(subject: str, right: int, seconds: float | None = 10.0) -> Stage:
    figure = accuracy([1.0] * right + [0.0] * (100 - right))
    return Stage(subject=subject, baseline=False, results={"sums": figure}, seconds=seconds)


STAGES = [
    stage("base", 3),
    stage("sft", 40),
    *(stage(f"grpo-s{i}", r, 10.0 * i) for i, r in enumerate((50, 44, 53))),
    *(stage(f"dr-grpo-s{i}", r) for i, r in enumerate((60, 61))),
    stage("ppo-s0", 41),
    Stage(subject="rloo-s0", baseline=False),
]


def test_means_spreads_and_gains() -> None:
    start, rows = spreads(STAGES)
    assert start is not None
    assert start.subject == "sft"
    grpo, dr, ppo = rows
    assert grpo.method == "grpo"
    assert grpo.values == (0.5, 0.44, 0.53)
    assert grpo.mean == pytest.approx(0.49)
    assert grpo.sd == pytest.approx(statistics.stdev((0.5, 0.44, 0.53)))
    assert grpo.gain == pytest.approx(0.09)
    half = 4.303 * statistics.stdev((0.5, 0.44, 0.53)) / 3**0.5
    assert (grpo.low, grpo.high) == (pytest.approx(0.09 - half), pytest.approx(0.09 + half))
    assert grpo.seconds == pytest.approx(10.0)
    assert dr.high == pytest.approx(0.205 + 12.706 * 0.0070710678 / 2**0.5)
    assert ppo.sd is None
    assert ppo.low is None
    with pytest.raises(TreadleError, match="no measured stage is called"):
        spreads(STAGES[:2])
    nothing, rows = spreads(STAGES[2:])
    assert nothing is None
    assert rows[0].gain is None


@pytest.mark.parametrize("name", ["compare-policies", "compare-policies-small"])
def test_the_contest_gives_each_method_equal_samples_from_one_start(name: str) -> None:
    runs = [s for s in load(name).steps if isinstance(s, Run) and s.name != "sft"]
    assert len({run.name for run in runs}) == len(runs) == 24
    start, transforms = runs[0].model, list(runs[0].transforms)
    budgets, problems = set(), {}
    for run in runs:
        assert run.model == start
        assert [t for t in run.transforms if not isinstance(t, ValueHead)] == transforms
        ppo = isinstance(run.source, PPORollouts)
        rollouts = run.source.rollouts if ppo else run.source
        per_lot = run.source.epochs * run.source.minibatches if ppo else 1
        budgets.add((run.fit.steps / per_lot, rollouts.prompts * rollouts.completions))
        seed = int(run.name[-1])
        assert run.seed == seed
        problems.setdefault(seed, set()).add(rollouts.problems)
    assert len(budgets) == 1
    assert all(len(found) == 1 for found in problems.values())
    assert len({p for found in problems.values() for p in found}) == 3


def test_the_quantiles_are_those_of_student() -> None:
    stats = pytest.importorskip("scipy.stats")
    for i, value in enumerate(STUDENT):
        assert value == pytest.approx(stats.t.ppf(0.975, i + 1), abs=6e-4)


def test_the_table_is_in_the_order_of_means() -> None:
    lines = seed_table(*spreads(STAGES))
    assert lines[2].startswith("| sft | 40.0% |")
    assert [line.split(" | ")[0] for line in lines[3:]] == ["| dr-grpo", "| grpo", "| ppo"]
    assert "| 49.0% | 4.6 | 50.0%, 44.0%, 53.0% | +9.0 (−2.4 to +20.4) | 10 s |" in lines[4]
    assert "+9.0" not in lines[5]
