"""Distillation: a student learns from what a teacher makes of the same text.

    L = sum_terms weight * term

A term compares one aspect of student and teacher: their next-token distributions, their hidden
states, their attention. The student runs once, however many terms look at it. What the teacher
made of the text comes with the batch (`distillation/taught.py`), so that a teacher that is live, on
disk or far away is the same to the objective. All terms are means over predictions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.kernels.linear_cross_entropy import HeadRule, linear_cross_entropy
from treadle.models.decoder import DecoderModel
from treadle.nn.linear import bias_of
from treadle.objectives.objective import LossOutput, Objective, head_rule
from treadle.objectives.observe import Seen, observe


@dataclass(frozen=True, kw_only=True)
class TaughtBatch(Batch):
    """A batch with what the teacher made of it; what no signal asked for is None."""

    step: int = 0
    """Optimiser steps before this one, for what changes in the course of a run."""
    teacher_hidden: Float[Tensor, "M E"] | None = None
    """Its last hidden states where the predictions are made."""
    teacher_head: Float[Tensor, "V E"] | None = None
    teacher_bias: Float[Tensor, " V"] | None = None
    teacher_softcap: float | None = None
    top_tokens: Int[Tensor, "M K"] | None = None
    """Its likeliest next tokens."""
    top_logprobs: Float[Tensor, "M K"] | None = None
    """Their log-probabilities at `top_temperature`."""
    top_temperature: float = 1.0
    ranked_rows: Int[Tensor, " R"] | None = None
    """Predictions that a teacher of another vocabulary makes as well, after the same text."""
    ranked_logprobs: Float[Tensor, "R K"] | None = None
    """How likely it finds its first, second, ... token there."""
    teacher_states: Float[Tensor, "L N E"] | None = None
    """Outputs of its chosen layers, in their order."""
    teacher_q: Float[Tensor, "N H D"] | None = None
    """Queries of its chosen layer."""
    teacher_k: Float[Tensor, "N G D"] | None = None
    teacher_v: Float[Tensor, "N G D"] | None = None
    teacher_scale: float = 1.0
    """Factor of that layer on q.k."""


class Term(Config):
    """A shape: one aspect in which the student is to be like the teacher."""

    weight: float = Field(1.0, gt=0.0)

    @abstractmethod
    def states(self) -> tuple[int, ...]:
        """Layers of the student whose outputs it wants to see."""

    @abstractmethod
    def attention(self) -> tuple[int, ...]:
        """Layers of the student whose attention it wants to see."""

    @abstractmethod
    def __call__(self, model: DecoderModel, seen: Seen, batch: TaughtBatch) -> Float[Tensor, ""]:
        """Sum over the predictions of the batch, each times its weight."""


class HardLabels(Term):
    """Cross-entropy of the text itself."""

    def states(self) -> tuple[int, ...]:
        return ()

    def attention(self) -> tuple[int, ...]:
        return ()

    def __call__(self, model: DecoderModel, seen: Seen, batch: TaughtBatch) -> Float[Tensor, ""]:
        return linear_cross_entropy(
            seen.hidden[batch.sources],
            model.head_weight(),
            batch.targets,
            batch.weights,
            bias=bias_of(model.head),
            rule=head_rule(model),
        ).total


class Distil(Objective):
    """A weighted sum of terms."""

    terms: tuple[Term, ...] = Field(min_length=1)

    def __call__(self, model: DecoderModel, batch: TaughtBatch) -> LossOutput:
        seen = observe(
            model,
            batch,
            states={layer for term in self.terms for layer in term.states()},
            attention={layer for term in self.terms for layer in term.attention()},
        )
        values = [term(model, seen, batch) for term in self.terms]
        parts = zip(self.terms, values, strict=True)
        total = sum((term.weight * value for term, value in parts), start=values[0].new_zeros(()))
        metrics = {_label(self.terms, i): value.detach() for i, value in enumerate(values)}
        return LossOutput(total, batch.weights.sum(), metrics)


def _label(terms: tuple[Term, ...], index: int) -> str:
    """`soft_labels`; with its place where several terms are of one kind."""
    name = type(terms[index]).__name__
    snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
    return snake if sum(type(t).__name__ == name for t in terms) == 1 else f"{snake}_{index}"


def required(value: Tensor | None, term: Term, signal: str) -> Tensor:
    """What the teacher gave.

    Raises:
        TreadleError: the source did not ask it for that.
    """
    if value is None:
        raise TreadleError(
            f"{type(term).__name__}: the teacher did not give what it needs: set `lesson` of the "
            f"source Taught to {signal}"
        )
    return value


def teacher_rule(batch: TaughtBatch, temperature: float) -> HeadRule:
    return HeadRule(softcap=batch.teacher_softcap, temperature=temperature)
