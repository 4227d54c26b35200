"""A server of the OpenAI protocol under load: so many clients that stream completions at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from random import Random
from typing import Any
from urllib.parse import SplitResult, urlsplit

from treadle.core.errors import TreadleError
from treadle.core.meter import Source
from treadle.evals.speed import Clock, Timeline, Workload

WORDS = """
wool loom thread cloth weft warp hand wheel house water stone light time year river town road
tree field market winter summer morning night paper table window door garden horse bread salt
"""
"""Each a token in the vocabularies of most models."""
SECONDS = 600.0
"""Longest silence of a server."""
JOULES = re.compile(r'^treadle_energy_joules\{source="(\w+)"\} (\S+)$', re.MULTILINE)


class Server:
    """Where to ask, and for what.

    Args:
        url: with or without the `/v1` at its end.
        key: an API key, if one is needed.
        exact: ask with `ignore_eos` for answers of full length; a field of treadle, vLLM and
            llama-server, not of OpenAI.

    Raises:
        TreadleError: this is no http address.
    """

    def __init__(self, url: str, model: str, *, key: str | None, exact: bool) -> None:
        self.address: SplitResult = urlsplit(url.rstrip("/").removesuffix("/v1"))
        if self.address.scheme not in ("http", "https") or not self.address.hostname:
            raise TreadleError(f"--url {url}: write it http://HOST:PORT")
        self.url, self.model, self.key, self.exact = url, model, key, exact

    def measure(
        self, load: Workload, clock: Clock, warm: Callable[[], None] = lambda: None
    ) -> list[list[Timeline]]:
        """Rounds of `load.batch` clients at once, after one that warms the server up.

        Args:
            warm: called when that one has ended.

        Raises:
            TreadleError: the server cannot be reached, refuses, or breaks off.
        """
        with ThreadPoolExecutor(load.batch) as clients:
            found: list[list[Timeline]] = []
            for number in range(load.rounds + 1):
                if number == 1:
                    warm()
                texts = [words(load, number, row) for row in range(load.batch)]
                found.append(list(clients.map(lambda text: self._ask(text, load, clock), texts)))
        return found[1:]

    def spent(self) -> tuple[float, Source] | None:
        """Joules since the server began, and whether they are measured or estimated.

        None where the server does not tell; treadle's does, in `/metrics`.

        Raises:
            TreadleError: the server cannot be reached.
        """
        connection = self._connect()
        try:
            connection.request("GET", f"{self.address.path}/metrics", headers=self._key())
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace") if response.status == 200 else ""
        except (OSError, HTTPException) as error:
            raise TreadleError(f"{self.url}: {error or type(error).__name__}") from None
        finally:
            connection.close()
        told = JOULES.search(text)
        if told is None:
            return None
        return float(told[2]), "measured" if told[1] == "measured" else "estimated"

    def _connect(self) -> HTTPConnection:
        made = HTTPSConnection if self.address.scheme == "https" else HTTPConnection
        assert self.address.hostname is not None
        return made(self.address.hostname, self.address.port, timeout=SECONDS)

    def _key(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def _ask(self, text: str, load: Workload, clock: Clock) -> Timeline:
        connection = self._connect()
        answer = Timeline(load.prompt, clock())
        try:
            connection.request(
                "POST", f"{self.address.path}/v1/completions", *self._body(text, load)
            )
            _read(_accepted(connection.getresponse(), self.url), answer, clock)
        except (OSError, HTTPException) as error:
            raise TreadleError(f"{self.url}: {error or type(error).__name__}") from None
        finally:
            connection.close()
        return answer

    def _body(self, text: str, load: Workload) -> tuple[bytes, dict[str, str]]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": text,
            "max_tokens": load.output,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.exact:
            body["ignore_eos"] = True
        return json.dumps(body).encode(), {"content-type": "application/json", **self._key()}


def words(load: Workload, number: int, row: int) -> str:
    """About `load.prompt` tokens of text, other ones in each round and row."""
    return " ".join(Random(f"{load.seed} {number} {row}").choices(WORDS.split(), k=load.prompt))


def _accepted(response: HTTPResponse, url: str) -> HTTPResponse:
    if response.status == 200:
        return response
    text = response.read().decode("utf-8", "replace")
    try:
        text = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = text[:200]
    raise TreadleError(f"{url} answers {response.status}: {text}")


def _read(response: HTTPResponse, answer: Timeline, clock: Clock) -> None:
    """Write down when pieces come, and at the end how many tokens they were."""
    total = None
    for data in events(response):
        if "error" in data:
            raise TreadleError(f"the server broke off: {data['error']}")
        if any(choice.get("text") for choice in data.get("choices", ())):
            answer.arrivals.append((clock(), 1))
        if data.get("usage"):
            total = data["usage"]["completion_tokens"]
            answer.prompt = data["usage"]["prompt_tokens"]
    if total is not None and answer.arrivals:
        answer.arrivals = share_out(answer.arrivals, total)


def share_out(arrivals: list[tuple[float, int]], tokens: int) -> list[tuple[float, int]]:
    """The pieces again, with as many tokens as there really were, evenly among them.

    A server may hold text back, or send several tokens as one piece; a stop token has no text.
    """
    each, more = divmod(max(tokens, len(arrivals)), len(arrivals))
    return [(time, each + (i < more)) for i, (time, _) in enumerate(arrivals)]


def events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """What a stream of server-sent events says, up to `[DONE]`.

    Raises:
        TreadleError: an event is no JSON object.
    """
    for line in response:
        if not line.startswith(b"data:"):
            continue
        text = line.removeprefix(b"data:").strip()
        if text == b"[DONE]":
            return
        try:
            data = json.loads(text)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise TreadleError(f"the server sent what is no JSON object: {text[:80]!r}")
        yield data
