"""Multi-token prediction: from one hidden state, the tokens behind the next.

Head k = 1 .. K says token i + 1 + k from the hidden state h_i of token i, through the model's own
vocabulary head:

    MedusaHead      h^k_i = h_i + silu(W_k h_i)                                 Cai et al. 2024
    ParallelBlock   h^k_i = Block_k(h_<=i)                                 Gloeckle et al. 2024
    ChainedBlock    h^k_i = norm(Block_k(x_<=i)),   x_i = M_k [norm(e_{i+k}); norm(h^{k-1}_i)]
                                                                                 DeepSeek-V3 2024
    ChainedLayer    h^k_i = norm(x_i + FFN_k(x_i)), the same x_i                 Ankner et al. 2024

with e the embedding of a token and h^0 = h. Chained heads know the tokens between, parallel ones
do not. All give the trunk a denser signal (`MultiToken`); those that read one place alone also
guess ahead in generation, without a cache of their own (`MTPHeads`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError
from treadle.models.decoder import DecoderModel
from treadle.models.transform import Transform
from treadle.nn.block import Block
from treadle.nn.context import Context
from treadle.nn.ffn.ffn import FeedForward, GatedMLP

CARD = Card(
    id="arch.mtp",
    paper="Gloeckle et al. 2024, arXiv:2404.19737; DeepSeek-V3, arXiv:2412.19437; Cai et al. "
    "2024, Medusa, arXiv:2401.10774; Ankner et al. 2024, Hydra, arXiv:2402.05109",
    summary="Heads that predict tokens further ahead: a denser loss, and guesses for generation.",
    recipe="treadle run quickstart-scratch 'steps.pretrain.transforms=[{kind: MTP, heads: 2}]' "
    "'steps.pretrain.objective={kind: MultiToken}'",
    oracle="tests/models/test_models_mtp.py::test_chained_blocks_match_transformers",
)

M = TypeVar("M", bound=nn.Module)


class AheadLayer(nn.Module, ABC):
    """Hidden states of a token further ahead."""

    @abstractmethod
    def forward(
        self, hidden: Float[Tensor, "N D"], between: Float[Tensor, "N D"], context: Context | None
    ) -> Float[Tensor, "N D"]:
        """From hidden states of the head before it or of the model, and the embeddings of the
        tokens k ahead; None as context where it reads each place alone."""


class AheadHead(Config):
    """A shape: how a head sees further."""

    chained: ClassVar[bool] = False
    """It reads what the head before it gives, and not the model's hidden states."""
    local: ClassVar[bool] = True
    """It reads each place alone."""

    @abstractmethod
    def build(self, model: DecoderModel, index: int) -> AheadLayer:
        """Head `index` = 0, 1, ... of a model."""


class MedusaHead(AheadHead):
    """A residual layer, zero at first."""

    def build(self, model: DecoderModel, index: int) -> AheadLayer:
        return MedusaLayer(model.config.dim)


class ParallelBlock(AheadHead):
    """A block of its own on the shared trunk."""

    local: ClassVar[bool] = False
    block: Block | None = None
    """None: one like the model's last."""

    def build(self, model: DecoderModel, index: int) -> AheadLayer:
        return ParallelLayer(_block(self.block, model, index))


class ChainedBlock(AheadHead):
    """A block on the last head's output and the embedding of the token that it predicted."""

    chained: ClassVar[bool] = True
    local: ClassVar[bool] = False
    block: Block | None = None
    """None: one like the model's last."""

    def build(self, model: DecoderModel, index: int) -> AheadLayer:
        return ChainedBlockLayer(model, _block(self.block, model, index))


class ChainedLayer(AheadHead):
    """The same with a feed-forward in place of the block."""

    chained: ClassVar[bool] = True
    ffn: FeedForward | None = None
    """None: SwiGLU, twice as wide as the model."""

    def build(self, model: DecoderModel, index: int) -> AheadLayer:
        dim = model.config.dim
        ffn = self.ffn or GatedMLP(hidden=2 * dim)
        return ChainedLocalLayer(model, _drawn(ffn.build(dim), model))


