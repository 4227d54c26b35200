"""Adapters: small trained layers beside a frozen model, and what can be done with any of them.

    y = f(x; W, theta),     W frozen, theta trained,     f(x; W, theta_0) = W x

An adapter is a transform that wraps each of its targets into an `AdapterLayer`. To merge, to
switch off, to freeze and to save work on those layers alone, so that a new kind of adapter is
one new file: its config, its layer, its formula.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from treadle.core.errors import ConfigError
from treadle.models.transform import M, Transform, match_modules, replace_module
from treadle.nn.linear import LinearLike, bias_of, weight_of


class Adapter(Transform):
    """A shape: wraps the matched layers and freezes everything else."""

    targets: tuple[str, ...]
    """Patterns of module names, as `match_modules` reads them."""
    peft_type: ClassVar[str]
    """Its name in PEFT's adapter_config.json."""
    module_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of that file that choose modules, besides its targets."""
    peft_flags: ClassVar[tuple[str, ...]] = ()
    """Fields of that file that are true for this variant of `peft_type`."""
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, LinearLike, nn.Embedding)
    """What its targets are looked for among."""

    def __call__(self, model: M) -> M:
        """The model with each target wrapped.

        Raises:
            ConfigError: a target matches nothing, or a layer that has an adapter already.
        """
        owner = type(self).__name__
        found = match_modules(model, self.targets, self.kinds, owner=owner)
        for name in adapted(model):
            if name in found or f"{name}.base" in found:
                raise ConfigError(
                    f"{owner}: `{name}` has an adapter already; merge it first, or take "
                    "other targets"
                )
        layers = {name: self.wrap(name, base) for name, base in found.items()}
        self.share(tuple(layers.values()))
        for name, layer in layers.items():
            replace_module(model, name, layer)
        freeze(model)
        return model

    def share(self, layers: Sequence[AdapterLayer]) -> None:
        """Tie what the new layers have in common; as a rule nothing."""
        return

    @abstractmethod
    def wrap(self, name: str, base: nn.Module) -> AdapterLayer:
        """The layer in the place of `base`, which is called `name` in messages.

        Raises:
            ConfigError: this adapter does not go on this layer.
        """

    @abstractmethod
    def to_peft(self) -> dict[str, Any]:
        """The fields of PEFT's adapter_config.json that say how the layers compute."""

    @classmethod
    @abstractmethod
    def from_peft(cls, fields: Mapping[str, Any], targets: tuple[str, ...]) -> Self:
        """The adapter that a PEFT config describes, on these targets.

        Raises:
            ConfigError: the config asks for what treadle does not have.
        """


class AdapterLayer(nn.Module, ABC):
    """A frozen layer `base`, and what is learned beside it.

    `base` gives a fresh tensor at each call; an adapter may write into it.
    """

    peft_fields: tuple[str, ...] = ()
    """Those of the adapter's `module_fields` that choose this layer."""
    peft_parameters: tuple[str, ...] = ()
    """Tensors of the base that PEFT names one by one, where it does not name the layer."""

    def __init__(self, base: nn.Module, config: Adapter) -> None:
        super().__init__()
        self.base, self.config, self.enabled = base, config, True

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        compute: Any = self.adapted if self.enabled else self.base
        y: Tensor = compute(x, *rest)  # a mixer also takes its context
        return y

    @abstractmethod
    def adapted(self, x: Tensor) -> Tensor:
        """The output with the adapter."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """A plain layer with weights of its own that computes the same; fp32 arithmetic, then
        rounded to the dtype of the base."""

    @abstractmethod
    def peft_tensors(self) -> dict[str, Tensor]:
        """Views of the trained weights under PEFT's names; to load is to copy into them."""

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters beside the base."""
        return (p for name, p in self.named_parameters() if not name.startswith("base."))


class Added(nn.Module):
    """A mix-in of modules that a transform adds beside the model's own layers, to be trained."""


