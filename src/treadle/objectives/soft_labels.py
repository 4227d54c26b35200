"""Soft labels: the student learns the teacher's whole distribution over the next token.

    L = T^2 D( softmax(z_teacher / T), softmax(z_student / T) )

T^2 keeps the gradient's size as T changes (Hinton et al. 2015, section 2). The temperature may fall
in the course of training, so that the student first sees which tokens are alike and then which one
is right (Jafari et al. 2021).
"""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.kernels.linear_divergence import (
    Head,
    HiddenTeacher,
    Teacher,
    TopTeacher,
    linear_divergence,
)
from treadle.models.decoder import DecoderModel
from treadle.nn.linear import bias_of
from treadle.objectives.distil import TaughtBatch, Term, required, teacher_rule
from treadle.objectives.divergence import Divergence, ForwardKL
from treadle.objectives.objective import head_rule
from treadle.objectives.observe import Seen

CARD = Card(
    id="kd.logits",
    paper="Hinton et al. 2015, arXiv:1503.02531; Agarwal et al. 2024, arXiv:2306.13649; "
    "Ko et al. 2024, arXiv:2402.03898; Jafari et al. 2021, arXiv:2104.07163",
    summary="Soft labels by forward, reverse, skewed KL or JSD; annealed temperature; top-k cache.",
    recipe="treadle run distill-ladder",
    oracle="tests/objectives/test_objectives_distil.py::test_soft_labels_match_trl",
)


class Temperature(Config):
    """A shape: the temperature in the course of training."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Temperature of a step, counted from 0."""


class Steady(Temperature):
    """The same throughout."""

    value: float = Field(1.0, gt=0.0)

    def __call__(self, step: int) -> float:
        return self.value


class Annealed(Temperature):
    """From one value to another in a straight line, then constant."""

    start: float = Field(4.0, gt=0.0)
    end: float = Field(1.0, gt=0.0)
    steps: int = Field(ge=1)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


class SoftLabels(Term):
    """The teacher's distribution over the next token."""

    divergence: Divergence = ForwardKL()
    temperature: Temperature = Steady()

    def states(self) -> tuple[int, ...]:
        return ()

    def attention(self) -> tuple[int, ...]:
        return ()

    def __call__(self, model: DecoderModel, seen: Seen, batch: TaughtBatch) -> Float[Tensor, ""]:
        temperature = self.temperature(batch.step)
        rule = head_rule(model, temperature)
        head = Head(model.head_weight(), bias_of(model.head), rule)
        hidden, weights = seen.hidden[batch.sources], batch.weights * temperature**2
        teacher = _teacher(self, batch, temperature)
        return linear_divergence(hidden, head, teacher, weights, self.divergence)


def _teacher(term: SoftLabels, batch: TaughtBatch, temperature: float) -> Teacher:
    if batch.top_tokens is not None and batch.top_logprobs is not None:
        if temperature != batch.top_temperature:
            raise TreadleError(
                f"the teacher's likeliest tokens were kept at temperature "
                f"{batch.top_temperature}, but SoftLabels asks for {temperature}: give Cached "
                "that temperature, or use Live, which serves any"
            )
        return TopTeacher(batch.top_tokens, batch.top_logprobs)
    hidden = required(batch.teacher_hidden, term, "Live() or Cached()")
    weight = required(batch.teacher_head, term, "Live()")
    rule = teacher_rule(batch, temperature)
    return HiddenTeacher(hidden, Head(weight, batch.teacher_bias, rule))
