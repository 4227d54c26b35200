"""In which process the steps of a pipeline work.

    OneProcess      all in this one: quickest, and what one step leaves in memory the next ones pay
    ProcessPerStep  each in a fresh one, so that its peak memory is its own

A step's process is told by text what to do and answers by a pipe: how far it is, its figures, or
what went wrong.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.core.config import Config, from_yaml, to_yaml
from treadle.core.errors import TreadleError
from treadle.core.meter import highest_resident
from treadle.core.progress import Progress, Task

if TYPE_CHECKING:
    from treadle.core.pipeline import Step, Workspace


@dataclass(frozen=True)
class Outcome:
    """What came of a step."""

    metrics: Mapping[str, Any]
    peak_bytes: int | None = None
    """Highest resident memory of a process of its own; None where it had none."""


class Processes(Config):
    """A shape: where steps work."""

    @abstractmethod
    def carry_out(self, step: Step, workspace: Workspace) -> Outcome:
        """The step's figures.

        Raises:
            TreadleError: from the step, or its process was ended from outside.
        """


class OneProcess(Processes):
    """All steps in this process."""

    def carry_out(self, step: Step, workspace: Workspace) -> Outcome:
        return Outcome(step.execute(workspace))


class ProcessPerStep(Processes):
    """Each step in a process of its own, which begins with nothing in memory."""

    def carry_out(self, step: Step, workspace: Workspace) -> Outcome:
        return _apart(step, workspace)


def _apart(step: Step, workspace: Workspace) -> Outcome:
    here, there = multiprocessing.Pipe(duplex=False)
    pipeline = to_yaml(workspace.pipeline)
    folders = (str(workspace.root), str(workspace.folder))
    process = multiprocessing.get_context("spawn").Process(
        target=_work, args=(there, pipeline, step.name, *folders)
    )
    process.start()
    there.close()
    try:
        return _listen(here, step.name, workspace.progress)
    finally:
        if process.is_alive():
            process.join(timeout=5.0)
        process.terminate()
        process.join()


def _listen(pipe: Connection, step: str, progress: Progress) -> Outcome:
    tasks: dict[int, Task] = {}
    while True:
        try:
            kind, *said = pipe.recv()
        except EOFError:
            raise TreadleError(
                f"the process of step `{step}` was ended from outside, as systems do when memory "
                "runs out: take a smaller model or fewer tokens at a time"
            ) from None
        match kind:
            case "task":
                number, name, total, expected = said
                tasks[number] = progress.task(name, total, expected=expected)
            case "update":
                number, completed, note = said
                tasks[number].update(completed, note=note)
            case "close":
                tasks.pop(said[0]).close()
            case "say":
                progress.say(said[0])
            case "done":
                return Outcome(*said)
            case "refused":
                raise TreadleError(said[0])
            case _:
                raise RuntimeError(f"step `{step}` failed in its process:\n{said[0]}")


def _work(pipe: Connection, text: str, name: str, root: str, folder: str) -> None:
    """The step's process."""
    from treadle.core.pipeline import Pipeline, Workspace, find_step

    try:
        pipeline = from_yaml(text, expect=Pipeline, name="pipeline")
        workspace = Workspace(Path(root), Path(folder), pipeline, _Told(pipe))
        metrics = dict(find_step(pipeline, name).execute(workspace))
        pipe.send(("done", metrics, highest_resident()))
    except TreadleError as error:
        pipe.send(("refused", str(error)))
    except KeyboardInterrupt:
        os._exit(130)  # the process that listens got it too
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
    finally:
        pipe.close()


class _Told(Progress):
    """Reports over the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.numbers = pipe, count()

    def task(self, name: str, total: float | None, *, expected: float | None = None) -> Task:
        number = next(self.numbers)
        self.pipe.send(("task", number, name, total, expected))
        return _ToldTask(self.pipe, number)

    def say(self, line: str) -> None:
        self.pipe.send(("say", line))


class _ToldTask(Task):
    def __init__(self, pipe: Connection, number: int) -> None:
        self.pipe, self.number = pipe, number

    def update(self, completed: float, *, note: str = "") -> None:
        self.pipe.send(("update", self.number, completed, note))

    def close(self) -> None:
        self.pipe.send(("close", self.number))
