"""A scalar head on any decoder: a language model becomes a reward model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from treadle.models.decoder import DecoderModel, Head, Wordless
from treadle.models.heads import put_head
from treadle.models.transform import Transform

M = TypeVar("M", bound=nn.Module)


class ScoreHead(Wordless, ABC):
    """A head that gives a number for a hidden state, where a language model has its vocabulary."""

    @abstractmethod
    def forward(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """Scores in fp32."""


class ScalarHead(Head):
    """One linear layer with one output, starting at zero: no opinion on anything."""

    pad: int | None = None
    """The score is read before tokens of this kind at the end of a text, even where they end its
    last turn: so transformers reads the models that it trained."""

    def build(self, vocab: int, dim: int, embedding: nn.Embedding) -> LinearScore:
        return LinearScore(dim)


class RewardHead(Transform):
    """Puts a `ScalarHead` in the place of the head; it is always trained.

    Adapters go before it, so that they do not freeze it.
    """

    def __call__(self, model: M) -> M:
        scorer = put_head(model, lambda m: LinearScore(m.config.dim), owner="RewardHead")
        assert isinstance(scorer, DecoderModel)
        scorer.config = scorer.config.replace(head=ScalarHead())
        return scorer


class LinearScore(ScoreHead):
    """w . h"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        with torch.autocast(hidden.device.type, enabled=False):
            scores: Tensor = hidden.float() @ self.linear.weight[0].float()
        return scores
