"""Factuality from retrieved evidence: planted claims, BM25 against its formula, bad input."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from treadle.alignment.factuality import Factuality, claim_of, open_library, stem
from treadle.core.errors import FileFormatError, TreadleError
from treadle.data.records import Problem, user

TOWNS = ("Alden", "Brook", "Corin", "Dale", "Estow", "Farn", "Gale", "Holt", "Ives", "Jarrow")
RIVERS = ("Tamar", "Wye", "Severn", "Trent", "Ouse", "Medway", "Avon", "Tees", "Dart", "Exe")
YEARS = [1203 + 37 * i for i in range(10)]
PROBLEM = Problem((user("?"),), "", "exact")


@pytest.fixture
def reward(tmp_path: Path) -> Factuality:
    lines = []
    for town, river, year in zip(TOWNS, RIVERS, YEARS, strict=True):
        lines.append(f"{town} lies on the river {river} and was founded in {year}.")
        lines.append(f"The mill of {town} does not grind barley. Its walls are red brick.")
    path = tmp_path / "facts.txt"
    path.write_text("\n".join(lines))
    return Factuality(evidence=str(path))


def test_planted_claims_are_told_apart(reward: Factuality) -> None:
    """Forty true claims and sixty false ones, each false in one word."""
    true, false = [], []
    for i, (town, river, year) in enumerate(zip(TOWNS, RIVERS, YEARS, strict=True)):
        true += [
            f"{town} was founded in {year}.",
            f"The river {river} is where {town} lies.",
            f"The mill of {town} does not grind barley.",
            f"In {year} {town} was founded on the river {river}.",
        ]
        other = (i + 3) % 10
        false += [
            f"{town} was founded in {YEARS[other]}.",
            f"{town} was founded in {year + 1}.",
            f"{town} lies on the river {RIVERS[other]}.",
            f"The mill of {town} grinds barley.",
            f"{town} was destroyed in {year}.",
            f"{TOWNS[other]} was not founded in {YEARS[other]}.",
        ]
    assert [reward(PROBLEM, text) for text in true] == [1.0] * 40
    assert [reward(PROBLEM, text) for text in false] == [0.0] * 60
    assert reward(PROBLEM, f"{true[0]} {false[0]} {true[2]}\n{false[3]}") == 0.5


def test_one_wrong_name_or_number_is_enough(reward: Factuality) -> None:
    """However much else is right, wherever it stands and however it is written."""
    town, other, river, year = TOWNS[0], TOWNS[1], RIVERS[0], YEARS[0]
    whole = "{} lies on the river {} and was founded in {}."
    assert reward(PROBLEM, whole.format(town, river, year)) == 1.0
    assert reward(PROBLEM, whole.format(town, river, year).lower()) == 1.0
    for wrong in (
        whole.format(other, river, year),
        whole.format("Zork", river, year),
        whole.format(other, river, year).lower(),
        whole.format(town, RIVERS[1], year).lower(),
        f"In {year} {town} was founded on the river {river}, where {RIVERS[1]} lies.".lower(),
    ):
        assert reward(PROBLEM, wrong) == 0.0, wrong


def test_a_number_is_one_word(tmp_path: Path) -> None:
    path = tmp_path / "facts.txt"
    path.write_text("The tower is 12.5 metres high and holds 1,304 stones.")
    found = Factuality(evidence=str(path))
    assert found(PROBLEM, "The tower holds 1304 stones.") == 1.0
    assert found(PROBLEM, "The tower is 12.5 metres high.") == 1.0
    assert found(PROBLEM, "The tower is 5.12 metres high.") == 0.0
    assert found(PROBLEM, "The tower is 12 metres high.") == 0.0
    assert found(PROBLEM, "The tower holds 1 stones.") == 0.0


def test_nothing_said_is_worth_nothing(reward: Factuality) -> None:
    assert reward(PROBLEM, "") == reward(PROBLEM, "Yes. It is. So.") == 0.0
    assert reward(PROBLEM, "Quantum zebras yodel.") == 0.0
    assert reward(PROBLEM, f"Yes. {TOWNS[0]} was founded in {YEARS[0]}.") == 1.0


def test_plurals_and_owners_are_one_word_with_what_they_are_of() -> None:
    assert stem("mills") == stem("mill") == stem("mill's") == "mill"
    assert [stem(w) for w in ("moss", "gas", "his")] == ["moss", "gas", "his"]


def test_retrieval_is_bm25(reward: Factuality) -> None:
    """The order of the sentences found is that of the formula, in plain loops."""
    library = open_library(reward.evidence)
    documents = [sorted(c.words) for c in library.claims]
    mean = sum(map(len, documents)) / len(documents)
    claim = claim_of("Alden lies on the river Wye, founded in 1203.")

    def score(document: list[str]) -> float:
        total = 0.0
        for word in claim.words:
            n = sum(word in d for d in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            tf = Counter(document)[word]
            total += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        return total

    best = sorted((score(d) for d in documents), reverse=True)[:5]
    found = [score(sorted(c.words)) for c in library.nearest(claim, 5)]
    assert found == pytest.approx(best)


def test_missing_evidence_is_named(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match=r"evidence .*nowhere\.txt cannot be read"):
        Factuality(evidence=str(tmp_path / "nowhere.txt"))(PROBLEM, "The sea is wide.")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(TreadleError, match="has no sentence"):
        Factuality(evidence=str(tmp_path / "empty.txt"))(PROBLEM, "The sea is wide.")
    (tmp_path / "latin.txt").write_bytes("Das Schloß.".encode("latin-1"))
    with pytest.raises(FileFormatError, match=r"evidence .*latin\.txt is no UTF-8 text"):
        Factuality(evidence=str(tmp_path / "latin.txt"))(PROBLEM, "The sea is wide.")
