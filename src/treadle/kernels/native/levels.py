"""The instruction sets that the native code is compiled for, and which of them is taken."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass

from treadle.core.errors import TreadleError, did_you_mean
from treadle.core.machine import CPUINFO

VARIABLE = "TREADLE_NATIVE"
"""The environment variable that names a level."""


@dataclass(frozen=True)
class Level:
    """A set of instructions."""

    name: str
    needs: frozenset[str]
    """What /proc/cpuinfo calls them."""
    flags: tuple[str, ...]
    """Of the compiler."""


def _level(name: str, needs: str, flags: str) -> Level:
    return Level(name, frozenset(needs.split()), tuple(flags.split()))


_AVX512 = "avx512f avx512bw avx512dq avx512vl"
_AVX2 = "-mavx2 -mfma -mf16c"
LEVELS = (
    _level(
        "avx512",
        f"{_AVX512} avx512_vnni",
        "-DTREADLE_AVX512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c",
    ),
    _level(
        "avx-vnni",
        "avx2 fma f16c avx_vnni",
        f"-DTREADLE_AVX2 -DTREADLE_AVXVNNI -mavxvnni {_AVX2}",
    ),
    _level("avx2", "avx2 fma f16c", f"-DTREADLE_AVX2 {_AVX2}"),
    _level(
        "neon-dotprod",
        "asimd asimddp",
        "-DTREADLE_NEON -DTREADLE_DOTPROD -march=armv8.2-a+dotprod",
    ),
    _level("neon", "asimd", "-DTREADLE_NEON -march=armv8-a"),
    _level("portable", "", ""),
)
"""The fastest first."""


def find_level(name: str | None = None) -> Level:
    """The level called `name`; None takes that of the environment, or the processor's best.

    Raises:
        TreadleError: there is none of that name, or this processor lacks some of its instructions.
    """
    name = name or os.environ.get(VARIABLE)
    has = features()
    if not name:
        return next(level for level in LEVELS if level.needs <= has)
    known = {level.name: level for level in LEVELS}
    if name not in known:
        raise TreadleError(f"{VARIABLE}: no level `{name}`{did_you_mean(name, known)}")
    if missing := known[name].needs - has:
        raise TreadleError(
            f"{VARIABLE}: this processor lacks {', '.join(sorted(missing))}, which the native "
            f"level {name} needs; take one of {', '.join(x.name for x in LEVELS if x.needs <= has)}"
        )
    return known[name]


def features() -> frozenset[str]:
    """What this processor has, in the words of /proc/cpuinfo."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return frozenset(("asimd", "asimddp"))  # on all of Apple's
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = (
        rest
        for key, _, rest in (line.partition(":") for line in lines)
        if key.strip() in ("flags", "Features")
    )
    return frozenset(next(found, "").split())
