"""Two replicas behind one port, by Ray Serve on this machine."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from typer.testing import CliRunner

pytest.importorskip("fastapi")
pytest.importorskip("ray.serve")
from serving.served_process import Process, served, write_model

from treadle.cli.app import build

SECONDS = 120.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    model = write_model(tmp_path_factory.mktemp("replicas") / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as it:
        port = it.getsockname()[1]
    with served(f"a={model}", "--replicas", "2", "--port", str(port)) as it:
        yield it


def processes(server: Process, wanted: int) -> set[int]:
    """Who answers, until so many have been met."""
    end, met = time.monotonic() + SECONDS, set()
    while len(met) < wanted:
        assert time.monotonic() < end, f"only {met} answer"
        answer = httpx.get(f"{server.url}/health", timeout=SECONDS)
        if answer.status_code == 200:
            met.add(answer.json()["process"])
    return met


@pytest.mark.slow
def test_two_replicas_answer_alike(server: Process) -> None:
    first, second = processes(server, 2)
    assert server.child.pid not in (first, second)
    asked = {"model": "a", "prompt": "abc", "max_tokens": 20, "seed": 3}
    ask = server.client.with_options(timeout=SECONDS).completions.create
    texts = {ask(**asked).choices[0].text for _ in range(20)}
    assert len(texts) == 1
    streamed = list(ask(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) in texts
    assert len(streamed) > 3, "the proxy passes pieces on as they come"
    missing = httpx.get(f"{server.url}/v1/models/none", timeout=SECONDS)
    assert missing.json()["error"]["code"] == "model_not_found"

    os.kill(first, signal.SIGKILL)  # the other goes on, and a new one comes
    again = processes(server, 2)
    assert first not in again or second in again
    assert ask(**asked).choices[0].text in texts
    server.child.send_signal(signal.SIGTERM)
    assert server.child.wait(SECONDS) == 0


def test_what_replicas_cannot_do_is_refused() -> None:
    command = ["serve", "x", "--replicas", "2"]
    done = CliRunner().invoke(build(), [*command, "--port", "0"])
    assert "name one with --port" in done.output
    done = CliRunner().invoke(build(), [*command, "--trial", "t=x:y"])
    assert "leave out --replicas" in done.output
