"""Cards are read from source text; a card that is not literal is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from treadle.core import cards
from treadle.core.cards import Card, catalogue_ids, read_cards

GOOD = """
CARD = Card(
    id="arch.rope",
    paper="Su et al. 2021",
    summary="Rotary "
    "positions.",
    recipe="treadle run quickstart",
    oracle="tests/nn/test_rope.py::test_x",
)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "treadle"
    folder.mkdir()
    monkeypatch.setattr(cards, "PACKAGE", folder)
    monkeypatch.setattr(cards, "source_files", lambda: sorted(folder.rglob("*.py")))
    return folder


def test_a_card_is_read_without_importing_its_file(package: Path) -> None:
    (package / "rope.py").write_text(f"import nothing_of_that_name\n{GOOD}")
    assert read_cards() == [
        Card(
            id="arch.rope",
            paper="Su et al. 2021",
            summary="Rotary positions.",
            recipe="treadle run quickstart",
            oracle="tests/nn/test_rope.py::test_x",
        )
    ]
    assert read_cards()[0].code == "treadle/rope.py:3"


def test_several_cards_of_a_file_are_read_in_order_of_id(package: Path) -> None:
    second = GOOD.replace("arch.rope", "arch.alibi").replace("CARD =", "OTHER =")
    (package / "rope.py").write_text(GOOD + second)
    assert [c.id for c in read_cards()] == ["arch.alibi", "arch.rope"]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('paper="Su et al. 2021"', "paper=PAPER", "literal strings"),
        ('paper="Su et al. 2021"', 'paper=f"{1}"', "literal strings"),
        ('paper="Su et al. 2021"', "paper=2021", "literal strings"),
        ('    paper="Su et al. 2021",\n', "", "differs in paper"),
        ('paper="Su', 'papers="Su', "differs in paper, papers"),
    ],
)
def test_a_wrong_card_is_refused_with_its_place(
    package: Path, old: str, new: str, found: str
) -> None:
    (package / "rope.py").write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=r"^treadle/rope\.py:2: ") as caught:
        read_cards()
    assert found in str(caught.value)


def test_the_catalogue_has_no_id_twice() -> None:
    ids = catalogue_ids()
    assert len(ids) == len(set(ids)) == 283