class MTP(Transform):
    """Adds heads, which are trained with the rest; to train them alone put `ChosenLayers` with
    `layers: [mtp]` behind it."""

    heads: int = Field(3, ge=1)
    """K, the tokens ahead of the next."""
    head: AheadHead = ChainedLayer()

    def __call__(self, model: M) -> M:
        if not isinstance(model, DecoderModel):
            raise ConfigError(f"MTP: a {type(model).__name__} is no decoder")
        if heads_of(model) is not None:
            raise ConfigError("MTP: the model has heads ahead already: leave one of the two out")
        model.add_module("mtp", AheadHeads(self, model).to(model.embedding.weight.device))
        return model


class AheadHeads(nn.Module):
    """The heads of a model, as its module `mtp`."""

    def __init__(self, config: MTP, model: DecoderModel) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(config.head.build(model, k) for k in range(config.heads))

    def forward(
        self,
        model: DecoderModel,
        hidden: Float[Tensor, "N D"],
        tokens: Int[Tensor, " N"],
        context: Context,
    ) -> list[Float[Tensor, "N D"]]:
        """For each head, from every token: meaningless where the text ends before i + k."""
        found: list[Tensor] = []
        for k, layer in enumerate(self.layers, 1):
            before = found[-1] if self.config.head.chained and found else hidden
            found.append(layer(before, model.embedding(tokens.roll(-k)), context))
        return found


class MedusaLayer(AheadLayer):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.W = nn.Linear(dim, dim)
        nn.init.zeros_(self.W.weight)
        nn.init.zeros_(self.W.bias)

    def forward(
        self, hidden: Float[Tensor, "N D"], between: Float[Tensor, "N D"], context: Context | None
    ) -> Float[Tensor, "N D"]:
        return hidden + nn.functional.silu(self.W(hidden))


class ParallelLayer(AheadLayer):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, hidden: Float[Tensor, "N D"], between: Float[Tensor, "N D"], context: Context | None
    ) -> Float[Tensor, "N D"]:
        found: Tensor = self.block(hidden, context)
        return found


class Joined(nn.Module):
    """x = M [norm(e); norm(h)], at first norm(h)."""

    def __init__(self, model: DecoderModel) -> None:
        super().__init__()
        dim = model.config.dim
        self.token_norm = model.config.norm.build(dim)
        self.hidden_norm = model.config.norm.build(dim)
        self.M = nn.Linear(2 * dim, dim, bias=False)
        with torch.no_grad():
            self.M.weight.copy_(torch.cat([torch.zeros(dim, dim), torch.eye(dim)], -1))

    def forward(
        self, hidden: Float[Tensor, "N D"], between: Float[Tensor, "N D"]
    ) -> Float[Tensor, "N D"]:
        both = torch.cat([self.token_norm(between), self.hidden_norm(hidden)], -1)
        joined: Tensor = self.M(both)
        return joined


class ChainedBlockLayer(AheadLayer):
    def __init__(self, model: DecoderModel, block: nn.Module) -> None:
        super().__init__()
        self.joined, self.block = Joined(model), block
        self.norm = model.config.norm.build(model.config.dim)

    def forward(
        self, hidden: Float[Tensor, "N D"], between: Float[Tensor, "N D"], context: Context | None
    ) -> Float[Tensor, "N D"]:
        found: Tensor = self.norm(self.block(self.joined(hidden, between), context))
        return found


class ChainedLocalLayer(AheadLayer):
    def __init__(self, model: DecoderModel, ffn: nn.Module) -> None:
        super().__init__()
        self.joined, self.ffn = Joined(model), ffn
        self.norm = model.config.norm.build(model.config.dim)

    def forward(
        self, hidden: Float[Tensor, "N D"], between: Float[Tensor, "N D"], context: Context | None
    ) -> Float[Tensor, "N D"]:
        x = self.joined(hidden, between)
        found: Tensor = self.norm(x + self.ffn(x))
        return found


def heads_of(model: nn.Module) -> AheadHeads | None:
    """The heads that `MTP` gave to a model, if it did."""
    found = dict(model.named_children()).get("mtp")
    return found if isinstance(found, AheadHeads) else None


def _block(block: Block | None, model: DecoderModel, index: int) -> nn.Module:
    layers = len(model.blocks)
    if block is None:
        block = model.config.blocks[-1]
    return _drawn(block.build(model.config.dim, layers + index, layers + index + 1), model)


def _drawn(module: nn.Module, model: DecoderModel) -> nn.Module:
    """Fresh weights as the model's own were."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=model.config.std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
    return module
