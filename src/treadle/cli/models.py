"""From what a user types to a model: the folder of a run, a known model, a hub id or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from treadle.core.errors import TreadleError

if TYPE_CHECKING:
    from treadle.core.pipeline import Workspace
    from treadle.models.source import Opened

PIPELINE = "pipeline.yaml"


def open_model(target: str) -> Opened:
    """The model that `target` names.

    The folder of a run stands for its last finished training step, the folder of a step for that
    step's model; anything else is what `Pretrained` takes.

    Raises:
        TreadleError: there is no such model, or the run has trained none yet.
    """
    from treadle.core.config import from_yaml
    from treadle.core.pipeline import Pipeline, Workspace
    from treadle.core.progress import standard
    from treadle.models.source import Pretrained
    from treadle.train.run import open_trained

    path = Path(target)
    root = path if (path / PIPELINE).is_file() else path.parent
    progress = standard()
    try:
        if not path.is_dir() or not (root / PIPELINE).is_file():
            empty = Pipeline(name="none", steps=())
            return Pretrained(name=target).open(Workspace(root, path, empty, progress))
        text = (root / PIPELINE).read_text(encoding="utf-8")
        pipeline = from_yaml(text, expect=Pipeline, name=str(root / PIPELINE))
        workspace = Workspace(root, path, pipeline, progress)
        return open_trained(_last_training(workspace) if root == path else path, workspace)
    finally:
        progress.close()


def _last_training(workspace: Workspace) -> Path:
    from treadle.core.pipeline import MANIFEST
    from treadle.train.run import Run

    trainings = [step.name for step in workspace.pipeline.steps if isinstance(step, Run)]
    for name in reversed(trainings):
        if (workspace.root / name / MANIFEST).is_file():
            return workspace.root / name
    raise TreadleError(
        f"{workspace.root}: no training step has finished (there are: "
        f"{', '.join(trainings) or 'none'}); run it again to go on"
    )
