"""A step of a pipeline that meta-trains what a model's transforms opened, over many tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from treadle.core.config import parse
from treadle.core.errors import ConfigError, TreadleError
from treadle.core.pipeline import Reads, Step, Workspace
from treadle.core.progress import Progress
from treadle.data.batch import Batch, assemble
from treadle.data.source import Env
from treadle.data.supervised import Supervised, piece_of
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened, weight_bytes
from treadle.models.transform import Transform, transformed
from treadle.objectives.causal import CausalLM
from treadle.optim.optimizer import Optimizer
from treadle.tokenizers.load import tokenizer_of
from treadle.train.meta import Episode, MetaMethod, Reptile, Weights
from treadle.train.precision import Auto, Precision
from treadle.train.rng import seed_everything
from treadle.train.run import WEIGHTS, load_trained, save_trained

DIVERGED = 1.5
"""Losses of a blind guess from which the inner steps lead astray: fresh models begin at about 1."""


class MetaTrain(Step):
    """Meta-training of adapters over tasks, each a supply of conversations."""

    name: str = "meta"
    model: ModelSource
    transforms: tuple[Transform, ...] = ()
    tasks: tuple[Supervised, ...] = Field(min_length=2)
    method: MetaMethod = Reptile()
    optimizer: Optimizer
    """Of the start; it takes the method's direction for a gradient."""
    steps: int = Field(30, ge=1)
    tasks_per_step: int = Field(2, ge=1)
    shots: int = Field(8, ge=1)
    """Conversations in each inner step, and in what the adapted weights are judged by."""
    inner_steps: int = Field(4, ge=1)
    """K."""
    inner_lr: float = Field(0.01, gt=0.0)
    precision: Precision = Auto()
    seed: int = 0

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        """Train, and write what trained as a `Run` does."""
        seed_everything(self.seed)
        opened = self.model.open(workspace)
        model = transformed(opened.model, self.transforms)
        precision = self.precision.resolve("cpu")
        precision.prepare(model)
        env = Env(
            model=model,
            tokenizer=tokenizer_of(opened),
            scratch=workspace.folder,
            seed=self.seed,
            autocast=partial(precision.autocast, "cpu"),
        )
        losses = self.train(env, workspace.progress)
        (workspace.folder / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": i, "loss": x}) + "\n" for i, x in enumerate(losses, 1))
        )
        weights = {n: p.detach() for n, p in model.named_parameters()}
        save_trained(model, weights, workspace.folder / WEIGHTS)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {
            "kind": "meta",
            "loss": losses[-1],
            "steps": self.steps,
            "parameters_trained": trained,
        }

    def train(self, env: Env, progress: Progress) -> list[float]:
        """Train what requires gradients; the query loss of each step.

        Raises:
            ConfigError: nothing trains, or a task has too few conversations.
            TreadleError: the loss is no number any more, or worse than a blind guess.
        """
        named = [(n, p) for n, p in env.model.named_parameters() if p.requires_grad]
        if not named:
            raise ConfigError("MetaTrain: nothing trains; add a transform such as LoRA")
        optimizer = self.optimizer.build(named)
        random = np.random.default_rng(self.seed)
        loss, blind = LossOf(env), math.log(env.model.config.vocab)
        losses: list[float] = []
        with progress.task(self.name, self.steps) as task:
            for step in range(self.steps):
                chosen = random.choice(len(self.tasks), self.tasks_per_step)
                episodes = [self._episode(env, self.tasks[int(i)], random) for i in chosen]
                found = self.method(loss, dict(named), episodes, self.inner_lr)
                if not np.isfinite(found.query_loss):
                    raise TreadleError(
                        f"MetaTrain: the loss of step {step} is {found.query_loss}; lower inner_lr"
                    )
                if found.query_loss > DIVERGED * blind:
                    raise TreadleError(
                        f"MetaTrain: after the inner steps of step {step} the loss is "
                        f"{found.query_loss:.1f}, and a blind guess has {blind:.1f}: they "
                        "diverge; lower inner_lr"
                    )
                for name, parameter in named:
                    parameter.grad = found.gradients[name]
                optimizer.step()
                losses.append(found.query_loss)
                task.update(step + 1, note=f"query loss {found.query_loss:.3f}")
        return losses

    def _episode(self, env: Env, source: Supervised, random: np.random.Generator) -> Episode:
        """Different conversations of one task for each inner step, and others to be judged by."""
        count = (self.inner_steps + 1) * self.shots
        known = source.conversations.count()
        if known is not None and known < count:
            raise ConfigError(
                f"MetaTrain: an episode takes {count} conversations of a task, but one has only "
                f"{known}; lower `shots` or `inner_steps`"
            )
        drawn = random.choice(known or 2**31, count, replace=known is None)
        numbers = [int(number) for number in drawn]
        batches = [
            batch_of(source, numbers[i : i + self.shots], env) for i in range(0, count, self.shots)
        ]
        return Episode(batches[:-1], batches[-1])


class MetaTrained(ModelSource, Reads):
    """The start that an earlier `MetaTrain` found, with its transforms."""

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.output(self.step)
        step = parse(
            workspace.manifest(self.step)["config"],
            expect=MetaTrain,
            where=lambda path: str(folder / "manifest.json"),
        )
        opened = step.model.open(workspace)
        model = transformed(opened.model, step.transforms)
        load_trained(model, folder / WEIGHTS)
        size = (opened.bytes_on_disk or 0) + weight_bytes(folder / WEIGHTS)
        return replace(opened, model=model, bytes_on_disk=size)


class LossOf:
    """The mean loss of a model of which some weights are given."""

    def __init__(self, env: Env) -> None:
        self.model, self.autocast = env.model, env.autocast

    def __call__(self, weights: Weights, batch: Batch) -> Float[Tensor, ""]:
        with self.autocast():
            total: Tensor = functional_call(
                _Loss(self.model), {f"model.{n}": w for n, w in weights.items()}, (batch,)
            )
        return total


class _Loss(torch.nn.Module):
    """`functional_call` swaps weights during a call of a module, and the loss is a part of it."""

    def __init__(self, model: DecoderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        output = CausalLM()(self.model, batch)
        return output.total / output.weight


def batch_of(source: Supervised, numbers: Sequence[int], env: Env) -> Batch:
    """These conversations in one batch."""
    chats = (source.conversations.conversation(i) for i in numbers)
    return assemble([piece_of(chat, source, env.tokenizer) for chat in chats])
