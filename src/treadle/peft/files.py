"""Adapter folders that PEFT reads, and reading those that PEFT wrote.

    adapter_config.json             kind, rank, targets by the names of Hugging Face
    adapter_model.safetensors       base_model.model.<module of Hugging Face>.lora_A.weight ...

The names come from the weight table of the model's family. A decoder that no family expresses
keeps its own names: the folder then serves treadle alone. The header of the weights also holds
a few numbers of the base, so that an adapter never goes unnoticed onto another model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from treadle.core import registry
from treadle.core.errors import ConfigError, FileFormatError, TreadleError, did_you_mean
from treadle.core.files import StrPath, atomic_directory, write_json
from treadle.models.decoder import DecoderModel
from treadle.models.transform import replace_module
from treadle.nn.ffn.moe import Experts
from treadle.nn.linear import weight_of
from treadle.peft.adapter import Adapter, AdapterLayer, adapted
from treadle.peft.names import Names, names_of, patterns, select

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_TABLE = "base_layer.weight"
"""PEFT saves the table of embeddings beside an adapter of it, though it is frozen."""
PROBE_KEY, PROBE_SIZE = "treadle_base", 64
SAME_BASE = 0.5
"""Relative difference up to which a base is the same: rounded, quantised, or tuned a little
further. Weights of another training differ by about 1.4."""


def save_adapter(model: DecoderModel, folder: StrPath, *, base: str = "") -> None:
    """Write the model's adapters, and nothing of its base, as a PEFT folder.

    Args:
        base: name or path of the base model, for whoever loads the folder.

    Raises:
        ConfigError: no adapters, several configurations, or layers that Hugging Face fuses.
        TreadleError: the disk is full.
    """
    layers = adapted(model)
    if not layers:
        raise ConfigError("the model has no adapters to save")
    (first, layer), *_ = layers.items()
    config, fields = layer.config, layer.config.to_peft()
    for name, other in layers.items():
        if type(other.config) is not type(config) or other.config.to_peft() != fields:
            raise ConfigError(
                f"`{first}` and `{name}` have adapters of different configurations; one folder "
                "holds one: merge the other first"
            )
    names = names_of(model)
    theirs = {name: names.theirs(name) for name in layers}
    whole = [theirs[name] for name, layer in layers.items() if not layer.peft_parameters]
    stacked = [
        f"{theirs[name]}.{leaf}" for name, layer in layers.items() for leaf in layer.peft_parameters
    ]
    tensors = {
        f"{PREFIX}{theirs[name]}.{leaf}": tensor.detach().cpu().contiguous()
        for name, layer in layers.items()
        for leaf, tensor in layer.peft_tensors().items()
    }
    settings = {
        "peft_type": config.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "target_modules": patterns(whole, names.ours_by_theirs),
        "fan_in_fan_out": any(name in names.transposed for name in layers),
        "inference_mode": True,
        **fields,
    }
    if stacked:
        settings["target_parameters"] = stacked
    for field in config.module_fields:
        chosen = [theirs[name] for name, layer in layers.items() if field in layer.peft_fields]
        settings[field] = patterns(chosen, names.ours_by_theirs)
    probe = {"module": theirs[first], "values": _probe(layer).tolist()}
    header = {"format": "pt", PROBE_KEY: json.dumps(probe)}
    with atomic_directory(folder, needed=sum(t.nbytes for t in tensors.values())) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata=header)
        write_json(temporary / CONFIG, settings)


def load_adapter(model: DecoderModel, folder: StrPath) -> DecoderModel:
    """Put the adapters of a PEFT folder on a model, in place; only they will train.

    Raises:
        FileFormatError: a broken folder, or one for another base.
        ConfigError: a kind of adapter, or a setting of it, that treadle does not have.
        TreadleError: no such folder, or only a pickle.
    """
    folder = Path(folder)
    fields = read_config(folder)
    kind = _kind(fields)
    tensors, probe = read_weights(folder)
    names = names_of(model)
    parts = _sort(tensors, names, folder, str(fields.get("base_model_name_or_path")))
    _check_targets(fields, [names.theirs(name) for name in parts], names, folder)
    for field in kind.module_fields:
        theirs = select(fields.get(field) or [], names.ours_by_theirs)
        fields[field] = patterns(
            [names.ours_by_theirs[name] for name in theirs], names.theirs_by_ours
        )
    config = kind.from_peft(fields, tuple(patterns(parts, names.theirs_by_ours)))
    there, trained = adapted(model), [p for p in model.parameters() if p.requires_grad]
    config(model)
    try:
        layers = {name: layer for name, layer in adapted(model).items() if name in parts}
        for name, layer in layers.items():
            table = parts[name].pop(BASE_TABLE, None)
            _fill(layer, parts[name], f"{folder}: {names.theirs(name)}")
            if table is not None:
                _check_base(layer, sample(table), folder)
        if probe:
            probed = layers.get(names.ours_by_theirs.get(str(probe.get("module")), ""))
            if probed is None:
                raise FileFormatError(f"{folder / WEIGHTS}: broken: its header names no layer here")
            _check_base(probed, torch.tensor(probe["values"]), folder)
    except BaseException:
        for name in adapted(model).keys() - there.keys():
            replace_module(model, name, adapted(model)[name].base)
        for parameter in trained:
            parameter.requires_grad_()
        raise
    return model


def _probe(layer: AdapterLayer) -> Float[Tensor, " n"]:
    """A few numbers of the base of an adapter."""
    match layer.base:
        case nn.Embedding() as table:
            return sample(table.weight)
        case Experts() as experts:
            return sample(experts.gate)
        case base:
            return sample(weight_of(base))


def sample(weight: Tensor) -> Float[Tensor, " n"]:
    """Evenly spaced numbers of a weight."""
    places = torch.arange(PROBE_SIZE) * (weight.numel() - 1) // (PROBE_SIZE - 1)
    return weight.detach().flatten().cpu()[places].float()


def _check_base(layer: AdapterLayer, theirs: Float[Tensor, " n"], folder: Path) -> None:
    difference = float((_probe(layer) - theirs).norm() / theirs.norm().clamp(min=1e-12))
    if not difference <= SAME_BASE:
        raise FileFormatError(
            f"{folder}: this adapter was trained on another base: the weights here differ from "
            f"it by {difference:.0%}; load the base that {CONFIG} names"
        )


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise TreadleError(f"{folder}: no {CONFIG}; name a folder that holds an adapter")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise FileFormatError(f"{file}: expected an object, found {type(fields).__name__}")
    return fields


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    file = folder / WEIGHTS
    if not file.is_file():
        raise TreadleError(f"{folder}: no {WEIGHTS}; a pickle (adapter_model.bin) is never loaded")
    try:
        with safe_open(file, "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            header = handle.metadata() or {}
        probe = json.loads(header[PROBE_KEY]) if PROBE_KEY in header else None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{file}: broken: {error}; fetch or save it again") from None
    if probe is not None and not _is_probe(probe):
        raise FileFormatError(f"{file}: broken: its header is not of treadle; save it again")
    return tensors, probe


def _is_probe(probe: object) -> bool:
    values = probe.get("values") if isinstance(probe, dict) else None
    return (
        isinstance(values, list)
        and len(values) == PROBE_SIZE
        and all(isinstance(value, float) for value in values)
    )


def _kind(fields: Mapping[str, Any]) -> type[Adapter]:
    """The adapter that PEFT describes by these fields, wherever it is defined."""
    shape: Any = Adapter
    classes = [registry.resolve(name, shape) for name in registry.kinds_of(shape)]
    peft_type = str(fields.get("peft_type"))
    if peft_type not in (known := {c.peft_type for c in classes}):
        raise ConfigError(
            f"{CONFIG}: unknown peft_type {peft_type!r}{did_you_mean(peft_type, known)}"
        )
    found = [c for c in classes if c.peft_type == peft_type and all(map(fields.get, c.peft_flags))]
    return max(found, key=lambda c: len(c.peft_flags))


def _sort(
    tensors: Mapping[str, Tensor], names: Names, folder: Path, base: str
) -> dict[str, dict[str, Tensor]]:
    """Our module -> the tensors for it, by what is left of their names."""
    known = names.ours_by_theirs
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX).split(".")
        fronts = (".".join(path[:n]) for n in range(len(path) - 1, 0, -1))
        module = next((front for front in fronts if front in known), None)
        if module is None:
            strange.append(key)
        else:
            leaf = key.removeprefix(PREFIX)[len(module) + 1 :]
            parts.setdefault(known[module], {})[leaf] = tensor
    if strange or not parts:
        what = f"`{strange[0]}` has no place in this model" if strange else "it holds no tensors"
        raise FileFormatError(f"{folder}: {what}; the adapter is for the base {base}")
    return parts


def _check_targets(
    fields: Mapping[str, Any], present: Sequence[str], names: Names, folder: Path
) -> None:
    """The layers that the config chooses here must be those that the file holds."""
    targets = fields.get("target_modules")
    if not isinstance(targets, list) or fields.get("layers_to_transform"):
        return
    if excluded := fields.get("exclude_modules"):
        raise ConfigError(f"{folder}: exclude_modules={excluded!r} is not known to treadle")
    if missing := select(targets, names.ours_by_theirs) - set(present):
        raise FileFormatError(
            f"{folder}: holds no weights for {len(missing)} of the layers that its config chooses "
            f"here, such as `{min(missing)}`; the adapter is for the base "
            f"{fields.get('base_model_name_or_path')}"
        )


@torch.no_grad()
def _fill(layer: AdapterLayer, tensors: Mapping[str, Tensor], where: str) -> None:
    places = layer.peft_tensors()
    if set(places) != set(tensors):
        raise FileFormatError(f"{where} has {sorted(tensors)}, but needs {sorted(places)}")
    for leaf, place in places.items():
        if place.shape != tensors[leaf].shape:
            raise FileFormatError(
                f"{where}.{leaf} is {tuple(tensors[leaf].shape)}, but here it must be "
                f"{tuple(place.shape)}; the adapter is for another base"
            )
        place.copy_(tensors[leaf])
