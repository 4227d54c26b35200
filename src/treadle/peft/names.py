"""What Hugging Face calls the layers of a model: adapter files go by those names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from treadle.core.errors import ConfigError
from treadle.models.decoder import DecoderModel
from treadle.models.families import family_for_hf
from treadle.models.weights import Stacked, Transposed
from treadle.nn.ffn.moe import Experts
from treadle.nn.linear import LinearLike
from treadle.peft.adapter import AdapterLayer

MODULES = (".block_sparse_moe.", ".mlp.")
"""What files call a part of Mixtral, and what transformers, and so an adapter, calls it."""


@dataclass(frozen=True)
class Names:
    """What Hugging Face calls our modules."""

    theirs_by_ours: Mapping[str, str]
    transposed: frozenset[str]
    """Ours, where theirs stores the weight as [in, out]."""

    @property
    def ours_by_theirs(self) -> dict[str, str]:
        return {theirs: ours for ours, theirs in self.theirs_by_ours.items()}

    def theirs(self, ours: str) -> str:
        if ours not in self.theirs_by_ours:
            raise ConfigError(
                f"`{ours}` is a part of a layer in Hugging Face's naming of this family, where an "
                "adapter takes the whole; merge the adapter and save the model instead"
            )
        return self.theirs_by_ours[ours]


def names_of(model: DecoderModel) -> Names:
    """The names of every layer that an adapter can go on."""
    kinds = (nn.Linear, LinearLike, nn.Embedding, Experts, AdapterLayer)
    layers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not name.endswith(".base")
    }
    rules = family_for_hf(model.config).huggingface.names(model.config)
    ruled = {ours.removesuffix(".weight") for rule in rules for ours in rule.ours}
    names = {name: name for name in layers - ruled}
    transposed = set()
    for rule in rules:
        ours, theirs = (names[0].removesuffix(".weight") for names in (rule.ours, rule.theirs))
        theirs = theirs.replace(*MODULES)
        if len(rule.ours) == 1 and ours in layers:
            names[ours] = theirs
            if rule.map == Transposed():
                transposed.add(ours)
        if isinstance(rule.map, Stacked) and (experts := ours.rpartition(".")[0]) in layers:
            names[experts] = theirs.partition(".experts.")[0] + ".experts"
    return Names(names, frozenset(transposed))


def patterns(chosen: Collection[str], among: Collection[str]) -> list[str]:
    """Last names where they choose exactly these modules, else whole names."""
    leaves = sorted({name.rpartition(".")[2] for name in chosen})
    return leaves if select(leaves, among) == set(chosen) else list(chosen)


def select(ends: Sequence[str], among: Collection[str]) -> set[str]:
    """The names that end in one of these, as PEFT reads `target_modules`."""
    return {n for n in among if any(f".{n}".endswith(f".{p}") for p in ends)}
