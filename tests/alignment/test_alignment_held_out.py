"""Pairs held out from a step: a path is stated once; steps that have none are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from treadle.alignment.held_out import HeldOut
from treadle.alignment.preferences import Pairs
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.data.records import Preference
from treadle.recipes.dpo import dpo
from treadle.recipes.reward_mixture import reward_mixture


def resolved(pipeline: Pipeline, pairs: HeldOut):
    return pairs.resolve(Workspace(Path(), Path(), pipeline))


def changed(pipeline: Pipeline, **source) -> Pipeline:
    first, *rest = pipeline.steps
    step = first.replace(source=first.source.replace(**source))
    return pipeline.replace(steps=(step, *rest))


def test_the_held_out_part_of_what_a_step_learns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(200)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    pipeline = dpo()
    trained = pipeline.steps[0].source.pairs.replace(path=str(path))
    held = resolved(changed(pipeline, pairs=trained), HeldOut(step="dpo"))
    assert held == trained.replace(held_out=True)
    seen = {trained.pair(i).prompt[0].content for i in range(trained.count())}
    unseen = {held.pair(i).prompt[0].content for i in range(held.count())}
    assert not seen & unseen
    assert len(seen) + len(unseen) == 200
    assert 10 < len(unseen) < 60


def test_one_aspect_of_several() -> None:
    mixture = reward_mixture()
    held = resolved(mixture, HeldOut(step="mixture", aspect="helpful"))
    assert (held.path, held.held_out) == ("helpful.jsonl", True)
    with pytest.raises(TreadleError, match=r"HeldOut\(step=mixture\): the step has no pairs out"):
        resolved(mixture, HeldOut(step="mixture", aspect="kind"))


class MadeUp(Pairs):
    """Pairs out of no file."""

    def pair(self, index: int) -> Preference:
        raise AssertionError

    def count(self) -> int:
        return 1


def test_steps_without_files_are_named() -> None:
    pipeline = changed(dpo(), pairs=MadeUp())
    for step in ("dpo", "measure-base"):
        with pytest.raises(TreadleError, match="no pairs out of files"):
            resolved(pipeline, HeldOut(step=step))
    with pytest.raises(TreadleError, match="there are steps in pipelines alone"):
        HeldOut(step="dpo").resolve(None)
    for unresolved in (HeldOut(step="dpo").count, lambda: HeldOut(step="dpo").pair(0)):
        with pytest.raises(TreadleError, match="not resolved"):
            unresolved()
