"""The house keeps its own rules: cards are true, names are unique, nothing foreign creeps in."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from treadle.cli.app import COMMANDS
from treadle.cli.kinds import named
from treadle.cli.targets import load_any, recipe_files
from treadle.core import registry
from treadle.core.cards import catalogue_ids, read_cards
from treadle.core.config import Config
from treadle.inference.reasoning.strategy import Strategy

ROOT = Path(__file__).resolve().parents[1]
CARDS = read_cards()
FORBIDDEN = {
    "an absolute path of one machine": r"(?<![\w.~}])/(wor[k]|roo[t]|hom[e]|opt|User[s])/\w",
    "a host of a package registry": r"pypi\.or[g]|pythonhosted\.or[g]|registry\.npmj[s]",
    "unfinished work": r"\b(TOD[O]|FIXM[E]|XX[X])\b",
}


def files(*suffixes: str) -> list[Path]:
    """Files of the repository, those that git ignores left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [p for p in paths if p.is_file() and (not suffixes or p.suffix in suffixes)]


# Cards


def test_each_card_is_a_row_of_the_catalogue() -> None:
    """Or a part of one: a row that names several techniques has `row.technique` for each file."""
    known = set(catalogue_ids())
    rows = known | {c.id for c in CARDS if c.id.rpartition(".")[0] in known}
    assert {c.id: c.code for c in CARDS if c.id not in rows} == {}


def test_no_technique_has_two_cards() -> None:
    count = Counter(c.id for c in CARDS)
    assert {c.id: c.code for c in CARDS if count[c.id] > 1} == {}


def test_each_card_is_filled_in() -> None:
    for card in CARDS:
        assert all((card.paper, card.summary, card.recipe, card.oracle)), card
        assert card.summary.endswith("."), card


def test_each_oracle_is_collected(collected: set[str]) -> None:
    wanted = {c.oracle for c in CARDS}
    found = {node.partition("[")[0] for node in collected}
    if missing := wanted - found:  # a partial run collects the rest by itself
        found |= _collect({m.partition("::")[0] for m in missing})
    assert {c.id: c.oracle for c in CARDS if c.oracle not in found} == {}


def _collect(paths: set[str]) -> set[str]:
    present = sorted(p for p in paths if (ROOT / p).is_file())
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", *present],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {line.partition("[")[0] for line in listed.stdout.splitlines() if "::" in line}


@pytest.mark.parametrize("recipe", sorted({c.recipe for c in CARDS}))
def test_each_recipe_of_a_card_is_a_command(recipe: str) -> None:
    owners = [c.code for c in CARDS if c.recipe == recipe]
    words = shlex.split(recipe)
    assert words[0] in ("treadle", "torchrun"), owners
    command, *arguments = words[words.index("treadle") + 1 :]
    assert command in {c.name for c in COMMANDS}, owners
    if command in ("run", "show"):
        target, *overrides = [a for a in arguments if not a.startswith("-")]
        assert command == "show" or target in recipe_files(), owners
        load_any(target, overrides)
    for option, value in pairwise(arguments):
        if option in ("-s", "--strategy"):
            named(value, Strategy, option)


# Names


def test_each_kind_names_one_class() -> None:
    for kind in registry.kinds_of(Config):
        if kind in registry.class_index():
            registry.resolve(kind, Config)


def test_test_files_have_names_of_their_own() -> None:
    count = Counter(p.name for p in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, n in count.items() if n > 1] == []


def test_each_room_says_what_it_holds() -> None:
    for folder in {p.parent for p in registry.source_files()}:
        first = folder / "__init__.py"
        assert first.is_file(), f"{folder} is no package"
        assert first.read_text(encoding="utf-8").startswith('"""'), f"{first} says nothing"


# Foreign matter


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_foreign_in_the_repository(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_no_pickles_are_loaded() -> None:
    loads = re.compile(r"\btorch\.load\((?!.*weights_only=True)|\bpickle\.loads?\(")
    for path in registry.source_files():
        assert not loads.search(path.read_text(encoding="utf-8")), path
