"""The C++ beside this file as a shared library: compiled on first use, kept in the user's cache.

The name of the compiled file holds a hash of all that it depends on: sources, compiler and flags,
which name the instructions that it may use. So a cache that several machines share, or a new
version of treadle, does no harm.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_size_t, c_void_p
from functools import cache
from pathlib import Path

from treadle.core.errors import TreadleError
from treadle.core.files import atomic_file
from treadle.kernels.native.levels import Level

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++20", "-O3", "-shared", "-fPIC", "-pthread", "-w")
COMPILERS = ("g++", "clang++", "c++")


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
    compiler = find_compiler()
    command = [compiler, *FLAGS, *level.flags]
    root = Path(os.environ.get("TREADLE_CACHE") or "~/.cache/treadle").expanduser()
    target = root / "native" / f"{level.name}-{_fingerprint(command)}.so"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TreadleError(
            f"{target.parent}: cannot be written ({error.strerror}); "
            "set TREADLE_CACHE to a folder of yours"
        ) from None
    with atomic_file(target) as temporary:
        done = subprocess.run(
            [*command, str(SOURCES / "library.cpp"), "-o", str(temporary)],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise TreadleError(
                f"{compiler} could not compile treadle's native kernels; take GCC 12 or Clang 16 "
                f"or newer (set CXX to it), or the torch path. It said:\n{done.stderr[-2000:]}"
            )
    return target


def find_compiler() -> str:
    """The C++ compiler's path.

    Raises:
        TreadleError: there is none.
    """
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else COMPILERS:
        if found := shutil.which(name):
            return found
    raise TreadleError(
        f"no C++ compiler ({chosen or ', '.join(COMPILERS)}), which the native path needs once; "
        "install one (`apt install g++`), set CXX to yours, or take the torch path"
    )


def _fingerprint(command: list[str]) -> str:
    version = subprocess.run([command[0], "--version"], check=False, capture_output=True).stdout
    digest = hashlib.sha256(version)
    for part in command:
        digest.update(part.encode() + b"\0")
    for source in sorted(p for p in SOURCES.iterdir() if p.suffix in (".h", ".cpp")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]
