"""Universal logit distillation: teacher and student need not share a vocabulary.

    L = sum_r | p_(r) - q_(r) |,     p_(1) >= p_(2) >= ...

the probabilities of the teacher's and of the student's next token, each sorted, and the shorter
filled up with zeros. It is the cost of moving one distribution onto the other where every token is
as far from every other: which token is which need not be known. With the text's own labels beside
it the student learns how sure to be, and among how many.

Boizard et al. 2024, arXiv:2402.12030, equation 5. They pair the predictions of both by number; here
those are paired that follow the same text (`distillation/other_tokenizer.py`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.core.cards import Card
from treadle.kernels.linear_divergence import Head, RankedTeacher, linear_divergence
from treadle.models.decoder import DecoderModel
from treadle.nn.linear import bias_of
from treadle.objectives.distil import TaughtBatch, Term, required
from treadle.objectives.divergence import AbsoluteDifference
from treadle.objectives.objective import head_rule
from treadle.objectives.observe import Seen

CARD = Card(
    id="kd.cross_tokenizer",
    paper="Boizard et al. 2024, Universal Logit Distillation, arXiv:2402.12030",
    summary="A student learns from a teacher with another tokenizer, rank by rank.",
    recipe="treadle run distill-across",
    oracle="tests/objectives/test_objectives_ranked_labels.py::test_matches_sorted_loop",
)


class RankedLabels(Term):
    """The teacher's probabilities in order, against the student's."""

    def states(self) -> tuple[int, ...]:
        return ()

    def attention(self) -> tuple[int, ...]:
        return ()

    def __call__(self, model: DecoderModel, seen: Seen, batch: TaughtBatch) -> Float[Tensor, ""]:
        rows = required(batch.ranked_rows, self, "OtherTokenizer()")
        logprobs = required(batch.ranked_logprobs, self, "OtherTokenizer()")
        weights = batch.weights[rows]
        if not len(rows):
            return torch.zeros((), device=batch.weights.device)
        # A mean over pairs, as other terms are means over predictions.
        share = batch.weights.sum() / weights.sum()
        head = Head(model.head_weight(), bias_of(model.head), head_rule(model))
        hidden = seen.hidden[batch.sources[rows]]
        found = min(logprobs.shape[1], len(head.weight))
        teacher = RankedTeacher(logprobs[:, :found])
        return share * linear_divergence(hidden, head, teacher, weights, AbsoluteDifference())
