"""The command line: quick, plain, and clear about mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from treadle.cli.app import COMMANDS, build
from treadle.core.cards import read_cards

RECIPE = '''
from collections.abc import Mapping
from typing import Any

from treadle.core.errors import TreadleError
from treadle.core.files import write_text
from treadle.core.pipeline import Pipeline, Reads, Step, Workspace


class {prefix}Write(Step):
    text: str = "warp"
    wrong: str = ""

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        if self.wrong == "ctrl-c":
            raise KeyboardInterrupt
        if self.wrong:
            raise TreadleError(self.wrong)
        write_text(workspace.folder / "text.txt", self.text)
        return {{"letters": len(self.text)}}


def weave():
    """Two threads."""
    return Pipeline(
        name="weave",
        steps=({prefix}Write(name="warp"), {prefix}Write(name="weft", text="weft")),
    )
'''


def treadle(*arguments: str, debug: bool = False) -> Result:
    return CliRunner().invoke(build(debug=debug), arguments)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's own recipe; its classes have a name of their own in each test."""
    monkeypatch.chdir(tmp_path)
    prefix = f"Cli{abs(hash(tmp_path))}"
    (tmp_path / "weave.py").write_text(RECIPE.format(prefix=prefix))
    return "weave.py"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_help_needs_neither_torch_nor_the_configuration_tree() -> None:
    code = (
        "import sys, treadle.cli.main; sys.argv = ['treadle', '--help']\n"
        "try: treadle.cli.main.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print([m for m in ('torch', 'pydantic', 'rich') if m in sys.modules])"
    )
    shown = python(code)
    assert shown.endswith("[]\n")
    assert all(command.name in shown for command in COMMANDS)


def test_listing_techniques_imports_no_torch() -> None:
    code = (
        "import sys, treadle.cli.main; sys.argv = ['treadle', 'techniques', '--json']\n"
        "try: treadle.cli.main.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print('torch' in sys.modules)"
    )
    assert python(code).endswith("False\n")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_every_command_has_help_with_an_example(command: object) -> None:
    name = command.name  # type: ignore[attr-defined]
    shown = treadle(name, "--help")
    assert shown.exit_code == 0
    assert f"Examples:\n    treadle {name}" in shown.output


def test_version() -> None:
    assert treadle("--version").output.startswith("treadle 0.")
    assert "torch" in treadle("version").output


def test_a_mistyped_command_gets_a_hint() -> None:
    shown = treadle("shwo")
    assert shown.exit_code == 2
    assert "Did you mean 'show'?" in shown.output


# techniques


def test_techniques_as_rows() -> None:
    rows = json.loads(treadle("techniques", "--json").stdout)
    assert [r["id"] for r in rows] == [c.id for c in read_cards()]
    assert all(list(r) == ["id", "summary", "paper", "code", "recipe", "oracle"] for r in rows)
    assert all(all(r.values()) for r in rows)


def test_one_technique_in_full() -> None:
    shown = treadle("techniques", "arch.rope")
    assert "tests/nn/" in shown.output
    assert "treadle/nn/rope.py:" in shown.output


def test_techniques_are_found_by_a_word() -> None:
    shown = treadle("techniques", "YARN").output
    assert "arch.rope" in shown
    assert "arch.norms" not in shown


def test_an_unknown_technique_gets_a_hint() -> None:
    shown = treadle("techniques", "arch.roep")
    assert shown.exit_code == 2
    assert "no technique `arch.roep`; did you mean `arch.rope`?" in shown.stderr


# run and show


def test_run_does_each_step_once(recipe: str) -> None:
    assert treadle("run", recipe).exit_code == 0
    assert Path("runs/weave/weft/text.txt").read_text() == "weft"
    again = treadle("run", recipe)
    assert again.stderr.count("skipped") == 2
    changed = treadle("run", recipe, "steps.1.text=silk")
    assert changed.stderr.count("skipped") == 1
    assert Path("runs/weave/weft/text.txt").read_text() == "silk"


