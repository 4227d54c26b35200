"""From what a user types to a model: the folder of a run, a known model, a hub id or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treadle.models.source import ModelSource, Opened


def source_of(target: str) -> ModelSource:
    """Where the model that `target` names comes from.

    The folder of a run stands for its last finished training step, the folder of a step for that
    step's model; anything else is what `Pretrained` takes.

    Raises:
        TreadleError: the run has trained no model yet.
    """
    from treadle.core.pipeline import is_run

    path = Path(target)
    if path.is_dir() and (is_run(path) or is_run(path.parent)):
        from treadle.train.from_run import find_trained  # slow: all of training

        return find_trained(path)
    from treadle.models.source import Pretrained

    return Pretrained(name=target)


def file_of(target: str) -> Path | None:
    """The GGUF file that `target` names, if it names one.

    Raises:
        TreadleError: there is no such model, or the run has trained none yet.
    """
    from treadle.core.progress import standard
    from treadle.models.hub.pull import pull
    from treadle.models.source import Pretrained

    source = source_of(target)
    if not isinstance(source, Pretrained):
        return None
    progress = standard()
    try:
        path = pull(source.name, progress=progress.say).path
    finally:
        progress.close()
    return path if path.suffix == ".gguf" else None


def open_model(target: str) -> Opened:
    """The model that `target` names.

    Raises:
        TreadleError: there is no such model, or the run has trained none yet.
    """
    from treadle.core.pipeline import Pipeline, Workspace
    from treadle.core.progress import standard

    progress = standard()
    nowhere = Pipeline(name="none", steps=())
    try:
        return source_of(target).open(Workspace(Path(), Path(), nowhere, progress))
    finally:
        progress.close()
