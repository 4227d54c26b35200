"""Diagonal Fisher information: how much each weight matters to what the model says of some data.

    F_i = 1/N sum_examples (d log p(y | x) / d w_i)^2

With the labels of the data: the empirical Fisher. Elastic weight consolidation holds by it,
and a sparse fine-tuning trains where it is largest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from treadle.core.errors import ConfigError
from treadle.core.files import atomic_file
from treadle.core.pipeline import Reads, Step, Workspace
from treadle.data.batch import Batch
from treadle.data.source import Env
from treadle.data.supervised import Supervised
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened
from treadle.models.transform import match_modules
from treadle.nn.linear import LinearLike
from treadle.nn.modes import evaluating
from treadle.objectives.causal import CausalLM
from treadle.objectives.ewc import remember
from treadle.objectives.objective import Objective
from treadle.peft.sparse import with_masks
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision

FISHER, ANCHOR = "fisher.safetensors", "anchor.safetensors"
TARGETS = (nn.Linear, LinearLike)
"""What masks are laid on."""


class Fisher(Step):
    """Measure the Fisher information of the weights that train, and keep their values."""

    name: str = "fisher"
    model: ModelSource
    source: Supervised
    examples: int = Field(64, ge=1)
    """N."""
    precision: Precision = Auto()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        opened = self.model.open(workspace)
        model = opened.model
        precision = self.precision.resolve("cpu")
        precision.prepare(model)
        env = Env(
            model=model,
            tokenizer=tokenizer_of(opened),
            scratch=workspace.folder,
            autocast=partial(precision.autocast, "cpu"),
        )
        batches = examples(self.source, env, self.examples)
        found = fisher(model, CausalLM(), batches, env)
        anchor = {n: p.detach().float() for n, p in model.named_parameters() if n in found}
        for tensors, name in ((found, FISHER), (anchor, ANCHOR)):
            with atomic_file(workspace.folder / name) as temporary:
                save_file(tensors, temporary)
        total = sum(float(f.sum()) for f in found.values())
        return {
            "kind": "fisher",
            "examples": len(batches),
            "parameters": sum(f.numel() for f in found.values()),
            "trace": total,
        }


class Remembered(ModelSource, Reads):
    """A model that remembers an earlier task, whose `Fisher` it reads, for the objective EWC."""

    model: ModelSource

    def open(self, workspace: Workspace) -> Opened:
        opened = self.model.open(workspace)
        folder = workspace.output(self.step)
        remember(opened.model, load_file(folder / FISHER), load_file(folder / ANCHOR))
        return opened

    def outline(self, workspace: Workspace) -> DecoderModel | None:
        return self.model.outline(workspace)


class FisherMasked(ModelSource, Reads):
    """A model of which those weights train whose Fisher information is largest (FISH mask)."""

    model: ModelSource
    density: float = Field(0.005, gt=0.0, le=1.0)
    """Of all numbers of the targets together."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    def open(self, workspace: Workspace) -> Opened:
        opened = self.model.open(workspace)
        information = load_file(workspace.output(self.step) / FISHER)
        masks = fisher_masks(opened.model, information, self.targets, self.density)
        with_masks(opened.model, masks, "FisherMasked")
        return opened

    def outline(self, workspace: Workspace) -> None:
        model = self.model.outline(workspace)
        if model is not None:
            match_modules(model, self.targets, TARGETS, owner="FisherMasked")


def examples(source: Supervised, env: Env, count: int) -> Sequence[Batch]:
    """The first conversations, a batch each; those without an answer are left out."""
    shortest = 8  # a conversation that is longer than a micro-batch may be is alone in it
    return next(source.replace(tokens=shortest, per_step=count).open(env)).batches


def fisher(
    model: DecoderModel, objective: Objective, batches: Iterable[Batch], env: Env
) -> dict[str, Tensor]:
    """F of each parameter that trains, by name, without dropout; each batch is one example.

    Raises:
        ConfigError: nothing trains, or there is no example.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError("Fisher: nothing of the model trains, so there is nothing to weigh")
    sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in trained.items()}
    count = 0
    for batch in batches:
        with evaluating(model), env.autocast():
            total = objective(model, batch.to(env.device)).total
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        for own, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                own += gradient.float().square()
        count += 1
    if not count:
        raise ConfigError("Fisher: the source gave no example")
    return {name: own / count for name, own in sums.items()}


def fisher_masks(
    model: DecoderModel, information: Mapping[str, Tensor], targets: tuple[str, ...], density: float
) -> dict[str, Tensor]:
    """Places of the largest information of all targets together, by layer.

    Raises:
        ConfigError: a target matches nothing or was not measured, or the density is too small.
    """
    names = list(match_modules(model, targets, TARGETS, owner="FisherMasked"))
    if missing := [n for n in names if f"{n}.weight" not in information]:
        raise ConfigError(
            f"FisherMasked: the step measured nothing for `{missing[0]}`; measure the plain model, "
            "with all its weights open"
        )
    parts = [information[f"{name}.weight"].flatten() for name in names]
    count = int(density * sum(map(len, parts)))
    if not count:
        raise ConfigError(
            f"FisherMasked: density={density} of {sum(map(len, parts))} numbers is an empty mask; "
            "raise it"
        )
    chosen = torch.cat(parts).topk(count).indices.sort().values
    masks, start = {}, 0
    for name, part in zip(names, parts, strict=True):
        inside = (chosen >= start) & (chosen < start + len(part))
        masks[name] = chosen[inside] - start
        start += len(part)
    return masks
