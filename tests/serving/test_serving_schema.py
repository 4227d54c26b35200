"""Requests made up from the OpenAPI page: none breaks the server, and answers are as it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")
import httpx
import schemathesis
from hypothesis import strategies
from schemathesis import checks
from serving.tiny_server import Running, running, tiny_engine

from treadle.serving.pool import Base
from treadle.serving.trial import Trial


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("trial") / "votes.jsonl"
    offers = [Base(name, lambda: tiny_engine(context=64)) for name in ("tiny", "other")]
    with running(offers, trials=[Trial(name="duel", a="tiny", b="other")], trial_log=log) as it:
        yield it


EXAMPLES = 25


@pytest.mark.slow
def test_any_request_gets_the_answer_that_is_promised(server: Running) -> None:
    page = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    asked: Counter[str] = Counter()
    for found in page.get_all_operations():
        operation = found.ok()

        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(), name=strategies.sampled_from("tt?"))
        def ask(case: Any, name: str) -> None:
            check(case, "tiny" if name == "t" else None)
            asked[case.path] += 1

        ask()
    assert {"/v1/chat/completions", "/v1/responses", "/v1/votes", "/metrics"} <= set(asked)
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    text = httpx.get(f"{server.url}/metrics").text
    assert 'treadle_requests_open{model="tiny"} 0.0' in text


def check(case: Any, model: str | None) -> None:
    body = case.body
    if model is not None and isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = model
    response = case.call(timeout=120)
    case.validate_response(
        response,
        # a schema does not say how long the context is, or which of two fields are wanted
        excluded_checks=[checks.positive_data_acceptance, checks.negative_data_rejection],
    )
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"]
        assert set(error) == {"message", "type", "param", "code"}


def test_the_page_promises_errors_in_openais_shape(server: Running) -> None:
    page = httpx.get(f"{server.url}/openapi.json").json()
    for path, methods in page["paths"].items():
        for method in methods.values():
            assert set(method["responses"]) == {"200", "4XX", "5XX"}, path
    streamed = page["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(streamed) == {"application/json", "text/event-stream"}
