"""State trees on disk: a JSON document, and its tensors apart in safetensors.

In the document a tensor is `{"$tensor": "path/in/the/tree"}` and a float that JSON lacks is
`{"$float": "nan"}`. Nothing is ever pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def split(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The JSON form of `tree`; its tensors are put into `tensors` under their path."""
    match tree:
        case Tensor():
            tensors[path] = tree.detach()
            return {"$tensor": path}
        case Mapping():
            wrong = [k for k in tree if not isinstance(k, str) or k.startswith("$")]
            assert not wrong, f"state keys are plain strings, found {wrong[0]!r} in {path or 'top'}"
            return {k: split(v, tensors, f"{path}/{k}" if path else k) for k, v in tree.items()}
        case list() | tuple():
            return [split(v, tensors, f"{path}/{i}") for i, v in enumerate(tree)]
        case float() if not math.isfinite(tree):
            return {"$float": repr(tree)}
        case None | bool() | int() | float() | str():
            return tree
        case np.integer() | np.floating():
            return split(tree.item(), tensors, path)
    raise TypeError(f"{path}: a state holds JSON values and tensors, not {type(tree).__name__}")


def join(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split`; tuples come back as lists."""
    match document:
        case {"$tensor": path}:
            return tensors[path]
        case {"$float": text}:
            return float(text)
        case dict():
            return {k: join(v, tensors) for k, v in document.items()}
        case list():
            return [join(v, tensors) for v in document]
    return document


def pack(tree: Any) -> bytes:
    """A tree as one run of bytes: safetensors with the JSON in its metadata."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    document = json.dumps(split(tree, tensors), allow_nan=False)
    return save({k: owned(v) for k, v in tensors.items()}, metadata={"tree": document})


def unpack(data: bytes) -> Any:
    """The inverse of `pack`."""
    from safetensors.torch import load

    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return join(json.loads(header["__metadata__"]["tree"]), load(data))


def owned(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous and alone in its storage, as safetensors wants it."""
    tensor = tensor.detach().to("cpu").contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
