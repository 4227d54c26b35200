"""Virtual tokens: a learned table, direct or out of a small network that is thrown away later.

    Direct     E [n, width]
    Tanh       W2 tanh(W1 E)                 Li and Liang 2021
    ReLU       W3 relu(W2 relu(W1 E))        Liu et al. 2021
    LSTM       W2 relu(W1 biLSTM(E))         Liu et al. 2021

The networks tie the rows to each other, which steadies training at high learning rates.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from treadle.core.config import Config


class VirtualTokens(Config):
    """A shape: how the table of virtual tokens is made."""

    @abstractmethod
    def build(self, dim: int, start: Float[Tensor, "n width"]) -> nn.Module:
        """A module `() -> [n width]`. `dim` is the width of the rows that a network reads."""


class Direct(VirtualTokens):
    """The table itself is trained, from values of real tokens."""

    def build(self, dim: int, start: Float[Tensor, "n width"]) -> nn.Module:
        return Table(start)


class TanhNetwork(VirtualTokens):
    """Two layers, for prefix tuning."""

    hidden: int = Field(default=256, ge=1)

    def build(self, dim: int, start: Float[Tensor, "n width"]) -> nn.Module:
        n, width = start.shape
        layers = (nn.Linear(dim, self.hidden), nn.Tanh(), nn.Linear(self.hidden, width))
        return Encoded(torch.randn(n, dim), nn.Sequential(*layers))


class ReLUNetwork(VirtualTokens):
    """Three layers, for P-tuning."""

    hidden: int = Field(default=256, ge=1)

    def build(self, dim: int, start: Float[Tensor, "n width"]) -> nn.Module:
        n, width = start.shape
        return Encoded(
            torch.randn(n, dim),
            nn.Sequential(
                *(nn.Linear(dim, self.hidden), nn.ReLU()),
                *(nn.Linear(self.hidden, self.hidden), nn.ReLU()),
                nn.Linear(self.hidden, width),
            ),
        )


class LSTMNetwork(VirtualTokens):
    """Reads the rows in both directions, for P-tuning."""

    hidden: int = Field(default=256, ge=1)
    layers: int = Field(default=2, ge=1)

    def build(self, dim: int, start: Float[Tensor, "n width"]) -> nn.Module:
        n, width = start.shape
        both = 2 * self.hidden
        return Encoded(
            torch.randn(n, dim),
            nn.Sequential(
                Outputs(nn.LSTM(dim, self.hidden, self.layers, bidirectional=True)),
                *(nn.Linear(both, both), nn.ReLU(), nn.Linear(both, width)),
            ),
        )


class Table(nn.Module):
    def __init__(self, start: Float[Tensor, "n width"]) -> None:
        super().__init__()
        self.table = nn.Parameter(start.detach().float().clone())

    def forward(self) -> Float[Tensor, "n width"]:
        return self.table


class Encoded(nn.Module):
    def __init__(self, rows: Float[Tensor, "n dim"], network: nn.Module) -> None:
        super().__init__()
        self.rows, self.network = nn.Parameter(rows), network

    def forward(self) -> Float[Tensor, "n width"]:
        return self.network(self.rows)  # type: ignore[no-any-return]


class Outputs(nn.Module):
    """A recurrent network without its last state."""

    def __init__(self, network: nn.LSTM) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n width"]:
        return self.network(x)[0]  # type: ignore[no-any-return]
