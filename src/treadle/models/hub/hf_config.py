"""config.json of transformers: typed reading, and what many families spell alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle.core.errors import ConfigError, FileFormatError
from treadle.kernels.gated import Activation
from treadle.models.decoder import Head, LinearHead, TiedHead

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class HfConfig:
    """A config.json; a key that is absent or null takes the default, or is an error without."""

    data: Mapping[str, Any]

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
            raise self._wrong(key, "an integer")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        return float(value)

    def maybe_integer(self, key: str) -> int | None:
        return None if self.data.get(key) is None else self.integer(key)

    def maybe_number(self, key: str) -> float | None:
        return None if self.data.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def activation(self, key: str, default: str) -> Activation:
        name = str(self._value(key, default))
        if name not in ACTIVATIONS:
            raise ConfigError(
                f"config.json: `{key}` is {name!r}; treadle knows {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[name]

    def head(self, tied: bool) -> Head:
        return TiedHead() if self.flag("tie_word_embeddings", tied) else LinearHead()

    def refuse(self, key: str, *allowed: Any) -> None:
        """Raise where a key that treadle does not have is set to anything but these values."""
        value = self.data.get(key)
        if value is not None and value not in allowed:
            raise ConfigError(f"config.json: `{key}` is {value!r}, which treadle does not have")

    def _value(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        if value is None:
            value = default
        if value is None:
            raise FileFormatError(f"config.json lacks `{key}`")
        return value

    def _wrong(self, key: str, expected: str) -> FileFormatError:
        return FileFormatError(f"config.json: `{key}` is {self.data.get(key)!r}, not {expected}")


def activation_name(activation: Activation) -> str:
    """transformers' name of an activation."""
    names = {"gelu_tanh": "gelu_pytorch_tanh"}
    return names.get(activation, activation)
