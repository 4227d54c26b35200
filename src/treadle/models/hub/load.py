"""Loading a model from a Hugging Face folder or a GGUF file.

The config gives the decoder, the decoder the table of tensors that must be there. Only when names
and shapes fit is a weight read, one at a time, into a model built without memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.files import StrPath
from treadle.kernels.blocks import block_format, dequantise
from treadle.models.decoder import Decoder, DecoderModel, TiedHead
from treadle.models.families import FAMILIES, family_of_gguf, family_of_hf
from treadle.models.family import Family
from treadle.models.hub.fill import (
    Cut,
    Part,
    Shape,
    applicable,
    check,
    expected_shapes,
    fill,
    ignore,
)
from treadle.models.hub.gguf import GGUFFile
from treadle.models.hub.gguf_header import ROPE_DIVISORS, GgufHeader
from treadle.models.hub.safetensors import SafetensorsFolder, open_safetensors
from treadle.models.outline import outline
from treadle.models.weights import Rule

CARD = Card(
    id="model.hub",
    paper="safetensors and GGUF file formats",
    summary="Loads and saves Hugging Face folders and GGUF files, both ways.",
    recipe="treadle export smollm2-135m-instruct --to smollm2.gguf --format Q4_K",
    oracle="tests/models/test_models_hub.py::test_transformers_reads_what_treadle_wrote",
)


CutModel = Callable[[DecoderModel], Mapping[str, Cut]]
"""Cuts a model without values in place; says which part of each parameter it has kept."""


@dataclass(frozen=True)
class Loaded:
    """A model and where it came from."""

    model: DecoderModel
    family: str
    """`llama`, `qwen3`; for GGUF the architecture that the file names."""
    source: Path
    """The folder or file."""
    metadata: Mapping[str, Any]
    """config.json, or the key-value pairs of the GGUF file with its tokenizer."""


def load_model(
    path: StrPath,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    leave: Sequence[str] = (),
    cut: CutModel | None = None,
) -> Loaded:
    """Load a Hugging Face folder (config.json, *.safetensors) or a .gguf file.

    Args:
        dtype: of the weights; None keeps that of a folder's files, and is float32 for GGUF.
        leave: patterns of parameters that are not read: they stay on the meta device.
        cut: cuts the model before its weights are read, and says which part of each to read;
            None: it stays whole.

    Raises:
        TreadleError: nothing to load at `path`, or only a pickle.
        FileFormatError: the file is broken, or its tensors do not fit its config.
        ConfigError: an architecture that treadle does not have; names those it has.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, dtype, device, leave, cut)
    if path.is_file():
        return _load_gguf(path, dtype, device, leave, cut)
    raise TreadleError(f"{path}: no such file or folder")


def read_decoder(path: StrPath) -> Decoder:
    """The shape of a model on disk; none of its weights is read.

    Raises:
        TreadleError, FileFormatError, ConfigError: as `load_model`.
    """
    path = Path(path)
    if path.is_dir():
        config = read_config(path)
        return family_of_hf(config).huggingface.decoder(config)
    if not path.is_file():
        raise TreadleError(f"{path}: no such file or folder")
    header = read_header(GGUFFile.open(path))
    return family_of_gguf(header.architecture).read(header)


def _load_folder(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    leave: Sequence[str],
    cut: CutModel | None,
) -> Loaded:
    config = read_config(folder)
    family = family_of_hf(config)
    spelling = family.huggingface
    decoder = spelling.decoder(config)
    tensors = open_safetensors(folder)
    rules = spelling.names(decoder)
    stored = ignore(tuple(tensors), spelling.ignored)
    known = {n for r in rules for n in r.theirs}
    # A model saved without its head leaves off the front of all names.
    bare = known.isdisjoint(stored) and any(spelling.prefix + n in known for n in stored)
    names = {(spelling.prefix if bare else "") + n: n for n in stored}
    if isinstance(decoder.head, TiedHead):
        names = _without_tied_copy(names, tensors, rules)
    model = _filled(
        decoder,
        rules,
        {n: tensors.shape(name) for n, name in names.items()},
        lambda name: tensors[names[name]],
        dtype,
        device,
        leave,
        cut,
        None,
        where=f"{folder}: not a checkpoint of {family.name} as its config.json says"
        + _likeness(stored, family, decoder),
    )
    return Loaded(model, family.name, folder, config)


def _likeness(names: Iterable[str], family: Family, decoder: Decoder) -> str:
    """The family that has tensors of these names, if it is another one."""
    for other in FAMILIES:
        known = {n for r in other.huggingface.names(decoder) for n in r.theirs}
        if known.issuperset(names):
            return "" if other.name == family.name else f", rather of {other.name}"
    return ""


