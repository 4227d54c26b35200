"""The heads with which BERT was pretrained.

pooler    p = tanh(W h_cls + b)
words     logits = E LayerNorm(gelu(W h + b)) + c,   E the embedding
next      logits = W p + b,   does the second text follow the first?
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from treadle.kernels.gated import Activation, activate
from treadle.models.decoder import Head, Wordless
from treadle.nn.norms import LayerNorm, Norm


class Pooler(Head):
    """A layer over the first token alone: what BERT is saved with when its heads are left off."""

    def build(self, vocab: int, dim: int, embedding: nn.Embedding) -> nn.Module:
        return PoolerHead(dim)


class MaskedWords(Head):
    """Predicts the words that were masked."""

    norm: Norm = LayerNorm(eps=1e-12)
    activation: Activation = "gelu"

    def build(self, vocab: int, dim: int, embedding: nn.Embedding) -> nn.Module:
        return MaskedHead(self, dim, embedding)


class Pretraining(Head):
    """Masked words, and whether the second text of a pair follows the first."""

    words: MaskedWords = MaskedWords()

    def build(self, vocab: int, dim: int, embedding: nn.Embedding) -> nn.Module:
        return PretrainingHead(self.words, dim, embedding)


class PoolerHead(Wordless):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pooler = nn.Linear(dim, dim)

    def forward(self, first: Float[Tensor, "S D"]) -> Float[Tensor, "S D"]:
        """Of the hidden states of first tokens."""
        return torch.tanh(self.pooler(first))


class MaskedHead(Wordless):
    def __init__(self, config: MaskedWords, dim: int, embedding: nn.Embedding) -> None:
        super().__init__()
        self.words = WordLogits(config, dim, embedding)

    def forward(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        logits: Tensor = self.words(hidden)
        return logits


class PretrainingHead(Wordless):
    def __init__(self, config: MaskedWords, dim: int, embedding: nn.Embedding) -> None:
        super().__init__()
        self.words = WordLogits(config, dim, embedding)
        self.pooler = nn.Linear(dim, dim)
        self.next = nn.Linear(dim, 2)

    def forward(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        logits: Tensor = self.words(hidden)
        return logits

    def follows(self, first: Float[Tensor, "S D"]) -> Float[Tensor, "S 2"]:
        """Logits of `it follows` and `it does not`, from the hidden states of first tokens."""
        logits: Tensor = self.next(torch.tanh(self.pooler(first)))
        return logits


class WordLogits(nn.Module):
    def __init__(self, config: MaskedWords, dim: int, embedding: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.activation: Activation = config.activation
        self.norm = config.norm.build(dim)
        self.vocabulary = nn.Linear(dim, embedding.num_embeddings)
        self.vocabulary.weight = embedding.weight

    def forward(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        logits: Tensor = self.vocabulary(self.norm(activate(self.dense(hidden), self.activation)))
        return logits