def test_report_of_a_run(recipe: str) -> None:
    assert treadle("run", recipe, "steps.warp.text=spun silk").exit_code == 0
    shown = treadle("report", "runs/weave")
    assert shown.exit_code == 0, shown.output
    page = Path(shown.stdout.strip())
    assert page == Path("runs/weave/report.html")
    assert "weft" in page.read_text()
    assert treadle("run", recipe, "steps.warp.text=spun silk").stderr.count("skipped") == 2
    wrong = treadle("report", "runs/waeve")
    assert wrong.exit_code == 2
    assert "error: " in wrong.stderr


def test_run_in_a_folder_of_ones_own(recipe: str) -> None:
    assert treadle("run", recipe, "--dir", "here").exit_code == 0
    assert Path("here/warp/text.txt").is_file()


def test_what_is_shown_runs(recipe: str) -> None:
    shown = treadle("show", recipe, "steps.0.text=wool")
    assert shown.exit_code == 0
    Path("mine.yaml").write_text(shown.stdout)
    assert treadle("run", "mine.yaml").exit_code == 0
    assert Path("runs/weave/warp/text.txt").read_text() == "wool"
    assert treadle("show", "runs/weave").stdout == shown.stdout


def test_presets_of_model_families_are_shown() -> None:
    shown = treadle("show", "gpt2", "dim=64")
    assert shown.stdout.startswith("kind: Decoder\nvocab: 50257\ndim: 64\n")
    assert "did you mean" in treadle("show", "gpt3").stderr


def test_a_wrong_override_says_what_is_near(recipe: str) -> None:
    shown = treadle("run", recipe, "steps.0.txet=x")
    assert shown.exit_code == 2
    assert "override `steps.0.txet=x`" in shown.stderr
    assert "did you mean `text`?" in shown.stderr
    assert not Path("runs").exists()


def test_a_mistake_in_a_step_is_a_message_and_with_debug_a_traceback(recipe: str) -> None:
    wrong = ("run", recipe, "steps.1.wrong=no thread left")
    shown = treadle(*wrong)
    assert shown.exit_code == 2
    assert "error: no thread left" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert Path("runs/weave/warp/manifest.json").is_file()
    assert str(treadle(*wrong, debug=True).exception) == "no thread left"


def test_ctrl_c_says_that_the_run_goes_on(recipe: str) -> None:
    shown = treadle("run", recipe, "steps.weft.wrong=ctrl-c")
    assert shown.exit_code == 130
    assert "the same command goes on" in shown.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_real_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    text = RECIPE.format(prefix="CliSleep").replace(
        "raise KeyboardInterrupt", "__import__('time').sleep(60)"
    )
    (tmp_path / "weave.py").write_text(text)
    # A shell's background job ignores Ctrl-C, and would hand that down.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "treadle.cli.main", "run", "weave.py", "steps.0.wrong=ctrl-c"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")},
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    assert process.stderr
    assert "2 steps" in process.stderr.readline()
    while not (tmp_path / "runs/weave/warp/begun.json").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "the same command goes on" in process.communicate(timeout=30)[1]
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("no-such-recipe", "no recipe or preset `no-such-recipe`"),
        ("wave.yaml", "wave.yaml: no such file; did you mean `weave.yaml`?"),
        ("nothing.py", "nothing.py: no such file"),
        ("empty.py", "define a function `empty()`"),
        ("binary.yaml", "is not text"),
        ("list.yaml", "expected a mapping"),
        ("layer.yaml", "is a RMSNorm; what runs is a Pipeline"),
    ],
)
def test_a_wrong_target_is_named(
    target: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weave.yaml").write_text("kind: Pipeline\n")
    Path("empty.py").write_text("")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    Path("list.yaml").write_text("- 1\n")
    Path("layer.yaml").write_text("kind: RMSNorm\n")
    shown = treadle("show", target)
    assert shown.exit_code == 2
    assert found in shown.stderr


# schema


def test_schema_of_a_shape() -> None:
    schema = json.loads(treadle("schema", "RMSNorm").stdout)
    assert {"$ref": "#/$defs/RMSNorm", "required": ["kind"]} in schema["anyOf"]
    shown = treadle("schema", "RMSNrom")
    assert shown.exit_code == 2
    assert "did you mean `RMSNorm`?" in shown.stderr
