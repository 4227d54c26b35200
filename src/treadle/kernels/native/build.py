"""The C++ beside this file as a shared library, one for each level of a processor."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_size_t, c_void_p
from functools import cache
from pathlib import Path

from treadle.kernels.compiler import compile_library
from treadle.kernels.native.levels import Level

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-pthread")


class Shape(ctypes.Structure):
    """`Shape` of decoder.h."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in (
                *("dim", "heads", "kv_heads", "head_dim", "hidden", "layers", "vocab"),
                *("context", "page", "ropes", "activation"),
            )
        ),
        *(
            (name, c_float)
            for name in ("eps", "scale", "embedding_scale", "score_cap", "logit_cap")
        ),
    ]


class Rope(ctypes.Structure):
    """`Rope` of decoder.h."""

    _fields_ = [("count", c_int32), ("factor", c_float), ("frequencies", c_void_p)]


class Pass(ctypes.Structure):
    """`Pass` of decoder.h."""

    _fields_ = [
        ("sequences", c_int32),
        *(
            (name, c_void_p)
            for name in (
                *("tokens", "counts", "starts", "outputs"),
                *("tables", "table_at", "pages", "logits", "hidden"),
            )
        ),
        ("stride", c_int32),
    ]


@cache
def library(level: Level) -> ctypes.CDLL:
    """The library for processors of a level.

    Raises:
        TreadleError: there is no C++ compiler, or it failed; says what to install.
    """
    loaded = ctypes.CDLL(str(compiled(level)))
    arena, matrix, decoder = c_void_p, c_void_p, c_void_p
    for name, result, arguments in (
        ("level", c_char_p, []),
        ("in_large_pages", None, [c_void_p, c_size_t]),
        ("arena", arena, [c_size_t]),
        ("free_arena", None, [arena]),
        ("matrix_bytes", c_size_t, [c_int, c_int, c_int]),
        ("matrix", matrix, [arena, c_int, c_int, c_int, c_void_p]),
        ("free_matrix", None, [matrix]),
        ("unpack_row", None, [matrix, c_int, c_void_p]),
        ("multiply", c_int, [matrix, c_void_p, c_int, c_void_p]),
        ("decoder", decoder, [POINTER(Shape), c_int, *[c_void_p] * 5]),
        ("free_decoder", None, [decoder]),
        ("run", c_int, [decoder, POINTER(Pass)]),
        ("peaks", c_int, [decoder, c_void_p, c_int, c_size_t, c_void_p, c_void_p]),
    ):
        function = getattr(loaded, f"treadle_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


def compiled(level: Level) -> Path:
    """The library's file in the cache, compiled now if it is not there."""
    return compile_library(SOURCES / "library.cpp", (*FLAGS, *level.flags), name=level.name)
