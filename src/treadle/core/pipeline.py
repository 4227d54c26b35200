"""Pipelines: named steps, each of which writes one folder with a manifest.

A step's *key* is the digest of its configuration and of the keys of the steps it reads. A folder
whose manifest has the step's key is done and is skipped; one that was begun with that key and has
no manifest was interrupted, and the step goes on in it. Anything else is moved aside.
"""

from __future__ import annotations

import json
import os
import platform
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout
from pydantic import Field, model_validator

from treadle.core.config import Config, digest, dump, to_yaml
from treadle.core.errors import ConfigError, TreadleError, did_you_mean
from treadle.core.files import sha256, write_json, write_text
from treadle.core.machine import machine
from treadle.core.meter import Meter
from treadle.core.processes import OneProcess, Processes
from treadle.core.progress import Progress, Silent, Task

MANIFEST, BEGUN, SPENT = "manifest.json", "begun.json", "spent.json"
PIPELINE = "pipeline.yaml"
"""What a run's folder was made with."""
WAIT = 0.1
"""Seconds between two looks at what the first process has done."""


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


def execute(pipeline: Pipeline, root: Path, progress: Progress | None = None) -> None:
    """Run what is not done yet, in order, in `root`.

    Of the processes that torchrun starts, the first does this; the others join its parallel steps.

    Raises:
        TreadleError: from a step; what earlier steps wrote stays, and running again goes on. Or
            another process runs in `root`.
    """
    keys = step_keys(pipeline)
    if int(os.environ.get("RANK", "0")) > 0:
        _follow(pipeline, root, keys)
        return
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        write_text(root / PIPELINE, to_yaml(pipeline))
        _lead(pipeline, root, keys, progress or Silent())


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    lock = FileLock(root / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise TreadleError(
            f"{root} is in use by another process: wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _lead(pipeline: Pipeline, root: Path, keys: Mapping[str, str], progress: Progress) -> None:
    done = {s.name for s in pipeline.steps if finished(root / s.name, keys[s.name])}
    minutes = sum(s.minutes for s in pipeline.steps if s.name not in done)
    passed = 0.0
    read = inputs(pipeline)
    with progress.task(pipeline.name, minutes, expected=60 * minutes) as overall:
        for number, step in enumerate(pipeline.steps, 1):
            overall.update(passed, note=f"step {number} of {len(pipeline.steps)}: {step.name}")
            folder, key = root / step.name, keys[step.name]
            if step.name in done:
                seconds = read_manifest(folder)["cost"]["seconds"]
                progress.say(f"{step.name}: done before ({_duration(seconds)}), skipped")
            else:
                _prepare(folder, key)
                inner = _Share(progress, overall, passed, step.minutes)
                workspace = Workspace(root, folder, pipeline, inner)
                seconds = _run(step, workspace, key, {n: keys[n] for n in read[step.name]})
                progress.say(f"{step.name}: done in {_duration(seconds)}")
                passed += step.minutes


def _follow(pipeline: Pipeline, root: Path, keys: Mapping[str, str]) -> None:
    """Take part in parallel steps and wait for the others; torchrun ends us if the first fails."""
    for step in pipeline.steps:
        folder, key = root / step.name, keys[step.name]
        if step.parallel:
            while not finished(folder, key) and not _begun(folder, key):
                time.sleep(WAIT)
            if not finished(folder, key):
                step.execute(Workspace(root, folder, pipeline))
        while not finished(folder, key):
            time.sleep(WAIT)


class _Share(Progress):
    """A step's tasks, which also move the pipeline's own bar."""

    def __init__(self, inner: Progress, overall: Task, start: float, share: float) -> None:
        self.inner, self.overall, self.start, self.share = inner, overall, start, share
        self.fraction = 0.0

    def task(self, name: str, total: float | None, *, expected: float | None = None) -> Task:
        return _SharedTask(self, self.inner.task(name, total, expected=expected), total)

    def reached(self, fraction: float) -> None:
        """The overall bar never goes back, however many tasks a step has."""
        self.fraction = max(self.fraction, fraction)
        self.overall.update(self.start + self.share * self.fraction)

    def say(self, line: str) -> None:
        self.inner.say(line)


class _SharedTask(Task):
    def __init__(self, owner: _Share, inner: Task, total: float | None) -> None:
        self.owner, self.inner, self.total = owner, inner, total

    def update(self, completed: float, *, note: str = "") -> None:
        self.inner.update(completed, note=note)
        self.owner.reached(completed / self.total if self.total else 0.0)

    def close(self) -> None:
        self.inner.close()


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


def finished(folder: Path, key: str) -> bool:
    """Whether the folder holds this very step's output, with all its files at full size."""
    if not (folder / MANIFEST).is_file():
        return False
    record = read_manifest(folder)
    files: dict[str, dict[str, Any]] = record["files"]
    return record["key"] == key and all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]
        for name, entry in files.items()
    )


def _begun(folder: Path, key: str) -> bool:
    begun = folder / BEGUN
    return begun.is_file() and json.loads(begun.read_text()).get("key") == key


def _prepare(folder: Path, key: str) -> None:
    """Keep the folder if it was begun with this key, else move it aside and begin."""
    if _begun(folder, key):
        (folder / MANIFEST).unlink(missing_ok=True)
        return
    if folder.exists():
        aside = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}x")
        folder.rename(aside)
    folder.mkdir(parents=True)
    write_json(folder / BEGUN, {"key": key})


def _run(step: Step, workspace: Workspace, key: str, read: Mapping[str, str]) -> float:
    folder = workspace.folder
    spent = folder / SPENT
    earlier = json.loads(spent.read_text()) if spent.is_file() else None
    with Meter() as meter:
        try:
            outcome = workspace.pipeline.processes.carry_out(step, workspace)
        except BaseException:
            write_json(spent, meter.cost().plus(earlier).plain())
            raise
    spent_now = meter.cost()
    if outcome.peak_bytes is not None:
        spent_now = replace(spent_now, peak_bytes=outcome.peak_bytes)
    cost = spent_now.plus(earlier)
    spent.unlink(missing_ok=True)
    record = {
        "step": step.name,
        "key": key,
        "config": dump(step),
        "reads": dict(read),
        "metrics": dict(outcome.metrics),
        "cost": cost.plain(),
        "files": _inventory(folder),
        "versions": versions(),
        "machine": machine(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / MANIFEST, record)
    return cost.seconds


def _inventory(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, BEGUN, SPENT)
    }


def versions() -> dict[str, str]:
    """Of Python, the machine and the libraries that decide results."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("treadle", "torch", "numpy", "tokenizers", "safetensors", "reasoning-gym"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def references(node: Any) -> Iterator[Reads]:
    """What a configuration, at any depth, uses of earlier steps."""
    if isinstance(node, Reads):
        yield node
    if isinstance(node, Config):
        for name in type(node).model_fields:
            yield from references(getattr(node, name))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for part in node:
            yield from references(part)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def find_step(pipeline: Pipeline, name: str) -> Step:
    """The step called `name`."""
    for step in pipeline.steps:
        if step.name == name:
            return step
    hint = did_you_mean(name, (s.name for s in pipeline.steps))
    raise ConfigError(f"pipeline `{pipeline.name}` has no step `{name}`{hint}")
