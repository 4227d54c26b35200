#!/usr/bin/env python3
"""The ratchet: files stay short and code is not written twice.

    python3 scripts/ratchet.py            fail where a limit is passed
    python3 scripts/ratchet.py --update   write down what got better; never what got worse
    python3 scripts/ratchet.py --list     show every repeated block

Limits and today's exceptions are in `scripts/ratchet.json`. Repetition is measured in lines: those
that stand in a run of at least eight equal lines in two files. White space, comments, docstrings,
imports and lines without a letter or digit do not count.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = Path(__file__).with_suffix(".json")
LONGEST = 400
BLOCK = 8

Line = tuple[int, str]


@dataclass(frozen=True)
class Repeat:
    """The same run of lines in two files, by first and last line number."""

    left: str
    left_lines: tuple[int, int]
    right: str
    right_lines: tuple[int, int]
    length: int

    def __str__(self) -> str:
        left = f"{self.left}:{self.left_lines[0]}-{self.left_lines[1]}"
        right = f"{self.right}:{self.right_lines[0]}-{self.right_lines[1]}"
        return f"{self.length} lines: {left} = {right}"


def code_lines(text: str) -> list[Line]:
    """Line numbers and text of the lines that count, white space folded."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if documents or isinstance(node, ast.Import | ast.ImportFrom):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            skipped.update(range(node.lineno, node.body[0].lineno))
    lines = ((n, re.sub(r"\s+", " ", s).strip()) for n, s in enumerate(text.splitlines(), 1))
    return [
        (n, s)
        for n, s in lines
        if n not in skipped and re.search(r"\w", s) and not s.startswith("#")
    ]


def repeats(files: dict[str, list[Line]], block: int = BLOCK) -> list[Repeat]:
    """Every longest run of at least `block` equal lines that two of the files share."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, lines in files.items():
        for start in range(len(lines) - block + 1):
            window = tuple(text for _, text in lines[start : start + block])
            places[window].append((name, start))
    pairs = {
        (a, b) for at in places.values() for a in at for b in at if a[0] < b[0]
    }  # windows of `block` lines that are equal in two different files
    return sorted(_runs(pairs, files, block), key=lambda r: (-r.length, r.left, r.right))


def _runs(
    pairs: set[tuple[tuple[str, int], tuple[str, int]]], files: dict[str, list[Line]], block: int
) -> Iterator[Repeat]:
    for (left, i), (right, j) in pairs:
        if ((left, i - 1), (right, j - 1)) in pairs:
            continue  # inside a longer run
        length = block
        while ((left, i + length - block + 1), (right, j + length - block + 1)) in pairs:
            length += 1
        a, b = files[left][i : i + length], files[right][j : j + length]
        yield Repeat(left, (a[0][0], a[-1][0]), right, (b[0][0], b[-1][0]), length)


def measure() -> tuple[dict[str, int], list[Repeat]]:
    """Files over the limit with their length, and all repetition below `src`."""
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "src").rglob("*.py"))
    }
    long = {n: length for n, t in texts.items() if (length := len(t.splitlines())) > LONGEST}
    return long, repeats({name: code_lines(text) for name, text in texts.items()})


def main(arguments: list[str]) -> int:
    limits = json.loads(LIMITS.read_text(encoding="utf-8"))
    long, found = measure()
    repeated = sum(r.length for r in found)
    complaints = [
        f"{name} has {length} lines, {allowed} are allowed: split it"
        for name, length in long.items()
        if length > (allowed := limits["long_files"].get(name, LONGEST))
    ]
    if repeated > limits["repeated_lines"]:
        complaints.append(
            f"{repeated} repeated lines, {limits['repeated_lines']} are allowed: "
            "let one piece of code serve both places"
        )
    if complaints or "--list" in arguments:
        print(*complaints, *found, sep="\n")
    better = {
        "long_files": {n: min(v, long[n]) for n, v in limits["long_files"].items() if n in long},
        "repeated_lines": min(repeated, limits["repeated_lines"]),
    }
    if better != limits and "--update" in arguments:
        LIMITS.write_text(json.dumps(better, indent=2) + "\n", encoding="utf-8")
        print(
            f"{LIMITS.name}: now {better['repeated_lines']} repeated lines, {len(long)} long files"
        )
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
