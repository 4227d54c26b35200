"""How rotary frequencies are changed for contexts longer than the one trained on.

With w_i = theta^(-2i/D) and s the factor by which the context grows:

LinearScaling   w_i / s                                        Chen et al. 2023, arXiv:2306.15595
DynamicNTK      theta' = theta (s L/L0 - (s - 1))^(D/(D-2)), once L > L0      bloc97, emozilla 2023
YaRN            w_i (1 - r_i) / s + w_i r_i with a ramp r over i; cos and sin times 0.1 ln s + 1
                                                               Peng et al. 2023, arXiv:2309.00071
LongRoPE        w_i / f_i, with searched f for short and for long contexts
                                                               Ding et al. 2024, arXiv:2402.13753
Llama3Scaling   w_i / s for long wavelengths, w_i for short ones, a ramp between
                                                               Llama team 2024, arXiv:2407.21783
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.core.errors import ConfigError
from treadle.nn.rope import Frequencies, Scaling


class LinearScaling(Scaling):
    """Position interpolation: all positions are divided by the factor."""

    factor: float

    def __call__(self, base: Float[Tensor, " half"], theta: float, length: int) -> Frequencies:
        return Frequencies(base / self.factor)


class DynamicNTK(Scaling):
    """A larger theta, the more so the further a text runs past the trained context."""

    factor: float
    original_context: int

    def __call__(self, base: Float[Tensor, " half"], theta: float, length: int) -> Frequencies:
        growth = self.factor * max(length, self.original_context) / self.original_context
        dim = 2 * len(base)
        theta *= (growth - (self.factor - 1)) ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=base.dtype, device=base.device) / dim
        return Frequencies(1.0 / theta**exponents)


class YaRN(Scaling):
    """Interpolates slow dimensions, keeps fast ones, ramps between."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    """Dimensions that turn at least this often within the trained context are kept."""
    beta_slow: float = 1.0
    """Dimensions that turn at most this often are interpolated."""
    truncate: bool = True
    """Widen the ramp to whole dimensions."""
    attention: float | None = None
    """Factor on cos and sin; None means 0.1 ln(factor) + 1."""

    def __call__(self, base: Float[Tensor, " half"], theta: float, length: int) -> Frequencies:
        dim = 2 * len(base)
        low = self._dimension(self.beta_fast, dim, theta)
        high = self._dimension(self.beta_slow, dim, theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if low == high else 0.0
        index = torch.arange(dim // 2, dtype=base.dtype, device=base.device)
        interpolated = ((index - low) / (high - low)).clamp(0, 1)
        inverse = base / self.factor * interpolated + base * (1 - interpolated)
        grown = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return Frequencies(inverse, grown if self.attention is None else self.attention)

    def _dimension(self, turns: float, dim: int, theta: float) -> float:
        """The (real) index i of the frequency that turns so often within the trained context."""
        wavelength = self.original_context / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))


class LongRoPE(Scaling):
    """Searched divisors of each frequency, one set for short and one for long contexts."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: int
    factor: float
    """Full context over original context; sets `attention` where that is None."""
    attention: float | None = None
    """Factor on cos and sin; None means sqrt(1 + ln(factor) / ln(original_context))."""

    def __call__(self, base: Float[Tensor, " half"], theta: float, length: int) -> Frequencies:
        divisors = self.long if length > self.original_context else self.short
        inverse = _divide(base, divisors, "LongRoPE")
        if self.attention is not None:
            return Frequencies(inverse, self.attention)
        spread = math.log(max(self.factor, 1.0)) / math.log(self.original_context)
        return Frequencies(inverse, math.sqrt(1 + spread))


class Llama3Scaling(Scaling):
    """Divides slow frequencies by the factor, keeps fast ones, blends between."""

    factor: float
    low: float = 1.0
    """Frequencies that turn less often than this within the original context are slow."""
    high: float = 4.0
    """Frequencies that turn more often than this are fast."""
    original_context: int = 8192

    def __call__(self, base: Float[Tensor, " half"], theta: float, length: int) -> Frequencies:
        turns = self.original_context * base / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return Frequencies((1 - kept) * base / self.factor + kept * base)


class DividedFrequencies(Scaling):
    """Each frequency divided by a number of its own: what a GGUF file keeps of other scalings."""

    divisors: tuple[float, ...]

    def __call__(self, base: Float[Tensor, " half"], theta: float, length: int) -> Frequencies:
        return Frequencies(_divide(base, self.divisors, "DividedFrequencies"))


def _divide(
    base: Float[Tensor, " half"], divisors: tuple[float, ...], owner: str
) -> Float[Tensor, " half"]:
    if len(divisors) != len(base):
        raise ConfigError(
            f"{owner}: {len(divisors)} factors for {len(base)} frequencies; "
            "give one for every two rotated dimensions of a head"
        )
    return base / torch.tensor(divisors, dtype=base.dtype, device=base.device)
