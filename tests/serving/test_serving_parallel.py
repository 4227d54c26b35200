"""A model over two processes behind one server: the answers are those of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("fastapi")
from serving.served_process import Process, served, write_model
from typer.testing import CliRunner

from treadle.cli.app import build

WAIT = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("parallel") / "tiny")


def answers(server: Process) -> list[Any]:
    client, texts = server.client, []
    for seed in range(3):
        asked = {"model": "a", "prompt": f"The loom {seed}", "max_tokens": 12, "seed": seed}
        whole = client.completions.create(**asked, n=2, logprobs=2, echo=True)
        texts.append([(c.text, c.finish_reason) for c in whole.choices])
        texts.append(
            "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True))
        )
    return texts


def gone(processes: list[psutil.Process]) -> bool:
    end = time.monotonic() + WAIT
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_answer_as_one(model: Path) -> None:
    with served(f"a={model}", "--device", "cpu") as one:
        wanted = answers(one)
    with served(f"a={model}", "--tensor-parallel", "2", "--idle", "2") as two:
        others = psutil.Process(two.child.pid).children()
        assert len(others) == 1
        assert answers(two) == wanted
        end = time.monotonic() + WAIT
        while two.client.models.retrieve("a").loaded:
            assert time.monotonic() < end, "it is not unloaded when idle"
            time.sleep(0.2)
        assert answers(two) == wanted, "and opened again, in both"
        two.child.send_signal(signal.SIGTERM)
        assert two.child.wait(WAIT) == 0
        assert gone(others)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_process_that_is_killed_ends_the_others(model: Path) -> None:
    with served(f"a={model}", "--tensor-parallel", "2") as server:
        (other,) = psutil.Process(server.child.pid).children()
        other.kill()
        assert server.child.wait(WAIT) == 1
    with served(f"a={model}", "--tensor-parallel", "2") as server:
        others = psutil.Process(server.child.pid).children()
        server.child.kill()
        assert gone(others), "nobody is left behind"


@pytest.mark.slow
@pytest.mark.distributed
def test_generate_starts_the_others_itself(model: Path) -> None:
    def said(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "treadle", "generate", str(model), "loom", *more]
        env = {**os.environ, "PYTHONPATH": "src"}
        return subprocess.run(
            command, check=False, env=env, capture_output=True, text=True, timeout=WAIT * 2
        )

    one = said("--max-tokens", "9", "--device", "cpu")
    two = said("--max-tokens", "9", "--tensor-parallel", "2")
    assert two.stdout == one.stdout
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    many = said("--tensor-parallel", "3")
    assert many.returncode == 2
    assert many.stderr.count("2 groups of heads, too few for 3 processes") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["b"], "leave out all but one model"),
        (["--adapter", "x=y"], "leave out --adapter"),
        (["--trial", "duel=a:b"], "leave out --trial"),
        (["--replicas", "2"], "leave out --replicas"),
        (["--prefixes", "kept"], "leave out --prefixes"),
        (["--device", "native"], "native kernels run in one process"),
    ],
)
def test_what_does_not_go_with_it(more: list[str], message: str) -> None:
    result = CliRunner().invoke(build(), ["serve", "a", "--tensor-parallel", "2", *more])
    assert result.exit_code
    assert message in " ".join((result.output + str(result.exception)).split())
