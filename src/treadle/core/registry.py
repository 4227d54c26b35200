"""Names to classes, without importing the package: `kind: DPO` finds `treadle.objectives.dpo.DPO`.

The index is read from the source text, so a new technique is one new file: nothing lists it.
Only treadle's own modules and classes that a program has already imported can be named in a
configuration file; a file can never make Python import foreign code.
"""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

from treadle.core.errors import ConfigError, did_you_mean

PACKAGE = Path(__file__).resolve().parent.parent
_CLASS = re.compile(r"^class (\w+)\b", re.MULTILINE)


def module_name(path: Path) -> str:
    """`.../treadle/objectives/dpo.py` -> `treadle.objectives.dpo`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def class_index() -> dict[str, tuple[str, ...]]:
    """Class name -> the treadle modules that define a class of that name."""
    index: dict[str, tuple[str, ...]] = {}
    for path in source_files():
        for name in _CLASS.findall(path.read_text(encoding="utf-8")):
            index[name] = (*index.get(name, ()), module_name(path))
    return index


def resolve(kind: str, base: type) -> type:
    """The subclass of `base` called `kind`.

    Raises:
        ConfigError: no such class, or it is of another shape than the place needs.
    """
    candidates: list[type] = [
        getattr(importlib.import_module(module), kind) for module in class_index().get(kind, ())
    ]
    candidates += [c for c in subclasses(base) if c.__name__ == kind and c not in candidates]
    fitting = [c for c in candidates if isinstance(c, type) and issubclass(c, base)]
    if len(fitting) > 1:
        places = ", ".join(c.__module__ for c in fitting)
        raise ConfigError(f"kind `{kind}` is ambiguous: defined in {places}; rename one")
    if not fitting:
        raise ConfigError(f"unknown kind `{kind}`{did_you_mean(kind, kinds_of(base))}")
    return fitting[0]


def subclasses(base: type) -> set[type]:
    """All classes below `base` that are loaded now."""
    below: set[type] = set(base.__subclasses__())
    return below.union(*(subclasses(c) for c in below))


@cache
def _bases() -> dict[str, tuple[str, ...]]:
    bases: dict[str, tuple[str, ...]] = {}
    for path in source_files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = tuple(b.id for b in node.bases if isinstance(b, ast.Name))
    return bases


def kinds_of(base: type) -> list[str]:
    """Names of the classes that extend `base`, read from the source of the whole package."""
    table = _bases()

    def below(name: str, seen: tuple[str, ...] = ()) -> bool:
        if name in seen:
            return False
        return any(b == base.__name__ or below(b, (*seen, name)) for b in table.get(name, ()))

    loaded = {c.__name__ for c in subclasses(base)}
    return sorted({n for n in table if below(n)} | loaded)
