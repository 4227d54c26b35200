"""The ways to adapt a model that are weighed against each other, as real configurations."""

from __future__ import annotations

from dataclasses import dataclass, field

from treadle.models.decoder import Decoder
from treadle.models.transform import Transform
from treadle.objectives.causal import CausalLM
from treadle.objectives.distil import Distil, HardLabels
from treadle.objectives.objective import Objective
from treadle.objectives.soft_labels import SoftLabels
from treadle.optim.adamw import AdamW
from treadle.optim.adamw8bit import AdamW8bit
from treadle.optim.optimizer import Optimizer
from treadle.peft.bottleneck import Bottleneck
from treadle.peft.dora import DoRA
from treadle.peft.ia3 import IA3
from treadle.peft.lora import LoRA
from treadle.peft.prefix import PrefixTuning
from treadle.peft.prompt import PromptTuning
from treadle.quantization.nf4 import NF4


@dataclass(frozen=True)
class Method:
    """A way to adapt a model."""

    name: str
    transforms: tuple[Transform, ...]
    optimizer: Optimizer
    objective: Objective = field(default_factory=CausalLM)
    distils: bool = False
    """Whether a smaller student learns from the model, instead of the model itself."""


def methods() -> tuple[Method, ...]:
    """From the most that is changed to the least; distillation last."""
    soft = Distil(terms=(HardLabels(weight=0.1), SoftLabels(weight=0.9)))
    return (
        Method("full", (), AdamW(lr=2e-4)),
        Method("lora", (LoRA(rank=16),), AdamW(lr=2e-3)),
        Method("dora", (DoRA(rank=16),), AdamW(lr=2e-3)),
        Method("qlora", (NF4(), LoRA(rank=16)), AdamW8bit(lr=2e-3)),
        Method("adapter", (Bottleneck(),), AdamW(lr=2e-3)),
        Method("ia3", (IA3(),), AdamW(lr=2e-2)),
        Method("prefix", (PrefixTuning(),), AdamW(lr=1e-2)),
        Method("prompt", (PromptTuning(),), AdamW(lr=1e-2)),
        Method("distillation", (), AdamW(lr=5e-4), soft, distils=True),
    )


def student_of(decoder: Decoder) -> Decoder:
    """A third of the layers, evenly spread, the first and the last among them."""
    count = len(decoder.blocks)
    wanted = max(1, round(count / 3))
    places = [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]
    return decoder.replace(blocks=tuple(decoder.blocks[i] for i in places))
