"""What Mixtral and the Qwen mixtures spell alike.

Checkpoints of transformers have one tensor for each expert of each layer, GGUF files one for all
experts of a layer, [experts out in] as ours.
"""

from __future__ import annotations

from typing import Any

from treadle.core.errors import ConfigError
from treadle.models.decoder import Decoder, swap
from treadle.models.hub.gguf_header import GgufHeader
from treadle.models.weights import Rule, Squeezed, Stacked, rule
from treadle.nn.ffn.ffn import FeedForward, GatedMLP
from treadle.nn.ffn.moe import MoE, Router

GGUF_EXPERT_RULES = (
    rule("blk.{i}.ffn_gate_inp.weight", "blocks.{i}.ffn.router.weight"),
    rule("blk.{i}.ffn_gate_inp_shexp.weight", "blocks.{i}.ffn.shared.switch.weight", Squeezed()),
    *(
        item
        for n in ("gate", "up", "down")
        for item in (
            rule(f"blk.{{i}}.ffn_{n}_exps.weight", f"blocks.{{i}}.ffn.experts.{n}"),
            rule(f"blk.{{i}}.ffn_{n}_shexp.weight", f"blocks.{{i}}.ffn.shared.ffn.{n}.weight"),
        )
    ),
)


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


def mixture_from_gguf(
    dense: Decoder, header: GgufHeader, router: Router, shared: FeedForward | None = None
) -> Decoder:
    """`dense` with the experts that the file has; as it is where the file has none."""
    experts = header.integer("expert_count", 0)
    if not experts:
        return dense
    top_k = header.integer("expert_used_count")

    def mix(ffn: GatedMLP) -> MoE:
        hidden = header.integer("expert_feed_forward_length", ffn.hidden)
        expert = ffn.replace(hidden=hidden)
        return MoE(expert=expert, experts=experts, top_k=top_k, router=router, shared=shared)

    mixed: Decoder = swap(dense, GatedMLP, mix)
    return mixed


def mixture_to_gguf(decoder: Decoder) -> dict[str, Any]:
    """The metadata of the experts; nothing where there are none."""
    moe = next((block.ffn for block in decoder.blocks if isinstance(block.ffn, MoE)), None)
    if moe is None:
        return {}
    return {
        "expert_count": moe.experts,
        "expert_used_count": moe.top_k,
        "expert_feed_forward_length": moe.expert.hidden,
    }
