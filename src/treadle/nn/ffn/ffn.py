"""Feed-forward networks.

MLP        y = W_down act(W_up x)                       Vaswani 2017; ReLU^2: So et al. 2021
GatedMLP   y = W_down (act(W_gate x) * W_up x)          Shazeer 2020: SwiGLU, GeGLU
"""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.kernels.gated import Activation, activate, gated

CARD = Card(
    id="arch.ffn",
    paper="Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202; So et al. 2021",
    summary="Plain and gated feed-forward networks with ReLU, GELU, SiLU or squared ReLU.",
    recipe="treadle run quickstart-scratch",
    oracle="tests/nn/test_nn_ffn.py::test_ffn_matches_transformers",
)


class FeedForward(Config):
    """A shape: works on each token by itself."""

    @abstractmethod
    def build(self, dim: int) -> nn.Module:
        """A module `[N dim] -> [N dim]`."""


class MLP(FeedForward):
    """Two layers with an activation between."""

    hidden: int
    activation: Activation = "gelu"
    bias: bool = True

    def build(self, dim: int) -> nn.Module:
        return MLPLayer(self, dim)


class GatedMLP(FeedForward):
    """Gated linear unit: SwiGLU with `silu`, GeGLU with `gelu` or `gelu_tanh`."""

    hidden: int
    activation: Activation = "silu"
    bias: bool = False

    def build(self, dim: int) -> nn.Module:
        return GatedMLPLayer(self, dim)


class MLPLayer(nn.Module):
    def __init__(self, config: MLP, dim: int) -> None:
        super().__init__()
        self.activation: Activation = config.activation
        self.up = nn.Linear(dim, config.hidden, bias=config.bias)
        self.down = nn.Linear(config.hidden, dim, bias=config.bias)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return self.down(activate(self.up(x), self.activation))  # type: ignore[no-any-return]


class GatedMLPLayer(nn.Module):
    def __init__(self, config: GatedMLP, dim: int) -> None:
        super().__init__()
        self.kernel = gated
        self.activation: Activation = config.activation
        self.gate = nn.Linear(dim, config.hidden, bias=config.bias)
        self.up = nn.Linear(dim, config.hidden, bias=config.bias)
        self.down = nn.Linear(config.hidden, dim, bias=config.bias)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return self.down(self.kernel(self.gate(x), self.up(x), self.activation))  # type: ignore[no-any-return]
