"""Many adapters on one model: loaded and unloaded while it runs, at most so many in memory.

Every request names its adapter. Those in use have a slot in the layers' stacked factors; to go
from one to another is another number in the pass. Who has not been used for longest gives up its
slot where one is missing, and is read from its folder again when it is asked for.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import TreadleError, did_you_mean
from treadle.core.files import StrPath
from treadle.inference.adapted_linear import AdaptedLinear, Change, Route
from treadle.models.decoder import DecoderModel
from treadle.models.transform import replace_module
from treadle.nn.linear import LinearLike, bias_of
from treadle.peft.adalora import AdaLoRALinear
from treadle.peft.adapter import AdapterLayer, adapted, remove
from treadle.peft.dora import DoRALinear
from treadle.peft.files import CONFIG, WEIGHTS, load_adapter
from treadle.peft.ia3 import IA3Linear
from treadle.peft.lora import LoRALinear

CARD = Card(
    id="inf.lora",
    paper="Chen et al. 2023, Punica, arXiv:2310.18547; Sheng et al. 2023, arXiv:2311.03285",
    summary="Many adapters on one base in one batch: LoRA, DoRA, AdaLoRA, (IA)^3; hot swap.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' --adapter adapters/a",
    oracle="tests/inference/test_inference_adapters.py::test_mixed_batch_matches_peft",
)


class CannotShareError(TreadleError):
    """An adapter that needs a model of its own."""


@dataclass
class _Known:
    folder: Path
    mark: bytes
    stamp: tuple[int, ...]


class Adapters:
    """Adapters by name, on the linear layers of `model`, at most `slots` of them in memory."""

    def __init__(self, model: DecoderModel, slots: int) -> None:
        self.model, self.slots, self.route = model, slots, Route()
        self.device = model.embedding.weight.device
        shared: dict[int, Tensor] = {id(b): b for b in model.buffers()}
        for p in model.parameters():  # of its own: to read an adapter freezes what it is read onto
            shared[id(p)] = nn.Parameter(p.detach(), requires_grad=False)
        self._skeleton = copy.deepcopy(model, shared)
        """The base's layers over the same weights: adapters are read onto it and taken off."""
        self._layers: dict[str, AdaptedLinear] = {}
        self._known: dict[str, _Known] = {}
        self._used: OrderedDict[str, int] = OrderedDict()
        """Those in memory with their slots, the least recently used first."""
        self._free: list[int] = []
        self._size = 1
        """Slots that the layers have room for; slot 0 is no adapter."""

    @property
    def plain(self) -> DecoderModel:
        """The model over the same weights, without adapters; not to be changed."""
        return self._skeleton

    @property
    def names(self) -> tuple[str, ...]:
        """All that a request may name."""
        return tuple(self._known)

    @property
    def resident(self) -> tuple[str, ...]:
        """Those in memory, the least recently used first."""
        return tuple(self._used)

    @property
    def nbytes(self) -> int:
        """Memory of all that are resident."""
        return sum(layer.nbytes for layer in self._layers.values())

    def load(self, name: str, folder: StrPath) -> None:
        """Offer a PEFT folder under a name.

        Raises:
            CannotShareError: the adapter is of a kind that cannot share a batch.
            TreadleError: the name is taken, or weights are not finite.
            FileFormatError: a broken folder, or one for another base.
            ConfigError: a kind of adapter, or a setting of it, that treadle does not have.
        """
        if name in self._known:
            raise TreadleError(f"an adapter `{name}` is loaded already; unload it first")
        folder = Path(folder)
        changes = self._read(folder)
        self._known[name] = _Known(folder, _digest(folder), _stamp(folder))
        if len(self._used) < self.slots:
            self._place(name, changes, set())

    def unload(self, name: str) -> None:
        """Forget an adapter; no sequence that names it may be under way."""
        self._check(name)
        del self._known[name]
        if name in self._used:
            self._free.append(self._used.pop(name))
        if not self._used:
            for path, layer in self._layers.items():
                replace_module(self.model, path, layer.base)
            self._layers, self._free, self._size = {}, [], 1

    def mark(self, name: str | None) -> bytes:
        """Names the weights of an adapter: keys and values under equal marks are equal."""
        if name is None:
            return b""
        self._check(name)
        return self._known[name].mark

    def bring(self, names: set[str]) -> bool:
        """Get all of these into memory; False if they are more than there are slots.

        Raises:
            TreadleError: one of the folders is gone, or has changed since it was loaded.
        """
        if len(names) > self.slots:
            return False
        for name in sorted(names & self._used.keys()):
            self._used.move_to_end(name)
        for name in sorted(names - self._used.keys()):
            self._check(name)
            known = self._known[name]
            if _stamp(known.folder) != known.stamp:
                raise TreadleError(
                    f"{known.folder} has changed since adapter `{name}` was loaded: unload it and "
                    "load it again"
                )
            self._place(name, self._read(known.folder), names)
        return True

    @contextmanager
    def routed(self, segments: Sequence[tuple[str | None, int]]) -> Iterator[None]:
        """While it lasts the model's tokens fall into these segments: adapter and count."""
        slots = [(0 if name is None else self._used[name], count) for name, count in segments]
        if any(slot for slot, _ in slots):
            self.route.set(slots, self.device)
        try:
            yield
        finally:
            self.route.clear()

    def _check(self, name: str) -> None:
        if name not in self._known:
            raise TreadleError(f"no adapter `{name}`{did_you_mean(name, self._known)}")

    @torch.inference_mode()
    def _place(self, name: str, changes: dict[str, Change], kept: set[str]) -> None:
        """Give it a slot: a free one, a new one, or that of the least recently used."""
        if self._free:
            slot = self._free.pop()
        elif len(self._used) < self.slots:
            slot, self._size = self._size, self._size + 1
        else:
            slot = self._used.pop(next(n for n in self._used if n not in kept))
        for path in changes:
            if path not in self._layers:
                base = self.model.get_submodule(path)
                assert isinstance(base, nn.Linear | LinearLike)
                self._layers[path] = AdaptedLinear(base, self.route)
                replace_module(self.model, path, self._layers[path])
        for path, layer in self._layers.items():
            layer.put(slot, changes.get(path, Change()), self._size)
        self._used[name] = slot

    @torch.inference_mode()
    def _read(self, folder: Path) -> dict[str, Change]:
        """What a folder's adapter does to each of its layers."""
        with torch.random.fork_rng(devices=()):  # layers draw fresh weights before they get theirs
            load_adapter(self._skeleton, folder)
        layers = adapted(self._skeleton)
        remove(self._skeleton)
        dtype = self.model.embedding.weight.dtype
        return {
            path: Change(**{n: t.to(dtype) for n, t in _parts(layer, path, folder).items()})
            for path, layer in layers.items()
        }