class LinearAdapter(AdapterLayer, LinearLike):
    """An adapter on a linear layer, plain, quantised or of any other make."""

    base: nn.Linear | LinearLike

    def __init__(self, base: nn.Linear | LinearLike, config: Adapter) -> None:
        super().__init__(base, config)
        self.in_features, self.out_features = base.in_features, base.out_features

    @abstractmethod
    def adapted_weight(self) -> Float[Tensor, "out in"]:
        """The dense weight with the adapter in it, in the dtype of the base."""

    @abstractmethod
    def adapted_bias(self) -> Float[Tensor, " out"] | None:
        """The bias with the adapter in it."""

    def effective_weight(self) -> Float[Tensor, "out in"]:
        return self.adapted_weight() if self.enabled else weight_of(self.base)

    def effective_bias(self) -> Float[Tensor, " out"] | None:
        return self.adapted_bias() if self.enabled else bias_of(self.base)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer, dense even where the base is quantised."""
        weight, bias = self.adapted_weight(), self.adapted_bias()
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.clone(), requires_grad=False)
        return plain.train(self.training)


class EmbeddingAdapter(AdapterLayer):
    """An adapter on a table of embeddings."""

    base: nn.Embedding

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        """The whole table."""
        return self.adapted_table() if self.enabled else self.base.weight

    @abstractmethod
    def adapted(self, x: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """The rows of these tokens, with the adapter."""

    @abstractmethod
    def adapted_table(self) -> Float[Tensor, "V D"]:
        """The whole table with the adapter in it, in the dtype of the base."""

    @torch.no_grad()
    def merged(self) -> nn.Embedding:
        rows, width = self.base.weight.shape
        plain = nn.Embedding(rows, width, device="meta")
        plain.weight = nn.Parameter(self.adapted_table(), requires_grad=False)
        return plain.train(self.training)


def adapted(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdapterLayer)}


def freeze(model: nn.Module) -> None:
    """Let nothing train but the adapters, and what transforms have added."""
    trained = {id(p) for layer in adapted(model).values() for p in layer.trained()}
    trained |= {id(p) for m in model.modules() if isinstance(m, Added) for p in m.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


@contextmanager
def disabled(model: M) -> Iterator[M]:
    """The base model, while it lasts: the reference policy of DPO and GRPO at no memory.

    Raises:
        ConfigError: the model has no adapters: it would be compared with itself.
    """
    layers = list(adapted(model).values())
    if not layers:
        raise ConfigError(
            "the model has no adapters to switch off; give it one, or keep a frozen copy of the "
            "model as the reference"
        )
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def merge(model: M) -> M:
    """Fold every adapter into its layer, in place: a plain model again. Without adapters, as is.

    Each folded layer gets a weight of its own, and its base is freed unless someone holds it.

    Raises:
        ConfigError: a folded weight is also used by a layer without the adapter.
    """
    _refuse_shared(model)
    for name in list(adapted(model)):
        layer = model.get_submodule(name)
        assert isinstance(layer, AdapterLayer)
        replace_module(model, name, layer.merged())
    return model


def unmerge(model: M, layers: Mapping[str, AdapterLayer]) -> M:
    """Put back the adapter layers, as `adapted(model)` gave them before `merge(model)`.

    The base comes back bit for bit: it is not computed back but was kept by `layers`.
    """
    for name, layer in layers.items():
        replace_module(model, name, layer)
    return model


def remove(model: M) -> M:
    """Take every adapter off, in place: the base as it was."""
    for name, layer in adapted(model).items():
        replace_module(model, name, layer.base)
    return model


@contextmanager
def merged(model: M) -> Iterator[M]:
    """The model without the adapters' extra products, for a phase of generation.

    Costs a second copy of the adapted weights while it lasts.
    """
    layers = adapted(model)
    merge(model)
    try:
        yield model
    finally:
        unmerge(model, layers)


def _refuse_shared(model: nn.Module) -> None:
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    for name, layer in adapted(model).items():
        for parameter in layer.base.parameters(recurse=False):
            others = [n for n in users[id(parameter)] if n != f"{name}.base"]
            if others:
                raise ConfigError(
                    f"cannot merge the adapter of `{name}`: its weight is also that of "
                    f"`{others[0].removesuffix('.base')}`; save the adapter by itself, or adapt a "
                    "model whose head is not tied"
                )


def device_of(module: nn.Module) -> torch.device:
    """Where a layer's weights are, packed or not."""
    return next(iter((*module.parameters(), *module.buffers()))).device
