"""Experts that stay on the disk: each layer keeps the last few in memory.

A token passes few of a layer's experts, and those of the next tokens are often the same. A layer
that lacks one reads it, in the place of the one that was not used for longest. The output is that
of the model with everything in memory; memory is that of the dense part and `experts` a layer.

Eliseev and Mazur 2023, Fast inference of mixture-of-experts models with offloading.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.core.files import StrPath
from treadle.kernels.gated import Activation, gated
from treadle.models.decoder import DecoderModel
from treadle.models.families import family_of_hf
from treadle.models.hub.load import Loaded, load_model
from treadle.models.hub.ranges import ByteRange, byte_ranges
from treadle.models.transform import replace_module
from treadle.nn.ffn.moe import Experts, MoELayer

CARD = Card(
    id="inf.moe",
    paper="Eliseev and Mazur 2023, arXiv:2312.17238",
    summary="Experts stay in the file; each layer caches the last few. Grouped products.",
    recipe="treadle generate path/to/mixture 'The loom was' --experts 2",
    oracle="tests/inference/test_inference_experts.py::test_equals_all_in_memory",
)

STORED = ("*.experts.gate", "*.experts.up", "*.experts.down")
"""Parameters that are left in the file."""
Places = tuple[ByteRange, ByteRange, ByteRange]
"""Of one expert: gate, up, down."""


class CachedExperts(nn.Module):
    """In the place of `Experts`, with at most `room` of them in memory."""

    def __init__(
        self, places: Sequence[Places], activation: Activation, room: int, like: Tensor
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.places = places
        self.room, self.dtype, self.device = min(room, len(places)), like.dtype, like.device
        self.held: OrderedDict[int, tuple[Tensor, Tensor, Tensor]] = OrderedDict()
        """The least recently used first."""
        self.asked = self.found = 0

    def forward(self, x: Float[Tensor, "M D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "M D"]:
        ends = counts.cumsum(0).tolist()
        used = counts.nonzero().flatten().tolist()
        out = torch.empty_like(x)
        # those at hand first, lest they go before they were used
        for expert in sorted(used, key=lambda e: e not in self.held):
            rows = slice(ends[expert - 1] if expert else 0, ends[expert])
            gate, up, down = self._fetch(expert)
            inner = gated(F.linear(x[rows], gate), F.linear(x[rows], up), self.activation)
            out[rows] = F.linear(inner, down).to(out.dtype)
        return out

    def _fetch(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        self.asked += 1
        if expert in self.held:
            self.found += 1
            self.held.move_to_end(expert)
        else:
            if len(self.held) == self.room:
                self.held.popitem(last=False)
            gate, up, down = (
                place.read().to(self.device, self.dtype) for place in self.places[expert]
            )
            self.held[expert] = (gate, up, down)
        return self.held[expert]

    @property
    def nbytes(self) -> int:
        """Memory of the experts that are held."""
        return sum(t.nbytes for tensors in self.held.values() for t in tensors)


def load_offloaded(
    folder: StrPath,
    *,
    experts: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Loaded:
    """A model whose experts stay in its folder but for `experts` of each layer.

    Raises:
        TreadleError: not a Hugging Face folder, or a model without mixtures of experts.
        FileFormatError: the files are broken, or do not fit their config.
        ConfigError: an architecture that treadle does not have.
    """
    folder = Path(folder)
    if experts < 1:
        raise TreadleError(f"experts={experts}: a token passes at least one; keep one or more")
    if not folder.is_dir():
        raise TreadleError(f"{folder}: experts are read one by one from a Hugging Face folder")
    loaded = load_model(folder, dtype=dtype, device=device, leave=STORED)
    model = loaded.model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoELayer)}
    if not layers:
        raise TreadleError(f"{folder}: the model has no mixture of experts; load it as it is")
    ranges = byte_ranges(folder)
    spelling = family_of_hf(loaded.metadata).huggingface
    bare = {f"{spelling.prefix}{name}": place for name, place in ranges.items()}
    theirs = {rule.ours[0]: rule.theirs for rule in spelling.rules(model.config)}
    for name, layer in layers.items():
        stored = layer.experts
        assert isinstance(stored, Experts)
        gates, ups, downs = (
            [ranges.get(n) or bare[n] for n in theirs[f"{name}.experts.{leaf}"]]
            for leaf in ("gate", "up", "down")
        )
        cache = CachedExperts(
            list(zip(gates, ups, downs, strict=True)),
            stored.activation,
            room=experts,
            like=layer.router.weight,
        )
        replace_module(model, f"{name}.experts", cache)
    return loaded


def hit_rate(model: DecoderModel) -> tuple[int, int]:
    """How often an expert was found in memory, and how often one was asked for."""
    caches = [m for m in model.modules() if isinstance(m, CachedExperts)]
    return sum(cache.found for cache in caches), sum(cache.asked for cache in caches)
