"""Whether the native kernels run a file as it is stored, and an engine on them.

Chosen without being asked for, they must cost no quality: so only for GGUF files whose matrices
all keep their own numbers. Activations are then rounded to 8 bits, as llama.cpp does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from treadle.core.errors import TreadleError
from treadle.core.files import StrPath
from treadle.inference.decode import Eager
from treadle.inference.engine import Engine
from treadle.inference.limits import EngineConfig
from treadle.inference.native_runner import NativeRunner
from treadle.inference.native_shape import native_plan
from treadle.inference.native_weights import NativeWeights, StoredFile
from treadle.kernels.compiler import find_compiler
from treadle.kernels.native.levels import find_level
from treadle.tokenizers.tokenizer import Tokenizer

PAGE = 32


@dataclass(frozen=True)
class NativeSupport:
    """What the native kernels can do with a file."""

    weights: StoredFile | None
    """The open file, if they run it as it is stored."""
    why: str
    """In words: which kernels and formats, or what stands against it."""


def native_support(path: StrPath) -> NativeSupport:
    """Whether the native kernels run the model of a file as it is stored.

    Raises:
        FileFormatError: the file is broken.
        TreadleError: there is no such file.
    """
    if Path(path).suffix != ".gguf":
        return NativeSupport(None, "its weights are not stored in few bits")
    file = StoredFile(path)
    try:
        native_plan(file.decoder, PAGE)
        formats = " and ".join(file.formats)
        level = find_level()
        find_compiler()
    except TreadleError as error:
        return NativeSupport(None, str(error))
    return NativeSupport(file, f"{level.name} instructions, {formats} as stored")


def native_engine(
    weights: NativeWeights, tokenizer: Tokenizer, config: EngineConfig = EngineConfig()
) -> Engine:
    """An engine on native kernels; its cache has the size that `config` says.

    torch is told to compute on one thread: its threads would fight with the kernels' own.

    Raises:
        TreadleError: the native path does not run the model, or there is no compiler, or `config`
            asks for another cache or for compiled decoding.
    """
    if config.cache is not None:
        raise TreadleError(
            "the native kernels keep keys and values in pages of their own: leave --cache out"
        )
    if not isinstance(config.decode, Eager):
        raise TreadleError("the native kernels run a pass in one call already: leave --decode out")
    pages = native_pages(weights, config)
    torch.set_num_threads(1)
    mark = weights.mark(PAGE) if config.prefix_folder is not None else ""
    runner = NativeRunner(weights, pages=pages, page=PAGE)
    return Engine.of_runner(runner, tokenizer, config, mark=mark)


def native_pages(weights: NativeWeights, config: EngineConfig) -> int:
    """Pages for `cache_tokens`; None: for full contexts in all slots, in a quarter of memory."""
    if config.cache_tokens is not None:
        return -(-config.cache_tokens // PAGE)
    shape = native_plan(weights.decoder, PAGE).shape
    nbytes: int = shape.layers * shape.kv_heads * 2 * PAGE * shape.head_dim * 2
    one: int = -(-shape.context // PAGE)
    quarter: int = psutil.virtual_memory().total // 4
    return max(one, min(config.slots * one, quarter // nbytes))
