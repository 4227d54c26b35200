"""The prose that is on every machine: the documentation inside Python and its packages.

The reference topics of `help()`, then one document for each source file of the standard library
and of the packages named, in a fixed order. No paragraph comes twice, so none that is held out was
trained on. Which files are held out depends on their names alone. Any file or folder of text can
stand in its place (`data/texts.py`).

Another version of Python or of a package has other texts.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
import tokenize
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from io import BytesIO
from itertools import groupby
from pathlib import Path

from pydantic import Field

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.documents import Documents
from treadle.data.records import Text

HELD_OUT_EVERY = 10
SKIPPED = frozenset(
    ("test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "turtledemo", "__pycache__")
)
_DOCTEST = re.compile(r"^[ \t]*>>> .*\n(?:[ \t]*\S.*\n?)*", re.MULTILINE)
"""An example with what it prints, up to the next empty line."""


class Extract(Config):
    """A shape: the passages that are taken out of a Python source file."""

    @abstractmethod
    def __call__(self, source: bytes) -> Iterator[str]:
        """Its passages, in order; none where it is not valid Python."""


class Docstrings(Extract):
    """What modules, classes and functions say of themselves, without interpreter sessions."""

    shortest: int = Field(80, ge=1)
    """Characters; shorter ones say little."""

    def __call__(self, source: bytes) -> Iterator[str]:
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(_tree(source)):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                prose = _DOCTEST.sub("", text + "\n").strip()
                if len(prose) >= self.shortest:
                    yield prose


class Comments(Extract):
    """Comments of several lines, without their number signs."""

    shortest: int = Field(80, ge=1)

    def __call__(self, source: bytes) -> Iterator[str]:
        lines: dict[int, str] = {}
        try:
            for token in tokenize.tokenize(BytesIO(source).readline):
                if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
                    lines[token.start[0]] = token.string.lstrip("#!:").strip()
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            return
        for _, run in groupby(enumerate(sorted(lines)), lambda item: item[1] - item[0]):
            passage = "\n".join(lines[number] for _, number in run).strip()
            if len(passage) >= self.shortest:
                yield passage


class SourceCode(Extract):
    """The whole file."""

    def __call__(self, source: bytes) -> Iterator[str]:
        if _tree(source).body:
            yield source.decode("utf-8", errors="replace")


class PythonDocs(Documents):
    """Documentation topics, and what `extracts` take out of source files."""

    packages: tuple[str, ...] = ()
    """Installed packages that are read after the standard library, such as `numpy`."""
    extracts: tuple[Extract, ...] = (Docstrings(),)

    def training(self) -> Iterator[Text]:
        return (text for text, held_out in self.documents() if not held_out)

    def held_out(self) -> Iterator[Text]:
        return (text for text, held_out in self.documents() if held_out)

    def documents(self) -> Iterator[tuple[Text, bool]]:
        """Each with whether it is held out.

        Raises:
            TreadleError: a package is not installed.
        """
        places = {name: _package(name) for name in self.packages}
        seen: set[bytes] = set()
        for name, text in (*_topics(), *self._files(places)):
            if fresh := _fresh(text, seen):
                yield Text(fresh), held_out(name)

    def _files(self, places: dict[str, Path]) -> Iterator[tuple[str, str]]:
        library = Path(sysconfig.get_paths()["stdlib"])
        for root in (library, *places.values()):
            for path in _sources(root):
                source = path.read_bytes()
                passages = (p for extract in self.extracts for p in extract(source))
                name = path.relative_to(root if root == library else root.parent).as_posix()
                yield name, "\n\n".join(passages)


def held_out(name: str) -> bool:
    """Whether a file or topic is held out: one in ten, by the hash of its name."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_EVERY == 0


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from ((f"help/{name}", topics[name]) for name in sorted(topics))


def _package(name: str) -> Path:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise TreadleError(
            f"PythonDocs: no package `{name}` here: install it, or take it out of `packages`"
        )
    return Path(found.submodule_search_locations[0])


def _sources(root: Path) -> Iterator[Path]:
    """Source files below `root` in the order of their names, tests and the like left out."""
    for folder, below, names in os.walk(root):
        below[:] = sorted(b for b in below if b not in SKIPPED)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _tree(source: bytes) -> ast.Module:
    """The syntax tree; empty where it is not valid Python, as some templates are not."""
    with warnings.catch_warnings(action="ignore"):  # of old escapes in foreign code
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])


def _fresh(text: str, seen: set[bytes]) -> str:
    """The paragraphs of `text` that no document had before."""
    kept = []
    for paragraph in text.replace("\t", "    ").split("\n\n"):
        words = " ".join(paragraph.split())
        key = hashlib.sha256(words.encode("utf-8", "replace")).digest()[:16]
        if words and key not in seen:
            seen.add(key)
            kept.append(paragraph.rstrip())
    return "\n\n".join(kept)
