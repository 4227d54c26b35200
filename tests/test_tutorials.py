"""The tutorials, command by command, in one fresh folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).resolve().parents[1] / "docs" / "tutorials"
IN_ORDER = ("support.md", "half-size.md")
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((TUTORIALS / page).read_text(encoding="utf-8"))


def test_every_tutorial_is_here() -> None:
    assert {path.name for path in TUTORIALS.glob("*.md")} == set(IN_ORDER)
    assert all(len(blocks(page)) >= 3 for page in IN_ORDER)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_commands_run_as_written(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    treadle = tools / "treadle"
    treadle.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m treadle "$@"\n')
    treadle.chmod(0o755)
    source = Path(__file__).resolve().parents[1] / "src"
    folder = tmp_path / "fresh"
    folder.mkdir()
    for page in IN_ORDER:
        for block in blocks(page):
            # PYTHONPATH of the reader's own shell, where a block sets none: treadle installed
            script = block.replace("PYTHONPATH=. ", f'PYTHONPATH=".:{source}" ')
            environment = os.environ | {
                "PATH": f"{tools}:{os.environ['PATH']}",
                "PYTHONPATH": str(source),
            }
            done = subprocess.run(
                ["sh", "-ec", script],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            print(done.stdout[-2000:], done.stderr[-2000:])
            assert done.returncode == 0, f"{page}:\n{block}\n{done.stdout}\n{done.stderr}"
    assert (folder / "runs" / "half" / "export" / "model.gguf").is_file()
