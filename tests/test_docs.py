"""What the pages say is so: examples run, links lead somewhere, commands exist."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from treadle.cli.app import COMMANDS, build
from treadle.cli.targets import load_any, presets, recipe_files
from treadle.core.cards import read_cards

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#]+)\)")
CALL = re.compile(r"^    (treadle .*?)(?:\s{2,}#.*)?$", re.MULTILINE)
SHOWN = re.compile(r"^    \$ (treadle .*)\n((?:    .*\n)+)", re.MULTILINE)
EXAMPLE = [(n, i, code) for n, p in zip(NAMES, PAGES, strict=True)
           for i, code in enumerate(PYTHON.findall(p.read_text(encoding="utf-8")))
           if n != "CONTRIBUTING.md"]  # fmt: skip


@pytest.mark.parametrize(("page", "number", "code"), EXAMPLE)
def test_examples_run(page: str, number: int, code: str) -> None:
    exec(compile(code, f"{page}, example {number}", "exec"), {"__name__": "example"})  # noqa: S102


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "techniques.md"], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_right(page: Path) -> None:
    """The command is there, and where it names a recipe or preset, its overrides fit."""
    known = {command.name for command in COMMANDS}
    trees = {*recipe_files(), *presets()}
    text = page.read_text(encoding="utf-8").replace(" \\\n", "")  # a command over several lines
    for line in CALL.findall(text):
        words = shlex.split(line.partition("#")[0].partition(">")[0])
        assert words[1] in known or words[1].startswith("-"), line
        if words[1] in ("run", "show") and words[2] in trees:
            load_any(words[2], words[3:])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_shown_output_is_what_comes_out(page: Path) -> None:
    for command, output in SHOWN.findall(page.read_text(encoding="utf-8")):
        done = CliRunner().invoke(build(), shlex.split(command)[1:])
        assert done.output.strip() == output.strip()


def test_the_example_technique_of_contributing_works(tmp_path: Path) -> None:
    """Its file and its test, laid out in a copy of the package, pass."""
    technique, test = PYTHON.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    package = tmp_path / "src" / "treadle"
    package.mkdir(parents=True)
    for path in (ROOT / "src" / "treadle").iterdir():
        if path.name not in ("optim", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "optim").mkdir()
    for path in (ROOT / "src" / "treadle" / "optim").glob("*.py"):
        (package / "optim" / path.name).symlink_to(path)
    (package / "optim" / "step_decay.py").write_text(technique, encoding="utf-8")
    (tmp_path / "test_step_decay.py").write_text(test, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "test_step_decay.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "src"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_site_has_a_page_for_each_technique(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its card, its fields and its source; every link of a page leads to a page."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    site = importlib.import_module("docs_site")
    monkeypatch.setattr(site, "PAGES", tmp_path / "docs")
    site.write_pages()
    pages = {page.stem: page.read_text(encoding="utf-8") for page in tmp_path.rglob("ft.*.md")}
    assert set(pages) == {card.id for card in read_cards() if card.id.startswith("ft.")}
    assert "| `rank` | `int` | `16` |" in pages["ft.lora"]
    assert "y = W x + s B A x" in pages["ft.lora"]
    assert "def test_matches_peft(" in pages["ft.lora"]
    for page in tmp_path.glob("docs/*.md"):
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).is_file(), (page.name, target)
