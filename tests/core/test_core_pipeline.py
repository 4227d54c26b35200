"""Pipelines: what is done is skipped, what was interrupted goes on, what changed runs again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from treadle.core.errors import TreadleError
from treadle.core.execute import execute
from treadle.core.meter import Meter
from treadle.core.pipeline import Pipeline, Reads, Step, Workspace, read_manifest


class From(Reads):
    """Uses an earlier step."""


class Count(Step):
    """Writes a number; fails halfway where it is told to."""

    add: int = 1
    source: From | None = None
    fail: bool = False
    wrong: str = ""

    def check(self, workspace: Workspace) -> None:
        if self.wrong:
            raise TreadleError(self.wrong)

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        log = workspace.root / "log.txt"
        with log.open("a") as file:
            file.write(self.name + "\n")
        before = 0
        if self.source is not None:
            before = workspace.manifest(self.source.step)["metrics"]["value"]
        half = workspace.folder / "half.txt"
        resumed = half.exists()
        half.write_text("x")
        if self.fail and not resumed:
            raise KeyboardInterrupt
        return {"value": before + self.add, "resumed": resumed}


def pipeline(**changes: Any) -> Pipeline:
    second = Count(name="second", add=10, source=From(step="first"))
    return Pipeline(name="p", steps=(Count(name="first", **changes), second, Count(name="third")))


def ran(root: Path) -> list[str]:
    log = root / "log.txt"
    lines = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_done_steps_are_skipped(tmp_path: Path) -> None:
    execute(pipeline(), tmp_path)
    assert ran(tmp_path) == ["first", "second", "third"]
    assert read_manifest(tmp_path / "second")["metrics"]["value"] == 11
    execute(pipeline(), tmp_path)
    assert ran(tmp_path) == []


def test_a_step_that_cannot_run_is_told_of_before_the_first_runs(tmp_path: Path) -> None:
    execute(pipeline(), tmp_path)
    ran(tmp_path)
    wrong = Count(name="fourth", wrong="no thread; buy some")
    longer = pipeline(add=5).replace(steps=(*pipeline(add=5).steps, wrong))
    with pytest.raises(TreadleError, match="step `fourth` cannot run: no thread; buy some"):
        execute(longer, tmp_path)
    assert ran(tmp_path) == []


def test_what_is_done_is_not_checked_again(tmp_path: Path) -> None:
    class Late(Count):
        """Finds its mistake once it has run."""

        def check(self, workspace: Workspace) -> None:
            if workspace.folder.exists():
                raise TreadleError("too late")

    late = Pipeline(name="p", steps=(Late(name="late"),))
    execute(late, tmp_path)
    execute(late, tmp_path)
    assert ran(tmp_path) == ["late"]


def test_a_change_runs_the_step_and_those_that_read_it(tmp_path: Path) -> None:
    execute(pipeline(), tmp_path)
    ran(tmp_path)
    execute(pipeline(add=5), tmp_path)
    assert ran(tmp_path) == ["first", "second"]
    assert read_manifest(tmp_path / "second")["metrics"]["value"] == 15
    # The former output was moved aside, not deleted.
    assert list(tmp_path.glob("first.old-*/manifest.json"))


def test_expected_minutes_are_no_change(tmp_path: Path) -> None:
    execute(pipeline(), tmp_path)
    ran(tmp_path)
    execute(pipeline(minutes=9.0), tmp_path)
    assert ran(tmp_path) == []


def test_an_interrupted_step_goes_on_in_its_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(pipeline(fail=True), tmp_path)
    spent = json.loads((tmp_path / "first" / "spent.json").read_text())
    assert spent["seconds"] >= 0
    execute(pipeline(fail=True), tmp_path)
    assert ran(tmp_path) == ["first", "first", "second", "third"]
    record = read_manifest(tmp_path / "first")
    assert record["metrics"]["resumed"]
    assert record["cost"]["seconds"] >= spent["seconds"]


def test_a_lost_or_cut_file_runs_the_step_again(tmp_path: Path) -> None:
    execute(pipeline(), tmp_path)
    ran(tmp_path)
    (tmp_path / "third" / "half.txt").write_text("")
    execute(pipeline(), tmp_path)
    assert ran(tmp_path) == ["third"]


def test_manifest_says_what_was_made_and_of_what(tmp_path: Path) -> None:
    execute(pipeline(), tmp_path)
    record = read_manifest(tmp_path / "second")
    assert record["reads"] == {"first": read_manifest(tmp_path / "first")["key"]}
    assert record["files"]["half.txt"]["bytes"] == 1
    assert len(record["files"]["half.txt"]["sha256"]) == 64
    assert {"seconds", "peak_bytes", "joules", "energy"} <= set(record["cost"])
    assert record["config"]["add"] == 10


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Count(name="a", source=From(step="b")), Count(name="b")), "`a` reads `b`, which is no"),
        ((Count(name="a"), Count(name="a")), "two steps are called `a`"),
    ],
)
def test_impossible_orders_are_refused(steps: tuple[Step, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Pipeline(name="p", steps=steps)


def test_broken_manifest_names_file_and_remedy(tmp_path: Path) -> None:
    execute(pipeline(), tmp_path)
    (tmp_path / "first" / "manifest.json").write_text("{")
    with pytest.raises(TreadleError, match=r"manifest.json is not valid JSON.*delete the folder"):
        execute(pipeline(), tmp_path)


def test_meter_sees_time_and_memory() -> None:
    with Meter(interval=0.01) as meter:
        block = bytearray(50 * 2**20)
        block[::4096] = b"x" * len(block[::4096])
    cost = meter.cost()
    assert cost.peak_bytes > 50 * 2**20
    assert cost.cpu_seconds > 0
    assert cost.energy in ("measured", "estimated")
