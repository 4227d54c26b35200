"""Trials: planted differences are found, absent ones are not, however often one looks."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from treadle.cli.app import build
from treadle.core.errors import FileFormatError, TreadleError
from treadle.serving.trial import Trial, parse_trial
from treadle.serving.verdict import evidence, judge, read_events, z_test


def stream(generator: np.random.Generator, n: int, a: float, b: float, share: float = 0.5) -> list:
    arms = generator.random(n) < share
    return [("b" if arm else "a", bool(generator.random() < (b if arm else a))) for arm in arms]


def test_planted_difference_is_found() -> None:
    generator = np.random.default_rng(0)
    found = [judge(stream(generator, 2000, 0.5, 0.62)) for _ in range(60)]
    assert sum(v.decided(0.05) for v in found) >= 54
    assert all(v.difference > 0 for v in found if v.decided(0.05))
    assert sum(v.p < 0.05 for v in found) >= 57


def test_no_difference_is_not_found_however_often_one_looks() -> None:
    generator = np.random.default_rng(1)
    streams = [stream(generator, 600, 0.4, 0.4) for _ in range(400)]
    safe = sum(max(evidence(s)) >= 20 for s in streams)
    peeking = sum(
        any(judge_p(s[:n]) < 0.05 for n in range(20, 600, 20)) for s in streams
    )  # what looking again and again does to an ordinary p-value
    assert safe <= 0.05 * 400
    assert peeking > 0.15 * 400


def judge_p(votes: list) -> float:
    n = [sum(arm == side for arm, _ in votes) for side in "ab"]
    good = [sum(arm == side and y for arm, y in votes) for side in "ab"]
    return z_test(good[0], n[0], good[1], n[1])


@pytest.mark.parametrize("blocks", [(1, 1), (2, 1), (1, 3)])
def test_evidence_of_a_block_is_at_most_one_on_average(blocks: tuple[int, int]) -> None:
    """By enumeration: E[E] <= 1 for equal rates, whatever was seen before."""
    before = [("a", True)] * 6 * blocks[0] + [("b", False)] * 6 * blocks[1]
    size = sum(blocks)
    start = evidence(before, blocks)[-1]
    for rate in (0.1, 0.5, 0.77):
        total = 0.0
        for outcome in itertools.product((False, True), repeat=size):
            arms = "a" * blocks[0] + "b" * blocks[1]
            chance = math.prod(rate if y else 1 - rate for y in outcome)
            after = evidence([*before, *zip(arms, outcome, strict=True)], blocks)[-1]
            total += chance * after / start
        assert total <= 1 + 1e-12
    assert evidence([*before, *[("a", True)] * blocks[0], *[("b", False)] * blocks[1]], blocks)[-1]


def test_z_test_is_the_chi_squared_test() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for a, n, b, m in ((30, 100, 45, 110), (1, 9, 8, 12), (5, 10, 5, 10)):
        table = [[a, n - a], [b, m - b]]
        wanted = scipy.chi2_contingency(table, correction=False).pvalue
        assert z_test(a, n, b, m) == pytest.approx(wanted)
    assert z_test(0, 0, 3, 4) == 1.0
    assert z_test(4, 4, 3, 3) == 1.0


def test_users_are_split_by_weight_and_stay() -> None:
    trial = Trial(name="t", a="x", b="y", share=0.2)
    arms = [trial.arm(f"user {i}") for i in range(5000)]
    assert arms == [trial.arm(f"user {i}") for i in range(5000)]
    assert arms.count("y") / 5000 == pytest.approx(0.2, abs=0.02)
    other = Trial(name="u", a="x", b="y", share=0.2)
    both = sum(
        a == b == "y"
        for a, b in zip(arms, (other.arm(f"user {i}") for i in range(5000)), strict=True)
    )
    assert both / 5000 == pytest.approx(0.04, abs=0.015), "trials split users independently"


def test_trials_are_written_in_short() -> None:
    assert parse_trial("t=x:y") == Trial(name="t", a="x", b="y")
    assert parse_trial("t=x:y@0.1").share == 0.1
    assert parse_trial("t=x:y@shadow").shadow
    for wrong in ("t", "t=x", "t=x:y@much", "t=x:x", "t=x:y@2"):
        with pytest.raises(TreadleError, match="NAME=A:B"):
            parse_trial(wrong)


def test_report_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    generator = np.random.default_rng(3)
    rows = []
    for i, (arm, good) in enumerate(stream(generator, 1500, 0.3, 0.6)):
        row = {"event": "served", "id": str(i), "trial": "duel", "arm": arm, "model": f"m-{arm}"}
        row |= {"shadow": False, "tokens": 7, "first_token": 0.1, "seconds": 1.0}
        rows.append({**row, "finish": "stop", "text": "x"})
        rows.append({"event": "vote", "id": str(i), "good": good})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "vo')
    done = CliRunner().invoke(build(), ["trial", str(path)])
    assert "verdict: b (m-b) is better" in done.output
    path.write_text('{"event": "party"}\n')
    with pytest.raises(FileFormatError, match=r"votes\.jsonl:1"):
        read_events(path)
    with pytest.raises(TreadleError, match="no such file"):
        read_events(tmp_path / "none")
