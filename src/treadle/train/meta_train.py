"""A step of a pipeline that meta-trains what a model's transforms opened, over many tasks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from treadle.core.config import to_yaml
from treadle.core.errors import ConfigError, TreadleError
from treadle.core.pipeline import Workspace
from treadle.data.batch import Batch, assemble
from treadle.data.source import Env
from treadle.data.supervised import Supervised, piece_of
from treadle.models.decoder import DecoderModel
from treadle.models.transform import transformed
from treadle.objectives.causal import CausalLM
from treadle.optim.optimizer import Optimizer
from treadle.tokenizers.load import tokenizer_of
from treadle.train.hooks import StepReport
from treadle.train.loop import repeat
from treadle.train.meta import Episode, MetaMethod, Reptile, Weights, length
from treadle.train.precision import Auto, Precision, settle
from treadle.train.rng import RandomState, seed_everything
from treadle.train.run import WEIGHTS, Training, save_trained
from treadle.train.state import TrainState

DIVERGED = 1.5
"""Losses of a blind guess from which the inner steps lead astray: fresh models begin at about 1."""


class MetaTrain(Training):
    """Meta-training of adapters over tasks, each a supply of conversations."""

    name: str = "meta"
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
    checkpoint_every: int = Field(5, ge=1)
    seed: int = 0

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        """Train, and write what trained as a `Run` does."""
        seed_everything(self.seed)
        opened = self.model.open(workspace)
        model = transformed(opened.model, self.transforms)
        memo, say = workspace.folder / "precision.yaml", workspace.progress.say
        precision = settle(self.precision, "cpu", memo, say)
        precision.prepare(model)
        env = Env(
            model=model,
            tokenizer=tokenizer_of(opened),
            scratch=workspace.folder,
            seed=self.seed,
            autocast=partial(precision.autocast, "cpu"),
        )
        self.train(env, workspace)
        save_trained(model, dict(model.named_parameters()), workspace.folder / WEIGHTS)
        return {
            "kind": "train",
            "metrics_file": "metrics.jsonl",
            "steps": self.steps,
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "precision": str(precision.dtype()).removeprefix("torch."),
        }

    def train(self, env: Env, workspace: Workspace) -> None:
        """Train what requires gradients, with checkpoints in the workspace's folder.

        Raises:
            ConfigError: nothing trains, or a task has too few conversations.
            TreadleError: the loss is no number any more, or worse than a blind guess.
        """
        named = {n: p for n, p in env.model.named_parameters() if p.requires_grad}
        if not named:
            raise ConfigError("MetaTrain: nothing trains; add a transform such as LoRA")
        optimizer = self.optimizer.build(list(named.items()))
        episodes, loss = Episodes(self, env), LossOf(env)

        def take(step: int) -> StepReport:
            started, given = time.monotonic(), next(episodes)
            found = self.method(loss, named, given, self.inner_lr)
            self._require_sound(found.query_loss, step, math.log(env.model.config.vocab))
            for name, parameter in named.items():
                parameter.grad = found.gradients[name]
            optimizer.step()
            return StepReport(
                step=step,
                steps=self.steps,
                loss=found.query_loss,
                lr=float(optimizer.param_groups[0]["lr"]),
                grad_norm=float(length(found.gradients)),
                tokens=sum(map(_tokens, given)),
                seconds=time.monotonic() - started,
            )

        repeat(
            take,
            steps=self.steps,
            checkpoint_every=self.checkpoint_every,
            state=TrainState(
                model=env.model,
                optimizer=optimizer,
                stream=episodes,
                parts={"random": RandomState()},
                config=to_yaml(self),
            ),
            name=self.name,
            workspace=workspace,
        )

    def _require_sound(self, loss: float, step: int, blind: float) -> None:
        if not math.isfinite(loss):
            raise TreadleError(f"MetaTrain: the loss of step {step} is {loss}; lower inner_lr")
        if loss > DIVERGED * blind:
            raise TreadleError(
                f"MetaTrain: after the inner steps of step {step} the loss is {loss:.1f}, and a "
                f"blind guess has {blind:.1f}: they diverge; lower inner_lr"
            )


class Episodes:
    """The tasks of one meta-step after the other, drawn at random; its place can be saved."""

    def __init__(self, config: MetaTrain, env: Env) -> None:
        self.config, self.env = config, env
        self.random = np.random.default_rng(config.seed)

    def __next__(self) -> list[Episode]:
        tasks = self.config.tasks
        chosen = self.random.choice(len(tasks), self.config.tasks_per_step)
        return [self._episode(tasks[int(i)]) for i in chosen]

    def state(self) -> dict[str, Any]:
        return {"random": dict(self.random.bit_generator.state)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.random.bit_generator.state = state["random"]

    def _episode(self, source: Supervised) -> Episode:
        """Different conversations of one task for each inner step, and others to be judged by."""
        shots = self.config.shots
        count = (self.config.inner_steps + 1) * shots
        known = source.conversations.count()
        if known is not None and known < count:
            raise ConfigError(
                f"MetaTrain: an episode takes {count} conversations of a task, but one has only "
                f"{known}; lower `shots` or `inner_steps`"
            )
        drawn = self.random.choice(known or 2**31, count, replace=known is None)
        numbers = [int(number) for number in drawn]
        batches = [
            batch_of(source, numbers[i : i + shots], self.env) for i in range(0, count, shots)
        ]
        return Episode(batches[:-1], batches[-1])


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
    """These conversations in one batch.

    Raises:
        TreadleError: there is nothing to learn in any of them.
    """
    chats = (source.conversations.conversation(i) for i in numbers)
    batch = assemble([piece_of(chat, source, env.tokenizer) for chat in chats])
    if not len(batch.targets):
        raise TreadleError(
            f"MetaTrain: none of {len(numbers)} conversations has an assistant token within its "
            f"first {source.longest} tokens: raise `longest`, or shorten the prompts"
        )
    return batch


def _tokens(episode: Episode) -> int:
    return sum(batch.layout.tokens for batch in (*episode.support, episode.query))
