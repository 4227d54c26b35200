"""Sources: what opens to a resumable stream of optimiser steps.

A stream yields, for each optimiser step, the micro-batches of this rank whose gradients are
summed. How much a step holds is the source's business: a corpus counts tokens, a rollout source
counts prompts, and the training loop does not ask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.core.config import Config
from treadle.data.batch import Batch
from treadle.models.decoder import DecoderModel

if TYPE_CHECKING:
    from treadle.core.pipeline import Workspace
    from treadle.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Limit:
    """A metric of which the user is warned when it is above `most`."""

    metric: str
    most: float
    remedy: str


@dataclass(frozen=True)
class Work:
    """One optimiser step: micro-batches, and what the source observed while making them."""

    batches: tuple[Batch, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    """Of these metrics, or of those of the objective."""
    spare: Batch | None = None
    """Where there is no micro-batch: one to keep this process in step with others that have some;
    nothing is learned from it."""


@dataclass(frozen=True)
class Env:
    """What a source may use when it opens."""

    model: DecoderModel
    """The model that is being trained; on-policy sources sample from it."""
    tokenizer: Tokenizer
    scratch: Path
    """A folder of the run for caches that survive a restart."""
    seed: int = 0
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    """The precision in which the model runs."""
    workspace: Workspace | None = None
    """Of the step, for sources that read other steps' models; None outside a pipeline."""
    steps: int | None = None
    """Optimiser steps of the run, where it is known: nothing need be prepared for more."""

    def say(self, line: str) -> None:
        """A line in the run's log; nowhere outside a pipeline."""
        if self.workspace is not None:
            self.workspace.progress.say(line)


class Stream(ABC):
    """An endless iterator of steps whose place can be saved and restored exactly."""

    def __iter__(self) -> Stream:
        return self

    @abstractmethod
    def __next__(self) -> Work:
        """This rank's share of the next optimiser step."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where the stream is, as JSON values."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken: the same steps follow."""


class Source(Config):
    """A shape: opens to a stream."""

    @abstractmethod
    def open(self, env: Env) -> Stream:
        """The stream from its beginning."""
