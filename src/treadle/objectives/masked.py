"""Masked words: an encoder says what stood where tokens were hidden.

    L = - sum_i w_i log softmax(head(h_i))[y_i] / sum_i w_i        i the hidden places alone

Devlin et al. 2018, arXiv:1810.04805. Only hidden places meet the head, so the logits of all others
are never computed.
"""

from __future__ import annotations

import torch.nn.functional as F

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.models.bert_heads import MaskedHead, PretrainingHead
from treadle.models.decoder import DecoderModel
from treadle.objectives.objective import LossOutput, Objective

CARD = Card(
    id="pre.mlm.words",
    paper="Devlin et al. 2018, BERT, arXiv:1810.04805",
    summary="Masked words, whole or by token: an encoder learns the language of its field.",
    recipe="treadle run masked-words",
    oracle="tests/objectives/test_objectives_masked.py::test_matches_transformers",
)


class MaskedLM(Objective):
    """Cross-entropy of the hidden tokens."""

    def __call__(self, model: DecoderModel, batch: Batch) -> LossOutput:
        if not isinstance(model.head, MaskedHead | PretrainingHead):
            raise TreadleError(
                f"MaskedLM: the model ends in a {type(model.head).__name__}, which says no words; "
                "add the transform `{kind: WordHead}`"
            )
        hidden = model(batch.tokens, batch.context())
        logits = model.logits(hidden[batch.sources]).float()
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        right = (logits.argmax(-1) == batch.targets) * batch.weights
        return LossOutput(
            (losses * batch.weights).sum(), batch.weights.sum(), {"accuracy": right.sum()}
        )
