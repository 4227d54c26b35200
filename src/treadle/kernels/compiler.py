"""C++ as shared libraries: compiled on first use, kept in the user's cache.

The name of a compiled file holds a hash of all that it depends on: sources, compiler and flags,
which name the instructions and the libraries that it may use. So a cache that several machines
share, or a new version of treadle, does no harm.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from treadle.core.errors import TreadleError
from treadle.core.files import atomic_file

ALWAYS = ("-std=c++20", "-shared", "-fPIC", "-w")
COMPILERS = ("g++", "clang++", "c++")


def compile_library(source: Path, flags: Sequence[str], *, name: str) -> Path:
    """The library's file in the cache, compiled now if it is not there.

    Raises:
        TreadleError: there is no C++ compiler, or it failed; says what to install.
    """
    command = [find_compiler(), *ALWAYS, str(source), *flags]
    root = Path(os.environ.get("TREADLE_CACHE") or "~/.cache/treadle").expanduser()
    target = root / "native" / f"{name}-{_fingerprint(command, source.parent)}.so"
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
            [*command, "-o", str(temporary)],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise TreadleError(
                f"{command[0]} could not compile treadle's {source.parent.name} library; take "
                "GCC 12 or Clang 16 or newer (set CXX to it), or the torch path. It said:\n"
                f"{done.stderr[-2000:]}"
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


def _fingerprint(command: list[str], folder: Path) -> str:
    version = subprocess.run([command[0], "--version"], check=False, capture_output=True).stdout
    digest = hashlib.sha256(version)
    for part in command:
        digest.update(part.encode() + b"\0")
    for source in sorted(p for p in folder.iterdir() if p.suffix in (".h", ".cpp")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]
