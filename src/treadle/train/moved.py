"""Did it train? What moved between the first step and the last, and what must not have.

    change of w = ||w_after - w_before|| / ||w_after||     over up to 4096 of its numbers

Before training each parameter leaves a print: a sum of all its bits, which tells whether it moved
at all, and the sampled numbers, which tell by how much. A frozen parameter that moved, or a trained
one that did not, is an error and not a line in a log: a run can look well and have trained nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor, nn

from treadle.core.errors import TreadleError

SAMPLE = 4096
ENOUGH = 2
"""Steps after which all that trains must have moved. In the first, a factor beside one that is
still zero (A of LoRA) has no gradient."""


@dataclass(frozen=True)
class Print:
    """What is remembered of a parameter."""

    trained: bool
    bits: int
    sample: Float[Tensor, " n"]


Prints = Mapping[str, Print]


def prints_of(model: nn.Module) -> dict[str, Print]:
    """A print of each parameter, by name."""
    return {
        name: Print(parameter.requires_grad, _bits(parameter), _sample(parameter))
        for name, parameter in model.named_parameters()
    }


def changes(before: Prints, after: Mapping[str, Tensor], *, steps: int) -> dict[str, float]:
    """The change of each trained parameter, by name, the smallest first.

    Raises:
        TreadleError: a frozen parameter moved, or a trained one did not in so many steps.
    """
    moved = {name: _bits(after[name]) != was.bits for name, was in before.items()}
    loose = [n for n, was in before.items() if moved[n] and not was.trained]
    if loose:
        raise TreadleError(
            f"{_some(loose)} moved in training, though frozen: a transform or an optimiser writes "
            "into weights that are not its own; what was trained is not to be trusted"
        )
    stuck = [n for n, was in before.items() if was.trained and not moved[n]]
    if stuck and steps >= ENOUGH:
        raise TreadleError(
            f"{_some(stuck)} did not move in {steps} steps: nothing there was learned. Look at "
            "grad_norm and lr in metrics.jsonl: no gradient reaches it, the rate is zero, or "
            "every step was refused"
        )
    found = {n: _change(was.sample, after[n]) for n, was in before.items() if was.trained}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def summary(found: Mapping[str, float]) -> str:
    """One line for the report."""
    least, most = next(iter(found)), next(reversed(list(found)))
    return (
        f"{len(found)} tensors by {median(found.values()):.2%} in the middle, least `{least}` "
        f"{found[least]:.2%}, most `{most}` {found[most]:.2%}"
    )


def _bits(tensor: Tensor) -> int:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().flatten()
    return int(flat.view(whole[flat.element_size()]).sum(dtype=torch.int64))


def _sample(tensor: Tensor) -> Float[Tensor, " n"]:
    flat = tensor.detach().flatten()
    return flat[:: -(-len(flat) // SAMPLE) or 1].to("cpu", torch.float32, copy=True)


def _change(before: Float[Tensor, " n"], after: Tensor) -> float:
    now = _sample(after)
    return float((now - before).norm() / now.norm().clamp(min=1e-30))


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{n}`" for n in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
