"""The loop around a step that is not `fit`'s: the same checkpoints, the same hooks.

A method whose step is more than one gradient (a trust region, meta-learning) brings that step;
what is killed goes on here as there.
"""

from __future__ import annotations

from collections.abc import Callable

from treadle.core.pipeline import Workspace
from treadle.train.checkpoint import CheckpointStore
from treadle.train.hooks import JsonLines, RunInfo, ShowProgress, StepReport, WarnAbove
from treadle.train.state import TrainState


def repeat(
    take: Callable[[int], StepReport],
    *,
    steps: int,
    checkpoint_every: int,
    state: TrainState,
    name: str,
    workspace: Workspace,
) -> None:
    """Take the steps that are left, with checkpoints in the workspace's folder.

    A run that was interrupted goes on from its last checkpoint as if it had not been.

    Args:
        take: takes a step, of this number from 1, and reports it.

    Raises:
        TreadleError: from a step; or the checkpoint is of another model or optimiser.
    """
    folder = workspace.folder
    store = CheckpointStore(folder / "checkpoints")
    first = store.restore_latest(state) or 0
    hooks = (
        JsonLines(folder / "metrics.jsonl"),
        ShowProgress(workspace.progress, name),
        WarnAbove(workspace.progress, name),
    )
    for hook in hooks:
        hook.on_start(RunInfo(folder=folder, steps=steps, start=first))
    try:
        for step in range(first + 1, steps + 1):
            report = take(step)
            for hook in hooks:
                hook.on_step(report)
            if step % checkpoint_every == 0 or step == steps:
                store.save(step, state)
    finally:
        for hook in hooks:
            hook.on_end()
