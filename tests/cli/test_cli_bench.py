"""`treadle bench` of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_generation import byte_tokenizer
from typer.testing import CliRunner

from treadle.cli.app import build
from treadle.models.hub.save import save_hf
from treadle.models.llama import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_hf(tiny_llama(257, dim=64, layers=2, kv_heads=2, hidden=96, context=64).build(), folder)
    byte_tokenizer().save(folder)
    return folder


def test_figures_of_a_model(folder: Path) -> None:
    command = ["bench", str(folder), "--batch", "2", "--prompt", "8", "--output", "50"]
    done = CliRunner().invoke(build(), [*command, "--rounds", "2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["requests"], found["tokens"], found["where"]) == (4, 200, "cpu")
    assert found["energy"]["source"] in ("measured", "estimated")
    # A processor's time is counted in hundredths of a second: fewer tokens could take none.
    assert found["energy"]["joules_per_token"] > 0
    assert found["operations"] > 2 * 11 * 64 * 64
    assert found["throughput"] > 0
    table = CliRunner().invoke(build(), [*command, "--grid", "0"]).output
    assert "2 x (8 + 50 tokens), 3 rounds" in table
    assert ", 0 g CO2" in table
    assert "first token" in table


def test_mistakes_are_told(folder: Path) -> None:
    done = CliRunner().invoke(build(), ["bench", str(folder), "--prompt", "61", "--output", "4"])
    assert done.exit_code == 2
    assert "65 tokens, but the model's context is 64" in done.output
    done = CliRunner().invoke(build(), ["bench", str(folder), "--device", "abacus"])
    assert "abacus" in done.output
    assert done.exit_code == 2
