"""What `treadle serve` says to a user who errs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi")
from serving.served_process import write_model
from typer.testing import CliRunner

from treadle.cli.app import build
from treadle.core.errors import TreadleError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone/model"], "`gone/model` cannot be loaded"),
        (["{model}", "--memory", "0.0001"], "`a` does not fit"),
        (["{model}", "b={folder}", "--trial", "duel=a:c"], "no model `c` is served"),
        (["{model}", "--trial", "duel=a"], "write NAME=A:B"),
        (["{model}", "b={folder}", "--trial", "duel=a:b"], "--trial-log"),
        (["{model}", "--adapter", "polite"], "write it NAME=FOLDER"),
        (["{model}", "a={folder}"], "two models are called `a`"),
        (["{model}", "--host", "203.0.113.7"], "cannot listen at 203.0.113.7"),
    ],
)
def test_mistakes_are_told_at_the_start(tmp_path: Path, arguments: list[str], message: str) -> None:
    folder = write_model(tmp_path / "tiny")
    given = [a.format(model=f"a={folder}", folder=folder) for a in arguments]
    result = CliRunner().invoke(build(), ["serve", "--port", "0", "--device", "cpu", *given])
    assert result.exit_code
    assert isinstance(result.exception, TreadleError | SystemExit), result.exception
    assert message in " ".join(f"{result.output} {result.exception}".split())
