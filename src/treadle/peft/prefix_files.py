"""Learned prefixes in folders that PEFT reads, and reading those that PEFT wrote.

    adapter_config.json             PREFIX_TUNING, PROMPT_TUNING or P_TUNING, and sizes
    adapter_model.safetensors       prompt_embeddings [n, layers 2 G D] or [n, D]

What a network made is written as the table that it makes, so a folder serves to run, not to train
the network further; PEFT does the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from treadle.core.errors import ConfigError, FileFormatError, did_you_mean
from treadle.core.files import StrPath, atomic_directory, write_json
from treadle.models.decoder import DecoderModel
from treadle.nn.mixers.attention import AttentionLayer
from treadle.peft.files import CONFIG, PROBE_KEY, SAME_BASE, WEIGHTS, read_config, read_weights
from treadle.peft.files import sample as probe
from treadle.peft.prefix import KeyValueTable, PrefixTuning, prefix_of
from treadle.peft.prompt import PromptTuning, SoftPrompt
from treadle.peft.virtual import Table

TENSOR = "prompt_embeddings"
KINDS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


def save_prefix(model: DecoderModel, folder: StrPath, *, base: str = "") -> None:
    """Write the model's prefix, and nothing of its base, as a PEFT folder.

    Raises:
        ConfigError: the model has none.
        TreadleError: the disk is full.
    """
    prefix = prefix_of(model)
    if not isinstance(prefix, KeyValueTable | SoftPrompt):
        raise ConfigError("the model has no learned prefix to save")
    table = prefix.virtual().detach().cpu().contiguous()
    settings = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "num_virtual_tokens": prefix.count,
        "token_dim": table.shape[1],
        "num_layers": len(model.blocks),
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }
    if isinstance(prefix, KeyValueTable):
        groups, width = prefix.shape[-2:]
        settings |= {
            "peft_type": "PREFIX_TUNING",
            "token_dim": groups * width,
            "num_attention_heads": groups,
            "num_layers": len(prefix.layers),
            "prefix_projection": False,
        }
    write_prefix(model, folder, {TENSOR: table}, settings)


def write_prefix(
    model: DecoderModel,
    folder: StrPath,
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
) -> None:
    """A folder of these tensors and settings, marked with a few numbers of the base."""
    header = {"format": "pt"}
    if isinstance(model.embedding, nn.Embedding):
        header[PROBE_KEY] = json.dumps({"values": probe(model.embedding.weight).tolist()})
    with atomic_directory(folder, needed=sum(t.nbytes for t in tensors.values())) as temporary:
        save_file(dict(tensors), temporary / WEIGHTS, metadata=header)
        write_json(temporary / CONFIG, dict(settings))


def load_prefix(model: DecoderModel, folder: StrPath) -> DecoderModel:
    """Put the prefix of a PEFT folder on a model, in place; only it will train.

    Raises:
        FileFormatError: a broken folder, or one for another base.
        ConfigError: no kind of prefix that treadle has.
        TreadleError: no such folder, or only a pickle.
    """
    folder = Path(folder)
    fields = read_config(folder)
    tensors, header = read_weights(folder)
    kind = str(fields.get("peft_type"))
    if kind not in KINDS:
        raise ConfigError(f"{folder}: {kind} is no learned prefix{did_you_mean(kind, KINDS)}")
    if set(tensors) != {TENSOR}:
        raise FileFormatError(f"{folder}: holds {sorted(tensors)}, but a prefix is one `{TENSOR}`")
    check_prefix_base(model, header, folder)
    table = tensors[TENSOR]
    wide = kind == "PREFIX_TUNING"
    expected = _width(model, wide=wide)
    if table.ndim != 2 or table.shape[1] != expected:
        raise FileFormatError(
            f"{folder}: the prefix is {tuple(table.shape)}, but here it must be "
            f"(tokens, {expected}); it is for the base {fields.get('base_model_name_or_path')}"
        )
    transform = PrefixTuning if wide else PromptTuning
    transform(tokens=table.shape[0])(model)
    prefix = prefix_of(model)
    assert isinstance(prefix, KeyValueTable | SoftPrompt)
    assert isinstance(prefix.virtual, Table)
    with torch.no_grad():
        prefix.virtual.table.copy_(table)
    return model


def _width(model: DecoderModel, *, wide: bool) -> int:
    if not wide:
        return model.config.dim
    layers = [m for m in model.modules() if isinstance(m, AttentionLayer)]
    return sum(2 * m.kv_heads * m.head_dim for m in layers)


def check_prefix_base(model: DecoderModel, header: Mapping[str, Any] | None, folder: Path) -> None:
    """Raise FileFormatError where the prefix was trained on other embeddings than these."""
    if header is None or not isinstance(model.embedding, nn.Embedding):
        return
    theirs = torch.tensor(header["values"])
    difference = float((probe(model.embedding.weight) - theirs).norm() / theirs.norm())
    if not difference <= SAME_BASE:
        raise FileFormatError(
            f"{folder}: this prefix was trained on another base: the embeddings here differ from "
            f"it by {difference:.0%}; load the base that {CONFIG} names"
        )
