"""The guard: steps that would harm the model are not taken, and written down.

A loss or gradient that is not finite is never applied. A spike is a loss, or the logarithm of a
gradient norm, far above the recent ones, in robust units:

    z(x) = (x - median) / max(1.4826 * MAD, floor)        over the last `window` good steps

A spike is skipped. After `patience` bad steps in a row skipping has not helped: the weights may
be what is wrong, so the run goes back to its last checkpoint and passes over the steps that led
there (Chowdhery et al. 2022, PaLM, section 5.1).
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum
from statistics import median
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError

CARD = Card(
    id="opt.stability",
    paper="Chowdhery et al. 2022, PaLM, arXiv:2204.02311; Leys et al. 2013 (median deviation)",
    summary="Skips steps with NaN or a spike and records them; goes back when skipping fails.",
    recipe="treadle run quickstart-scratch steps.1.fit.guard.patience=3",
    oracle="tests/train/test_train_guard.py::test_planted_nan_and_spike",
)


class Verdict(Enum):
    """What to do with a step whose gradients are there."""

    GO = "go"
    SKIP = "skip"
    """Do not apply it."""
    ROLLBACK = "rollback"
    """Restore the last checkpoint, then go on; `refuses` names the steps to pass over."""


@dataclass(frozen=True)
class Event:
    """A step that was not taken."""

    step: int
    verdict: str
    reason: str
    loss: float
    grad_norm: float
    data: str
    """Digest of this rank's share of the step's data."""


class Sentinel(ABC):
    """Judges each step. All ranks see the same global loss and norm, so all agree."""

    @abstractmethod
    def verdict(
        self, step: int, loss: float, grad_norm: float, data: Callable[[], str] = str
    ) -> Verdict:
        """Judge step `step` (from 0) by its loss and its gradient norm before clipping.

        `data` makes the digest for the record, and is called only where there is one to write.

        Raises:
            TreadleError: skipping and going back do not help.
        """

    @abstractmethod
    def refuses(self, step: int) -> bool:
        """Whether this step led to a rollback: its work is drawn and thrown away."""

    @abstractmethod
    def events(self) -> tuple[Event, ...]:
        """Every step that was not taken, in order."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """History and events, as JSON values."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; what this process has learned about bad steps is kept."""


class Guarding(Config):
    """A shape: what watches over a run."""

    @abstractmethod
    def build(self) -> Sentinel:
        """A sentinel that has seen nothing."""


class Unguarded(Guarding):
    """Takes every step, NaN or not: to study instability."""

    def build(self) -> Sentinel:
        return BlindSentinel()


class Guard(Guarding):
    """Skips what is not finite and what spikes."""

    z: float = Field(default=8.0, gt=0.0)
    """Robust deviations above the median that make a spike; infinity leaves the NaN guard."""
    window: int = Field(default=64, ge=8)
    warmup: int = Field(default=32, ge=4)
    """Good steps before spikes are looked for."""
    loss_floor: float = Field(default=0.05, gt=0.0)
    """Least deviation of the loss, as a share of its median or of 1, whichever is more."""
    norm_floor: float = Field(default=0.25, gt=0.0)
    """Least deviation of the logarithm of the gradient norm."""
    patience: int = Field(default=5, ge=1)
    """Bad steps in a row that end in a rollback."""
    lead: int = Field(default=5, ge=0)
    """Steps before the first bad one that are passed over too after a rollback."""
    rollbacks: int = Field(default=3, ge=0)
    """Rollbacks after which the run gives up."""

    def build(self) -> Sentinel:
        return RobustSentinel(self)


