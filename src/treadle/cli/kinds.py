"""Options whose value is a kind: its name, or YAML with its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from treadle.core.config import Config
    from treadle.inference.engine import EngineConfig

C = TypeVar("C", bound="Config")

CacheKind = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="KIND|YAML",
        help="Paged, PagesOnly, Contiguous, Quantised, Rolling, HeavyHitters or SnapKV, "
        "or such as '{kind: Quantised, bits: 4}'.",
    ),
]
DecodeKind = Annotated[
    str | None,
    typer.Option(
        "--decode",
        metavar="KIND|YAML",
        help="How a torch device writes token after token: Eager, Compiled, or Graphs (CUDA).",
    ),
]
DraftKind = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="KIND|YAML",
        help="Guess tokens ahead, the text stays the same: NGram, MTPHeads, "
        "or such as '{kind: NGram, tokens: 8, branches: 3}'.",
    ),
]


def named(text: str, shape: type[C], option: str) -> C:
    """The value of `shape` that a user wrote.

    Raises:
        ConfigError: there is no such kind, or a setting does not fit.
    """
    from treadle.core.config import from_yaml

    whole = text if text.lstrip().startswith("{") else f"{{kind: {text}}}"
    return from_yaml(whole, expect=shape, name=option)


def limits_of(
    cache: str | None,
    draft: str | None,
    decode: str | None = None,
    *,
    slots: int = 64,
    adapters: int = 8,
) -> EngineConfig:
    """An engine's limits, as options say."""
    from treadle.inference.cache import Cache
    from treadle.inference.decode import Decode, Eager
    from treadle.inference.engine import EngineConfig
    from treadle.inference.speculative import Draft

    return EngineConfig(
        slots=slots,
        adapters=adapters,
        cache=named(cache, Cache, "--cache") if cache else None,  # type: ignore[type-abstract]
        decode=named(decode, Decode, "--decode") if decode else Eager(),  # type: ignore[type-abstract]
        draft=named(draft, Draft, "--draft") if draft else None,  # type: ignore[type-abstract]
    )
