"""Adapters that were trained apart, as model sources without a pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from peft_pair import perturbed, tiny

from treadle.core.pipeline import Pipeline, Workspace
from treadle.models.source import ModelSource, Opened
from treadle.models.transform import Transform


class TinyExpert(ModelSource):
    """A tiny model with adapters that are far from their start."""

    transforms: tuple[Transform, ...] = ()
    seed: int = 0
    base_seed: int = 0
    dim: int = 32

    def open(self, workspace: Workspace) -> Opened:
        model = tiny(seed=self.base_seed, dim=self.dim)
        torch.manual_seed(100 + self.seed)
        for transform in self.transforms:
            model = transform(model)
        return Opened(perturbed(model, size=0.3) if self.transforms else model, Path())


def nowhere() -> Workspace:
    return Workspace(Path(), Path(), Pipeline(name="none", steps=()))
