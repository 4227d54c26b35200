"""A hypernetwork: it reads what a task is, and writes the LoRA for it.

    e      = mean of the base's own last hidden states over the description    [D]
    h      = MLP([norm(e); embedding of the layer])                            one for each target
    A_l    = A0_l + heads of h,   B_l = heads of h                             [r, in], [out, r]

Ha et al. 2017, arXiv:1609.09106; Phang et al. 2023, HyperTuning, arXiv:2211.12485; Charakorn et al.
2025, Text-to-LoRA, arXiv:2506.06105. Layers of one shape share a head. A head goes through a narrow
code, so that it is small beside what it writes: A_l = sum_k c_k(h) P_k with c of `codes` numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.core.pipeline import Workspace
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened
from treadle.models.transform import M, Transform, match_modules, replace_module
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.nn.linear import LinearLike, bias_of, compute_dtype, weight_of
from treadle.peft.adapter import Added, LinearAdapter, adapted, device_of, disabled, freeze
from treadle.peft.lora import LoRA, LoRALinear
from treadle.peft.low_rank import check_rank
from treadle.tokenizers.load import tokenizer_of

CARD = Card(
    id="ft.hypernet",
    paper="Ha et al. 2017, arXiv:1609.09106; Phang et al. 2023, arXiv:2211.12485; Charakorn et al. "
    "2025, Text-to-LoRA, arXiv:2506.06105",
    summary="Reads the description of a task and writes a LoRA for it, for unseen tasks too.",
    recipe="treadle run hypernetwork",
    oracle="tests/peft/test_peft_hypernetwork.py::test_what_is_written_matches_the_formula",
)


class Hypernetwork(Transform):
    """A network beside a frozen model that writes its LoRA."""

    rank: int = Field(default=4, ge=1)
    alpha: float = Field(default=8.0, gt=0)
    targets: tuple[str, ...] = ("q", "v")
    hidden: int = Field(default=64, ge=1)
    codes: int = Field(default=16, ge=1)
    """Directions among which each factor is a mixture."""

    def __call__(self, model: M) -> M:
        assert isinstance(model, DecoderModel)
        kinds = (nn.Linear, LinearLike)
        found = match_modules(model, self.targets, kinds, owner="Hypernetwork")
        if adapted(model):
            raise ConfigError("Hypernetwork: the model has adapters already; merge them first")
        layers = []
        for name, base in found.items():
            assert isinstance(base, nn.Linear | LinearLike)
            check_rank("Hypernetwork", self.rank, name, (base.out_features, base.in_features))
            layers.append(WrittenLoRA(base, LoRA(rank=self.rank, alpha=self.alpha)))
            replace_module(model, name, layers[-1])
        writer = Writer(self, model.config.dim, layers).to(device_of(model.embedding))
        model.add_module("writer", writer)
        freeze(model)
        return model


class WrittenLoRA(LinearAdapter):
    """A LoRA whose factors are written by the hypernetwork, with gradient; nothing of its own."""

    config: LoRA

    def __init__(self, base: nn.Linear | LinearLike, config: LoRA) -> None:
        super().__init__(base, config)
        self.scale = config.scale
        self.A: Tensor | None = None
        self.B: Tensor | None = None

    def factors(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """A and B.

        Raises:
            ConfigError: no description was read yet.
        """
        if self.A is None or self.B is None:
            raise ConfigError(
                "the hypernetwork has read no description yet: train with the objective Described, "
                "or open the model by Written"
            )
        return self.A, self.B

    def adapted(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        (A, B), dtype = self.factors(), compute_dtype(x)
        rows = x.to(dtype).reshape(-1, self.in_features)
        h = F.linear(rows, A.to(dtype))
        y: Tensor = self.base(rows)
        y = y + self.scale * F.linear(h, B.to(dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def adapted_weight(self) -> Float[Tensor, "out in"]:
        (A, B), weight = self.factors(), weight_of(self.base)
        return (weight.float() + self.scale * B @ A).to(weight.dtype)

    def adapted_bias(self) -> Float[Tensor, " out"] | None:
        return bias_of(self.base)

    def peft_tensors(self) -> dict[str, Tensor]:
        A, B = self.factors()
        return {"lora_A.weight": A, "lora_B.weight": B}


class Writer(Added):
    """The network; it is called with a description and leaves the factors in the layers."""

    def __init__(self, config: Hypernetwork, dim: int, layers: Sequence[WrittenLoRA]) -> None:
        super().__init__()
        self.config = config
        shapes = [(layer.out_features, layer.in_features) for layer in layers]
        self.kinds = tuple(dict.fromkeys(shapes))
        self.kind_of = tuple(self.kinds.index(shape) for shape in shapes)
        hidden, codes, r = config.hidden, config.codes, config.rank
        self.place = nn.Embedding(len(layers), hidden)
        self.read = nn.Sequential(
            nn.Linear(dim + hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.code = nn.Linear(hidden, 2 * codes)
        self.A = nn.ParameterList(torch.empty(codes, r, inner) for _, inner in self.kinds)
        self.B = nn.ParameterList(torch.zeros(codes, out, r) for out, _ in self.kinds)
        self.A0 = nn.ParameterList(torch.empty(r, layer.in_features) for layer in layers)
        for factor in (*self.A, *self.A0):
            nn.init.normal_(factor, std=factor.shape[-1] ** -0.5)

    def forward(
        self, task: Float[Tensor, " D"]
    ) -> list[tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]]:
        """A and B of each layer."""
        about = F.layer_norm(task, task.shape).expand(len(self.kind_of), -1)
        h = self.read(torch.cat([about, self.place.weight], -1))
        for_a, for_b = self.code(h).chunk(2, -1)
        return [
            (
                self.A0[place] + torch.einsum("k,kri->ri", for_a[place], self.A[kind]),
                torch.einsum("k,kor->or", for_b[place], self.B[kind]),
            )
            for place, kind in enumerate(self.kind_of)
        ]


class Written(ModelSource):
    """A model whose hypernetwork has read this description: a plain model with a LoRA."""

    model: ModelSource
    description: str = Field(min_length=1)

    def open(self, workspace: Workspace) -> Opened:
        opened = self.model.open(workspace)
        tokens = tokenizer_of(opened).encode(self.description, parse_special=False)
        as_lora(opened.model, torch.tensor(tokens))
        return opened


def writer_of(model: nn.Module) -> Writer:
    """The hypernetwork of a model.

    Raises:
        ConfigError: it has none.
    """
    found = getattr(model, "writer", None)
    if not isinstance(found, Writer):
        raise ConfigError("the model has no hypernetwork; add the transform Hypernetwork")
    return found


def write(model: DecoderModel, description: Int[Tensor, " L"]) -> None:
    """Read a description, and leave its LoRA in the layers; differentiable in the network."""
    writer = writer_of(model)
    written = writer(summary(model, description))
    layers = [m for m in model.modules() if isinstance(m, WrittenLoRA)]
    for layer, (A, B) in zip(layers, written, strict=True):
        layer.A, layer.B = A, B


@torch.no_grad()
def summary(model: DecoderModel, description: Int[Tensor, " L"]) -> Float[Tensor, " D"]:
    """What the base makes of a description."""
    tokens = description.to(model.embedding.weight.device)
    with disabled(model):
        hidden = model(tokens, Packed.of(Layout((len(tokens),)), tokens.device))
    mean: Tensor = hidden.float().mean(0)
    return mean


@torch.no_grad()
def as_lora(model: DecoderModel, description: Int[Tensor, " L"]) -> DecoderModel:
    """The model with the LoRA that its hypernetwork writes, and without the network; in place."""
    write(model, description)
    for name, layer in adapted(model).items():
        assert isinstance(layer, WrittenLoRA)
        A, B = layer.factors()
        plain = LoRALinear(layer.base, layer.config)
        plain.A.copy_(A)
        plain.B.copy_(B)
        replace_module(model, name, plain)
    delattr(model, "writer")
    freeze(model)
    return model
