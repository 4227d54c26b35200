"""The prose that is on every machine: Python's own documentation.

Reference topics (`help("yield")`) and the docstrings of the standard library, deduplicated, in a
fixed order; every tenth source file is held out. Any text file or folder can stand in its place
(`data/read.py`).
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from treadle.data.documents import Documents
from treadle.data.records import Text

HELD_OUT_EVERY = 10
SHORTEST = 80
"""Characters; shorter docstrings say little."""
SKIPPED = ("test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo")


class PythonDocs(Documents):
    """Documentation topics and docstrings of the Python that runs."""

    def training(self) -> Iterator[Text]:
        return (Text(t) for i, t in enumerate(_documents()) if i % HELD_OUT_EVERY)

    def held_out(self) -> Iterator[Text]:
        return (Text(t) for i, t in enumerate(_documents()) if i % HELD_OUT_EVERY == 0)


@cache
def _documents() -> tuple[str, ...]:
    """One document a topic, and one a source file, without paragraphs that came before."""
    seen: set[str] = set()
    found = (_fresh(text, seen) for text in (*_topics(), *_files()))
    return tuple(text for text in found if len(text) >= SHORTEST)


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _files() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not any(part in SKIPPED for part in path.relative_to(root).parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            yield "\n\n".join(_docstrings(tree))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)) and len(text) >= SHORTEST:
            yield text


def _fresh(text: str, seen: set[str]) -> str:
    """The paragraphs of `text` that no document had before."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph.rstrip())
    return "\n\n".join(kept)
