"""A mixture of reward models: a score for each aspect, and a gate that reads the prompt.

    r_k(x, y) = w_k . h(x, y),     g(x) = softmax(V h(x)),     R(x, y) = sum_k g_k(x) r_k(x, y)

h(x, y) is the hidden state at the answer's end, h(x) that at the prompt's. A pair that was
compared in aspect k teaches r_k alone, one that was compared as a whole teaches the gate alone:

    L = -log sigmoid(r_k(x, y_w) - r_k(x, y_l))     or     -log sigmoid(R(x, y_w) - R(x, y_l)),

with r_k held fixed in the second, so that whole verdicts cannot bend what an aspect means. What
is won in one aspect counts as much as the prompt lets it. After Wang et al. 2024 (ArmoRM),
arXiv:2406.12845, whose aspects are regressions; here all are learned from pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.models.decoder import DecoderModel, Wordless
from treadle.models.heads import put_head
from treadle.models.transform import Transform
from treadle.objectives.dpo import PreferenceBatch
from treadle.objectives.objective import LossOutput, Objective
from treadle.objectives.reward import sequence_ends

CARD = Card(
    id="al.reward.mixture",
    paper="Wang et al. 2024, ArmoRM, arXiv:2406.12845",
    summary="Rewards by aspect, mixed by a gate that reads the prompt.",
    recipe="treadle run reward-mixture steps.mixture.source.aspects.0.pairs.path=harmless.jsonl "
    "steps.mixture.source.aspects.1.pairs.path=helpful.jsonl",
    oracle="tests/objectives/test_objectives_reward_mixture.py::test_loss_and_gradients_by_rows",
)
WHOLE = -1
"""The aspect of a pair that was compared as a whole."""
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class AspectBatch(PreferenceBatch):
    """Pairs, each compared in one aspect or as a whole."""

    aspects: Int[Tensor, " P"]
    """Number of the aspect, or WHOLE."""


@dataclass(frozen=True)
class Mixed:
    """What a mixture says of answers."""

    aspects: Float[Tensor, "S K"]
    gates: Float[Tensor, "S K"]

    @property
    def scores(self) -> Float[Tensor, " S"]:
        return (self.aspects * self.gates).sum(-1)


class MixtureHead(Transform):
    """Puts a linear score for each aspect and the gate in the place of the head; always trained.

    Adapters go before it. It starts at zero: no opinion in any aspect, and equal gates.
    """

    aspects: int = Field(ge=2)
    """Their number K."""

    def __call__(self, model: M) -> M:
        return put_head(
            model, lambda m: GatedScores(m.config.dim, self.aspects), owner="MixtureHead"
        )


class GatedScores(Wordless):
    """W h(x, y) and softmax(V h(x))."""

    def __init__(self, dim: int, aspects: int) -> None:
        super().__init__()
        self.scores = nn.Linear(dim, aspects, bias=False)
        self.gate = nn.Linear(dim, aspects, bias=False)
        nn.init.zeros_(self.scores.weight)
        nn.init.zeros_(self.gate.weight)

    def forward(self, answers: Float[Tensor, "S D"], prompts: Float[Tensor, "S D"]) -> Mixed:
        """In fp32."""
        with torch.autocast(answers.device.type, enabled=False):
            aspects = answers.float() @ self.scores.weight.float().T
            gates = (prompts.float() @ self.gate.weight.float().T).softmax(-1)
        return Mixed(aspects, gates)


class MixtureBradleyTerry(Objective):
    """The pairwise loss of aspects and of the whole."""

    centre: float = Field(0.0, ge=0.0)
    """Coefficient of (r_k(x, y_w) + r_k(x, y_l))^2, which keeps an aspect's scores near zero."""

    def __call__(self, model: DecoderModel, batch: AspectBatch) -> LossOutput:
        mixed = mixture_scores(model, batch)
        highest = int(batch.aspects.max()) if len(batch.aspects) else WHOLE
        if highest >= mixed.aspects.shape[1]:
            raise TreadleError(
                f"a pair is of aspect {highest}, but the head has {mixed.aspects.shape[1]}: set "
                f"MixtureHead.aspects={highest + 1}"
            )
        whole = batch.aspects == WHOLE
        column = batch.aspects.clamp(min=0).repeat_interleave(2)[:, None]
        own = mixed.aspects.gather(1, column)[:, 0]
        held = Mixed(mixed.aspects.detach(), mixed.gates).scores
        scores = torch.where(whole.repeat_interleave(2), held, own)
        chosen, rejected = scores.unflatten(0, (-1, 2)).unbind(-1)
        difference = chosen - rejected
        loss = -F.logsigmoid(difference)
        if batch.confidence is not None:
            q = batch.confidence
            loss = q * loss - (1 - q) * F.logsigmoid(-difference)
        loss = loss + self.centre * (chosen + rejected).square() * ~whole
        metrics = {
            "accuracy": (difference > 0).sum(),
            "margin": difference.detach().sum(),
            **{f"gate_{k}": g.sum() / 2 for k, g in enumerate(mixed.gates.detach().unbind(-1))},
        }
        return LossOutput(loss.sum(), batch.weights.new_tensor(len(difference)), metrics)


def mixture_scores(model: DecoderModel, batch: Batch) -> Mixed:
    """Of each answer of a batch of trees.

    Raises:
        TreadleError: the model has another head.
    """
    head: nn.Module = model.head
    if not isinstance(head, GatedScores):
        raise TreadleError(
            "the model has no scores by aspect: add the transform `{kind: MixtureHead}` to train "
            "it, or name a model that has one"
        )
    hidden = model(batch.tokens, batch.context())
    mixed: Mixed = head(hidden[sequence_ends(batch)], hidden[prompt_ends(batch)])
    return mixed


def prompt_ends(batch: Batch) -> Int[Tensor, " S"]:
    """Flat index of the last token of each answer's prompt."""
    layout = batch.layout
    parents = [p for i in range(len(layout.lengths)) if (p := layout.parent(i)) >= 0]
    ends = [layout.span(p)[-1] for p in parents]
    return torch.tensor(ends, device=batch.tokens.device)
