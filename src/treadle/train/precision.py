"""Precision: in which format a model computes, and how small gradients survive it.

Weights that train stay in fp32 ("master weights", Micikevicius et al. 2018); matrix products run
in the compute dtype under autocast; weights that are frozen are stored in it. fp16 has 5 bits of
exponent, so its loss is scaled up before backward and the gradients down after; the scale doubles
after `growth` good steps and halves when something overflows, and that step is not taken.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.config import Config, from_yaml, to_yaml
from treadle.core.errors import TreadleError
from treadle.core.files import write_text
from treadle.optim.clipping import gradient_norm, scale_gradients
from treadle.train.parallel import talk

CARD = Card(
    id="opt.precision",
    paper="Micikevicius et al. 2018, arXiv:1710.03740; Kalamkar et al. 2019, arXiv:1905.12322",
    summary="fp32, bf16, or fp16 with dynamic loss scaling; Auto races them on this machine.",
    recipe="treadle run quickstart-scratch steps.1.fit.precision='{kind: BF16}'",
    oracle="tests/train/test_train_precision.py::test_loss_curves_agree",
)


SMALLEST = 2.0**-24
"""Loss scale below which an overflow is no matter of scale: the least number of fp16."""


class Scaler(ABC):
    """Loss scaling: multiply the loss before backward, divide the gradients after."""

    @abstractmethod
    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""

    @abstractmethod
    def unscale(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Undo the scale in the gradients; False if any of them, on any rank, overflowed."""

    @abstractmethod
    def update(self, finite: bool) -> None:
        """Learn whether this step's gradients were finite."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The scale and how long it has held, as JSON values."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""


class NoScaler(Scaler):
    """fp32 and bf16 have exponents enough; NaN is the guard's business."""

    def scale(self, loss: Tensor) -> Tensor:
        return loss

    def unscale(self, parameters: Sequence[nn.Parameter]) -> bool:
        return True

    def update(self, finite: bool) -> None:
        return

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        return


class DynamicScaler(Scaler):
    def __init__(self, config: FP16) -> None:
        self.config = config
        self.factor, self.good = config.initial_scale, 0

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.factor

    def unscale(self, parameters: Sequence[nn.Parameter]) -> bool:
        scale_gradients(parameters, 1.0 / self.factor)
        norm = gradient_norm(parameters)
        return norm - norm == 0.0  # neither NaN nor infinite

    def update(self, finite: bool) -> None:
        self.good = self.good + 1 if finite else 0
        if not finite and self.factor <= SMALLEST:
            raise TreadleError(
                "gradients overflow fp16 at any scale: set fit.precision to BF16 or FP32"
            )
        if not finite:
            self.factor /= 2
        elif self.good == self.config.growth:
            self.factor, self.good = self.factor * 2, 0

    def state(self) -> dict[str, Any]:
        return {"factor": self.factor, "good": self.good}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.factor, self.good = float(state["factor"]), int(state["good"])


