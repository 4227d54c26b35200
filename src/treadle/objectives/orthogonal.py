"""A penalty that keeps the factors of AdaLoRA near orthogonal, on top of any objective.

    L' = L + c mean over layers and both factors of ||P^T P - I||_F,  ||Q Q^T - I||_F

Zhang et al. 2023, arXiv:2303.10512, equation 4, with the root that PEFT takes.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.errors import ConfigError
from treadle.models.decoder import DecoderModel
from treadle.objectives.objective import LossOutput, Objective
from treadle.peft.adalora import AdaLoRALinear


class Orthogonal(Objective):
    """Another objective, and the distance of each P and Q from an orthogonal one."""

    objective: Objective
    weight: float = Field(default=0.5, ge=0.0)
    """c."""

    def __call__(self, model: DecoderModel, batch: Any) -> LossOutput:
        output = self.objective(model, batch)
        penalty = distance(model)
        return LossOutput(
            total=output.total + self.weight * penalty * output.weight,
            weight=output.weight,
            metrics={**output.metrics, "orthogonality": penalty.detach() * output.weight},
        )


def distance(model: DecoderModel) -> Float[Tensor, ""]:
    """Mean Frobenius distance of the factors' Gram matrices from the identity.

    Raises:
        ConfigError: the model has no AdaLoRA layer.
    """
    layers = [m for m in model.modules() if isinstance(m, AdaLoRALinear)]
    if not layers:
        raise ConfigError("Orthogonal: the model has no AdaLoRA layer; add the transform AdaLoRA")
    grams = [gram for m in layers for gram in (m.P.T @ m.P, m.Q @ m.Q.T)]
    eye = torch.eye(len(grams[0]), device=grams[0].device)
    return torch.stack([torch.linalg.matrix_norm(gram - eye) for gram in grams]).mean()