def _parts(layer: AdapterLayer, path: str, folder: Path) -> dict[str, Tensor]:
    """The layer's function in the terms of a `Change`."""
    parts: dict[str, Tensor]
    match layer:
        case LoRALinear():
            parts = {"A": layer.A, "B": layer.scale * layer.B.T}
        case AdaLoRALinear():
            parts = {"A": layer.Q, "B": layer.scale * (layer.P * layer.e).T}
        case DoRALinear():
            g = layer.m / layer.norm()
            parts = {"A": layer.A, "B": layer.scale * layer.B.T, "outputs": g}
            if (bias := bias_of(layer.base)) is not None:
                parts["shift"] = (1 - g) * bias
        case IA3Linear():
            parts = {"inputs" if layer.inputs else "outputs": layer.factor}
        case _:
            raise CannotShareError(
                f"{folder}: {type(layer.config).__name__} on `{path}` cannot share a batch with "
                "other adapters; LoRA, AdaLoRA, DoRA and (IA)^3 on linear layers can. Merge it "
                "(`treadle merge`) and serve it as a model of its own"
            )
    if not all(bool(part.isfinite().all()) for part in parts.values()):
        raise TreadleError(f"{folder}: the weights for `{path}` are not finite; train it again")
    return parts


def _digest(folder: Path) -> bytes:
    hasher = blake2b(digest_size=16)
    for name in (CONFIG, WEIGHTS):
        hasher.update((folder / name).read_bytes())
    return hasher.digest()


def _stamp(folder: Path) -> tuple[int, ...]:
    """Changes when the folder's files do."""
    try:
        found = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError as error:
        raise TreadleError(f"{folder}: the adapter cannot be read any more: {error}") from None
    return tuple(number for stat in found for number in (stat.st_size, stat.st_mtime_ns))
