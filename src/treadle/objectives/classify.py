"""Classes for texts and for words; numbers for texts.

    Classify        - sum_i w_i log softmax(z_i)[y_i] / sum_i w_i
    SquaredError    sum_i (z_i - v_i)^2 / n
    Relevance       - sum_i v_i log s(z_i) + (1 - v_i) log(1 - s(z_i)),   s the sigmoid

`Relevance` is what cross-encoders are trained with: v is 1 for a pair that belongs together
(Nogueira and Cho 2019, arXiv:1901.04085).
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.data.labelled import RatedBatch
from treadle.models.decoder import DecoderModel
from treadle.models.heads import read
from treadle.objectives.objective import LossOutput, Objective

CARDS = (
    Card(
        id="ft.heads.objectives",
        paper="Devlin et al. 2018, arXiv:1810.04805",
        summary="Weighed cross-entropy over labels, and squared error, for heads of tasks.",
        recipe="treadle run ner steps.train.source.texts.path=words.jsonl "
        "steps.measure.benchmarks.0.texts.path=words.jsonl",
        oracle="tests/objectives/test_objectives_classify.py::test_losses_match_transformers",
    ),
    Card(
        id="ft.embedding.cross_encoder",
        paper="Nogueira and Cho 2019, arXiv:1901.04085",
        summary="Cross-encoders: a pair of texts is read in one pass and given a relevance.",
        recipe="treadle run cross-encoder steps.train.source.texts.path=pairs.jsonl",
        oracle="tests/objectives/test_objectives_classify.py"
        "::test_relevance_matches_sentence_transformers",
    ),
)


class Classify(Objective):
    """Cross-entropy of labels, of texts or of words as the model's head has them."""

    def __call__(self, model: DecoderModel, batch: Batch) -> LossOutput:
        logits = read(model, batch.tokens, batch.context(), batch.sources)
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        right = (logits.argmax(-1) == batch.targets) * batch.weights
        return LossOutput(
            (losses * batch.weights).sum(), batch.weights.sum(), {"accuracy": right.sum()}
        )


class SquaredError(Objective):
    """Of a number."""

    def __call__(self, model: DecoderModel, batch: RatedBatch) -> LossOutput:
        scores = one_number(read(model, batch.tokens, batch.context(), batch.sources))
        total = (scores - batch.values).square().sum()
        return LossOutput(total, batch.values.new_tensor(len(batch.values)))


class Relevance(Objective):
    """Whether two texts belong together; values lie between 0 and 1."""

    def __call__(self, model: DecoderModel, batch: RatedBatch) -> LossOutput:
        values = batch.values
        if ((values < 0) | (values > 1)).any():
            raise TreadleError(
                f"a score of {float(values.min())} or {float(values.max())} is no relevance: give "
                "0 to 1, or take the objective SquaredError"
            )
        scores = one_number(read(model, batch.tokens, batch.context(), batch.sources))
        total = F.binary_cross_entropy_with_logits(scores, values, reduction="sum")
        right = ((scores > 0) == (values > 0.5)).sum()
        return LossOutput(total, values.new_tensor(len(values)), {"accuracy": right})


def one_number(output: Float[Tensor, "S K"]) -> Float[Tensor, " S"]:
    """The single output of a head.

    Raises:
        TreadleError: it has several.
    """
    if output.shape[-1] != 1:
        raise TreadleError(
            f"the model's head gives {output.shape[-1]} numbers a text, not one: add the transform "
            "`{kind: NumberHead}`"
        )
    return output[:, 0]
