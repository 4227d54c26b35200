"""Bottleneck adapters: a small network at the end of each sublayer, or beside it.

    serial      y = f(x) + s U g(D f(x))        Houlsby et al. 2019: after both sublayers
    parallel    y = f(x) + s U g(D x)           He et al. 2022: beside the feed-forward

D [r, dim] random, U [dim, r] = 0: y = f(x) at the start. Pfeiffer et al. 2021 put them after the
feed-forward alone: `targets=("ffn",)`. D and U can be made of Kronecker products (`compacter.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError
from treadle.kernels.gated import Activation, activate
from treadle.nn.linear import LinearLike
from treadle.peft.adapter import Adapter, AdapterLayer, device_of

CARD = Card(
    id="ft.adapter.bottleneck",
    paper="Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021; He et al. 2022",
    summary="Small networks after each sublayer (Houlsby), after some (Pfeiffer), or beside them.",
    recipe="treadle run fine-tune 'steps.sft.transforms=[{kind: Bottleneck}]'",
    oracle="tests/peft/test_peft_bottleneck.py::test_blocks_match_the_papers",
)
NOT_IN_PEFT = "PEFT has no bottleneck adapters; the run's folder keeps this one"


class Projection(Config):
    """A shape: what D and U are."""

    @abstractmethod
    def build(self, width_in: int, width_out: int, *, zero: bool) -> nn.Module:
        """A layer `[... in] -> [... out]`; with `zero` it gives zeros at first."""

    def share(self, layers: Sequence[nn.Module]) -> None:
        """Tie what all layers of one adapter have in common; as a rule nothing."""
        return


class DenseProjection(Projection):
    """A plain linear layer with a bias."""

    def build(self, width_in: int, width_out: int, *, zero: bool) -> nn.Module:
        layer = nn.Linear(width_in, width_out)
        nn.init.zeros_(layer.bias)
        if zero:
            nn.init.zeros_(layer.weight)
        return layer


class Connection(Config):
    """A shape: what the adapter reads."""

    @abstractmethod
    def reads(self, x: Tensor, y: Tensor) -> Tensor:
        """Its input, given that of the sublayer and its output."""


class Serial(Connection):
    """The output of the sublayer."""

    def reads(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class Parallel(Connection):
    """The input of the sublayer."""

    def reads(self, x: Tensor, y: Tensor) -> Tensor:
        return x


class Bottleneck(Adapter):
    """Bottleneck adapters on sublayers, by default as Houlsby et al. place them."""

    peft_type: ClassVar[str] = ""
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    targets: tuple[str, ...] = ("mixer", "ffn")
    width: int = Field(default=32, ge=1)
    """r."""
    activation: Activation = "relu"
    scale: float = Field(default=1.0, gt=0.0)
    connection: Connection = Serial()
    projection: Projection = DenseProjection()

    def wrap(self, name: str, base: nn.Module) -> AdapterLayer:
        dim = residual_width(base, name, "Bottleneck")
        if self.width > dim:
            raise ConfigError(
                f"Bottleneck: width {self.width} is larger than the residual stream of `{name}`, "
                f"which is {dim}: it would be no bottleneck"
            )
        return BottleneckLayer(base, self, dim)

    def share(self, layers: Sequence[AdapterLayer]) -> None:
        parts = [p for m in layers if isinstance(m, BottleneckLayer) for p in (m.D, m.U)]
        self.projection.share(parts)

    def to_peft(self) -> dict[str, Any]:
        raise ConfigError(NOT_IN_PEFT)

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], targets: tuple[str, ...]) -> Self:
        raise ConfigError(NOT_IN_PEFT)


class BottleneckLayer(AdapterLayer):
    """A sublayer and its adapter; further arguments (the context) go to the sublayer."""

    def __init__(self, base: nn.Module, config: Bottleneck, dim: int) -> None:
        super().__init__(base, config)
        device = device_of(base)
        self.D = config.projection.build(dim, config.width, zero=False).to(device)
        self.U = config.projection.build(config.width, dim, zero=True).to(device)
        self.activation: Activation = config.activation
        self.scale, self.connection = config.scale, config.connection

    def adapted(self, x: Float[Tensor, "N D"], *rest: Any) -> Float[Tensor, "N D"]:
        y: Tensor = self.base(x, *rest)
        hidden = activate(self.D(self.connection.reads(x, y)), self.activation)
        change: Tensor = self.U(hidden)
        return y + self.scale * change

    def merged(self) -> NoReturn:
        raise ConfigError(
            "a bottleneck adapter is not linear and cannot be merged into weights; keep the model "
            "with it, or take LoRA where a plain model is wanted"
        )

    def peft_tensors(self) -> dict[str, Tensor]:
        raise ConfigError(NOT_IN_PEFT)


def residual_width(base: nn.Module, name: str, owner: str) -> int:
    """The width of the residual stream around a sublayer: that of the layer that ends it.

    Raises:
        ConfigError: `base` is no sublayer of a block.
    """
    room, leaf = name.rpartition(".")[::2]
    last = [m for n, m in base.named_modules() if n in ("o", "down", "o.base", "down.base")]
    widths = {m.out_features for m in last if isinstance(m, nn.Linear | LinearLike)}
    if len(widths) != 1 or leaf not in ("mixer", "ffn"):
        raise ConfigError(
            f"{owner}: `{name}` is no sublayer; it goes on `mixer` or `ffn` of the blocks"
            + (f" of `{room}`" if room else "")
        )
    return int(widths.pop())
