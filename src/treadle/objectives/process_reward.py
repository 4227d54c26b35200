"""Process rewards: each step of a solution is judged, not only where it ends.

    p_t = sigmoid(w . h_t),     h_t the hidden state at the end of step t
    L = - sum_t [y_t log p_t + (1 - y_t) log(1 - p_t)] / T

y_t is whether step t is right (Lightman et al. 2023, arXiv:2305.20050), or the share of
continuations from it that reach the answer (Math-Shepherd, Wang et al. 2023, arXiv:2312.08935).
A solution is worth its worst step, min_t p_t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from treadle.core.cards import Card
from treadle.data.batch import Batch
from treadle.models.decoder import DecoderModel
from treadle.objectives.objective import LossOutput, Objective
from treadle.objectives.reward import score_head

CARD = Card(
    id="al.reward.process",
    paper="Lightman et al. 2023, arXiv:2305.20050; Wang et al. 2023, Math-Shepherd, 2312.08935",
    summary="Reward models of single steps, from labels or from rollouts of each prefix.",
    recipe="treadle run process-reward",
    oracle="tests/objectives/test_objectives_process_reward.py::test_loss_and_gradients_by_rows",
)


@dataclass(frozen=True, kw_only=True)
class StepBatch(Batch):
    """Solutions whose steps have labels."""

    ends: Int[Tensor, " E"]
    """Flat index of the last token of each step."""
    labels: Float[Tensor, " E"]
    """Probability that the step is right."""
    solutions: Int[Tensor, " E"]
    """Which solution the step belongs to, in order."""


class ProcessReward(Objective):
    """Cross-entropy of each step's label."""

    def __call__(self, model: DecoderModel, batch: StepBatch) -> LossOutput:
        scores = step_scores(model, batch)
        loss = F.binary_cross_entropy_with_logits(scores, batch.labels, reduction="sum")
        agreed = (scores > 0) == (batch.labels >= 0.5)
        metrics = {"accuracy": agreed.sum(), "score": scores.detach().sum()}
        return LossOutput(loss, batch.weights.new_tensor(len(scores)), metrics)


def step_scores(model: DecoderModel, batch: StepBatch) -> Float[Tensor, " E"]:
    """w . h at the end of each step.

    Raises:
        TreadleError: the model has the head of a language model.
    """
    hidden = model(batch.tokens, batch.context())
    scores: Tensor = score_head(model)(hidden[batch.ends])
    return scores


def worst_steps(scores: Float[Tensor, " E"], solutions: Int[Tensor, " E"]) -> Float[Tensor, " S"]:
    """The least score of each solution's steps."""
    count = int(solutions[-1]) + 1 if len(solutions) else 0
    return scores.new_full((count,), torch.inf).scatter_reduce(0, solutions, scores, "amin")
