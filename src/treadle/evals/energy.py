"""What an answer costs: arithmetic, energy, carbon dioxide.

    FLOPs of token t = 2 N + 4 sum_l H_l D_l min(t, w_l)
    N    elements of the matrices of blocks and head; an embedding is only looked up
    H D  heads and their width, of the layers that attend; w their window
    CO2  = joules / 3.6e6 J/kWh * grid's g/kWh

A multiplication and an addition are two operations; t counts from 1, so t tokens are attended to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.core.meter import Cost, Source
from treadle.models.decoder import Decoder
from treadle.nn.mixers.attention import AttentionLayer

CARD = Card(
    id="ev.energy",
    paper="Kaplan et al. 2020, arXiv:2001.08361, section 2.1; Lacoste et al. 2019, "
    "arXiv:1910.09700",
    summary="Operations of a query, joules of a token (RAPL, NVML, or an estimate), CO2.",
    recipe="treadle bench smollm2-135m-instruct --prompt 64 --output 32 --grid 300",
    oracle="tests/evals/test_evals_energy.py::test_operations_are_those_that_torch_counts",
)
GRID = 475.0
"""Grams of CO2 for a kWh, the world's mean of 2019 (IEA); one's own grid may be 20 to 900."""


@dataclass(frozen=True)
class Energy:
    """The bill of some generated tokens."""

    joules_per_token: float
    """Reading of prompts included."""
    source: Source
    """By the machine's counters, or from processor time (`treadle.core.meter`)."""
    grams_per_million: float
    """CO2 of a million tokens."""


def energy(cost: Cost, tokens: int, grid: float = GRID) -> Energy:
    """What a piece of work cost that gave so many tokens; raises as `bill`."""
    return bill(cost.joules, cost.energy, tokens, grid)


def bill(joules: float, source: Source, tokens: int, grid: float = GRID) -> Energy:
    """
    Raises:
        TreadleError: there are no tokens to divide by.
    """
    if tokens < 1:
        raise TreadleError("energy of a token: there are no tokens")
    each = joules / tokens
    return Energy(each, source, grams(each, grid) * 1e6)


def grams(joules: float, grid: float) -> float:
    """CO2, from a grid with so many grams for a kWh."""
    return joules / 3.6e6 * grid


def operations(decoder: Decoder, prompt: int, output: int) -> int:
    """FLOPs of a query that reads `prompt` tokens and writes `output`.

    Every prompt token but the last needs no logits, and the last token written is not read.

    Raises:
        TreadleError: a layer mixes tokens by something else than attention.
    """
    with torch.device("meta"):
        model = decoder.build()
    matrices = sum(_size(m) for m in model.blocks.modules() if isinstance(m, nn.Linear))
    read = prompt + output - 1
    total = 2 * matrices * read + 2 * decoder.vocab * decoder.dim * output
    for block in model.blocks:
        mixers = [m for m in block.modules() if isinstance(m, AttentionLayer)]
        if len(mixers) != 1:
            raise TreadleError("operations are counted for layers with attention only")
        (mixer,) = mixers
        width = mixer.heads * mixer.head_dim
        total += 4 * width * _seen(read, mixer.rule.window)
    return total


def _size(module: nn.Linear) -> int:
    return module.in_features * module.out_features


def _seen(tokens: int, window: int | None) -> int:
    """sum_t min(t, w) for t = 1 .. tokens"""
    full = min(tokens, window or tokens)
    return full * (full + 1) // 2 + (tokens - full) * full
