"""The server as a process: killed and started again, weighed under load, told to stop."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

pytest.importorskip("fastapi")
from openai import AsyncOpenAI
from serving.served_process import Process, served, write_model
from typer.testing import CliRunner

from treadle.cli.app import build
from treadle.serving.verdict import read_events

CLIENTS, ROUNDS = 200, 5
LONG = "What a long thread it was, " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "tiny")


def vote(server: Process, user: str) -> None:
    answer = server.client.completions.create(model="duel", prompt="xyz", max_tokens=4, user=user)
    ballot = {"id": answer.id, "good": True}
    assert httpx.post(f"{server.url}/v1/votes", json=ballot).status_code == 200


def cached(server: Process) -> int:
    answer = server.client.responses.create(model="a", input=LONG, max_output_tokens=2)
    return answer.usage.input_tokens_details.cached_tokens


@pytest.mark.slow
def test_killed_and_started_again(model: Path, tmp_path: Path) -> None:
    """Votes and prefixes are on disk; a client in the middle of an answer is not left waiting."""
    log = tmp_path / "votes.jsonl"
    arguments = [f"a={model}", f"b={model}", "--trial", "duel=a:b", "--trial-log", log]
    arguments += ["--prefixes", tmp_path / "prefixes"]
    with served(*arguments) as server:
        for user in "12345":
            vote(server, user)
        assert cached(server) == 0
        body = {"model": "a", "prompt": "abc", "max_tokens": 900, "stream": True}
        body["ignore_eos"] = True
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            chunks = stream.iter_bytes()
            next(chunks)
            server.child.send_signal(signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                for _ in chunks:
                    pass
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
    with log.open("ab") as file:
        file.write(b'{"event": "vo')  # a line that the kill tore
    with served(*arguments) as server:
        assert cached(server) > len(LONG) // 2
        for user in "678":
            vote(server, user)
    assert len(read_events(log)["duel"].votes) == 8
    report = CliRunner().invoke(build(), ["trial", str(log)])
    assert report.exit_code == 0, report.output
    assert "votes good" in report.output


@pytest.mark.slow
def test_told_to_stop_it_finishes_and_ends(model: Path) -> None:
    with served(f"a={model}") as server:
        stream = server.client.completions.create(
            model="a", prompt="abc", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        first = next(iter(stream))
        server.child.send_signal(signal.SIGTERM)
        chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.child.wait(60) == 0


@pytest.mark.slow
def test_two_hundred_clients_in_bounded_memory(model: Path) -> None:
    """Rounds of a crowd, of which some leave in the middle; what a round leaves behind is nothing.

    The first two rounds fill caches and the allocator's pools, which then stay as they are.
    """
    with served(f"a={model}", "--requests", str(CLIENTS)) as server:
        process = psutil.Process(server.child.pid)
        sizes = []
        for number in range(ROUNDS):
            assert asyncio.run(crowd(server, number)) == CLIENTS
            idle(server)
            sizes.append(process.memory_info().rss)
        grown = sizes[-1] - sizes[1]
        assert grown < 24 * 2**20, [size // 2**20 for size in sizes]
        assert process.num_threads() < 40
        assert process.num_fds() < 100, "connections are closed"


async def crowd(server: Process, number: int) -> int:
    """How many clients were content."""

    async def one(client: AsyncOpenAI, place: int) -> bool:
        asked = {"model": "a", "prompt": f"{number} {place} " * 20, "max_tokens": 40}
        if place % 4 == 0:
            return bool((await client.completions.create(**asked)).usage.completion_tokens)
        stream = await client.completions.create(**asked, stream=True)
        async for _ in stream:
            if place % 4 == 1:
                await stream.close()
                return True
        return True

    limits = httpx.Limits(max_connections=CLIENTS)
    async with (
        httpx.AsyncClient(limits=limits, timeout=240) as http,
        AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="x", http_client=http, max_retries=0
        ) as client,
    ):
        return sum(await asyncio.gather(*(one(client, place) for place in range(CLIENTS))))


def idle(server: Process) -> None:
    """No request in hand, and no page of the cache held by any."""
    end = time.monotonic() + 60
    wanted = ('treadle_requests_open{model="a"} 0.0', 'treadle_cache_pages_held{model="a"} 0.0')
    while not all(line in httpx.get(f"{server.url}/metrics").text for line in wanted):
        assert time.monotonic() < end, "requests are left"
        time.sleep(0.05)
    assert json.loads(httpx.get(f"{server.url}/health").text)["status"] == "ok"
