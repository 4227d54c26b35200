"""Pipelines: each step once, again only where something changed, on from where it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from treadle.core.config import from_yaml
from treadle.core.errors import ConfigError, TreadleError
from treadle.core.files import write_text
from treadle.core.pipeline import (
    Pipeline,
    Reads,
    Step,
    Summary,
    Workspace,
    execute,
    find_step,
    read_manifest,
)
from treadle.core.progress import Silent


class PipeSpin(Step):
    thread: str = "wool"
    fails: bool = False
    parallel: ClassVar[bool] = True

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        rank = os.environ.get("RANK", "0")
        with (workspace.folder / f"attempts-{rank}").open("a") as file:
            file.write("x")
        if self.fails:
            raise TreadleError("the thread broke")
        if rank == "0":
            write_text(workspace.folder / "thread.txt", self.thread)
        return {"length": len(self.thread)}


class PipeInput(Reads):
    def text(self, workspace: Workspace) -> str:
        return (workspace.output(self.step) / "thread.txt").read_text()


class PipeWeave(Step):
    warp: PipeInput
    weft: tuple[PipeInput, ...] = ()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        threads = [self.warp, *self.weft]
        write_text(workspace.folder / "cloth.txt", " ".join(t.text(workspace) for t in threads))
        return {"threads": len(threads)}


class PipeLabel(Summary):
    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        steps = [s.name for s in workspace.pipeline.steps if s.name != self.name]
        return {"lengths": [workspace.manifest(s)["metrics"] for s in steps]}


CLOTH = Pipeline(
    name="cloth",
    steps=(
        PipeSpin(name="warp"),
        PipeSpin(name="weft", thread="silk"),
        PipeWeave(name="weave", warp=PipeInput(step="warp"), weft=(PipeInput(step="weft"),)),
        PipeLabel(name="label"),
    ),
)


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def run(root: Path, pipeline: Pipeline = CLOTH) -> list[str]:
    """Names of the steps that did not need to run."""
    notes = Notes()
    execute(pipeline, root, notes)
    return [line.partition(":")[0] for line in notes.lines if line.endswith("skipped")]


def changed(step: str, **fields: Any) -> Pipeline:
    return CLOTH.replace(
        steps=tuple(s.replace(**fields) if s.name == step else s for s in CLOTH.steps)
    )


def test_steps_run_in_order_and_leave_a_record(tmp_path: Path) -> None:
    assert run(tmp_path) == []
    assert (tmp_path / "weave/cloth.txt").read_text() == "wool silk"
    record = read_manifest(tmp_path / "weave")
    assert record["metrics"] == {"threads": 2}
    assert list(record["reads"]) == ["warp", "weft"]
    assert record["files"]["cloth.txt"]["bytes"] == 9
    assert record["cost"]["seconds"] >= 0
    assert read_manifest(tmp_path / "label")["metrics"]["lengths"][0] == {"length": 4}
    saved = from_yaml((tmp_path / "pipeline.yaml").read_text(), expect=Pipeline)
    assert saved == CLOTH


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    run(tmp_path)
    assert run(tmp_path) == ["warp", "weft", "weave", "label"]
    assert (tmp_path / "warp/attempts-0").read_text() == "x"


def test_a_change_runs_again_what_reads_it_and_keeps_the_old(tmp_path: Path) -> None:
    run(tmp_path)
    assert run(tmp_path, changed("weft", thread="flax")) == ["warp"]
    assert (tmp_path / "weave/cloth.txt").read_text() == "wool flax"
    (old,) = tmp_path.glob("weave.old-*")
    assert (old / "cloth.txt").read_text() == "wool silk"
    assert run(tmp_path, changed("weft", thread="jute")) == ["warp"]
    assert len(list(tmp_path.glob("weave.old-*"))) == 2


def test_expected_minutes_change_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    assert len(run(tmp_path, changed("warp", minutes=9.0))) == 4


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_output_is_made_again(tmp_path: Path, damage: str) -> None:
    run(tmp_path)
    thread = tmp_path / "warp/thread.txt"
    thread.unlink() if damage == "remove" else thread.write_text("w")
    assert run(tmp_path) == ["weft", "weave", "label"]
    assert thread.read_text() == "wool"


def test_a_failed_step_goes_on_in_its_folder(tmp_path: Path) -> None:
    broken = changed("weft", fails=True)
    with pytest.raises(TreadleError, match="broke"):
        run(tmp_path, broken)
    assert not (tmp_path / "weft/manifest.json").exists()
    with pytest.raises(TreadleError, match="broke"):
        run(tmp_path, broken)
    assert (tmp_path / "weft/attempts-0").read_text() == "xx"
    assert not list(tmp_path.glob("*.old-*"))
    assert run(tmp_path) == ["warp"]


def test_cost_of_a_failed_attempt_counts(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match="broke"):
        run(tmp_path, changed("weft", fails=True))
    spent = tmp_path / "weft/spent.json"
    text = json.loads(spent.read_text())
    assert text["seconds"] >= 0
    begun = json.loads((tmp_path / "weft/begun.json").read_text())
    keys = {"key": run_key(CLOTH, "weft")}
    assert begun != keys
    write_text(tmp_path / "weft/begun.json", json.dumps(keys))
    write_text(spent, json.dumps({**text, "seconds": 100.0}))
    run(tmp_path)
    assert read_manifest(tmp_path / "weft")["cost"]["seconds"] >= 100.0
    assert not spent.exists()


def run_key(pipeline: Pipeline, step: str) -> str:
    from treadle.core.pipeline import step_keys

    return step_keys(pipeline)[step]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys, time; from filelock import FileLock\n"
        f"lock = FileLock({str(tmp_path / '.lock')!r}); lock.acquire()\n"
        "print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TreadleError, match="in use by another process"):
            run(tmp_path)
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert run(tmp_path) == []  # a killed process holds nothing


def test_a_broken_manifest_says_what_to_do(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "warp/manifest.json").write_text("{")
    with pytest.raises(TreadleError, match=r"not valid JSON .* delete the folder"):
        run(tmp_path)


def test_steps_read_earlier_steps_only() -> None:
    with pytest.raises(ValidationError, match="reads `wrap`, which is no earlier step; did you me"):
        changed("weave", warp=PipeInput(step="wrap"))
    with pytest.raises(ValidationError, match="two steps are called `warp`"):
        changed("weft", name="warp")
    with pytest.raises(ValidationError, match="pattern"):
        PipeSpin(name="../up")
    with pytest.raises(ValidationError, match="pattern"):
        CLOTH.replace(name="../up")


def test_a_step_is_found_by_name() -> None:
    assert find_step(CLOTH, "weave") is CLOTH.steps[2]
    with pytest.raises(ConfigError, match="no step `waeve`; did you mean `weave`"):
        find_step(CLOTH, "waeve")


@pytest.mark.distributed
def test_of_several_processes_one_leads(tmp_path: Path) -> None:
    """The second takes part in parallel steps only, and ends when all is done."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; from test_core_pipeline import CLOTH, run\n"
        f"run(Path({str(tmp_path)!r}))\n"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "RANK": str(rank), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in (1, 0)
    ]
    assert [process.wait(60) for process in ranks] == [0, 0]
    assert (tmp_path / "warp/attempts-1").read_text() == "x"
    assert (tmp_path / "weft/attempts-0").read_text() == "x"
    assert not (tmp_path / "weave/attempts-1").exists()
    assert (tmp_path / "weave/cloth.txt").read_text() == "wool silk"
