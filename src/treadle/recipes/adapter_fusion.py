"""Two bottleneck adapters, each trained on its own task, and attention over both."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.peft.bottleneck import Bottleneck
from treadle.peft.fusion import AdapterFusion
from treadle.recipes.adapter_mixture import one_each, together
from treadle.train.run import Trained


def adapter_fusion() -> Pipeline:
    experts = one_each(Bottleneck(width=32, targets=("ffn",)))
    fusion = AdapterFusion(experts=tuple(Trained(step=run.name) for run in experts))
    return together("adapter-fusion", experts, fusion, lr=1e-4)
