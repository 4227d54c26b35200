"""Carrying out a pipeline: what is done is skipped, what was interrupted goes on.

A folder whose manifest has the step's key is done and is skipped; one that was begun with that key
and has no manifest was interrupted, and the step goes on in it. Anything else is moved aside.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from treadle.core.config import dump, to_yaml
from treadle.core.errors import TreadleError
from treadle.core.files import sha256, write_json, write_text
from treadle.core.machine import machine
from treadle.core.meter import Meter
from treadle.core.pipeline import (
    MANIFEST,
    PIPELINE,
    Pipeline,
    Step,
    Workspace,
    inputs,
    read_manifest,
    step_keys,
)
from treadle.core.progress import Progress, Silent, Task

BEGUN, SPENT = "begun.json", "spent.json"
WAIT = 0.1
"""Seconds between two looks at what the first process has done."""


def execute(pipeline: Pipeline, root: Path, progress: Progress | None = None) -> None:
    """Run what is not done yet, in order, in `root`.

    Of the processes that torchrun starts, the first does this; the others join its parallel steps.

    Raises:
        TreadleError: a step could not run, told before the first one does. Or from a step; what
            earlier steps wrote stays, and running again goes on. Or another process runs in `root`.
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
    for step in pipeline.steps:
        if step.name not in done:
            _check(step, Workspace(root, root / step.name, pipeline, progress))
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


def _check(step: Step, workspace: Workspace) -> None:
    try:
        step.check(workspace)
    except TreadleError as error:
        raise TreadleError(f"step `{step.name}` cannot run: {error}") from None


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
    """A step's tasks, which also move the pipeline's own bar; those within others do not."""

    def __init__(self, inner: Progress, overall: Task, start: float, share: float) -> None:
        self.inner, self.overall, self.start, self.share = inner, overall, start, share
        self.fraction = 0.0
        self.open: list[_SharedTask] = []

    def task(self, name: str, total: float | None, *, expected: float | None = None) -> Task:
        task = _SharedTask(self, self.inner.task(name, total, expected=expected), total)
        self.open.append(task)
        return task

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
        if self.owner.open[:1] == [self]:
            self.owner.reached(completed / self.total if self.total else 0.0)

    def close(self) -> None:
        self.inner.close()
        self.owner.open = [task for task in self.owner.open if task is not self]


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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
