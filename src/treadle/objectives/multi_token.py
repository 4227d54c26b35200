"""Multi-token prediction as a loss, beside another one.

    L = L_next + lambda / K  sum_k L_k,     L_k = - sum_i w_i log p_k(y_i | x_<=i-k) / sum_i w_i

y_i is what the other objective predicts from place i; head k says it from k places earlier in the
same segment. DeepSeek-V3, arXiv:2412.19437, equations 24 and 25. The trunk runs once.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from treadle.core.errors import ConfigError
from treadle.data.batch import Batch
from treadle.kernels.linear_cross_entropy import linear_cross_entropy
from treadle.models.decoder import DecoderModel
from treadle.models.mtp import heads_of
from treadle.nn.layout import Layout
from treadle.nn.linear import bias_of
from treadle.objectives.causal import CausalLM
from treadle.objectives.objective import LossOutput, Objective, head_rule


class MultiToken(Objective):
    """Another objective, and that of the model's heads that look further ahead (`MTP`)."""

    objective: Objective = CausalLM()
    weight: float = Field(0.3, gt=0.0)
    """lambda: of the mean of the heads' losses."""

    def __call__(self, model: DecoderModel, batch: Batch) -> LossOutput:
        """The loss of one micro-batch.

        Raises:
            ConfigError: the model has no such heads, or `objective` does not run the model just
                once over the batch.
        """
        heads = heads_of(model)
        if heads is None:
            raise ConfigError("MultiToken: the model has no heads ahead: add MTP to its transforms")
        passes: list[Tensor] = []
        hook = model.register_forward_hook(lambda module, inputs, output: passes.append(output))
        try:
            output = self.objective(model, batch)
        finally:
            hook.remove()
        if len(passes) != 1 or passes[0].shape[0] != len(batch.tokens):
            raise ConfigError(
                f"MultiToken: {type(self.objective).__name__} runs the model {len(passes)} times "
                "a batch, and heads ahead need the hidden states of one pass over it: use "
                "CausalLM, Distil or another that reads the batch once"
            )
        total, metrics = output.total, dict(output.metrics)
        ahead = heads(model, passes[0], batch.tokens, batch.context())
        for k, hidden in enumerate(ahead, 1):
            near = within(batch.layout, batch.sources, k)
            loss = linear_cross_entropy(
                hidden[batch.sources[near] - k],
                model.head_weight(),
                batch.targets[near],
                batch.weights[near],
                bias=bias_of(model.head),
                rule=head_rule(model),
            )
            total = total + self.weight / len(ahead) * loss.total
            metrics[f"ahead_{k}"] = loss.correct
        return LossOutput(total=total, weight=output.weight, metrics=metrics)


def within(layout: Layout, sources: Int[Tensor, " M"], k: int) -> Bool[Tensor, " M"]:
    """Whether the token k places before is of the same segment."""
    starts = torch.tensor(layout.starts, device=sources.device)
    return sources - k >= starts[torch.searchsorted(starts, sources, right=True) - 1]
