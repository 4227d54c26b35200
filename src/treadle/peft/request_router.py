"""Which adapter answers a request: the one whose training prompts it is most like.

    e(x) = mean over the prompt of the base's last hidden states, minus their mean over all experts
    expert = argmax_i cos(e(x), c_i),     c_i = mean of e over the prompts of expert i

The base itself reads the prompt, so there is nothing to train: a few prompts an expert are enough
(Jang et al. 2023, arXiv:2302.03202, choose experts alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from treadle.core.errors import ConfigError
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.peft.adapter import adapted, disabled


@dataclass(frozen=True)
class RequestRouter:
    """Centroids of the experts' prompts."""

    middle: Float[Tensor, " D"]
    centroids: Float[Tensor, "experts D"]
    """Of length 1."""

    def __call__(
        self, model: DecoderModel, prompts: Sequence[Sequence[int]]
    ) -> Int[Tensor, " requests"]:
        """The expert of each prompt."""
        away = summaries(model, prompts) - self.middle  # its length counts for all experts alike
        return (away @ self.centroids.T).argmax(-1)

    def gates(
        self, model: DecoderModel, prompts: Sequence[Sequence[int]]
    ) -> Float[Tensor, "requests experts"]:
        """One-hot shares, for `switch` and `routed`."""
        return F.one_hot(self(model, prompts), len(self.centroids)).float()


def fit_router(model: DecoderModel, prompts: Sequence[Sequence[Sequence[int]]]) -> RequestRouter:
    """A router from tokens of some prompts of each expert.

    Raises:
        ConfigError: an expert without prompts.
    """
    if empty := [place for place, own in enumerate(prompts) if not own]:
        raise ConfigError(f"expert {empty[0]} has no prompts to be known by; give some of each")
    means = torch.stack([summaries(model, own).mean(0) for own in prompts])
    middle = means.mean(0)
    return RequestRouter(middle, F.normalize(means - middle, dim=-1))


@torch.no_grad()
def summaries(model: DecoderModel, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "requests D"]:
    """Mean of the last hidden states of each text, by the base without its adapters."""
    layout = Layout(tuple(map(len, prompts)))
    device = model.embedding.weight.device
    tokens = torch.tensor([t for prompt in prompts for t in prompt], device=device)
    context = Packed.of(layout, device)
    if adapted(model):
        with disabled(model):
            hidden = model(tokens, context)
    else:
        hidden = model(tokens, context)
    return torch.stack([part.float().mean(0) for part in hidden.split(layout.lengths)])
