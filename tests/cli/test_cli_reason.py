"""Which problems `treadle reason` puts."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from treadle.cli.app import build
from treadle.cli.reason import exams_of
from treadle.cli.targets import load


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("quickstart", {"leg_counting", "gcd"}),  # put by Evaluate
        ("game24", {"game24"}),  # by Reason
        ("r1", {"gcd"}),  # by MeasureThinking
    ],
)
def test_exams_are_those_of_any_step(recipe: str, names: set[str]) -> None:
    assert names <= {exam.name for exam in exams_of(load(recipe))}


def test_a_recipe_without_exams_is_named() -> None:
    arguments = ["reason", "smollm2-135m-instruct", "--like", "masked-words"]
    done = CliRunner().invoke(build(), arguments)
    assert done.exit_code != 0
    assert "masked-words has no exams: name a recipe that puts problems" in done.output
