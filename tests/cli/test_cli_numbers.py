"""--dtype, --quantize, --decode and --cache of the commands that generate: what runs, what not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer
from typer.testing import CliRunner, Result

from treadle.cli.app import build
from treadle.cli.numbers import Numbers
from treadle.models.hub.save import save_hf
from treadle.models.llama import tiny_llama
from treadle.quantization.float8 import Float8Weight


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    decoder = tiny_llama(tokenizer.vocab_size, dim=64, layers=2, hidden=96, context=128)
    save_hf(decoder.replace(std=0.1).build(), tmp_path)
    tokenizer.save(tmp_path)
    return tmp_path


def invoke(command: str, path: Path, *options: str) -> Result:
    rest = ["the loom", "--max-tokens", "5"] if command == "generate" else ["--rounds", "1"]
    return CliRunner().invoke(build(), [command, str(path), *rest, "--device", "cpu", *options])


def told(path: Path, *options: str) -> str:
    done = invoke("generate", path, *options)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_text_is_that_of_the_plain_path(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    compiled: list[object] = []

    def traced(function, **settings):
        compiled.append(function)
        return real(function, backend="eager", **settings)

    monkeypatch.setattr(torch, "compile", traced)
    plain = told(stored)
    assert told(stored, "--cache", "PagesOnly") == plain
    assert told(stored, "--decode", "Compiled") == plain
    assert len(compiled) == 1
    assert len(told(stored, "--dtype", "bfloat16", "--quantize", "Float8")) > 0


def test_weights_are_kept_as_asked() -> None:
    torch.manual_seed(0)
    model = tiny_llama(32, dim=64, layers=2, hidden=96, context=128).build()
    put = Numbers("bfloat16", "{kind: Float8, kernel: {kind: DynamicFloat8}}").put(model, "cpu")
    assert {p.dtype for p in put.parameters()} == {torch.bfloat16}
    packed = [m for m in put.modules() if isinstance(m, Float8Weight)]
    assert len(packed) == 14
    assert put.logits(put(torch.arange(9))).isfinite().all()


def test_bench_measures_them(stored: Path) -> None:
    options = ("--batch", "2", "--prompt", "8", "--output", "4", "--json", "--dtype", "bfloat16")
    done = invoke("bench", stored, *options, "--cache", "PagesOnly", "--quantize", "Int8")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["decode"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "bfloat"), "there are float32, bfloat16, float16"),
        (("--quantize", "Int9"), "Int9"),
        (("--decode", "Graphs"), "the model is on cpu"),
        (("--decode", "Compiled", "--cache", "Paged"), "--cache PagesOnly"),
        (("--dtype", "bfloat16", "--tensor-parallel", "2"), "one process holds whole"),
        (("--decode", "Compiled", "--experts", "2"), "one process holds whole"),
        (("--device", "native", "--dtype", "bfloat16"), "leave --dtype and --quantize out"),
    ],
)
def test_what_does_not_go_together_is_refused(
    stored: Path, options: tuple[str, ...], message: str
) -> None:
    done = invoke("generate", stored, *options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
