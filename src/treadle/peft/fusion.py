"""AdapterFusion: attention over what several frozen adapters make of a sublayer's output.

    z_i = s_i U_i g(D_i h)                          what adapter i adds, frozen
    y   = f(x) + sum_i softmax_i(Q f(x) . K z_i) V z_i

Pfeiffer et al. 2021, arXiv:2005.00247. Q and K start small and V as the identity: the mean of the
adapters. What is trained is which adapter to listen to, token by token and layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.core.pipeline import Workspace
from treadle.kernels.gated import Activation, activate
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened
from treadle.models.transform import replace_module
from treadle.peft.adapter import AdapterLayer, device_of, freeze
from treadle.peft.bottleneck import BottleneckLayer, Connection, residual_width
from treadle.peft.experts import Expert, buffered, open_experts

CARD = Card(
    id="ft.fusion",
    paper="Pfeiffer et al. 2021, AdapterFusion, arXiv:2005.00247",
    summary="Attention over the outputs of several frozen bottleneck adapters.",
    recipe="treadle run adapter-fusion",
    oracle="tests/peft/test_peft_fusion.py::test_matches_the_formula",
)
STD = 0.02


class FusedAdapter(nn.Module):
    """One frozen adapter: D and U as buffers."""

    def __init__(self, layer: BottleneckLayer) -> None:
        super().__init__()
        self.D, self.U = buffered(layer.D), buffered(layer.U)
        self.activation: Activation = layer.activation
        self.scale, self.connection = layer.scale, layer.connection

    def forward(self, x: Float[Tensor, "N D"], y: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        connection: Connection = self.connection
        hidden = activate(self.D(connection.reads(x, y)), self.activation)
        change: Tensor = self.scale * self.U(hidden)
        return change


class FusionLayer(AdapterLayer):
    """A sublayer, its adapters, and Q, K and V, which alone train."""

    def __init__(self, base: nn.Module, layers: Sequence[BottleneckLayer], width: int) -> None:
        super().__init__(base, layers[0].config)
        self.adapters = nn.ModuleList(FusedAdapter(layer) for layer in layers)
        device = device_of(base)
        self.Q = nn.Parameter(STD * torch.randn(width, width, device=device))
        self.K = nn.Parameter(STD * torch.randn(width, width, device=device))
        self.V = nn.Parameter(torch.eye(width, device=device))

    def adapted(self, x: Float[Tensor, "N D"], *rest: Any) -> Float[Tensor, "N D"]:
        y: Tensor = self.base(x, *rest)
        z = torch.stack([adapter(x, y) for adapter in self.adapters], 1)
        query = y @ self.Q.to(y.dtype).T
        scores = torch.einsum("nd,nid->ni", query, z @ self.K.to(y.dtype).T)
        attention = scores.float().softmax(-1).to(y.dtype)
        fused = torch.einsum("ni,nid->nd", attention, z)
        return y + fused @ self.V.to(y.dtype).T

    def merged(self) -> NoReturn:
        raise ConfigError(
            "fused adapters are not linear and cannot be merged into weights; keep the model with "
            "them, or mix LoRA adapters where a plain model is wanted"
        )

    def peft_tensors(self) -> NoReturn:
        raise ConfigError("PEFT has no AdapterFusion; the run's folder keeps this one")


class AdapterFusion(ModelSource):
    """Models that were trained with bottleneck adapters on one base become one."""

    experts: tuple[ModelSource, ...] = Field(min_length=2)

    def open(self, workspace: Workspace) -> Opened:
        opened, experts = open_experts(self.experts, workspace, "AdapterFusion")
        fuse(opened.model, experts)
        return opened


def fuse(model: DecoderModel, experts: Sequence[Expert]) -> DecoderModel:
    """Put attention over the experts' adapters after each sublayer that they adapt; in place.

    Raises:
        ConfigError: the experts adapt different sublayers, or not by bottleneck adapters.
    """
    names = list(experts[0])
    for place, expert in enumerate(experts, 1):
        if odd := set(names) ^ set(expert):
            raise ConfigError(
                f"AdapterFusion: experts 1 and {place} do not adapt the same sublayers "
                f"(`{min(odd)}`); train them with the same targets"
            )
        for name, layer in expert.items():
            if not isinstance(layer, BottleneckLayer):
                raise ConfigError(
                    f"AdapterFusion: expert {place} has a {type(layer).__name__} on `{name}`; it "
                    "fuses bottleneck adapters (MixtureOfAdapters takes LoRA)"
                )
    for name in names:
        layers = [layer for e in experts if isinstance(layer := e[name], BottleneckLayer)]
        base = model.get_submodule(name)
        width = residual_width(base, name, "AdapterFusion")
        replace_module(model, name, FusionLayer(base, layers, width))
    freeze(model)
    return model
