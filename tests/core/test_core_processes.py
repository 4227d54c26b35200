"""Steps in processes of their own: the same figures, errors that arrive, memory that is theirs."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from treadle.core.errors import TreadleError
from treadle.core.execute import execute
from treadle.core.meter import highest_resident
from treadle.core.pipeline import Pipeline, read_manifest
from treadle.core.processes import (
    OneProcess,
    Outcome,
    Processes,
    ProcessPerStep,
    _listen,
)
from treadle.core.progress import Progress, Silent, Task
from treadle.data.texts import TextFiles
from treadle.tokenizers.train import ByteLevelBPE
from treadle.train.tokenizer import TrainTokenizer


class Remembered(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def task(self, name: str, total: float | None, *, expected: float | None = None) -> Task:
        self.said.append(name)
        return Silent().task(name, total)

    def say(self, line: str) -> None:
        self.said.append(line)


def pipeline(path: Path, processes: Processes) -> Pipeline:
    documents = TextFiles(path=str(path), separator="\n")
    step = TrainTokenizer(documents=documents, tokenizer=ByteLevelBPE(vocab_size=300))
    return Pipeline(name="p", steps=(step,), processes=processes)


def test_same_outcome_and_memory_of_its_own(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the number after {i} is {i + 1}" for i in range(200)))
    name = pipeline(text, OneProcess()).steps[0].name
    execute(pipeline(text, OneProcess()), tmp_path / "one")
    ballast = bytearray(600 * 2**20)  # counts for this process alone
    progress = Remembered()
    execute(pipeline(text, ProcessPerStep()), tmp_path / "own", progress)
    assert len(ballast) > 0
    one, own = (read_manifest(tmp_path / run / name) for run in ("one", "own"))
    assert own["metrics"] == one["metrics"]
    assert own["key"] == one["key"]  # where a step works is no part of what it does
    assert own["files"] == one["files"]
    assert own["cost"]["peak_bytes"] < 600 * 2**20 < highest_resident()
    assert any(name in line for line in progress.said)


def test_users_mistake_arrives(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match="absent"):
        execute(pipeline(tmp_path / "absent.txt", ProcessPerStep()), tmp_path / "run")


def test_process_that_was_killed_is_told() -> None:
    here, there = multiprocessing.Pipe(duplex=False)
    there.close()
    with pytest.raises(TreadleError, match=r"step `train` was ended from outside.*memory"):
        _listen(here, "train", Silent())


def test_failure_keeps_its_traceback() -> None:
    here, there = multiprocessing.Pipe(duplex=False)
    there.send(("failed", "Traceback of the step"))
    with pytest.raises(RuntimeError, match="Traceback of the step"):
        _listen(here, "train", Silent())
    there.send(("done", {"a": 1}, 5))
    assert _listen(here, "train", Silent()) == Outcome({"a": 1}, 5)


def test_highest_resident_is_this_process_alone() -> None:
    ballast = bytearray(300 * 2**20)
    code = "from treadle.core.meter import highest_resident; print(highest_resident())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(found.stdout) < len(ballast) < highest_resident()
