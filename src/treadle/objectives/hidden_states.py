"""Hidden-state matching: layers of the student come to say what layers of the teacher say.

    L = mean_l d( H_l^S W, H_g(l)^T )

with d the mean squared error (TinyBERT) or 1 - cosine (DistilBERT). g maps student layers to the
teacher's: `layers` here and `Live.states` of the source go in pairs. W is learned where the widths
differ (`StudentProjection`), and one for all layers, as in TinyBERT.
"""

from __future__ import annotations

from abc import abstractmethod

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.models.decoder import DecoderModel
from treadle.models.transform import M, Transform
from treadle.objectives.distil import TaughtBatch, Term, required
from treadle.objectives.observe import Seen

CARD = Card(
    id="kd.features",
    paper="Jiao et al. 2020, TinyBERT, arXiv:1909.10351; Sanh et al. 2019, arXiv:1910.01108",
    summary="Hidden states of chosen layers are matched, through a learned projection if need be.",
    recipe="treadle run distill-ladder",
    oracle="tests/objectives/test_objectives_features.py::test_hidden_states_match_tinybert_formula",
)


class Distance(Config):
    """A shape: how far vectors are apart."""

    @abstractmethod
    def __call__(self, a: Float[Tensor, "M E"], b: Float[Tensor, "M E"]) -> Float[Tensor, " M"]:
        """Distance of each pair, in float32."""


class MeanSquared(Distance):
    """Mean over the width of squared differences."""

    def __call__(self, a: Float[Tensor, "M E"], b: Float[Tensor, "M E"]) -> Float[Tensor, " M"]:
        return (a.float() - b.float()).square().mean(-1)


class OneMinusCosine(Distance):
    """Of the angle alone: indifferent to the few huge coordinates that decoders have."""

    def __call__(self, a: Float[Tensor, "M E"], b: Float[Tensor, "M E"]) -> Float[Tensor, " M"]:
        return 1 - F.cosine_similarity(a.float(), b.float(), dim=-1)


class HiddenStates(Term):
    """Outputs of blocks, where predictions are made."""

    layers: tuple[int, ...] = Field(min_length=1)
    """Of the student, as many as the teacher gives, in the same order."""
    distance: Distance = MeanSquared()

    def states(self) -> tuple[int, ...]:
        return self.layers

    def attention(self) -> tuple[int, ...]:
        return ()

    def __call__(self, model: DecoderModel, seen: Seen, batch: TaughtBatch) -> Float[Tensor, ""]:
        wanted = required(batch.teacher_states, self, "Live(states=...)")
        if len(wanted) != len(self.layers):
            raise TreadleError(
                f"HiddenStates: {len(self.layers)} layers of the student cannot be paired with "
                f"{len(wanted)} of the teacher: name as many in Live(states=...)"
            )
        total = wanted.new_zeros((), dtype=batch.weights.dtype)
        for layer, goal in zip(self.layers, wanted, strict=True):
            ours = _projected(model, seen.states[layer][batch.sources], goal.shape[-1])
            total = total + (batch.weights * self.distance(ours, goal[batch.sources])).sum()
        return total / len(self.layers)


class StudentProjection(Transform):
    """Adds the learned matrix that takes the student's width to the teacher's."""

    width: int = Field(ge=1)
    """Of the teacher's hidden states."""

    def __call__(self, model: M) -> M:
        dim: int = model.config.dim  # type: ignore[assignment]
        layer = nn.Linear(dim, self.width, bias=False)
        nn.init.normal_(layer.weight, std=dim**-0.5)
        model.add_module("projection", layer)
        return model


def _projected(model: DecoderModel, x: Float[Tensor, "M D"], width: int) -> Float[Tensor, "M E"]:
    layer = dict(model.named_children()).get("projection")
    if layer is not None:
        x = layer(x)
    if x.shape[-1] != width:
        raise TreadleError(
            f"HiddenStates: the student's states have width {x.shape[-1]}, the teacher's {width}: "
            f"add StudentProjection(width={width}) to the run's transforms"
        )
    return x
