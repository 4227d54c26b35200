"""Elastic weight consolidation: what earlier tasks depend on is held where they left it.

    L' = L + lambda/2 sum_tasks sum_i F_i (w_i - w*_i)^2

Kirkpatrick et al. 2017, arXiv:1612.00796. F is the diagonal Fisher information of an earlier task
and w* the weights at its end (`train/fisher.py`); the model carries both as `Memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.models.decoder import DecoderModel
from treadle.objectives.objective import LossOutput, Objective

CARD = Card(
    id="ft.continual",
    paper="Kirkpatrick et al. 2017, EWC, arXiv:1612.00796",
    summary="Holds the weights that earlier tasks depend on, each as much as it matters.",
    recipe="treadle run continual",
    oracle="tests/objectives/test_objectives_ewc.py::test_penalty_by_hand",
)


class Memory(nn.Module):
    """Fisher information and weights of one earlier task; no part of what is saved."""

    def __init__(self, fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(fisher)
        for place, name in enumerate(self.names):
            self.register_buffer(f"fisher_{place}", fisher[name], persistent=False)
            self.register_buffer(f"anchor_{place}", anchor[name], persistent=False)

    def penalty(self, weights: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """sum_i F_i (w_i - w*_i)^2, in fp32.

        Raises:
            ConfigError: other weights train now than then.
        """
        if odd := set(self.names) ^ set(weights):
            raise ConfigError(
                f"EWC: `{min(odd)}` trains in one of the tasks and not in the other; go on with "
                "the same adapters that the earlier task trained"
            )
        parts = []
        for place, name in enumerate(self.names):
            away = weights[name].float() - self.get_buffer(f"anchor_{place}")
            parts.append((self.get_buffer(f"fisher_{place}") * away.square()).sum())
        return torch.stack(parts).sum()


class EWC(Objective):
    """Another objective, and a spring on each weight."""

    objective: Objective
    strength: float = Field(100.0, gt=0.0)
    """lambda."""

    def __call__(self, model: DecoderModel, batch: Any) -> LossOutput:
        """The loss of one micro-batch.

        Raises:
            ConfigError: the model remembers no earlier task.
        """
        output = self.objective(model, batch)
        memories = [m for m in model.modules() if isinstance(m, Memory)]
        if not memories:
            raise ConfigError("EWC: the model remembers no task; open it by Remembered")
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        penalty = self.strength / 2 * torch.stack([m.penalty(weights) for m in memories]).sum()
        return LossOutput(
            total=output.total + penalty * output.weight,
            weight=output.weight,
            metrics={**output.metrics, "spring": penalty.detach() * output.weight},
        )


def remember(
    model: DecoderModel, fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> DecoderModel:
    """Give the model a memory of one more task; in place."""
    count = sum(isinstance(m, Memory) for m in model.modules())
    model.add_module(f"memory_{count}", Memory(fisher, anchor))
    return model
