"""The official client is the oracle: what it parses is the protocol."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator

import numpy as np
import openai
import pytest
import torch

pytest.importorskip("fastapi")
from openai import AsyncOpenAI
from serving.tiny_server import CONTEXT, Running, running, tiny_engine
from tiny_generation import END, byte_tokenizer

from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.serving.pool import Base

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running([Base("tiny", tiny_engine), Base("other", lambda: tiny_engine(1))]) as it:
        yield it


def own(prompt: str, **sampling: object) -> object:
    """What the engine itself says."""
    engine = tiny_engine()
    tokens = tuple(engine.tokenizer.encode(prompt))
    return engine.generate([Request(tokens, Sampling(**sampling))])[0][0]


def test_chat(server: Running) -> None:
    answer = server.client.chat.completions.create(
        model="tiny", messages=HELLO, seed=3, max_tokens=20, temperature=0.8, top_p=0.9
    )
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    wanted = own(prompt, seed=3, max_tokens=20, temperature=0.8, top_p=0.9)
    choice = answer.choices[0]
    assert choice.message.content == wanted.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == wanted.finish
    assert answer.model == "tiny"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(wanted.tokens)


def test_streamed_chat_is_the_whole_chat(server: Running) -> None:
    asked = {"model": "tiny", "messages": HELLO, "seed": 5, "max_tokens": 40, "n": 3}
    whole = server.client.chat.completions.create(**asked)
    chunks = list(
        server.client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    for index, choice in enumerate(whole.choices):
        deltas = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(d.delta.content or "" for d in deltas) == choice.message.content
        assert deltas[0].delta.role == "assistant"
        assert [d.finish_reason for d in deltas if d.finish_reason] == [choice.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 10, "a stream of one piece is no stream"
    assert len({c.id for c in chunks}) == 1


def test_completion(server: Running) -> None:
    answer = server.client.completions.create(
        model="tiny", prompt=["ab", "cd"], max_tokens=9, seed=1, n=2, echo=True
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == "ab" + own("ab", seed=1, max_tokens=9).text
    assert answer.choices[2].text == "cd" + own("cd", seed=1, max_tokens=9).text
    assert answer.usage.prompt_tokens == 4


def test_completion_of_tokens_streams(server: Running) -> None:
    asked = {"model": "tiny", "prompt": [[1, 2, 3], [4, 5]], "max_tokens": 12, "temperature": 0.5}
    whole = server.client.completions.create(**asked, seed=9)
    texts = ["", ""]
    for chunk in server.client.completions.create(**asked, seed=9, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in whole.choices]


def test_stop_and_greedy(server: Running) -> None:
    plain = server.client.completions.create(
        model="tiny", prompt="abc", max_tokens=30, temperature=0
    )
    text = plain.choices[0].text
    stop = text[4:6]
    cut = server.client.completions.create(
        model="tiny", prompt="abc", max_tokens=30, temperature=0, stop=[stop]
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_fewest_tokens(server: Running) -> None:
    """A model that would end at once; the end of the text is no token of `usage`'s text."""

    def count(**own: object) -> int:
        asked = {"model": "tiny", "prompt": "abc", "max_tokens": 9, "temperature": 0}
        answer = server.client.completions.create(
            **asked, logit_bias={str(END): 100}, extra_body=own
        )
        assert answer.choices[0].finish_reason == ("length" if "ignore_eos" in own else "stop")
        return answer.usage.completion_tokens

    assert count() == 1
    assert count(min_tokens=4) == 5
    assert count(ignore_eos=True) == 9


def test_logprobs_are_the_models(server: Running) -> None:
    answer = server.client.chat.completions.create(
        model="tiny", messages=HELLO, seed=2, max_tokens=8, logprobs=True
    )
    content = answer.choices[0].logprobs.content
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    wanted = own(prompt, seed=2, max_tokens=8)
    kept = [(t, lp) for t, lp in zip(wanted.tokens, wanted.logprobs, strict=True) if t != END]
    assert [bytes(entry.bytes) for entry in content] == [
        byte_tokenizer().token_bytes(t) for t, _ in kept
    ]
    assert [entry.logprob for entry in content] == pytest.approx([lp for _, lp in kept])
    plain = server.client.completions.create(
        model="tiny", prompt="abc", seed=2, max_tokens=8, logprobs=1
    )
    lists = plain.choices[0].logprobs
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.text_offset)


def test_streamed_logprobs_come_with_their_text(server: Running) -> None:
    asked = {"model": "tiny", "messages": HELLO, "seed": 2, "max_tokens": 40, "logprobs": True}
    whole = server.client.chat.completions.create(**asked)
    chunks = list(server.client.chat.completions.create(**asked, stream=True))
    told = [c.choices[0] for c in chunks if c.choices[0].logprobs]
    entries = [entry for choice in told for entry in choice.logprobs.content]
    assert entries == whole.choices[0].logprobs.content
    with_text = [choice for choice in told if choice.delta.content]
    assert len(with_text) > 10
    for choice in with_text:
        spelled = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        if spelled.isascii():  # else a character's bytes may be spread over pieces
            assert spelled.decode() == choice.delta.content


