"""Loading a model from a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import FileFormatError, TreadleError
from treadle.models.decoder import DecoderModel
from treadle.models.families import family_of_gguf, family_of_hf
from treadle.models.hub.fill import applicable, check, expected_shapes, fill, ignore
from treadle.models.hub.gguf_header import GgufHeader

CARD = Card(
    id="model.hub",
    paper="safetensors and GGUF file formats",
    summary="Loads and saves Hugging Face folders and GGUF files, both ways.",
    recipe="treadle export runs/quickstart --format gguf",
    oracle="tests/models/test_models_hub.py::test_transformers_reads_what_treadle_wrote",
)


@dataclass(frozen=True)
class Loaded:
    """A model and where it came from."""

    model: DecoderModel
    family: str
    source: Path
    """The folder or file."""
    metadata: Mapping[str, Any]
    """config.json, or the key-value pairs of the GGUF file with its tokenizer."""


def load_model(path: str | Path, *, dtype: torch.dtype | None = None) -> Loaded:
    """Load a Hugging Face folder (config.json, *.safetensors) or a .gguf file.

    Args:
        dtype: of the weights; None keeps the file's (float32 for quantised GGUF).

    Raises:
        TreadleError: nothing to load at `path`, or only a pickle.
        FileFormatError: the file is broken, or its tensors do not fit its config.
        ConfigError: an architecture that treadle does not have; names those it has.
    """
    path = Path(path)
    if path.is_dir():
        return _load_hf(path, dtype)
    if path.suffix == ".gguf" and path.is_file():
        return _load_gguf(path, dtype)
    raise TreadleError(f"{path}: not a folder with config.json, and not a .gguf file")


def _load_hf(folder: Path, dtype: torch.dtype | None) -> Loaded:
    config = read_hf_config(folder)
    family = family_of_hf(config)
    decoder = family.huggingface.read(config)
    with torch.device("meta"):
        model = decoder.build()
    files = _weight_files(folder)
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                found[name] = (file, tuple(handle.get_slice(name).get_shape()))
    rules = applicable(model, family.huggingface.rules(decoder))
    kept = ignore(tuple(found), family.huggingface.ignored)
    check(
        expected_shapes(model, rules),
        {n: found[n][1] for n in kept},
        source=str(folder),
        family=family.name,
    )

    def get(name: str) -> Tensor:
        with safe_open(found[name][0], "pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor

    fill(model, rules, get, dtype)
    return Loaded(model.eval(), family.name, folder, config)


def _load_gguf(file: Path, dtype: torch.dtype | None) -> Loaded:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    metadata = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    tensors = {t.name: t for t in reader.tensors}

    def get(name: str) -> Tensor:
        tensor = tensors[name]
        dense = dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(dense.copy()).reshape(tuple(map(int, reversed(tensor.shape))))

    shapes = {name: tuple(map(int, reversed(t.shape))) for name, t in tensors.items()}
    architecture = str(metadata.get("general.architecture", ""))
    gguf = family_of_gguf(architecture)
    front = f"{architecture}."
    divisors = get("rope_freqs.weight") if "rope_freqs.weight" in tensors else None
    header = GgufHeader(
        architecture,
        {k.removeprefix(front): v for k, v in metadata.items() if k.startswith(front)},
        shapes,
        divisors,
    )
    decoder = gguf.read(header)
    with torch.device("meta"):
        model = decoder.build()
    rules = applicable(model, gguf.rules(decoder))
    kept = ignore(tuple(shapes), ("rope_freqs.weight",))
    check(
        expected_shapes(model, rules),
        {n: shapes[n] for n in kept},
        source=str(file),
        family=architecture,
    )
    fill(model, rules, get, dtype)
    return Loaded(model.eval(), architecture, file, metadata)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise TreadleError(f"{folder}: no config.json; name a folder that holds a model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise FileFormatError(f"{file}: expected an object, found {type(config).__name__}")
    return config


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise TreadleError(f"{folder}: no *.safetensors")
    return files
