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
from typing import Any, TypeVar

from treadle.core.errors import ConfigError, did_you_mean

T = TypeVar("T")
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


def resolve(kind: str, base: type[T]) -> type[T]:
    """The subclass of `base` called `kind`.

    Raises:
        ConfigError: no such class, or it is of another shape than the place needs.
    """
    candidates: list[Any] = [
        getattr(importlib.import_module(module), kind, object)
        for module in class_index().get(kind, ())
    ]
    loaded = {(c.__module__, c.__qualname__): c for c in subclasses(base) if c.__name__ == kind}
    candidates += [c for c in loaded.values() if c not in candidates]  # the newest of a notebook's
    fitting: list[type[T]] = [c for c in candidates if isinstance(c, type) and issubclass(c, base)]
    if len(fitting) > 1:
        places = ", ".join(c.__module__ for c in fitting)
        raise ConfigError(f"kind `{kind}` is ambiguous: defined in {places}; rename one")
    if not fitting:
        raise ConfigError(f"unknown kind `{kind}`{did_you_mean(kind, kinds_of(base))}")
    return fitting[0]


def subclasses(base: type[T]) -> list[type[T]]:
    """All classes below `base` that are loaded now, in the order of their definition."""
    below: dict[type[T], None] = {}
    for child in base.__subclasses__():
        below.update(dict.fromkeys((child, *subclasses(child))))
    return list(below)


@cache
def _bases() -> dict[str, tuple[str, ...]]:
    """Class name -> names of its bases, for every class of the package."""
    bases: dict[str, tuple[str, ...]] = {}
    for path in source_files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                named = (b.value if isinstance(b, ast.Subscript) else b for b in node.bases)
                bases[node.name] = tuple(b.id for b in named if isinstance(b, ast.Name))
    return bases


def kinds_of(base: type[Any]) -> list[str]:
    """Names of what extends `base` and is no shape itself, read from the package's source."""
    table = _bases()
    shapes = {name for bases in table.values() for name in bases}

    def below(name: str, seen: tuple[str, ...] = ()) -> bool:
        if name in seen:
            return False
        return any(b == base.__name__ or below(b, (*seen, name)) for b in table.get(name, ()))

    loaded = {c.__name__ for c in subclasses(base) if not c.__subclasses__()}
    public = {n for n in table if n not in shapes and not n.startswith("_")}
    return sorted({n for n in public if below(n)} | loaded)
