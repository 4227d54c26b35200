"""A mixture of adapters: frozen LoRA experts on one base, weighed for each token or each request.

    y = W x + sum_i g_i s_i B_i A_i x

    TokenRouting  g = softmax(R x), of which the `top` largest are kept; R [experts, in] is trained
    Switched      g is set from outside, for all tokens or for each: a switch moves a few numbers

Huang et al. 2024, LoraHub, arXiv:2307.13269; Wu et al. 2024, MoLE, arXiv:2404.13628. All experts
go through two products, whatever their number: their A lie above each other, their B side by side.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError
from treadle.core.pipeline import Workspace
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened
from treadle.models.transform import replace_module
from treadle.nn.layout import Layout
from treadle.nn.linear import LinearLike, bias_of, compute_dtype, weight_of
from treadle.peft.adapter import Added, LinearAdapter, device_of, freeze
from treadle.peft.experts import Expert, open_experts
from treadle.peft.lora import LoRALinear

CARD = Card(
    id="ft.fusion.mixture",
    paper="Huang et al. 2024, LoraHub, arXiv:2307.13269; Wu et al. 2024, MoLE, arXiv:2404.13628",
    summary="Several LoRA adapters on one base, routed per token or per request, or switched.",
    recipe="treadle run adapter-mixture",
    oracle="tests/peft/test_peft_mixture.py::test_one_hot_routing_equals_that_adapter",
)


class Routing(Config):
    """A shape: how much each expert counts."""

    @abstractmethod
    def build(self, experts: int) -> Switch | None:
        """What all layers share; None where each layer routes by itself."""

    @abstractmethod
    def router(self, width: int, experts: int, shared: Switch | None) -> Router:
        """The router of a layer that reads `width` numbers a token."""


class Router(nn.Module):
    """A shape: `[N in] -> [N experts]`, or `[experts]` for all tokens alike."""


class TokenRouting(Routing):
    """A trained router in each layer, equal weights at the start."""

    top: int | None = Field(default=None, ge=1)
    """Experts that a token goes through; none: all."""

    def build(self, experts: int) -> None:
        if self.top is not None and self.top > experts:
            raise ConfigError(f"TokenRouting: top={self.top}, but there are only {experts} experts")

    def router(self, width: int, experts: int, shared: Switch | None) -> Router:
        return TokenRouter(width, experts, self.top)


class Switched(Routing):
    """Set at run time by `switch` or `routed`; the mean of all experts until then."""

    def build(self, experts: int) -> Switch:
        return Switch(experts)

    def router(self, width: int, experts: int, shared: Switch | None) -> Router:
        assert shared is not None
        return shared


class TokenRouter(Added, Router):
    def __init__(self, width: int, experts: int, top: int | None) -> None:
        super().__init__()
        self.R = nn.Parameter(torch.zeros(experts, width))
        self.top = top

    def forward(self, x: Float[Tensor, "N in"]) -> Float[Tensor, "N experts"]:
        scores = F.linear(x.float(), self.R)
        if self.top is not None and self.top < len(self.R):
            least = scores.topk(self.top, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        return scores.softmax(-1)


class Switch(Router):
    """One for the whole model."""

    gates: Tensor

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.register_buffer("gates", torch.full((experts,), 1 / experts))

    def forward(self, x: Float[Tensor, "N in"]) -> Float[Tensor, "*N experts"]:
        return self.gates


class MixtureLayer(LinearAdapter):
    """The factors are buffers, in fp32; the scale of each expert is in its B."""

    A: Tensor
    B: Tensor
    owner: Tensor

    def __init__(
        self, base: nn.Linear | LinearLike, experts: Sequence[LoRALinear | None], router: Router
    ) -> None:
        present = [(i, e) for i, e in enumerate(experts) if e is not None]
        super().__init__(base, present[0][1].config)
        self.register_buffer("A", torch.cat([e.A.detach() for _, e in present]))
        self.register_buffer("B", torch.cat([e.scale * e.B.detach() for _, e in present], 1))
        owner = [i for i, e in present for _ in range(len(e.A))]
        self.register_buffer("owner", torch.tensor(owner, device=self.A.device))
        self.router = router.to(device_of(base))

    def adapted(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        dtype = compute_dtype(x)
        rows = x.to(dtype).reshape(-1, self.in_features)
        gates = self.router(rows)[..., self.owner].to(dtype)
        h = F.linear(rows, self.A.to(dtype)) * gates
        y: Tensor = self.base(rows)
        y = y.addmm_(h, self.B.to(dtype).T)
        return y.view(*x.shape[:-1], self.out_features)

    def adapted_weight(self) -> Float[Tensor, "out in"]:
        if not isinstance(self.router, Switch) or self.router.gates.ndim > 1:
            raise ConfigError(
                "a mixture that is routed by token or by document has no single weight; `switch` "
                "it to fixed shares before it is merged"
            )
        weight = weight_of(self.base)
        change = (self.B * self.router.gates[self.owner]) @ self.A
        return (weight.float() + change).to(weight.dtype)

    def adapted_bias(self) -> Float[Tensor, " out"] | None:
        return bias_of(self.base)

    def peft_tensors(self) -> dict[str, Tensor]:
        raise ConfigError("PEFT has no such mixtures; the run's folder keeps this one")


class MixtureOfAdapters(ModelSource):
    """Models that were trained with LoRA on one base become one; only its routers train."""

    experts: tuple[ModelSource, ...] = Field(min_length=2)
    routing: Routing = TokenRouting()

    def open(self, workspace: Workspace) -> Opened:
        opened, experts = open_experts(self.experts, workspace, "MixtureOfAdapters")
        mix(opened.model, experts, self.routing)
        return opened


def mix(model: DecoderModel, experts: Sequence[Expert], routing: Routing) -> DecoderModel:
    """Put a mixture in the place of each layer that an expert adapts; in place.

    Raises:
        ConfigError: an expert is no LoRA on linear layers.
    """
    shared = routing.build(len(experts))
    for name in dict.fromkeys(name for expert in experts for name in expert):
        found = [_lora(expert, name, place) for place, expert in enumerate(experts, 1)]
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear | LinearLike)
        router = routing.router(base.in_features, len(experts), shared)
        replace_module(model, name, MixtureLayer(base, found, router))
    freeze(model)
    return model


def _lora(expert: Expert, name: str, place: int) -> LoRALinear | None:
    layer = expert.get(name)
    if layer is not None and not isinstance(layer, LoRALinear):
        raise ConfigError(
            f"MixtureOfAdapters: expert {place} has a {type(layer).__name__} on `{name}`; it mixes "
            "LoRA on linear layers (AdapterFusion takes bottleneck adapters)"
        )
    return layer


def mixtures(model: nn.Module) -> list[MixtureLayer]:
    """The mixture layers of a model.

    Raises:
        ConfigError: it has none.
    """
    found = [m for m in model.modules() if isinstance(m, MixtureLayer)]
    if not found:
        raise ConfigError("the model has no mixture of adapters; open it by MixtureOfAdapters")
    return found


def switch(model: nn.Module, gates: Sequence[float] | Float[Tensor, "*N experts"]) -> None:
    """Set the shares of the experts from now on, for all tokens or for each of a pass.

    Raises:
        ConfigError: no `Switched` mixture, or another number of experts.
    """
    layer = mixtures(model)[0]
    if not isinstance(layer.router, Switch):
        raise ConfigError("the mixture routes each token by itself; open it with Switched()")
    values = torch.as_tensor(gates, dtype=torch.float32, device=layer.A.device)
    experts = layer.router.gates.shape[-1]
    if values.shape[-1] != experts:
        raise ConfigError(f"{values.shape[-1]} shares for {experts} experts; give one each")
    layer.router.gates = values


@contextmanager
def routed(
    model: nn.Module, layout: Layout, gates: Float[Tensor, "documents experts"]
) -> Iterator[None]:
    """While it lasts, each document of a packed batch has shares of its own."""
    layer = mixtures(model)[0]
    before = layer.router.gates if isinstance(layer.router, Switch) else None
    lengths: Int[Tensor, " documents"] = torch.tensor(layout.lengths, device=gates.device)
    switch(model, gates.repeat_interleave(lengths, 0))
    try:
        yield
    finally:
        assert before is not None
        switch(model, before)
