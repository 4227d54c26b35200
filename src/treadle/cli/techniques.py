"""`treadle techniques`."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from itertools import groupby
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.command import Command
from treadle.core.cards import Card

if TYPE_CHECKING:
    from collections.abc import Sequence

CARD = Card(
    id="plan.techniques",
    paper="none; generated from the cards of the package",
    summary="The catalogue: paper, code, recipe and proof of each technique, searchable.",
    recipe="treadle techniques rope",
    oracle="tests/test_house.py::test_each_oracle_is_collected",
)
COLUMNS = ("id", "summary", "paper", "code", "recipe", "oracle")


def techniques(
    search: Annotated[
        str | None, typer.Argument(metavar="[ID | WORD]", help="A technique, or a word to find.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Rows for programs; working techniques only.")
    ] = False,
) -> None:
    """List what treadle can do: each technique with its paper, code, recipe and test."""
    from treadle.core.cards import catalogue_ids, read_cards

    cards, ids = read_cards(), catalogue_ids()
    planned = [i for i in ids if i not in {c.id for c in cards}]
    if search is not None:
        cards, planned = _matching(search, cards, planned)
    if as_json:
        rows = [{k: v for k, v in asdict(card).items() if k in COLUMNS} for card in cards]
        typer.echo(json.dumps([{k: row[k] for k in COLUMNS} for row in rows], indent=2))
    elif len(cards) == 1 and not planned:
        _show(cards[0])
    else:
        _table(cards, planned)
    if search is None and not as_json:
        done = len(ids) - len(planned)
        typer.echo(f"\n{done} of {len(ids)} rows of the catalogue work", err=True)


def _matching(
    search: str, cards: Sequence[Card], planned: Sequence[str]
) -> tuple[list[Card], list[str]]:
    """The technique of that id, else all that speak of it.

    Raises:
        TreadleError: none does; names what is near.
    """
    from treadle.core.errors import TreadleError, did_you_mean

    exact = [c for c in cards if c.id == search]
    if exact:
        return exact, []
    if search in planned:
        return [], [search]
    word = search.lower()
    found = [c for c in cards if word in " ".join((c.id, c.summary, c.paper)).lower()]
    waiting = [i for i in planned if word in i]
    if not found and not waiting:
        hint = did_you_mean(search, [c.id for c in cards] + list(planned))
        raise TreadleError(f"no technique `{search}`{hint}\n`treadle techniques` lists them all")
    return found, waiting


def _table(cards: Sequence[Card], planned: Sequence[str]) -> None:
    columns = shutil.get_terminal_size((100, 24)).columns
    width = max((len(c.id) for c in cards), default=0)
    for card in cards:
        room = max(columns - width - 2, 30)
        line = card.summary if len(card.summary) <= room else card.summary[: room - 3] + "..."
        typer.echo(f"{typer.style(f'{card.id:{width}}', bold=True)}  {line}")
    if planned:
        typer.echo("\nplanned:" if cards else "planned:")
        for room, ids in groupby(planned, key=lambda i: i.partition(".")[0]):
            names = " ".join(i.partition(".")[2] for i in ids)
            typer.echo(
                fill(f"{room}: {names}", columns, initial_indent="  ", subsequent_indent="    ")
            )


def _show(card: Card) -> None:
    typer.echo(f"{typer.style(card.id, bold=True)}\n{card.summary}\n")
    for column in COLUMNS[2:]:
        typer.echo(f"{column:7} {getattr(card, column)}")


COMMAND = Command(
    name="techniques",
    run=techniques,
    examples=(
        "treadle techniques",
        "treadle techniques lora",
        "treadle techniques pref.dpo",
        "treadle techniques --json | python -m json.tool",
    ),
)
