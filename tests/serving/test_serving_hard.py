"""Hard use: crowds, clients that leave or dawdle, limits, keys, failure, drain."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi")
from openai import APIError, AsyncOpenAI, AuthenticationError, InternalServerError, RateLimitError
from serving.tiny_server import WAIT, Brake, Running, long_engine, running, tiny_engine
from tiny_generation import tiny_model

from treadle.core.errors import TreadleError
from treadle.inference.engine import Engine
from treadle.serving.config import Limits, Serve
from treadle.serving.pool import Base
from treadle.serving.trial import Trial
from treadle.serving.verdict import read_events

CLIENTS = 200


def eventually(check: object) -> None:
    end = time.monotonic() + WAIT
    while not check():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def nothing_is_left(server: Running, name: str = "tiny") -> None:
    """No request in hand, no sequence in the engine, all of its slots and pages free."""
    worker = server.app.service.pool.workers()[name]
    eventually(lambda: not worker.tickets and not worker._numbers and not worker._jobs)
    # the engine lets go of a sequence in the step after its job is forgotten
    eventually(lambda: not worker.engine.running and not worker.engine.waiting)
    blocks = worker.engine.scheduler.blocks
    eventually(lambda: blocks.available == blocks.pages)
    eventually(lambda: server.app.gate.inside == 0)  # the answers end after their tickets


def test_two_hundred_clients_are_all_answered() -> None:
    """Some stream, some leave in the middle; each of the others gets what it would get alone."""
    with running(config=Serve(port=0, limits=Limits(requests=CLIENTS))) as server:

        async def one(client: AsyncOpenAI, number: int) -> str:
            asked = {"model": "tiny", "prompt": f"client {number % 7}", "max_tokens": 12}
            asked |= {"seed": number % 7, "temperature": 0.9}
            if number % 3 == 0:
                answer = await client.completions.create(**asked)
                return answer.choices[0].text
            text = ""
            stream = await client.completions.create(**asked, stream=True)
            async for chunk in stream:
                text += chunk.choices[0].text
                if number % 3 == 1 and text:
                    await stream.close()  # goes away
                    return ""
            return text

        async def crowd() -> list[str]:
            limits = httpx.Limits(max_connections=CLIENTS)
            async with (
                httpx.AsyncClient(limits=limits, timeout=WAIT * 4) as http,
                AsyncOpenAI(
                    base_url=f"{server.url}/v1", api_key="x", http_client=http, max_retries=0
                ) as client,
            ):
                return await asyncio.gather(*(one(client, i) for i in range(CLIENTS)))

        texts = asyncio.run(crowd())
        for seed in range(7):
            same = {t for i, t in enumerate(texts) if i % 7 == seed and i % 3 != 1}
            assert len(same) == 1
        nothing_is_left(server)


def test_overload_is_said_and_passes() -> None:
    brake = Brake()
    with running([brake.offer()], Serve(port=0, limits=Limits(requests=2))) as server:
        client = server.client
        streams = [client.completions.create(**_long(), stream=True) for _ in range(2)]
        with pytest.raises(RateLimitError) as caught:
            client.completions.create(**_long())
        assert caught.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()
        brake.release()
        nothing_is_left(server)
        assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices


def _long() -> dict[str, object]:
    return {"model": "tiny", "prompt": "abc", "max_tokens": 900, "temperature": 0}


def test_who_goes_away_is_forgotten() -> None:
    brake = Brake()
    with running([brake.offer()]) as server:
        url = f"{server.url}/v1/completions"
        for _ in range(5):
            with (
                httpx.Client() as client,
                client.stream("POST", url, json={**_long(), "stream": True}) as response,
            ):
                next(response.iter_bytes())
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=_long(), timeout=0.2)
        brake.release()
        nothing_is_left(server)


def test_slow_readers_hold_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """A client that reads nothing; others are served, and it loses its stream."""
    limits = Limits(stall_seconds=1.0)
    with running([Base("tiny", long_engine)], Serve(port=0, limits=limits)) as server:
        # what the kernel would keep for each is more than they ask for
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        address, sleepers = server.listener.getsockname(), []
        for _ in range(4):
            sleeper = socket.socket()
            sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sleeper.connect(address)
            asked = {**_long(), "stream": True, "logprobs": 5, "n": 2}
            body = json.dumps(asked).encode()
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\n\r\n"
            sleeper.sendall(head.encode() + body)
            sleepers.append(sleeper)
        answer = server.client.completions.create(model="tiny", prompt="b", max_tokens=5)
        assert answer.choices[0].finish_reason == "length"
        worker = server.app.service.pool.workers()["tiny"]
        eventually(lambda: not worker.tickets)
        eventually(lambda: caplog.text.count("a client read nothing") == len(sleepers))
        for sleeper in sleepers:
            sleeper.close()
        nothing_is_left(server)


def test_unread_text_is_one_piece() -> None:
    """What a reader has not fetched is merged, so it is bounded by the context."""
    from treadle.inference.request import Request
    from treadle.inference.sampling import Sampling
    from treadle.serving.metrics import Metrics
    from treadle.serving.worker import Worker

    worker = Worker(long_engine(), name="tiny", capacity=4, metrics=Metrics())

    async def dawdle() -> int:
        request = Request((1, 2), Sampling(max_tokens=200, temperature=0), n=2)
        with worker.open(request, seconds=WAIT, news=asyncio.Event()) as ticket:
            while not all(p.finish for p in ticket._unread.values()) or len(ticket._unread) < 2:
                await asyncio.sleep(0.01)
            pieces = ticket.take()
            assert all(len(piece.tokens) == 200 for piece in pieces)
            return len(pieces)

    assert asyncio.run(dawdle()) == 2
    worker.close()
    worker.join()


def test_answers_that_take_too_long() -> None:
    brake = Brake()
    with running([brake.offer()], Serve(port=0, limits=Limits(seconds=0.2))) as server:
        with pytest.raises(InternalServerError) as caught:
            server.client.completions.create(**_long())
        assert caught.value.status_code == 504
        with pytest.raises(APIError, match="longer than the server allows"):
            list(server.client.completions.create(**_long(), stream=True))
        brake.release()
        nothing_is_left(server)


def test_keys() -> None:
    with running(config=Serve(port=0, keys=("open sesame",))) as server:
        with pytest.raises(AuthenticationError, match="valid API key"):
            server.client.models.list()
        assert server.client.with_options(api_key="open sesame").models.list().data
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(server.url).status_code == 200


def test_an_engine_that_fails_is_replaced() -> None:
    made: list[Engine] = []

    def fragile() -> Engine:
        engine = tiny_engine()
        if not made:

            def broken(*args: object) -> None:
                raise RuntimeError("out of memory")

            engine.runner.model.logits = broken  # type: ignore[method-assign]
        made.append(engine)
        return engine

    with running([Base("tiny", fragile)]) as server:
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 3}
        with pytest.raises(InternalServerError) as caught:
            server.client.completions.create(**asked)
        assert caught.value.status_code == 503
        assert "out of memory" not in str(caught.value), "the inside is no client's business"
        assert server.client.completions.create(**asked).choices[0].text is not None
        assert len(made) == 2


def test_a_model_that_cannot_be_loaded_is_said() -> None:
    def absent() -> Engine:
        raise TreadleError("no such file; fetch it first")

    with running([Base("tiny", tiny_engine), Base("gone", absent)]) as server:
        for _ in range(2):
            with pytest.raises(InternalServerError, match="fetch it first"):
                server.client.completions.create(model="gone", prompt="a")
        server.client.completions.create(model="tiny", prompt="a", max_tokens=1)


def test_models_are_loaded_on_demand_and_unloaded() -> None:
    size = sum(p.nbytes for p in tiny_model().parameters())
    loaded: list[str] = []

    def opener(name: str) -> Base:
        return Base(name, lambda: loaded.append(name) or tiny_engine())  # type: ignore[func-returns-value]

    with running(
        [opener("a"), opener("b"), opener("c")], Serve(port=0, memory_bytes=int(2.5 * size))
    ) as server:
        pool = server.app.service.pool
        assert pool.workers() == {}
        for name in "abac":
            server.client.completions.create(model=name, prompt="x", max_tokens=1)
        assert loaded == ["a", "b", "c"]
        assert set(pool.workers()) == {"a", "c"}, "the least recently used makes room"
    with running([opener("a"), opener("b")], Serve(port=0, idle_seconds=0.4)) as server:
        pool = server.app.service.pool
        for name in "ab":
            server.client.completions.create(model=name, prompt="x", max_tokens=1)
            eventually(lambda: not pool.workers())
            server.client.completions.create(model=name, prompt="x", max_tokens=1)
            assert loaded[-2:] == [name, name], "what is unloaded is loaded again when asked for"
    with (
        running([opener("a")], Serve(port=0, memory_bytes=size // 2)) as server,
        pytest.raises(InternalServerError, match=r"does not fit: its weights.*--memory allows"),
    ):
        server.client.completions.create(model="a", prompt="x", max_tokens=1)


def test_drain_finishes_what_was_begun() -> None:
    brake = Brake()
    with running([brake.offer()], Serve(port=0, drain_seconds=WAIT)) as server:
        stream = server.client.completions.create(**_long(), stream=True)
        text = next(iter(stream)).choices[0].text
        server.stop()
        eventually(lambda: server.app.gate.draining)
        refused = httpx.post(f"{server.url}/v1/completions", json=_long())
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        brake.release()
        chunks = list(stream)
        text += "".join(c.choices[0].text for c in chunks)
        assert chunks[-1].choices[0].finish_reason == "length"
    assert text


def test_drain_has_an_end() -> None:
    with running([Brake().offer()], Serve(port=0, drain_seconds=0.1)) as server:
        stream = server.client.completions.create(**_long(), stream=True)
        next(iter(stream))
        server.stop()
        with pytest.raises(APIError, match="unloaded"):
            list(stream)


def test_trials_record_what_they_serve(tmp_path: Path) -> None:
    log = tmp_path / "votes.jsonl"
    log.write_text('{"event": "serv')  # a killed server's last line
    offers = [Base("a", tiny_engine), Base("b", lambda: tiny_engine(1))]
    trials = [
        Trial(name="duel", a="a", b="b"),
        Trial(name="dark", a="a", b="b", shadow=True, shadows=12),
    ]
    with running(offers, trials=trials, trial_log=log) as server:
        client = server.client
        for user in range(12):
            asked = {"prompt": "xyz", "max_tokens": 4, "temperature": 0, "user": str(user)}
            answer = client.completions.create(model="duel", **asked)
            assert answer.model == "duel", "who votes does not know which it was"
            arm = trials[0].arm(str(user))
            same = client.completions.create(model=arm, **asked)
            assert answer.choices[0].text == same.choices[0].text
            ballot = {"id": answer.id, "good": user % 2 == 0}
            assert httpx.post(f"{server.url}/v1/votes", json=ballot).status_code == 200
            assert httpx.post(f"{server.url}/v1/votes", json=ballot).status_code == 404
            shown = client.completions.create(model="dark", **asked)
            assert (
                shown.choices[0].text
                == client.completions.create(model="a", **asked).choices[0].text
            )
        eventually(lambda: read_events(log)["dark"].shadows == 12)
    records = read_events(log)
    assert len(records["duel"].votes) == 12
    assert records["duel"].arms["a"].answers + records["duel"].arms["b"].answers == 12
    assert records["dark"].arms["b"].answers == 12
    assert "xyz" not in log.read_text(), "texts are not kept"


def test_engines_thread_ends_with_the_server() -> None:
    before = set(threading.enumerate())
    with running() as server:
        server.client.completions.create(model="tiny", prompt="a", max_tokens=1)
        assert [t for t in set(threading.enumerate()) - before if t.name == "engine tiny"]
    eventually(
        lambda: not [t for t in set(threading.enumerate()) - before if t.name == "engine tiny"]
    )
