"""The decoder: embeddings, a tuple of blocks, a final norm and a head.

Every decoder-only family is a value of this tree; see `models/llama.py` and its neighbours. So is
an encoder: its attention is not causal, its embeddings are normed and know the parts of a text
(`models/bert.py`).
The model works on flat tokens `[N]` with a `Context`; a rectangle `[B T]` without one is read as
B documents.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.nn.block import Block
from treadle.nn.context import Context, Packed
from treadle.nn.ffn.moe import Experts
from treadle.nn.layout import Layout
from treadle.nn.linear import weight_of
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import NoNorm, Norm, RMSNorm

P = TypeVar("P", bound=Config)


class Head(Config):
    """A shape: hidden states to logits."""

    @abstractmethod
    def build(self, vocab: int, dim: int, embedding: nn.Embedding) -> nn.Module:
        """A module `[N dim] -> [N vocab]`; as a rule one linear layer."""


class Wordless(nn.Module):
    """A head that predicts no next token: scores, labels, vectors, masked words."""


class TiedHead(Head):
    """Shares its weight with the embedding (Press and Wolf 2017)."""

    def build(self, vocab: int, dim: int, embedding: nn.Embedding) -> nn.Linear:
        head = nn.Linear(dim, vocab, bias=False, device="meta")
        head.weight = embedding.weight
        return head


class LinearHead(Head):
    """A weight of its own."""

    bias: bool = False

    def build(self, vocab: int, dim: int, embedding: nn.Embedding) -> nn.Linear:
        return nn.Linear(dim, vocab, bias=self.bias)


class Decoder(Config):
    """A language model."""

    vocab: int
    dim: int
    context: int
    """Longest document, in tokens, that the model is meant for."""
    blocks: tuple[Block, ...]
    norm: Norm = RMSNorm()
    head: Head = TiedHead()
    learned_positions: bool = False
    """Adds a learned vector for each position up to `context` to the embeddings (GPT-2)."""
    embedding_scale: float = 1.0
    """Factor on the embeddings (Gemma: sqrt(dim))."""
    token_types: int = 0
    """Learned vectors for the parts of a text, added to the embeddings (BERT: two sentences)."""
    embedding_norm: Norm = NoNorm()
    """Of what the first block reads (BERT)."""
    softcap: float | None = None
    """Soft limit of the logits (Gemma 2)."""
    std: float = 0.02
    """Standard deviation of fresh weights; those that write to the residual stream get
    std / sqrt(2 L) (Radford et al. 2019)."""

    def build(self) -> DecoderModel:
        return DecoderModel(self)


class DecoderModel(nn.Module):
    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.config = config
        layers = len(config.blocks)
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.position = (
            nn.Embedding(config.context, config.dim) if config.learned_positions else None
        )
        self.token_type = (
            nn.Embedding(config.token_types, config.dim) if config.token_types else None
        )
        self.embedding_norm = config.embedding_norm.build(config.dim)
        self.blocks = nn.ModuleList(
            block.build(config.dim, layer, layers) for layer, block in enumerate(config.blocks)
        )
        self.norm = config.norm.build(config.dim)
        self.head = config.head.build(config.vocab, config.dim, self.embedding)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Fresh weights from the current random state."""
        residual = self.config.std / math.sqrt(2 * max(1, len(self.config.blocks)))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                if module.weight.is_meta:
                    continue
                writes = name.endswith((".o", ".down"))
                nn.init.normal_(module.weight, std=residual if writes else self.config.std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts) and not module.gate.is_meta:
                module.initialise(self.config.std, residual)

    def forward(
        self, tokens: Int[Tensor, "..."], context: Context | None = None
    ) -> Float[Tensor, "... D"]:
        """Final hidden states, normed: `[N D]` for flat tokens, `[B T D]` for a rectangle."""
        shape = tokens.shape
        if context is None:
            rows, width = (1, shape[0]) if tokens.ndim == 1 else (shape[0], shape[1])
            context = Packed.of(Layout.rows(rows, width), tokens.device)
        x = self.embed(tokens.flatten(), context)
        for block in self.blocks:
            x = block(x, context)
        hidden: Tensor = self.norm(x)
        return hidden if tokens.ndim == 1 else hidden.unflatten(0, shape)

    def embed(self, tokens: Int[Tensor, " N"], context: Context) -> Float[Tensor, "N D"]:
        """What the first block reads."""
        x: Tensor = self.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            # Gemma rounds the factor to the dtype of the embeddings before it multiplies.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        if self.position is not None:
            x = x + self.position(context.positions)
        if self.token_type is not None:
            kinds = torch.zeros_like(tokens) if context.types is None else context.types
            x = x + self.token_type(kinds)
        normed: Tensor = self.embedding_norm(x)
        return normed

    def head_weight(self) -> Float[Tensor, "V D"]:
        """The head's dense weight, for losses that never hold all logits.

        Raises:
            TreadleError: the head is no linear layer over the vocabulary.
        """
        if isinstance(self.head, Wordless):
            raise TreadleError(
                f"{_wordless(self)}: take a model with a language-modelling head, or an objective "
                "for this head"
            )
        return weight_of(self.head)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits of hidden states, soft-capped where the family does so."""
        return softcap(self.head(hidden), self.config.softcap)


def is_causal(decoder: Decoder) -> bool:
    """Whether no token sees a later one: an encoder's do."""
    mixers = (block.mixer for block in decoder.blocks)
    return all(mixer.causal for mixer in mixers if isinstance(mixer, Attention))


def cannot_write(model: DecoderModel) -> str:
    """Why a model cannot continue a text; empty where it can."""
    if not is_causal(model.config):
        reason = "the model is an encoder: its tokens see those that follow"
    elif isinstance(model.head, Wordless):
        reason = _wordless(model)
    else:
        return ""
    return f"{reason}, so that it cannot continue a text; use `treadle predict` or `treadle embed`"


def _wordless(model: DecoderModel) -> str:
    return f"the model ends in a {type(model.head).__name__}, which predicts no next token"


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def swap(tree: Any, kind: type[P], change: Callable[[P], Config]) -> Any:
    """`tree` with `change` applied to every part of type `kind`: a new architecture by rewriting.

    ``swap(llama, GatedMLP, lambda f: MoE(expert=f, experts=8, top_k=2))``
    """
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, tuple):
        return tuple(swap(part, kind, change) for part in tree)
    if isinstance(tree, Config):
        fields = {name: getattr(tree, name) for name in type(tree).model_fields}
        return type(tree)(**{name: swap(value, kind, change) for name, value in fields.items()})
    return tree