class RobustSentinel(Sentinel):
    def __init__(self, config: Guard) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.norms: deque[float] = deque(maxlen=config.window)
        self.bad: list[int] = []
        self.refused: set[int] = set()
        self.rollbacks = 0
        self.record: list[Event] = []

    def verdict(
        self, step: int, loss: float, grad_norm: float, data: Callable[[], str] = str
    ) -> Verdict:
        reason = self._reason(loss, grad_norm)
        if not reason:
            self.losses.append(loss)
            if grad_norm > 0:
                self.norms.append(math.log(grad_norm))
            self.bad.clear()
            return Verdict.GO
        self.bad.append(step)
        verdict = Verdict.SKIP if len(self.bad) < self.config.patience else Verdict.ROLLBACK
        self.record.append(Event(step, verdict.value, reason, loss, grad_norm, data()))
        if verdict is Verdict.ROLLBACK:
            self._go_back(step, reason)
        return verdict

    def _reason(self, loss: float, grad_norm: float) -> str:
        """Why the step is bad; empty where it is good."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
        config = self.config
        if len(self.losses) >= config.warmup:
            z = robust_z(loss, self.losses, config.loss_floor * max(1.0, abs(median(self.losses))))
            if z > config.z:
                return f"loss {loss:.4g} is {z:.1f} deviations above the recent median"
        if len(self.norms) >= config.warmup and grad_norm > 0:
            z = robust_z(math.log(grad_norm), self.norms, config.norm_floor)
            if z > config.z:
                return f"gradient norm {grad_norm:.4g} is {z:.1f} deviations above the median"
        return ""

    def _go_back(self, step: int, reason: str) -> None:
        if self.rollbacks == self.config.rollbacks:
            raise TreadleError(
                f"training is unstable: {len(self.bad)} bad steps in a row up to step {step} "
                f"({reason}), after {self.rollbacks} rollbacks. The last good checkpoint is kept; "
                "go on from it with a lower optimizer.lr, a longer warmup or a smaller "
                "clip.max_norm, or raise guard.z if the loss is meant to jump"
            )
        self.rollbacks += 1
        self.refused.update(range(self.bad[0] - self.config.lead, step + 1))
        self.bad.clear()

    def refuses(self, step: int) -> bool:
        return step in self.refused

    def events(self) -> tuple[Event, ...]:
        return tuple(self.record)

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "bad": list(self.bad),
            "refused": sorted(self.refused),
            "rollbacks": self.rollbacks,
            "events": [asdict(event) for event in self.record],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.losses = deque(state["losses"], self.config.window)
        self.norms = deque(state["norms"], self.config.window)
        self.bad = list(state["bad"])
        self.refused |= set(state["refused"])
        self.rollbacks = max(self.rollbacks, state["rollbacks"])
        known = [Event(**event) for event in state["events"]]
        # What this process has seen since stands after what the checkpoint knew.
        self.record = known + self.record[len(known) :]


class BlindSentinel(Sentinel):
    def verdict(
        self, step: int, loss: float, grad_norm: float, data: Callable[[], str] = str
    ) -> Verdict:
        return Verdict.GO

    def refuses(self, step: int) -> bool:
        return False

    def events(self) -> tuple[Event, ...]:
        return ()

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        return


def robust_z(x: float, history: deque[float], floor: float) -> float:
    """(x - median) / max(1.4826 MAD, floor); 1.4826 makes it the deviation of a normal variable."""
    centre = median(history)
    spread = 1.4826 * median(abs(h - centre) for h in history)
    return (x - centre) / max(spread, floor)


def data_digest(value: Any) -> str:
    """A hash of all tensors and scalars in a tree of dataclasses (16 hexadecimal digits)."""
    sha = hashlib.sha256()

    def visit(node: Any) -> None:
        if isinstance(node, Tensor):
            sha.update(f"{node.dtype} {tuple(node.shape)}".encode())
            raw = node.detach().cpu().contiguous().flatten().view(torch.uint8)
            sha.update(raw.numpy().tobytes())
        elif is_dataclass(node):
            for field in fields(node):
                visit(getattr(node, field.name))
        elif isinstance(node, Mapping):
            for key in sorted(node):
                visit(key)
                visit(node[key])
        elif isinstance(node, tuple | list):
            for item in node:
                visit(item)
        else:
            sha.update(repr(node).encode())

    visit(value)
    return sha.hexdigest()[:16]
