"""The model of a run in another folder: to talk with it, to measure it, to train it further."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from treadle.core.config import from_yaml
from treadle.core.errors import TreadleError
from treadle.core.pipeline import (
    MANIFEST,
    PIPELINE,
    Pipeline,
    Workspace,
    find_step,
    is_run,
    read_manifest,
)
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened, origins
from treadle.train.run import Trained, Training, as_training, open_trained


class FromRun(ModelSource):
    """The model that a finished training step of another run made."""

    folder: str
    """Of the run."""
    step: str
    key: str = ""
    """Of the step. Where it is given, another model in the folder is an error."""

    def open(self, workspace: Workspace) -> Opened:
        root = Path(self.folder)
        folder = root / self.step
        if self.key and read_manifest(folder)["key"] != self.key:
            raise TreadleError(f"{folder} holds another model than when this was written")
        pipeline = read_pipeline(root)
        return open_trained(folder, Workspace(root, folder, pipeline, workspace.progress))

    def outline(self, workspace: Workspace) -> DecoderModel | None:
        there = self._workspace(workspace)
        step = as_training(find_step(there.pipeline, self.step), f"{there.folder}")
        return step.outline(there)

    def origins(self, workspace: Workspace) -> Iterator[Path]:
        yield from origins(Trained(step=self.step), self._workspace(workspace))

    def _workspace(self, workspace: Workspace) -> Workspace:
        root = Path(self.folder)
        return Workspace(root, root / self.step, read_pipeline(root), workspace.progress)


def read_pipeline(root: Path) -> Pipeline:
    """What a run's folder was made with."""
    file = root / PIPELINE
    return from_yaml(file.read_text(encoding="utf-8"), expect=Pipeline, name=str(file))


def find_trained(path: Path) -> FromRun:
    """The model of a run's folder (its last finished training step), or of a step's folder.

    Raises:
        TreadleError: no training step has finished.
    """
    root = path if is_run(path) else path.parent
    steps = [s.name for s in read_pipeline(root).steps if isinstance(s, Training)]
    wanted = steps if root == path else [path.name]
    for name in reversed(wanted):
        if (root / name / MANIFEST).is_file():
            key = read_manifest(root / name)["key"]
            return FromRun(folder=str(root), step=name, key=key)
    raise TreadleError(
        f"{path}: no training step has finished (there are: {', '.join(steps) or 'none'}); "
        "run it again to go on"
    )
