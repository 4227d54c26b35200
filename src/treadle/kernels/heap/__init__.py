"""A heap for tensors alone, which `torch` on a CPU is given instead of the process's own.

A process's own heap puts a tensor of megabytes beside an object of a hundred bytes that outlives
it; the hole that the tensor leaves is then good only for what is smaller, and in training such
objects, the nodes of autograd's graph, are everywhere. With addresses of their own, tensors of a
LoRA step of SmolLM2-135M take what lives and next to nothing more.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import psutil
import torch

from treadle.core.errors import TreadleError
from treadle.kernels.compiler import compile_library

SOURCES = Path(__file__).parent
SMALL = 32 * 1024
"""Bytes below which a tensor stays in the process's own heap."""
ROOM = 1.25
"""Addresses that are set apart, in memories of the machine: for what lives, and holes between. An
address costs nothing, but an error for what cannot fit is better than a process that is killed."""


@cache
def keep_tensors_apart() -> str:
    """Give the tensors of this process, from now on, a heap of their own; returns why not, or "".

    The first time on a machine compiles 150 lines of C++.
    """
    if sys.platform != "linux":
        return "tensors share the process's heap: one of their own is written for Linux"
    try:
        library = _library()
    except (TreadleError, OSError) as error:
        return f"tensors share the process's heap: {error}"
    room = int(ROOM * (psutil.virtual_memory().total + psutil.swap_memory().total))
    if not library.treadle_tensor_heap(room, SMALL):
        return "tensors share the process's heap: its addresses are limited (`ulimit -v`)"
    return ""


def release_tensors() -> None:
    """Give the system back what no tensor lives in."""
    if not keep_tensors_apart():
        _library().treadle_release_tensors()


@cache
def _library() -> ctypes.CDLL:
    torch_home = Path(torch.__file__).parent
    flags = (
        "-O2",
        f"-I{torch_home / 'include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-L{torch_home / 'lib'}",
        "-lc10",
        f"-Wl,-rpath,{torch_home / 'lib'}",
    )
    path = compile_library(SOURCES / "tensors.cpp", flags, name=f"heap-torch{torch.__version__}")
    library = ctypes.CDLL(str(path))
    library.treadle_tensor_heap.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    library.treadle_tensor_heap.restype = ctypes.c_int
    library.treadle_release_tensors.restype = None
    return library
