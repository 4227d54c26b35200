"""Reward models: a scalar for an answer, learned from which of two is better.

    L = -log sigmoid(r(x, y_w) - r(x, y_l) - m) + c (r(x, y_w) + r(x, y_l))^2

the Bradley-Terry model of 1952. The margin m asks for more where raters saw a clear difference
(Touvron et al. 2023, Llama 2, arXiv:2307.09288); c keeps rewards near zero, which pairs alone
leave free (Eisenstein et al. 2023, arXiv:2312.09244). A confidence q in a pair's label makes its
loss q l(d) + (1 - q) l(-d).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.models.decoder import DecoderModel
from treadle.models.reward_head import ScalarHead, ScoreHead
from treadle.objectives.dpo import PreferenceBatch
from treadle.objectives.objective import LossOutput, Objective

CARD = Card(
    id="al.reward",
    paper="Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155; Llama 2, arXiv:2307.09288",
    summary="Reward models on any decoder, trained on pairs with margins.",
    recipe="treadle run reward-model steps.reward.source.pairs.path=pairs.jsonl",
    oracle="tests/objectives/test_objectives_reward.py::test_loss_and_gradients_match_trl",
)


class BradleyTerry(Objective):
    """Pairwise logistic loss of scores."""

    margin: float = Field(0.0, ge=0.0)
    """Of every pair; pairs that have a margin of their own keep to theirs."""
    centre: float = Field(0.0, ge=0.0)
    """The coefficient c, such as 0.01."""

    def __call__(self, model: DecoderModel, batch: PreferenceBatch) -> LossOutput:
        chosen, rejected = sequence_scores(model, batch).unflatten(0, (-1, 2)).unbind(-1)
        difference = chosen - rejected
        margin = torch.full_like(difference, self.margin)
        if batch.margins is not None:
            margin = torch.where(batch.margins.isnan(), margin, batch.margins)
        loss = -F.logsigmoid(difference - margin)
        if batch.confidence is not None:
            q = batch.confidence
            loss = q * loss - (1 - q) * F.logsigmoid(-difference - margin)
        loss = loss + self.centre * (chosen + rejected).square()
        metrics = {
            "accuracy": (difference > 0).sum(),
            "margin": difference.detach().sum(),
            "score": (chosen + rejected).detach().sum() / 2,
        }
        return LossOutput(loss.sum(), batch.weights.new_tensor(len(difference)), metrics)


def sequence_ends(batch: Batch, pad: int | None = None) -> Int[Tensor, " S"]:
    """Flat index of the last token of each answer of a batch of trees.

    Args:
        pad: a token that is skipped at the end, as long as another one of the answer is left.
    """
    layout = batch.layout
    answers = [i for i in range(len(layout.lengths)) if layout.parent(i) >= 0]
    assert len(answers) == batch.sequence_count
    ends = []
    for span in map(layout.span, answers):
        end = span[-1]
        while pad is not None and end > span[0] and int(batch.tokens[end]) == pad:
            end -= 1
        ends.append(end)
    return torch.tensor(ends, device=batch.tokens.device)


def sequence_scores(model: DecoderModel, batch: Batch) -> Float[Tensor, " S"]:
    """The score of each answer, read at the end of its turn as the template writes it.

    Raises:
        TreadleError: the model has the head of a language model.
    """
    hidden = model(batch.tokens, batch.context())
    head = model.config.head
    ends = sequence_ends(batch, head.pad if isinstance(head, ScalarHead) else None)
    scores: Tensor = score_head(model)(hidden[ends])
    return scores


def score_head(model: DecoderModel) -> ScoreHead:
    """The head of a reward model."""
    head: nn.Module = model.head
    if not isinstance(head, ScoreHead):
        raise TreadleError(
            "the model gives words, not scores: add the transform `{kind: RewardHead}` to train "
            "it, or name a reward model"
        )
    return head
