"""A server under load: a scripted one whose clock the test turns, and treadle's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from treadle.cli.app import build
from treadle.core.errors import TreadleError
from treadle.evals.load import Server, share_out
from treadle.evals.speed import Workload, speed


class Stage:
    """A clock that stands still until the server moves it, once its reader has looked at it."""

    def __init__(self) -> None:
        self.now, self.looks, self.changed = 0.0, 0, threading.Condition()

    def __call__(self) -> float:
        with self.changed:
            self.looks += 1
            self.changed.notify_all()
            return self.now

    def move(self, seconds: float) -> None:
        with self.changed:
            self.now += seconds

    def looked(self, times: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.looks >= times, 60)


@contextmanager
def scripted(answer: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            answer(self, json.loads(body))

        def log_message(self, *args: object) -> None:
            pass

    with listening(Handler) as url:
        yield url


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def say(http: BaseHTTPRequestHandler, data: object) -> None:
    text = data if isinstance(data, str) else json.dumps(data)
    http.wfile.write(f"data: {text}\n\n".encode())
    http.wfile.flush()


def begin(http: BaseHTTPRequestHandler) -> None:
    http.send_response(200)
    http.send_header("content-type", "text/event-stream")
    http.end_headers()


def test_waits_are_those_of_the_server() -> None:
    """Half a second to the first piece, then 0.1 and 0.3; five tokens in three pieces."""
    clock, asked = Stage(), []

    def answer(http: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        asked.append((http.path, http.headers["authorization"], body))
        begin(http)
        looks = clock.looks
        say(http, {"choices": [{"text": ""}]})  # held back: no token to be seen
        for wait in (0.5, 0.1, 0.3):
            clock.move(wait)
            looks += 1
            http.wfile.write(b": a comment\n\n")
            say(http, {"choices": [{"text": "x"}], "usage": None})
            clock.looked(looks)
        say(http, {"choices": [], "usage": {"completion_tokens": 5, "prompt_tokens": 11}})
        say(http, "[DONE]")

    load = Workload(prompt=9, output=5, rounds=2)
    with scripted(answer) as url:
        server = Server(f"{url}/v1/", "some", key="sesame", exact=True)
        rounds = server.measure(load, clock)
    assert len(asked) == 3, "one more round warms up"
    for (timeline,) in rounds:
        assert timeline.prompt == 11
        times = [(pytest.approx(t), n) for t, n in ((0.5, 2), (0.6, 2), (0.9, 1))]
        assert [(t - timeline.asked, n) for t, n in timeline.arrivals] == times
    found = speed(rounds)
    assert found.first_token.p50 == pytest.approx(0.5)
    assert found.prefill == pytest.approx(22)
    assert found.decode == pytest.approx(3 / 0.4)
    path, key, body = asked[0]
    assert (path, key) == ("/v1/completions", "Bearer sesame")
    assert body["ignore_eos"]
    assert (body["max_tokens"], len(body["prompt"].split())) == (5, 9)
    assert len({body["prompt"] for _, _, body in asked}) == 3


def test_clients_come_together() -> None:
    """Each of the four waits until all four are there."""
    meeting = threading.Barrier(4, timeout=60)

    def answer(http: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        meeting.wait()
        assert "ignore_eos" not in body
        begin(http)
        say(http, {"choices": [{"text": "x"}]})
        say(http, "[DONE]")

    with scripted(answer) as url:
        server = Server(url, "some", key=None, exact=False)
        rounds = server.measure(Workload(batch=4, rounds=1), lambda: 0.0)
    assert [len(answers) for answers in rounds] == [4]
    assert [a.arrivals for a in rounds[0]] == [[(0.0, 1)]] * 4


def refuse(http: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    text = json.dumps({"error": {"message": "no model `some`"}}).encode()
    http.send_response(404)
    http.end_headers()
    http.wfile.write(text)


def fail(http: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    http.send_response(502)
    http.end_headers()
    http.wfile.write(b"<html>bad gateway")


def break_off(http: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    begin(http)
    say(http, {"error": {"message": "the engine failed"}})


def babble(http: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    begin(http)
    say(http, "nothing of note")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (refuse, "answers 404: no model `some`"),
        (fail, "answers 502: <html>bad gateway"),
        (break_off, "the engine failed"),
        (babble, "no JSON object"),
    ],
)
def test_what_servers_do_wrong_is_told(answer: Any, message: str) -> None:
    with scripted(answer) as url, pytest.raises(TreadleError, match=message):
        Server(url, "some", key=None, exact=True).measure(Workload(rounds=1), lambda: 0.0)


def test_bad_addresses() -> None:
    for url in ("localhost:8000", "ftp://here", "http://"):
        with pytest.raises(TreadleError, match="write it http"):
            Server(url, "some", key=None, exact=True)
    server = Server("http://127.0.0.1:9", "some", key=None, exact=True)
    with pytest.raises(TreadleError, match=r"http://127\.0\.0\.1:9: .*refused"):
        server.measure(Workload(rounds=1), lambda: 0.0)


def test_the_energy_is_that_of_the_measured_rounds() -> None:
    """The server has used 10 J before the warm-up, 30 after it and 70 at the end."""
    told, served = iter((30.0, 70.0)), 0

    class Http(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            begin(self)
            self.wfile.write(
                b"# TYPE treadle_energy_joules gauge\n"
                + f'treadle_energy_joules{{source="measured"}} {next(told)}\n'.encode()
            )

        def do_POST(self) -> None:
            nonlocal served
            served += 1
            self.rfile.read(int(self.headers["content-length"]))
            begin(self)
            say(
                self,
                {"choices": [{"text": "x"}], "usage": {"prompt_tokens": 8, "completion_tokens": 4}},
            )

        def log_message(self, *args: object) -> None:
            pass

    command = ["bench", "m", "--output", "4", "--rounds", "2", "--grid", "360", "--json"]
    with listening(Http) as url:
        found = json.loads(CliRunner().invoke(build(), [*command, "--url", url]).output)
    assert served == 3
    assert found["energy"] == {
        "joules_per_token": 40 / 8,
        "source": "measured",
        "grams_per_million": pytest.approx(5 / 3.6e6 * 360 * 1e6),
    }


def test_who_does_not_tell_is_not_billed() -> None:
    def answer(http: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        begin(http)
        say(http, {"choices": [{"text": "x"}]})

    with scripted(answer) as url:
        done = CliRunner().invoke(build(), ["bench", "m", "--rounds", "1", "--url", url])
    assert "energy unknown: the server does not tell" in done.output


def test_tokens_are_shared_out() -> None:
    pieces = [(1.0, 1), (2.0, 1), (3.0, 1)]
    assert [n for _, n in share_out(pieces, 3)] == [1, 1, 1]
    assert [n for _, n in share_out(pieces, 8)] == [3, 3, 2]
    assert [n for _, n in share_out(pieces, 2)] == [1, 1, 1], "what was seen was there"


def test_the_command_measures_a_server() -> None:
    pytest.importorskip("fastapi")
    from serving.tiny_server import running

    command = ["bench", "tiny", "--batch", "3", "--prompt", "8", "--output", "6", "--rounds", "2"]
    with running() as server:
        done = CliRunner().invoke(build(), [*command, "--url", server.url, "--json"])
        found = json.loads(done.output)
        assert (found["requests"], found["tokens"]) == (6, 36)
        assert found["energy"]["joules_per_token"] > 0
        assert found["energy"]["source"] in ("measured", "estimated")
        assert 0 < found["first_token"]["p50"] <= found["first_token"]["p99"]
        done = CliRunner().invoke(build(), [*command, "--url", server.url])
        assert "J/token" in done.output
        assert "GFLOP" not in done.output, "what model it runs is not known"
        assert "decode" in done.output
        wrong = CliRunner().invoke(build(), ["bench", "tony", "--url", server.url])
        assert "did you mean `tiny`" in wrong.output
        assert wrong.exit_code == 2
