"""TRPO as a step of a pipeline: its own short loop, since its steps are no gradient steps.

Rollouts give groups and advantages as for GRPO; each lot moves the policy once, by
`trust_region_step`. A run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import nn

from treadle.alignment.rollouts import Rollouts
from treadle.alignment.trpo import Bounds, Taken, trust_region_step
from treadle.core.config import to_yaml
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Workspace
from treadle.data.source import Env, Stream, Work
from treadle.models.transform import transformed
from treadle.tokenizers.load import tokenizer_of
from treadle.train.hooks import StepReport
from treadle.train.loop import repeat
from treadle.train.rng import RandomState, seed_everything
from treadle.train.run import WEIGHTS, Training, save_trained
from treadle.train.state import TrainState


class TRPO(Training):
    """Trust region policy optimisation, in fp32: its finite differences ask for it."""

    name: str = "trpo"
    source: Rollouts
    steps: int = Field(ge=1)
    delta: float = Field(0.01, gt=0.0)
    """Most KL(pi_old || pi) of a step, in nats, mean over tokens."""
    damping: float = Field(0.1, gt=0.0)
    iterations: int = Field(10, ge=1)
    """Of conjugate gradients; each costs three forward passes and one backward."""
    backtracks: int = Field(10, ge=1)
    shrink: float = Field(0.8, gt=0.0, lt=1.0)
    checkpoint_every: int = Field(5, ge=1)
    seed: int = 0

    def bounds(self) -> Bounds:
        return Bounds(self.delta, self.damping, self.iterations, self.backtracks, self.shrink)

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        folder = workspace.folder
        seed_everything(self.seed)
        opened = self.model.open(workspace)
        model = transformed(opened.model, self.transforms).float()
        env = Env(
            model=model,
            tokenizer=tokenizer_of(opened),
            scratch=folder / "scratch",
            seed=self.seed,
            workspace=workspace,
        )
        env.scratch.mkdir(exist_ok=True)
        stream = self.source.open(env)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise TreadleError("no parameter is trained: unfreeze some, or add a transform (LoRA)")
        state = TrainState(
            model=model,
            optimizer=torch.optim.SGD(parameters, lr=1.0),  # has no state: a place in the file
            stream=stream,
            parts={"random": RandomState()},
            config=to_yaml(self),
        )
        repeat(
            partial(self._step, model, stream),
            steps=self.steps,
            checkpoint_every=self.checkpoint_every,
            state=state,
            name=self.name,
            workspace=workspace,
        )
        save_trained(model, dict(model.named_parameters()), folder / WEIGHTS)
        return {
            "kind": "train",
            "metrics_file": "metrics.jsonl",
            "steps": self.steps,
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameters_trained": sum(p.numel() for p in parameters),
        }

    def _step(self, model: nn.Module, stream: Stream, step: int) -> StepReport:
        started = time.monotonic()
        work = next(stream)
        model.eval()  # dropout would be taken for a change of the policy
        taken = trust_region_step(model, work.batches, self.bounds())  # type: ignore[arg-type]
        return StepReport(
            step=step,
            steps=self.steps,
            loss=-taken.gain,
            lr=taken.scale,
            grad_norm=math.nan,
            tokens=_tokens(work),
            seconds=time.monotonic() - started,
            metrics={**work.metrics, **_metrics(taken)},
            skipped=taken.scale == 0.0,
            limits=work.limits,
        )


def _tokens(work: Work) -> int:
    return sum(batch.layout.tokens for batch in work.batches)


def _metrics(taken: Taken) -> dict[str, float]:
    return {
        "step_kl": taken.kl,
        "gain": taken.gain,
        "scale": taken.scale,
        "mismatch": taken.mismatch,
    }