class Precision(Config):
    """A shape: the format of a model's computation."""

    @abstractmethod
    def resolve(
        self, device: torch.device | str, say: Callable[[str], None] = lambda line: None
    ) -> Precision:
        """The concrete precision for `device`; a choice that was measured is said."""

    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What matrix products are computed in."""

    def prepare(self, model: nn.Module) -> None:
        """Store what trains in fp32 and floating-point parameters that are frozen in `dtype`."""
        for parameter in model.parameters():
            if parameter.is_floating_point():
                wanted = torch.float32 if parameter.requires_grad else self.dtype()
                parameter.data = parameter.data.to(wanted)

    def autocast(self, device: torch.device | str) -> AbstractContextManager[Any]:
        """Within it, matrix products run in `dtype`."""
        if self.dtype() == torch.float32:
            return nullcontext()
        return torch.autocast(torch.device(device).type, self.dtype())

    @abstractmethod
    def scaler(self) -> Scaler:
        """A fresh loss scaler."""


class FP32(Precision):
    """32 bits throughout."""

    def resolve(
        self, device: torch.device | str, say: Callable[[str], None] = lambda line: None
    ) -> Precision:
        return self

    def dtype(self) -> torch.dtype:
        return torch.float32

    def scaler(self) -> Scaler:
        return NoScaler()


class BF16(Precision):
    """The exponent of fp32 with 8 bits of mantissa."""

    def resolve(
        self, device: torch.device | str, say: Callable[[str], None] = lambda line: None
    ) -> Precision:
        return self

    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def scaler(self) -> Scaler:
        return NoScaler()


class FP16(Precision):
    """5 bits of exponent, 11 of mantissa, with dynamic loss scaling."""

    initial_scale: float = Field(default=1024.0, gt=0.0)
    """First factor, on a loss that is a sum over the tokens of a micro-batch."""
    growth: int = Field(default=2000, ge=1)
    """Good steps in a row after which the scale doubles."""

    def resolve(
        self, device: torch.device | str, say: Callable[[str], None] = lambda line: None
    ) -> Precision:
        return self

    def dtype(self) -> torch.dtype:
        return torch.float16

    def scaler(self) -> Scaler:
        return DynamicScaler(self)


class Auto(Precision):
    """bf16 where this machine is faster with it, else fp32."""

    advantage: float = Field(default=1.2, gt=0.0)
    """How many times faster bf16 must be to be worth its rounding."""

    def resolve(
        self, device: torch.device | str, say: Callable[[str], None] = lambda line: None
    ) -> Precision:
        mine = race(device)
        # Ranks measure at the same time and could disagree: the first one's figures count.
        fp32, bf16 = map(float, talk.from_first(f"{mine.fp32} {mine.bf16}").split())
        result = Race(fp32=fp32, bf16=bf16)
        chosen: Precision = BF16() if result.ratio >= self.advantage else FP32()
        say(
            f"precision: {type(chosen).__name__} (a linear layer, forward and backward, on "
            f"{torch.device(device).type}: fp32 {result.fp32:.0f}, bf16 {result.bf16:.0f} GFLOP/s)"
        )
        return chosen

    def dtype(self) -> torch.dtype:
        raise TypeError("Auto is not a dtype; use what Auto().resolve(device) returns")

    def scaler(self) -> Scaler:
        raise TypeError("Auto has no scaler; use what Auto().resolve(device) returns")


def settle(
    precision: Precision,
    device: torch.device | str,
    memo: Path,
    say: Callable[[str], None] = lambda line: None,
) -> Precision:
    """The concrete precision of a run, resolved once and kept in the file `memo`.

    A run that goes on computes as it began, on whatever machine. Every rank must call.
    """
    known = memo.read_text(encoding="utf-8") if talk.rank() == 0 and memo.exists() else ""
    text = talk.from_first(known)
    if text:
        return from_yaml(text, expect=Precision, name=str(memo))  # type: ignore[type-abstract]
    chosen = precision.resolve(device, say)
    with talk.first_rank_works() as working:
        if working:
            write_text(memo, to_yaml(chosen))
    return chosen


@dataclass(frozen=True)
class Race:
    """GFLOP/s of a linear layer's forward and backward with fp32 weights."""

    fp32: float
    bf16: float

    @property
    def ratio(self) -> float:
        return self.bf16 / self.fp32


def race(
    device: torch.device | str, *, rows: int = 256, inner: int = 576, outer: int = 1536
) -> Race:
    """Time both formats on the shapes of a small model, alternating, and keep the best of each."""
    device = torch.device(device)
    x = torch.ones(rows, inner, device=device)  # not random: a run's random state stays untouched
    weight = torch.ones(outer, inner, device=device, requires_grad=True)
    best = {FP32(): float("inf"), BF16(): float("inf")}
    for _ in range(12):
        for precision in best:
            _wait(device)
            start = time.perf_counter()
            with precision.autocast(device), torch.enable_grad():
                y = F.linear(x, weight)
            y.backward(torch.ones_like(y))
            _wait(device)
            best[precision] = min(best[precision], time.perf_counter() - start)
            weight.grad = None
    work = 2 * 2 * rows * inner * outer / 1e9
    return Race(fp32=work / best[FP32()], bf16=work / best[BF16()])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
