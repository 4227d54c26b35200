"""The step function: gradients of one optimiser step, summed over micro-batches and ranks.

`fit` is built on it, and so is any method that needs a loop of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.data.source import Work
from treadle.models.decoder import DecoderModel
from treadle.objectives.objective import Objective
from treadle.train.parallel.plan import Plan, World
from treadle.train.precision import Precision, Scaler


@dataclass
class Sums:
    """Totals of one optimiser step: of this rank's micro-batches, then of all ranks."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self.values[name] = self.values[name] + value if name in self.values else value

    def over_ranks(self, plan: Plan) -> dict[str, float]:
        names = sorted(self.values)
        reduced = plan.reduce_sum(torch.stack([self.values[n] for n in names]))
        return dict(zip(names, reduced.tolist(), strict=True))


def summed_gradients(
    model: DecoderModel,
    objective: Objective,
    work: Work,
    world: World,
    plan: Plan,
    precision: Precision,
    scaler: Scaler,
) -> Sums:
    """Leave the summed gradients of a step in the parameters; return its other sums.

    Raises:
        TreadleError: there is no batch at all.
    """
    sums = Sums()
    spare = work.batches[-1] if work.batches else work.spare
    if spare is None:
        raise TreadleError(
            f"process {world.rank} of {world.size} has no batch in a step: let the source give "
            "each process at least one item a step"
        )
    rounds = plan.rounds(max(1, len(work.batches)))
    for index in range(rounds):
        # A rank with fewer micro-batches than others still takes part in their communication.
        extra = index >= len(work.batches)
        batch = (spare if extra else work.batches[index]).to(world.device)
        plan.begin(model, last=index == rounds - 1)
        with precision.autocast(world.device):
            output = objective(model, batch)
        scaler.scale(output.total * 0.0 if extra else output.total).backward()
        found = {
            "total": output.total,
            "weight": output.weight,
            "tokens": torch.tensor(batch.layout.tokens, device=world.device),
            **{f"metric.{name}": value for name, value in output.metrics.items()},
        }
        for name, value in found.items():
            sums.add(name, torch.zeros_like(value) if extra else value)
        del output  # what its functions keep would live beside the next micro-batch's
    plan.finish(model)
    return sums


def ratios(sums: dict[str, float]) -> dict[str, float]:
    """Metrics divided by the weight of the step, like the loss."""
    prefix = "metric."
    return {
        name.removeprefix(prefix): value / sums["weight"]
        for name, value in sums.items()
        if name.startswith(prefix)
    }
