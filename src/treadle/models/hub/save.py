"""Saving a model as a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from treadle.core.files import StrPath, write_json
from treadle.kernels.blocks import FORMATS, block_format
from treadle.models.decoder import DecoderModel
from treadle.models.families import family_for_gguf, family_for_hf
from treadle.models.hub.fill import applicable, require_plain, spill
from treadle.models.hub.gguf_header import ROPE_DIVISORS
from treadle.models.hub.gguf_values import Value
from treadle.models.hub.gguf_write import write_gguf
from treadle.models.hub.safetensors import save_safetensors

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SMALLER_BLOCKS = MappingProxyType({"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"})
"""What llama.cpp takes for rows that do not divide into blocks of 256 weights."""
ROUTER = ".ffn_gate_inp.weight"
"""Small, and what a rounding changes there is which experts a token passes."""
FILE_TYPES = MappingProxyType(
    {
        "F32": 0,
        "F16": 1,
        "Q4_0": 2,
        "Q4_1": 3,
        "Q8_0": 7,
        "Q5_0": 8,
        "Q5_1": 9,
        "Q4_K": 14,
        "Q5_K": 16,
        "Q6_K": 18,
        "BF16": 32,
    }
)
"""`general.file_type`: what most of the weights are stored as."""


def save_hf(
    model: DecoderModel,
    folder: StrPath,
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    fields: Mapping[str, Any] = MappingProxyType({}),
    max_shard_bytes: int = 5_000_000_000,
) -> str:
    """Write config.json and safetensors as transformers does; the tokenizer goes beside them.

    Args:
        dtype: of the stored weights; None keeps the model's.
        family: which family to write; None takes the first that expresses the model, and
            treadle's own, which transformers does not read, where none does.
        fields: more keys for config.json, such as `bos_token_id` and `eos_token_id`.

    Returns:
        The name of the family written.

    Raises:
        ConfigError: the family cannot express the model, or a transform is still in it.
        TreadleError: the disk is full.
    """
    require_plain(model)
    chosen = family_for_hf(model.config, family)
    spelling = chosen.huggingface
    rules = applicable(model, spelling.names(model.config))
    stored = dtype or model.embedding.weight.dtype
    config = {
        "model_type": spelling.model_type,
        # transformers 5 and 4, in this order
        "dtype": str(stored).removeprefix("torch."),
        "torch_dtype": str(stored).removeprefix("torch."),
        # Left out, transformers takes numbers from the family's first release.
        **dict.fromkeys(TOKENS),
        **fields,
        **spelling.config(model.config),
    }
    tensors = ((name, tensor.to(dtype or tensor.dtype)) for name, tensor in spill(model, rules))
    save_safetensors(folder, tensors, max_shard_bytes=max_shard_bytes)
    write_json(Path(folder) / "config.json", config)
    return chosen.name


def save_gguf(
    model: DecoderModel,
    path: StrPath,
    *,
    format: str = "Q8_0",
    embedding: str | None = None,
    head: str | None = None,
    packed: Mapping[str, Tensor] = MappingProxyType({}),
    metadata: Mapping[str, Value | list[Any]] = MappingProxyType({}),
    types: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Write one file that llama.cpp runs.

    As llama.cpp does, vectors stay float32, and rows that do not divide into a format's blocks
    get the next better format that fits.

    Args:
        format: of the matrices, such as `F16`, `Q8_0`, `Q4_K`.
        embedding: of the embedding; None means `format`, and Q6_K for less where it is the head
            as well.
        head: of a head of its own; None means `format`, and Q6_K for less.
        packed: parameters by name that are in `format` already, as bytes [rows, bytes a row].
        metadata: further keys, above all the tokenizer's (`tokenizer.ggml.*`); llama.cpp needs
            them.
        types: GGUF types of metadata that are not the usual ones.

    Returns:
        The architecture written.

    Raises:
        ConfigError: llama.cpp cannot express the model, or a transform is still in it.
        TreadleError: an unknown format, or the disk is full.
    """
    require_plain(model)
    gguf, header = family_for_gguf(model.config)
    rules = applicable(model, gguf.rules(model.config))
    usual = block_format(format).name
    better = usual if FORMATS[usual].bits_per_weight > FORMATS["Q6_K"].bits_per_weight else "Q6_K"
    tied = "output.weight" not in header.shapes
    formats = {
        "token_embd.weight": block_format(embedding or (better if tied else usual)).name,
        "output.weight": block_format(head or better).name,
        "position_embd.weight": "F32",
    }

    def tensors() -> Iterator[tuple[str, Tensor, str]]:
        if header.rope_divisors is not None:
            yield ROPE_DIVISORS, header.rope_divisors, "F32"
        for name, tensor in spill(model, rules, packed):
            raw = tensor.dtype == torch.uint8
            wanted = "F32" if name.endswith(ROUTER) else formats.get(name, usual)
            yield name, tensor, usual if raw else _fitting(tensor, wanted)

    keys = {
        "general.architecture": header.architecture,
        "general.type": "model",
        "general.file_type": FILE_TYPES[usual],
        "general.quantization_version": 2,
        **{f"{header.architecture}.{key}": value for key, value in header.metadata.items()},
        **{key: tuple(v) if isinstance(v, list) else v for key, v in metadata.items()},
    }
    write_gguf(path, keys, tensors(), types=types)
    return header.architecture


def _fitting(tensor: Tensor, format: str) -> str:
    if tensor.ndim == 1:
        return "F32"
    for name in (format, SMALLER_BLOCKS.get(format, format)):
        if tensor.shape[-1] % FORMATS[name].block_size == 0:
            return name
    return "F16"
