"""Chosen layers: some parts of a model train as they are, all others are frozen.

Layers near the head, the norms, single experts, whatever has a name: Lee et al. 2023, surgical
fine-tuning, arXiv:2210.11466. There is nothing beside the weights, so nothing to merge.
"""

from __future__ import annotations

from pydantic import Field
from torch import nn

from treadle.core.cards import Card
from treadle.models.transform import M, Transform, match_modules

CARD = Card(
    id="ft.sparse",
    paper="Lee et al. 2023, surgical fine-tuning, arXiv:2210.11466",
    summary="Trains chosen layers, experts or norms, and leaves the rest bit for bit.",
    recipe="treadle run fine-tune steps.sft.optimizer.lr=3e-4 "
    "'steps.sft.transforms=[{kind: ChosenLayers, layers: [blocks.28, blocks.29, norm]}]'",
    oracle="tests/peft/test_peft_chosen.py::test_all_else_is_bit_identical",
)


class ChosenLayers(Transform):
    """Only the matched modules train, with all that is in them."""

    layers: tuple[str, ...] = Field(min_length=1)
    """Patterns of module names: `blocks.2*`, `ffn`, `mixer.o`, `norm`."""

    def __call__(self, model: M) -> M:
        """The model with everything else frozen.

        Raises:
            ConfigError: a pattern matches nothing.
        """
        found = match_modules(model, self.layers, (nn.Module,), owner="ChosenLayers")
        trained = {id(p) for module in found.values() for p in module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        return model
