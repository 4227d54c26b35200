"""Pipelines: named steps, each of which writes one folder with a manifest.

A step's *key* is the digest of its configuration and of the keys of the steps it reads;
`execute.py` tells by it what is done.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from treadle.core.config import Config, digest, dump
from treadle.core.errors import ConfigError, TreadleError, did_you_mean
from treadle.core.processes import OneProcess, Processes
from treadle.core.progress import Progress, Silent

MANIFEST = "manifest.json"
PIPELINE = "pipeline.yaml"
"""What a run's folder was made with."""


class Reads(Config):
    """A mix-in shape of configurations that use what an earlier step wrote."""

    step: str
    """Name of the step."""


class Step(Config):
    """A shape: a piece of work that writes into its folder and returns figures for the manifest."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    minutes: float = Field(1.0, gt=0.0)
    """About how long it takes on two cores; used only to foretell the time left."""
    parallel: ClassVar[bool] = False
    """Whether every process that torchrun started takes part; else one works and all wait."""

    @abstractmethod
    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        """Do the work in `workspace.folder`; called again after an interruption to go on."""

    def check(self, workspace: Workspace) -> None:
        """Find mistakes before any step runs, at next to no cost; as a rule there is nothing to do.

        Raises:
            TreadleError: the step would fail.
        """
        return

    def reads(self) -> tuple[str, ...]:
        """Names of the steps that this one uses."""
        return tuple(dict.fromkeys(r.step for r in references(self)))


class Summary(Step):
    """A shape: a step that reads all earlier ones, such as a report."""


class Pipeline(Config):
    """Steps in order."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    steps: tuple[Step, ...]
    processes: Processes = OneProcess()

    @model_validator(mode="after")
    def _steps_read_earlier_ones(self) -> Pipeline:
        names: list[str] = []
        for step in self.steps:
            for wanted in step.reads():
                if wanted not in names:
                    raise ValueError(
                        f"step `{step.name}` reads `{wanted}`, which is no earlier step"
                        f"{did_you_mean(wanted, names)}"
                    )
            if step.name in names:
                raise ValueError(f"two steps are called `{step.name}`: rename one")
            names.append(step.name)
        return self


@dataclass(frozen=True)
class Workspace:
    """Where a step works, and what it may look at."""

    root: Path
    folder: Path
    pipeline: Pipeline
    progress: Progress = field(default_factory=Silent)

    def output(self, step: str) -> Path:
        """The folder of an earlier step.

        Raises:
            TreadleError: it has not run.
        """
        folder = self.root / step
        if not (folder / MANIFEST).is_file():
            raise TreadleError(f"step `{step}` has no finished output in {self.root}: run it first")
        return folder

    def manifest(self, step: str) -> dict[str, Any]:
        """What an earlier step recorded."""
        return read_manifest(self.output(step))


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / PIPELINE).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A step's record: its configuration, figures, cost, files and versions."""
    try:
        record: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TreadleError(f"{folder} holds no finished step: it has no {MANIFEST}") from None
    except json.JSONDecodeError as error:
        raise TreadleError(
            f"{folder / MANIFEST} is not valid JSON ({error}): delete the folder and run again"
        ) from None
    return record


def inputs(pipeline: Pipeline) -> dict[str, tuple[str, ...]]:
    """Names of the steps that each step uses."""
    used: dict[str, tuple[str, ...]] = {}
    for step in pipeline.steps:
        used[step.name] = tuple(used) if isinstance(step, Summary) else step.reads()
    return used


def step_keys(pipeline: Pipeline) -> dict[str, str]:
    """Each step's key; it changes with the step's configuration and with what it reads."""
    keys: dict[str, str] = {}
    read = inputs(pipeline)
    for step in pipeline.steps:
        description = {k: v for k, v in dump(step).items() if k != "minutes"}
        keys[step.name] = digest([description, [keys[name] for name in read[step.name]]])
    return keys


def references(node: Any) -> Iterator[Reads]:
    """What a configuration, at any depth, uses of earlier steps."""
    return (part for part in parts_of(node) if isinstance(part, Reads))


def parts_of(node: Any) -> Iterator[Config]:
    """A configuration and all configurations in it, at any depth."""
    if isinstance(node, Config):
        yield node
        for name in type(node).model_fields:
            yield from parts_of(getattr(node, name))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for part in node:
            yield from parts_of(part)


def find_step(pipeline: Pipeline, name: str) -> Step:
    """The step called `name`."""
    for step in pipeline.steps:
        if step.name == name:
            return step
    hint = did_you_mean(name, (s.name for s in pipeline.steps))
    raise ConfigError(f"pipeline `{pipeline.name}` has no step `{name}`{hint}")
