"""Every method's needs on one machine, for one amount of data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.core.progress import Progress, Silent
from treadle.data.batch import Batch, Piece, assemble
from treadle.models.decoder import Decoder
from treadle.planning.methods import Method, student_of
from treadle.planning.rehearse import Job, Needs, rehearse_all
from treadle.train.precision import BF16, FP32, Precision

CHECKPOINTS = 2
"""Kept by a run at its end: weights that train, and the optimiser's states."""


class Machine(Config):
    """What there is to train with."""

    memory_bytes: int = Field(ge=1)
    disk_bytes: int = Field(ge=1)
    """Free."""
    fp32_gflops: float = Field(gt=0.0)
    """Of a linear layer, forward and backward."""
    bf16_gflops: float = Field(gt=0.0)
    name: str = "this machine"

    @property
    def precision(self) -> Precision:
        """What a run with `Auto` precision takes here."""
        return BF16() if self.bf16_gflops >= 1.2 * self.fp32_gflops else FP32()

    @property
    def flops(self) -> float:
        """Operations a second in that precision."""
        return 1e9 * (self.bf16_gflops if isinstance(self.precision, BF16) else self.fp32_gflops)


class Data(Config):
    """How much there is to learn from, and how it is cut into steps."""

    records: int = Field(ge=1)
    tokens: int = Field(ge=2)
    """In a record, on average, prompt and answer."""
    epochs: float = Field(1.0, gt=0.0)
    per_step: int = Field(16, ge=1)
    """Records in an optimiser step."""
    at_once: int = Field(2048, ge=8)
    """Most tokens in a micro-batch."""

    @property
    def steps(self) -> int:
        return max(1, round(self.records * self.epochs / self.per_step))

    @property
    def micro_batches(self) -> int:
        """In a step."""
        return math.ceil(self.per_step / self.together)

    @property
    def together(self) -> int:
        """Records in a micro-batch; the last of a step may have fewer."""
        return min(self.per_step, max(1, self.at_once // self.tokens))

    def batch(self) -> Batch:
        """One micro-batch of average records, all tokens learned."""
        record = Piece([0] * self.tokens, [True] * self.tokens)
        return assemble([record] * self.together)


@dataclass(frozen=True)
class Row:
    """A method's needs."""

    method: Method
    needs: Needs
    seconds: float
    """Of the training steps."""
    result_bytes: int
    """Of what the run leaves: the adapter, or the weights."""
    disk_bytes: int
    """With the checkpoints that it keeps."""
    fits: bool


def estimate(
    decoder: Decoder,
    data: Data,
    machine: Machine,
    methods: Sequence[Method],
    progress: Progress = Silent(),
) -> list[Row]:
    """A row a method, in their order.

    Raises:
        TreadleError: a record is longer than the model's context.
    """
    if data.tokens > decoder.context:
        raise TreadleError(
            f"records of {data.tokens} tokens do not fit into the model's context of "
            f"{decoder.context}: cut them, or take a model with a longer one"
        )
    batches = (data.batch(),) * min(2, data.micro_batches)
    jobs = [
        Job(
            decoder=student_of(decoder) if method.distils else decoder,
            teacher=decoder if method.distils else None,
            batches=batches,
            transforms=method.transforms,
            objective=method.objective,
            optimizer=method.optimizer,
            precision=machine.precision,
        )
        for method in methods
    ]
    return [
        _row(method, needs, data, machine)
        for method, needs in zip(methods, rehearse_all(jobs, progress), strict=True)
    ]


def _row(method: Method, needs: Needs, data: Data, machine: Machine) -> Row:
    rehearsed = min(2, data.micro_batches) * data.together
    operations = data.steps * needs.flops * data.per_step / rehearsed
    result = 4 * needs.trained  # what trains is in fp32
    disk = result + CHECKPOINTS * (result + needs.optimizer)
    fits = needs.resident <= machine.memory_bytes and disk <= machine.disk_bytes
    return Row(method, needs, operations / machine.flops, result, disk, fits)
