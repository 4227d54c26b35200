"""The folder of a run, finished or not, as a report reads it.

Nothing is executed and no configuration class is needed: a report can be made of a run that is
under way, was interrupted, or was made with techniques that are not installed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.execute import BEGUN, SPENT
from treadle.core.pipeline import MANIFEST, read_manifest

State = Literal["done", "interrupted", "begun", "outdated", "not run"]
"""begun: it runs now, or was killed; interrupted: it stopped with an error or Ctrl-C;
outdated: it is done, but with another configuration or other inputs than the run has now."""
PIPELINE = "pipeline.yaml"
METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What is known of a step."""

    name: str
    folder: Path
    state: State
    config: Mapping[str, Any]
    """As the pipeline has it now."""
    manifest: Mapping[str, Any]
    """Empty unless the step is done."""
    spent: Mapping[str, Any] | None = None
    """Cost of interrupted attempts."""

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What the step measured; empty unless it is done."""
        metrics: Mapping[str, Any] = self.manifest.get("metrics", {})
        return metrics

    @property
    def cost(self) -> Mapping[str, Any] | None:
        """Seconds, peak bytes, joules; of interrupted attempts where the step is not done."""
        cost: Mapping[str, Any] | None = self.manifest.get("cost", self.spent)
        return cost

    def metrics_file(self) -> Path:
        """Where its training curves are, or would be."""
        return self.folder / str(self.metrics.get("metrics_file", METRICS))


@dataclass(frozen=True)
class RunFolder:
    """A run's name, recipe and steps, in order."""

    path: Path
    name: str
    recipe: str
    """The YAML that it ran from."""
    steps: tuple[StepRecord, ...]

    def step(self, name: str) -> StepRecord | None:
        return next((s for s in self.steps if s.name == name), None)

    def done(self) -> tuple[StepRecord, ...]:
        return tuple(s for s in self.steps if s.state == "done")


def read_run(path: Path, *, leave_out: str = "") -> RunFolder:
    """Read the folder of a run.

    Args:
        leave_out: name of a step that is not looked at, such as the report itself.

    Raises:
        TreadleError: it is no run's folder.
        FileFormatError: its pipeline or a manifest is damaged.
    """
    source = path / PIPELINE
    try:
        text = source.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise TreadleError(
            f"{path} is not the folder of a run: it has no {PIPELINE}; give the folder that "
            "`treadle run` named, such as runs/quickstart"
        ) from None
    try:
        tree = YAML(typ="safe", pure=True).load(text)
        name, configs = str(tree["name"]), [dict(c) for c in tree["steps"]]
        names = [str(c["name"]) for c in configs]
    except (YAMLError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{source}: not a pipeline: {error}") from None
    keys: dict[str, str] = {}
    steps = []
    for step, config in zip(names, configs, strict=True):
        if step != leave_out:
            steps.append(_record(path / step, step, config, keys))
            keys[step] = str(steps[-1].manifest.get("key", ""))
    return RunFolder(path, name, text, tuple(steps))


def _record(
    folder: Path, name: str, config: Mapping[str, Any], keys: Mapping[str, str]
) -> StepRecord:
    spent = folder / SPENT
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        current = _without_minutes(manifest["config"]) == _without_minutes(config) and all(
            keys.get(step) == key for step, key in manifest["reads"].items()
        )
        if current:
            return StepRecord(
                name=name, folder=folder, state="done", config=config, manifest=manifest
            )
        state: State = "outdated"
    elif spent.is_file():
        state = "interrupted"
    else:
        state = "begun" if (folder / BEGUN).is_file() else "not run"
    return StepRecord(
        name=name,
        folder=folder,
        state=state,
        config=config,
        manifest={},
        spent=json.loads(spent.read_text(encoding="utf-8")) if spent.is_file() else None,
    )


def _without_minutes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "minutes"}
