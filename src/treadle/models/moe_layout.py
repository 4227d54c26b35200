"""What Mixtral and the Qwen mixtures spell alike: one tensor for each expert of each layer."""

from __future__ import annotations

from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder, swap
from treadle.models.weights import Rule, Stacked
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.ffn.moe import MoE


def expert_rules(decoder: Decoder, front: str, names: tuple[str, str, str]) -> tuple[Rule, ...]:
    """`front` begins the names of a layer's experts; `names` are those of gate, up and down."""
    counts = [block.ffn.experts for block in decoder.blocks if isinstance(block.ffn, MoE)]
    return tuple(
        Rule(
            tuple(f"{front}.{e}.{theirs}.weight" for e in range(counts[0])),
            (f"blocks.{{i}}.ffn.experts.{ours}",),
            Stacked(),
        )
        for theirs, ours in zip(names, ("gate", "up", "down"), strict=True)
        if counts
    )


def mixture(decoder: Decoder, family: str) -> MoE:
    """The first mixture of experts, for formats that state one for all blocks."""
    found = [block.ffn for block in decoder.blocks if isinstance(block.ffn, MoE)]
    if not found:
        raise ConfigError(f"{family} has mixtures of experts, and this decoder has none")
    return found[0]


def dense_twin(decoder: Decoder) -> Decoder:
    """The decoder with one expert in the place of each mixture."""
    twin: Decoder = swap(decoder, MoE, lambda moe: moe.expert)
    return twin


def dense_hidden(decoder: Decoder, otherwise: int) -> int:
    """Width of the feed-forwards between the mixtures, if there are any."""
    found = [block.ffn.hidden for block in decoder.blocks if isinstance(block.ffn, GatedMLP)]
    return found[0] if found else otherwise