def test_embeddings_are_mean_hidden_states(server: Running) -> None:
    texts = ["a loom", "b"]
    answer = server.client.embeddings.create(model="tiny", input=texts)  # base64
    plain = server.client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    engine = tiny_engine()
    for text, item, same in zip(texts, answer.data, plain.data, strict=True):
        with torch.no_grad():
            hidden = engine.runner.model(torch.tensor([engine.tokenizer.encode(text)]))[0]
        wanted = hidden.mean(0) / hidden.mean(0).norm()
        assert item.embedding == pytest.approx(wanted.tolist(), abs=1e-5)
        assert same.embedding == pytest.approx(wanted.tolist(), abs=1e-5)
    assert answer.usage.prompt_tokens == 7


def test_models(server: Running) -> None:
    client = server.client
    assert [m.id for m in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError, match="did you mean `tiny`"):
        client.models.retrieve("tyny")


def test_two_models_answer_for_themselves(server: Running) -> None:
    asked = {"prompt": "abc", "max_tokens": 20, "temperature": 0}
    one = server.client.completions.create(model="tiny", **asked)
    two = server.client.completions.create(model="other", **asked)
    assert one.choices[0].text != two.choices[0].text


def test_asynchronous_client(server: Running) -> None:
    async def ask() -> tuple[str, str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            asked = {"model": "tiny", "messages": HELLO, "seed": 4, "max_tokens": 16}
            whole, stream = await asyncio.gather(
                client.chat.completions.create(**asked),
                client.chat.completions.create(**asked, stream=True),
            )
            text = ""
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
            return whole.choices[0].message.content, text

    whole, streamed = asyncio.run(ask())
    assert whole == streamed


def test_tokenize_and_back(server: Running) -> None:
    client = server.client.with_options(base_url=server.url)
    tokens = client.post("/tokenize", body={"model": "tiny", "text": "Löwe"}, cast_to=dict)
    assert tokens["tokens"] == byte_tokenizer().encode("Löwe")
    back = client.post(
        "/detokenize", body={"model": "tiny", "tokens": tokens["tokens"]}, cast_to=dict
    )
    assert back["text"] == "Löwe"
    chat = client.post("/tokenize", body={"model": "tiny", "messages": HELLO}, cast_to=dict)
    assert chat["count"] == len("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 7.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, ""),
        ({"n": 10**9}, "`n` is 1000000000"),
        ({"seed": 2**70}, "seed"),
        ({"extra_body": {"max_token": 5}}, "unknown field `max_token`"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, f"context is {CONTEXT}"),
        ({"stop": ["x"] * 50}, "16 stop strings"),
        ({"tool_choice": "required"}, "no `tools`"),
        ({"response_format": {"type": "poem"}}, "response_format"),
    ],
)
def test_absurd_parameters(server: Running, asked: dict[str, object], message: str) -> None:
    everything = {"model": "tiny", "messages": HELLO, "max_tokens": 3, **asked}
    if asked.get("max_tokens") == 10**30:
        server.client.chat.completions.create(**everything, stop="\n", seed=1)
        return  # as much as there is room for
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(**everything)
    assert message in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"


def test_unknown_model(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.body["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not valid JSON"),
        (b'{"model": "\xff\xfe"}', 400, ""),
        (b"[]", 400, "JSON object"),
        (b"null", 400, ""),
        (b'{"a":' * 50_000, 400, ""),
        (b'{"model": "tiny", "messages": [], "temperature": NaN}', 400, ""),
        (b'{"model": "tiny", "seed": ' + b"9" * 6000 + b"}", 400, ""),
        (b"x" * 10_000_000, 413, "longer than"),
    ],
    ids=["cut", "not utf-8", "list", "null", "deep", "nan", "huge number", "10 MB"],
)
def test_broken_bodies(server: Running, body: bytes, status: int, message: str) -> None:
    import httpx

    headers = {"content-type": "application/json"}
    url = f"{server.url}/v1/chat/completions"
    answer = httpx.post(url, content=body, headers=headers, timeout=30)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    chunked = httpx.post(url, content=iter([body]), headers=headers, timeout=30)
    assert chunked.status_code == status
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def test_lone_surrogates_do_no_harm(server: Running) -> None:
    import httpx

    body = {"model": "\ud800", "messages": HELLO}
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("`model`")
    body = {"model": "tiny", "prompt": "a\udfff", "max_tokens": 1, "echo": True}
    answer = httpx.post(
        f"{server.url}/v1/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert answer.json()["choices"][0]["text"].startswith("a?")


def test_other_paths_and_methods(server: Running) -> None:
    import httpx

    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405
    form = httpx.post(f"{server.url}/v1/completions", data={"model": "tiny"})
    assert form.status_code == 400
    assert "application/json" in form.json()["error"]["message"]


def test_metrics(server: Running) -> None:
    import httpx

    server.client.completions.create(model="tiny", prompt="abc", max_tokens=5)
    text = httpx.get(f"{server.url}/metrics").text
    for line in (
        'treadle_requests_total{path="/v1/completions",status="200"}',
        'treadle_generated_tokens_total{model="tiny"}',
        'treadle_time_to_first_token_seconds_bucket{le="0.005",model="tiny"}',
        'treadle_inter_token_seconds_sum{model="tiny"}',
        'treadle_requests_open{model="tiny"} 0.0',
        'treadle_requests_waiting{model="tiny"} 0.0',
        'treadle_energy_joules{source="',
    ):
        assert line in text


def test_base64_is_little_endian_float32(server: Running) -> None:
    import httpx

    body = {"model": "tiny", "input": "x", "encoding_format": "base64"}
    row = httpx.post(f"{server.url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    vector = np.frombuffer(base64.b64decode(row), dtype="<f4")
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
