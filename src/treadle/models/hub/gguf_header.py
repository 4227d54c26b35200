"""The metadata of GGUF files: typed reading, and what many architectures spell alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from treadle.core.errors import ConfigError, FileFormatError
from treadle.nn.rope import NoScaling, RoPE, Scaling
from treadle.nn.rope_scaling import DividedFrequencies, LinearScaling, Llama3Scaling, YaRN

ROPE_DIVISORS = "rope_freqs.weight"
"""The tensor as which llama.cpp stores Llama 3's scaled RoPE."""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of its model besides the weights themselves."""

    architecture: str
    metadata: Mapping[str, Any]
    """Keys of the architecture without its name in front: `embedding_length`."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of every tensor, rows first."""
    rope_divisors: Float[Tensor, " half"] | None = None
    """The tensor `rope_freqs.weight`, where the file has it."""

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._value(key, default))

    def number(self, key: str, default: float | None = None) -> float:
        """A number; fp32 values come as the shortest decimal, 1e-05 and not 9.99999974e-06."""
        return float(str(np.float32(self._value(key, default))))

    def maybe_number(self, key: str) -> float | None:
        return self.number(key) if key in self.metadata else None

    def maybe_integer(self, key: str) -> int | None:
        return self.integer(key) if key in self.metadata else None

    def vocab(self) -> int:
        """Rows of the embedding; the metadata may lack or miscount them."""
        if "token_embd.weight" not in self.shapes:
            raise FileFormatError("this GGUF file has no tensor `token_embd.weight`")
        return self.shapes["token_embd.weight"][0]

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        name = f"{self.architecture}.{key}"
        if value is None:
            raise FileFormatError(f"this GGUF file lacks the key `{name}`")
        if isinstance(value, tuple):  # one for each layer
            if len(set(value)) != 1:
                raise ConfigError(f"GGUF: `{name}` differs between layers: {value}")
            value = value[0]
        if not isinstance(value, int | float):
            raise FileFormatError(f"this GGUF file has {value!r} for `{name}`, not a number")
        return value


def rope_from_gguf(header: GgufHeader, head_dim: int) -> RoPE:
    """The RoPE that applies to all layers."""
    fraction = header.integer("rope.dimension_count", head_dim) / head_dim
    theta = header.number("rope.freq_base", 10_000.0)
    return RoPE(theta=theta, scaling=_scaling(header, theta), fraction=fraction)


def _scaling(header: GgufHeader, theta: float) -> Scaling:
    if header.rope_divisors is not None:
        return _divided(header, header.rope_divisors, theta)
    kind = str(header.metadata.get("rope.scaling.type", "none"))
    match kind:
        case "none":
            return NoScaling()
        case "linear":
            return LinearScaling(factor=header.number("rope.scaling.factor"))
        case "yarn":
            return YaRN(
                factor=header.number("rope.scaling.factor"),
                original_context=header.integer("rope.scaling.original_context_length"),
                beta_fast=header.number("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=header.number("rope.scaling.yarn_beta_slow", 1.0),
            )
    raise ConfigError(f"this GGUF file scales RoPE by {kind!r}; treadle knows linear and yarn")


def _divided(header: GgufHeader, divisors: Float[Tensor, " half"], theta: float) -> Scaling:
    """Llama 3's scaling if the file names its numbers or the published ones fit, else divisors."""
    if "rope.scaling.llama3.factor" in header.metadata:
        return Llama3Scaling(
            factor=header.number("rope.scaling.llama3.factor"),
            low=header.number("rope.scaling.llama3.low"),
            high=header.number("rope.scaling.llama3.high"),
            original_context=header.integer("rope.scaling.llama3.original_context"),
        )
    base = _frequencies(theta, 2 * len(divisors))
    guess = Llama3Scaling(factor=float(str(np.float32(divisors.max().item()))))
    if divisors.allclose(base / guess(base, theta, 1).inverse, rtol=1e-4):
        return guess
    return DividedFrequencies(divisors=tuple(divisors.tolist()))


def rope_to_gguf(rope: RoPE, head_dim: int) -> tuple[dict[str, Any], Float[Tensor, " half"] | None]:
    """Metadata, and the tensor `rope_freqs.weight` where the scaling needs it.

    Raises:
        ConfigError: llama.cpp has no such scaling.
    """
    rotated = int(head_dim * rope.fraction)
    keys: dict[str, Any] = {"rope.dimension_count": rotated, "rope.freq_base": rope.theta}
    match rope.scaling:
        case NoScaling():
            return keys, None
        case LinearScaling(factor=factor):
            return {**keys, "rope.scaling.type": "linear", "rope.scaling.factor": factor}, None
        case YaRN() as yarn if yarn.attention is None and yarn.truncate:
            return {
                **keys,
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": yarn.factor,
                "rope.scaling.original_context_length": yarn.original_context,
                "rope.scaling.yarn_beta_fast": yarn.beta_fast,
                "rope.scaling.yarn_beta_slow": yarn.beta_slow,
            }, None
        case Llama3Scaling() as scaling:
            # llama.cpp takes the divisors alone; the numbers are for reading back.
            numbers = {
                "rope.scaling.llama3.factor": scaling.factor,
                "rope.scaling.llama3.low": scaling.low,
                "rope.scaling.llama3.high": scaling.high,
                "rope.scaling.llama3.original_context": scaling.original_context,
            }
            base = _frequencies(rope.theta, rotated)
            return {**keys, **numbers}, base / scaling(base, rope.theta, 1).inverse
        case DividedFrequencies(divisors=divisors):
            return keys, torch.tensor(divisors)
    raise ConfigError(f"GGUF cannot express {rope.scaling!r}; save a Hugging Face folder")


def _frequencies(theta: float, dim: int) -> Float[Tensor, " half"]:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
