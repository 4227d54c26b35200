"""Pipelines among processes: one leads, the others take part, and two do not share a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from treadle.core.errors import ConfigError, TreadleError
from treadle.core.execute import execute
from treadle.core.files import write_text
from treadle.core.pipeline import (
    Pipeline,
    Reads,
    Step,
    Summary,
    Workspace,
    find_step,
    read_manifest,
)


class PipeSpin(Step):
    thread: str = "wool"
    parallel: ClassVar[bool] = True

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        rank = os.environ.get("RANK", "0")
        with (workspace.folder / f"attempts-{rank}").open("a") as file:
            file.write("x")
        others = range(1, int(os.environ.get("WORLD_SIZE", "1")))
        while not all((workspace.folder / f"attempts-{other}").exists() for other in others):
            time.sleep(0.01)  # parallel steps meet, as in a collective
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
            execute(CLOTH, tmp_path)
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    execute(CLOTH, tmp_path)  # a killed process holds nothing


def test_names_stay_inside_the_folder() -> None:
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
        "from pathlib import Path; from test_core_pipeline_processes import CLOTH, execute\n"
        f"execute(CLOTH, Path({str(tmp_path)!r}))\n"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )
        for rank in (1, 0)
    ]
    assert [process.wait(60) for process in ranks] == [0, 0]
    assert (tmp_path / "warp/attempts-1").read_text() == "x"
    assert (tmp_path / "weft/attempts-0").read_text() == "x"
    assert not (tmp_path / "weave/attempts-1").exists()
    assert (tmp_path / "weave/cloth.txt").read_text() == "wool silk"
    assert read_manifest(tmp_path / "label")["metrics"]["lengths"][2] == {"threads": 2}
