"""Cards: each technique's file says what it is, where it comes from and what proves it.

Cards are read from the source text, so that listing hundreds of techniques imports none of them.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, fields
from importlib.resources import files

from treadle.core.registry import PACKAGE, source_files


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a technique is. Written once in its file, with literal strings only."""

    id: str
    """The row of the catalogue, such as `al.dpo`; `row.technique` where a row names several."""
    paper: str
    """Author, year and title or arXiv number."""
    summary: str
    """One sentence: what it does for the user."""
    recipe: str
    """A command that reaches it."""
    oracle: str
    """The independent test, as `tests/objectives/test_dpo.py::test_matches_trl`."""
    code: str = field(default="", compare=False)
    """`treadle/objectives/dpo.py:12`; filled in when cards are read."""


def read_cards() -> list[Card]:
    """All cards of the package, sorted by id. Raises ValueError where one is not literal."""
    cards = []
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        if "Card(" not in text:
            continue
        where = path.relative_to(PACKAGE.parent).as_posix()
        for node in ast.parse(text).body:
            for call in ast.walk(node) if isinstance(node, ast.Assign) else ():
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Card":
                    cards.append(_read(call, f"{where}:{call.lineno}"))
    return sorted(cards, key=lambda card: card.id)


def _read(call: ast.Call, where: str) -> Card:
    wanted = {f.name for f in fields(Card)} - {"code"}
    given = {k.arg: k.value for k in call.keywords if k.arg}
    if set(given) != wanted:
        wrong = ", ".join(sorted(wanted.symmetric_difference(given)))
        raise ValueError(f"{where}: a card has {', '.join(sorted(wanted))}; differs in {wrong}")
    literal = {k: v.value for k, v in given.items() if isinstance(v, ast.Constant)}
    if len(literal) < len(given) or not all(isinstance(v, str) for v in literal.values()):
        raise ValueError(f"{where}: a card's fields are literal strings, nothing computed")
    return Card(**{k: str(v) for k, v in literal.items()}, code=where)


def catalogue_ids() -> tuple[str, ...]:
    """Every technique that treadle is to have, finished or not."""
    text = files("treadle.core").joinpath("catalogue.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))