def _without_tied_copy(
    names: Mapping[str, str], tensors: SafetensorsFolder, rules: Sequence[Rule]
) -> dict[str, str]:
    """Some tools save the one weight of embedding and head twice; two different ones are wrong."""
    embedding = next(r.theirs[0] for r in rules if r.ours == ("embedding.weight",))
    head = next((r.theirs[0] for r in rules if r.ours == ("head.weight",)), "")
    if head not in names or embedding not in names:
        return dict(names)
    if not torch.equal(tensors[names[head]], tensors[names[embedding]]):
        raise FileFormatError(
            f"{tensors.path}: `{head}` differs from `{embedding}`, but config.json ties them; "
            "set tie_word_embeddings to false"
        )
    return {n: name for n, name in names.items() if n != head}


def _load_gguf(
    file: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    leave: Sequence[str],
    cut: CutModel | None,
) -> Loaded:
    gguf = GGUFFile.open(file)
    header = read_header(gguf)
    spelling = family_of_gguf(header.architecture)
    decoder = spelling.read(header)
    model = _filled(
        decoder,
        spelling.rules(decoder),
        {n: s for n, s in header.shapes.items() if n != ROPE_DIVISORS},
        gguf.read,
        dtype,
        device,
        leave,
        cut,
        partial(_part, gguf),
        where=f"{file}: not a model of {header.architecture} as its metadata say",
    )
    return Loaded(model, header.architecture, file, gguf.metadata)


def _filled(
    decoder: Decoder,
    rules: Sequence[Rule],
    found: Mapping[str, Shape],
    read: Callable[[str], Tensor],
    dtype: torch.dtype | None,
    device: torch.device | str,
    leave: Sequence[str],
    cut: CutModel | None,
    part: Part | None,
    *,
    where: str,
) -> DecoderModel:
    model = outline(decoder)
    rules = applicable(model, rules)
    check(expected_shapes(model, rules), found, where=where)
    wanted = [r for r in rules if not any(fnmatchcase(n, p) for n in r.ours for p in leave)]
    kept = {n: c for n, c in cut(model).items() if n in _names(wanted)} if cut else {}
    fill(model, wanted, read, dtype=dtype, device=device, cuts=kept, part=part)
    return model.eval()


def _names(rules: Sequence[Rule]) -> set[str]:
    return {name for rule in rules for name in rule.ours}


def _part(gguf: GGUFFile, rule: Rule, index: int, cut: Cut) -> Tensor:
    """Part of a parameter of a GGUF file; of a matrix, no other block is decoded.

    Maps of GGUF move rows, so they serve bytes as well as numbers.
    """
    first, *_ = infos = [gguf.tensors[name] for name in rule.theirs]
    start, stop = cut.own.start, cut.own.stop
    if len(first.shape) != 2 or len({info.format for info in infos}) > 1:
        numbers = rule.map.read(tuple(gguf.read(name) for name in rule.theirs))[index]
        return numbers.narrow(cut.dim, start, stop - start)
    raw = rule.map.read(tuple(gguf.raw(name) for name in rule.theirs))[index]
    format = block_format(first.format)
    if cut.dim == 0:
        return dequantise(raw[start:stop], format)
    block, last = start // format.block_size, -(-stop // format.block_size)
    part = dequantise(raw[:, block * format.block_bytes : last * format.block_bytes], format)
    return part[:, start - block * format.block_size :][:, : stop - start]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder.

    Raises:
        TreadleError: there is none, or the checkpoint is quantised in a way treadle does not read.
        FileFormatError: it is not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise TreadleError(f"{folder}: no config.json; name a folder that holds a model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise FileFormatError(f"{file}: expected an object, found {type(config).__name__}")
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, dict) else "?"
        raise TreadleError(
            f"{folder}: the weights are stored in {method}'s own format, which treadle does not "
            "read; take the unquantised model, or a GGUF file"
        )
    return config


def read_header(gguf: GGUFFile) -> GgufHeader:
    """What the file says of its model."""
    architecture = str(gguf.metadata.get("general.architecture", ""))
    front = f"{architecture}."
    return GgufHeader(
        architecture,
        {k.removeprefix(front): v for k, v in gguf.metadata.items() if k.startswith(front)},
        {name: info.shape for name, info in gguf.tensors.items()},
        gguf.read(ROPE_DIVISORS) if ROPE_DIVISORS in gguf.tensors else None,
    )
