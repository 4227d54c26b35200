"""One pass through a model, with a look at what its layers do on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from treadle.core.errors import ConfigError
from treadle.data.batch import Batch
from treadle.kernels.attention import AttentionRule
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Context


@dataclass(frozen=True)
class Looked:
    """Queries, keys and values of a layer, rotated and normed as its attention gets them."""

    q: Float[Tensor, "N H D"]
    k: Float[Tensor, "N G D"]
    v: Float[Tensor, "N G E"]
    rule: AttentionRule


@dataclass(frozen=True)
class Seen:
    """What one pass gave."""

    hidden: Float[Tensor, "N D"]
    """Last hidden states, which meet the head."""
    states: dict[int, Float[Tensor, "N D"]]
    """Output of the blocks that were watched."""
    attention: dict[int, Looked]


@dataclass(eq=False)
class Watching(Context):
    """A context that remembers what some layers attend with."""

    inner: Context
    layers: Collection[int]
    seen: dict[int, Looked] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        if layer in self.layers:
            self.seen[layer] = Looked(q, k, v, rule)
        return self.inner.attend(layer, q, k, v, rule)


def observe(
    model: DecoderModel,
    batch: Batch,
    *,
    states: Collection[int] = (),
    attention: Collection[int] = (),
) -> Seen:
    """Run the model on a batch and keep what the named layers put out or attend with.

    Raises:
        ConfigError: the model has no such layer, or one that does not attend.
    """
    for layer in (*states, *attention):
        check_layer(model, layer)
    inner = batch.context()
    watching = Watching(inner.positions, inner.length, inner, attention)
    outputs: dict[int, Tensor] = {}
    with _watched(model, states, outputs):
        hidden = model(batch.tokens, watching if attention else inner)
    if missing := set(attention) - set(watching.seen):
        raise ConfigError(f"layer {min(missing)} does not attend: watch another one")
    return Seen(hidden, outputs, watching.seen)


def check_layer(model: DecoderModel, layer: int) -> None:
    """Raise ConfigError where the model has no such layer."""
    count = len(model.blocks)
    if not 0 <= layer < count:
        raise ConfigError(f"layer {layer} does not exist: the model has layers 0 to {count - 1}")


@contextmanager
def _watched(
    model: DecoderModel, layers: Collection[int], outputs: dict[int, Tensor]
) -> Iterator[None]:
    hooks = [model.blocks[layer].register_forward_hook(_keeper(outputs, layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _keeper(outputs: dict[int, Tensor], layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs[layer] = output

    return keep
