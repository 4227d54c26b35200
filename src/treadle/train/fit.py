"""The one training loop.

    for each step: g = sum over micro-batches and ranks of d total / d theta
                   g <- clip(g / weight);   theta <- optimiser(theta, g, lr(step))

Pretraining, fine-tuning, preferences, reinforcement and distillation differ in the source of
batches and the objective, never here. Hooks observe; they cannot change the loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.source import Stream
from treadle.models.decoder import DecoderModel
from treadle.objectives.objective import Objective
from treadle.optim.clipping import NormClip, scale_gradients
from treadle.optim.optimizer import Clip, Optimizer, Schedule
from treadle.train.checkpoint import CheckpointStore
from treadle.train.guard import Event, Guard, Guarding, Verdict, data_digest
from treadle.train.hooks import Hook, RunInfo, StepReport
from treadle.train.parallel.plan import Plan, World
from treadle.train.precision import Auto, Precision
from treadle.train.rng import RandomState
from treadle.train.state import TrainState
from treadle.train.step import ratios, summed_gradients


class Fit(Config):
    """How long to train, and what protects the run."""

    steps: int = Field(ge=1)
    clip: Clip = NormClip()
    precision: Precision = Auto()
    guard: Guarding = Guard()
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints; one is also written at the end."""
    keep: int = Field(2, ge=1)
    """Checkpoints that are kept."""


@dataclass(frozen=True)
class FitResult:
    """Where training ended."""

    steps: int
    loss: float
    """Of the last step."""
    tokens: int
    """Tokens that went through the model in this process, since it started or resumed."""
    skipped: int
    """Steps that were not taken in this process."""
    events: tuple[Event, ...] = ()
    """What the guard refused in the whole run, and why."""


def fit(
    model: DecoderModel,
    stream: Stream,
    objective: Objective,
    *,
    optimizer: Optimizer,
    schedule: Schedule,
    config: Fit,
    plan: Plan,
    world: World,
    folder: Path,
    hooks: Sequence[Hook] = (),
    description: str = "",
) -> FitResult:
    """Train the parameters of `model` that require gradients, with checkpoints in `folder`.

    A run that was interrupted goes on from its last checkpoint as if it had not been.

    Raises:
        TreadleError: nothing to train, nothing to predict in a step, or too many bad steps.
    """
    precision = config.precision.resolve(world.device)
    precision.prepare(model.to(world.device))
    plan.wrap(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise TreadleError("no parameter is trained: unfreeze some, or add a transform (LoRA)")
    parameters = [p for _, p in named]
    steps_taken = optimizer.build(named)
    peaks = [float(group["lr"]) for group in steps_taken.param_groups]
    scaler, clipper, sentinel = precision.scaler(), config.clip.build(), config.guard.build()
    state = TrainState(
        model=model,
        optimizer=steps_taken,
        stream=stream,
        parts={"scaler": scaler, "clipper": clipper, "guard": sentinel, "random": RandomState()},
        config=description,
    )
    store = CheckpointStore(folder, keep=config.keep)
    step = store.restore_latest(state)
    if step is None:
        step = 0
        store.save(step, state)  # a rollback needs somewhere to go
    saved = step
    result = FitResult(steps=step, loss=float("nan"), tokens=0, skipped=0, events=sentinel.events())
    for hook in hooks:
        hook.on_start(RunInfo(folder=folder, steps=config.steps, start=step, config=description))
    model.train()
    try:
        while step < config.steps:
            started = time.monotonic()
            factor = schedule(step, config.steps)
            for group, peak in zip(steps_taken.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            work = next(stream)
            sums = summed_gradients(
                model, objective, work, world, plan, precision, scaler
            ).over_ranks(plan)
            if sums["weight"] <= 0:
                raise TreadleError(
                    f"step {step} has no token to learn from: check that the data has answers and "
                    "that prompts do not fill the whole context"
                )
            loss = sums["total"] / sums["weight"]
            finite = scaler.unscale(parameters)
            scale_gradients(parameters, 1.0 / sums["weight"])
            norm = clipper(parameters)
            verdict = Verdict.SKIP
            overflow = not finite and math.isfinite(loss)  # of fp16's scale, which comes down
            if not overflow and not sentinel.refuses(step):
                verdict = sentinel.verdict(step, loss, norm, lambda w=work: data_digest(w))  # type: ignore[misc]
            if verdict is Verdict.GO:
                steps_taken.step()
            steps_taken.zero_grad(set_to_none=True)
            scaler.update(finite)
            if verdict is Verdict.ROLLBACK:
                step = saved = store.restore_latest(state) or 0
                for hook in hooks:
                    hook.on_rewind(step)
                continue
            step += 1
            tokens = int(sums["tokens"])
            result = FitResult(
                steps=step,
                loss=loss,
                tokens=result.tokens + tokens,
                skipped=result.skipped + (verdict is not Verdict.GO),
                events=sentinel.events(),
            )
            report = StepReport(
                step=step,
                steps=config.steps,
                loss=loss,
                lr=peaks[0] * factor,
                grad_norm=norm,
                tokens=tokens,
                seconds=time.monotonic() - started,
                metrics={**work.metrics, **ratios(sums)},
                skipped=verdict is not Verdict.GO,
                limits=work.limits,
            )
            for hook in hooks:
                hook.on_step(report)
            # After the hooks: a line that was written but not reached by a checkpoint is cut off
            # on resume, one that was not written would be missing. Not amid bad steps: a rollback
            # is to end before them.
            due = step - saved >= config.checkpoint_every and verdict is Verdict.GO
            if due or step == config.steps:
                store.save(step, state)
                saved = step
    finally:
        for hook in hooks:
            hook.on_end()
    return result
