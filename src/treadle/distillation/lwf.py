"""Learning without forgetting: on the new task's text, the model stays near what it said before.

    L = CE(y, p) + keep T^2 KL(p_old || p)      p_old: the model before the new task

Li and Hoiem 2016, arXiv:1606.09282. Nothing of the old task's data is needed. It is distillation
with one's former self as the teacher, so it is put together from those parts.
"""

from __future__ import annotations

from dataclasses import dataclass

from treadle.core.cards import Card
from treadle.data.source import Source
from treadle.distillation.taught import Taught
from treadle.models.source import ModelSource
from treadle.objectives.distil import Distil, HardLabels
from treadle.objectives.soft_labels import SoftLabels, Steady

CARD = Card(
    id="ft.continual.lwf",
    paper="Li and Hoiem 2016, Learning without Forgetting, arXiv:1606.09282",
    summary="Learns a new task while its former self says what must not change; no old data.",
    recipe="treadle run continual",
    oracle="tests/distillation/test_distillation_lwf.py::test_loss_by_hand",
)


@dataclass(frozen=True)
class Unforgetting:
    """What a run needs."""

    source: Taught
    objective: Distil


def without_forgetting(
    source: Source, former: ModelSource, *, keep: float = 1.0, temperature: float = 2.0
) -> Unforgetting:
    """Source and objective of a run that learns `source` and stays near `former`."""
    soft = SoftLabels(weight=keep, temperature=Steady(value=temperature))
    return Unforgetting(
        source=Taught(source=source, teacher=former),
        objective=Distil(terms=(HardLabels(), soft)),
    )
