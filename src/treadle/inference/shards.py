"""A model cut over processes: each holds some heads, some hidden units, some of the vocabulary.

    y = W_o concat_h(a_h)            = sum_r W_o[:, r] a_r          a_r of the heads of process r
    y = W_down act(W_gate x) W_up x  = sum_r W_down[:, r] u_r       u_r of its hidden units
    e = E[t]                         = sum_r (t in V_r) E_r[t]      V_r its part of the vocabulary
    z = concat_r E_r h

Each sum is one all-reduce, so a block takes two. Heads are cut between groups that share keys
(and so are the caches); parts may differ by one. Shoeybi et al. 2019, arXiv:1909.08053.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from treadle.core.errors import TreadleError
from treadle.models.decoder import DecoderModel
from treadle.models.hub.fill import Cut
from treadle.nn.block import BlockLayer
from treadle.nn.ffn.ffn import GatedMLPLayer, MLPLayer
from treadle.nn.linear import LinearLike
from treadle.nn.mixers.attention import AcrossHeadsNorm, AttentionLayer


def span(count: int, rank: int, size: int) -> slice:
    """The part of `count` things that process `rank` of `size` holds; the first are larger."""
    whole, rest = divmod(count, size)
    start = rank * whole + min(rank, rest)
    return slice(start, start + whole + (rank < rest))


@torch.no_grad()
def shard(model: DecoderModel, rank: int, size: int) -> DecoderModel:
    """Keep the part of process `rank`, in place; all processes then run every pass together.

    A model that is cut already stays as it is.

    Raises:
        TreadleError: a layer that cannot be cut, or fewer heads than processes.
    """
    if isinstance(model.head, ShardedHead):
        return model
    for index, block in enumerate(model.blocks):
        assert isinstance(block, BlockLayer)
        _shard_mixer(block.mixer, f"blocks.{index}.mixer", rank, size)
        if block.ffn is not None:
            _shard_ffn(block.ffn, f"blocks.{index}.ffn", rank, size)
    tied = model.head.weight is model.embedding.weight
    own = span(model.config.vocab, rank, size)
    head = ShardedHead(_plain(model.head, "head"), own, model.config.vocab, size)
    embedding = ShardedEmbedding(model.embedding, own)
    if tied:
        embedding.weight = head.weight
    model.embedding, model.head = embedding, head
    return model


def outline_part(model: DecoderModel, rank: int, size: int) -> dict[str, Cut]:
    """Cut a model that has no values yet; which part of each parameter this process is to read.

    Raises:
        TreadleError: as `shard`.
    """
    shard(model, rank, size)
    cuts: dict[str, Cut] = {}
    for name, module in model.named_modules():
        if isinstance(module, SummedLinear):
            cuts[f"{name}.weight"] = Cut(1, module.own)
        elif isinstance(module, RowsLinear | ShardedEmbedding | ShardedHead):
            cuts |= {f"{name}.{leaf}": Cut(0, module.own) for leaf in ("weight", "bias")}
    return cuts


def _shard_mixer(mixer: nn.Module, name: str, rank: int, size: int) -> None:
    if not isinstance(mixer, AttentionLayer):
        raise TreadleError(f"`{name}` is a {type(mixer).__name__}, which cannot be cut over heads")
    if isinstance(mixer.q_norm, AcrossHeadsNorm):
        raise TreadleError(f"`{name}` has one norm over all heads, which cannot be cut over them")
    if mixer.kv_heads < size:
        raise TreadleError(
            f"`{name}` has {mixer.kv_heads} groups of heads, too few for {size} processes: take "
            f"at most {mixer.kv_heads}"
        )
    groups = span(mixer.kv_heads, rank, size)
    shared, width = mixer.heads // mixer.kv_heads, mixer.head_dim
    heads = slice(groups.start * shared, groups.stop * shared)
    for leaf, own in (("q", heads), ("k", groups), ("v", groups)):
        linear = _plain(getattr(mixer, leaf), f"{name}.{leaf}")
        setattr(mixer, leaf, RowsLinear(linear, slice(own.start * width, own.stop * width)))
    mixer.o = SummedLinear(  # type: ignore[assignment]
        _plain(mixer.o, f"{name}.o"), slice(heads.start * width, heads.stop * width)
    )
    mixer.heads, mixer.kv_heads = heads.stop - heads.start, groups.stop - groups.start
    if mixer.rule.slopes is not None:
        mixer.rule = replace(mixer.rule, slopes=mixer.rule.slopes[heads])


def _shard_ffn(ffn: nn.Module, name: str, rank: int, size: int) -> None:
    if not isinstance(ffn, GatedMLPLayer | MLPLayer):
        raise TreadleError(f"`{name}` is a {type(ffn).__name__}, which cannot be cut yet")
    down = _plain(ffn.down, f"{name}.down")
    own = span(down.in_features, rank, size)
    for leaf in ("gate", "up") if isinstance(ffn, GatedMLPLayer) else ("up",):
        setattr(ffn, leaf, RowsLinear(_plain(getattr(ffn, leaf), f"{name}.{leaf}"), own))
    ffn.down = SummedLinear(down, own)  # type: ignore[assignment]


def _plain(linear: nn.Module, name: str) -> nn.Linear:
    if not isinstance(linear, nn.Linear):
        raise TreadleError(
            f"`{name}` is a {type(linear).__name__}: only plain weights are cut over processes; "
            "merge adapters first, and take the model unquantised"
        )
    return linear


def _own(tensor: Tensor) -> nn.Parameter:
    """A copy, lest the part keep the whole in memory."""
    if tensor.is_meta:  # to clone a part of such imports sympy
        return nn.Parameter(tensor.new_empty(tensor.shape), requires_grad=False)
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


class RowsLinear(nn.Linear):
    """Outputs `own` of a layer."""

    def __init__(self, whole: nn.Linear, own: slice) -> None:
        # Not by Linear's own: it draws weights, for which torch imports its compiler (150 MB).
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.own = whole.in_features, own.stop - own.start, own
        self.weight = _own(whole.weight[own])
        self.bias = None if whole.bias is None else _own(whole.bias[own])


class SummedLinear(nn.Module):
    """x_r W[:, r]^T summed over processes, + b."""

    def __init__(self, whole: nn.Linear, own: slice) -> None:
        super().__init__()
        self.own = own
        self.weight = _own(whole.weight[:, own])
        self.bias = whole.bias

    def forward(self, x: Float[Tensor, "N in"]) -> Float[Tensor, "N out"]:
        y = F.linear(x, self.weight)
        dist.all_reduce(y)
        return y if self.bias is None else y + self.bias


class ShardedEmbedding(nn.Embedding):
    """Rows `own` of a table; those of other processes come by a sum."""

    def __init__(self, whole: nn.Embedding, own: slice) -> None:
        rows = _own(whole.weight[own])  # given, so that none are drawn
        super().__init__(len(rows), whole.embedding_dim, _weight=rows, _freeze=True)
        self.own = own

    def forward(self, input: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        local = input - self.own.start
        elsewhere = (local < 0) | (local >= len(self.weight))
        y = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        y = y.masked_fill(elsewhere[..., None], 0)
        dist.all_reduce(y)
        return y


class ShardedHead(LinearLike):
    """Logits of the vocabulary's part `own`, joined with those of the other processes."""

    def __init__(self, whole: nn.Linear, own: slice, vocab: int, size: int) -> None:
        super().__init__()
        self.in_features, self.out_features = whole.in_features, vocab
        self.size, self.own = size, own
        self.weight = _own(whole.weight[own])
        self.bias = None if whole.bias is None else _own(whole.bias[own])

    def effective_weight(self) -> Float[Tensor, "out in"]:
        return self._joined(self.weight.T).T

    def effective_bias(self) -> Float[Tensor, " out"] | None:
        return None if self.bias is None else self._joined(self.bias)

    def forward(self, x: Float[Tensor, "N in"]) -> Float[Tensor, "N out"]:
        return self._joined(F.linear(x, self.weight, self.bias))

    def _joined(self, own: Float[Tensor, "... part"]) -> Float[Tensor, "... V"]:
        widths = [span(self.out_features, r, self.size) for r in range(self.size)]
        counts = [w.stop - w.start for w in widths]
        padded = F.pad(own, (0, counts[0] - own.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([p[..., :n] for p, n in zip(parts, counts, strict=True)], dim=-1)
