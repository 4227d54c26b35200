"""Next-token prediction: pretraining and supervised fine-tuning.

    L = - sum_i w_i log p(y_i | x_<=i) / sum_i w_i

Pretraining learns every token; fine-tuning learns those that the source marks (assistant turns).
"""

from __future__ import annotations

from treadle.core.cards import Card
from treadle.data.batch import Batch
from treadle.kernels.linear_cross_entropy import linear_cross_entropy
from treadle.models.decoder import DecoderModel
from treadle.nn.linear import bias_of
from treadle.objectives.objective import LossOutput, Objective, head_rule

CARD = Card(
    id="pre.clm",
    paper="Bengio et al. 2003; Radford et al. 2018, GPT",
    summary="Causal language modelling with a fused head that never holds all logits.",
    recipe="treadle run quickstart-scratch",
    oracle="tests/objectives/test_objectives_causal.py::test_matches_transformers",
)


class CausalLM(Objective):
    """Cross-entropy of the marked tokens."""

    def __call__(self, model: DecoderModel, batch: Batch) -> LossOutput:
        hidden = model(batch.tokens, batch.context())
        loss = linear_cross_entropy(
            hidden[batch.sources],
            model.head_weight(),
            batch.targets,
            batch.weights,
            bias=bias_of(model.head),
            rule=head_rule(model),
        )
        return LossOutput(
            total=loss.total,
            weight=batch.weights.sum(),
            metrics={"accuracy": loss.correct},
        )
