"""Folders of sentence-transformers: which pooling makes a checkpoint an embedding model.

`modules.json` lists a Transformer, a Pooling and perhaps a Normalize; the pooling's own folder
says which it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from treadle.core.errors import ConfigError, FileFormatError, TreadleError
from treadle.models.decoder import DecoderModel
from treadle.models.heads import EmbeddingHead, TaskHead, VectorReadout
from treadle.models.pooling import FirstToken, LastToken, MeanPooling, Pooling
from treadle.models.source import Opened

MODULES = "modules.json"
MODES: Mapping[str, Pooling] = MappingProxyType(
    {"mean": MeanPooling(), "cls": FirstToken(), "lasttoken": LastToken()}
)
OLD_MODES: Mapping[str, str] = MappingProxyType(
    {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "lasttoken",
    }
)


def pooling_of(folder: Path) -> Pooling | None:
    """The pooling of a folder, or None where it is not of sentence-transformers.

    Raises:
        ConfigError: it has a module or a pooling that treadle does not have.
        FileFormatError: a file is not JSON.
    """
    if not (folder / MODULES).is_file():
        return None
    found: Pooling | None = None
    for module in _json(folder / MODULES):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            found = _pooling(_json(folder / str(module["path"]) / "config.json"))
        elif kind not in ("Transformer", "Normalize"):
            raise ConfigError(f"{folder / MODULES}: a {kind} is no part of treadle's embeddings")
    return found


def _pooling(config: Mapping[str, Any]) -> Pooling:
    modes = [str(config["pooling_mode"])] if "pooling_mode" in config else []
    modes += [OLD_MODES.get(k, k) for k, on in config.items() if on is True and "_mode_" in k]
    if len(modes) != 1 or modes[0] not in MODES:
        raise ConfigError(
            f"pooling {' and '.join(modes) or 'of no kind'} is not treadle's: "
            f"it has {', '.join(MODES)}"
        )
    return MODES[modes[0]]


def with_vectors(opened: Opened) -> DecoderModel:
    """The model as one that gives vectors.

    Its own head where it was trained to embed, the pooling of its folder where that is of
    sentence-transformers, else the mean of its hidden states.

    Raises:
        TreadleError: it was trained for another task.
    """
    model, head = opened.model, opened.model.head
    if isinstance(head, VectorReadout):
        return model
    if isinstance(head, TaskHead):
        raise TreadleError("the model was trained for another task: use `treadle predict`")
    folder = opened.origin if opened.origin.is_dir() else opened.origin.parent
    return EmbeddingHead(pooling=pooling_of(folder) or MeanPooling())(model)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path}: cannot be read: {error}") from None
