"""`/v1/responses`, read by the official client; what is said is what the chat endpoint says."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator

import jsonschema
import openai
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
from openai import AsyncOpenAI
from serving.test_serving_tools import TOOLS, WEATHER
from serving.tiny_server import Running, running, tiny_engine

from treadle.serving.config import Limits, Serve
from treadle.serving.items import Items
from treadle.serving.memory import Conversations
from treadle.serving.parse import Arguments, Call, Content, Part, Reasoning
from treadle.serving.pool import Base
from treadle.serving.protocol import ChatMessage
from treadle.serving.responses_body import ResponsesBody

FLAT = [{"type": "function", "strict": None, **tool["function"]} for tool in TOOLS]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    offers = [Base("tiny", lambda: tiny_engine(context=2048))]
    config = Serve(port=0, limits=Limits(remembered=20_000))
    with running(offers, config) as it:
        yield it


def said(server: Running, messages: list[dict[str, str]], **asked: object) -> str:
    """What the chat endpoint answers."""
    answer = server.client.chat.completions.create(
        model="tiny", messages=messages, extra_body=asked
    )
    return answer.choices[0].message.content


def test_text(server: Running) -> None:
    answer = server.client.responses.create(
        model="tiny",
        instructions="Be brief.",
        input="Hello",
        max_output_tokens=20,
        extra_body={"seed": 3},
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert answer.output_text == said(server, messages, seed=3, max_tokens=20)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"
    assert answer.usage.output_tokens == 20
    assert answer.usage.total_tokens == answer.usage.input_tokens + 20
    assert answer.instructions == "Be brief."
    again = server.client.responses.create(
        model="tiny",
        instructions="Be brief.",
        input="Hello",
        text={"format": {"type": "json_schema", "name": "weather", "schema": WEATHER}},
    )
    jsonschema.validate(json.loads(again.output_text), WEATHER)
    assert again.status == "completed"
    assert again.incomplete_details is None
    assert 0 < again.usage.input_tokens_details.cached_tokens < again.usage.input_tokens


def test_events_are_the_whole(server: Running) -> None:
    asked = {"model": "tiny", "input": "Hello", "max_output_tokens": 40, "extra_body": {"seed": 5}}
    whole = server.client.responses.create(**asked)
    events = list(server.client.responses.create(**asked, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type.removeprefix("response.") for e in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert len(deltas) > 5, "a stream of one piece is no stream"
    assert "".join(deltas) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[0].response.output == []
    assert events[2].item.content == []
    assert events[-4].text == whole.output_text


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # of a format that OpenAI has not
def test_a_stream_that_the_client_gathers(server: Running) -> None:
    """The client's own helper checks the order of events and builds the response from them."""

    async def ask() -> tuple[str, str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            word = {"text": {"format": {"type": "regex", "regex": "[a-z]{20}"}}}
            asked = {"model": "tiny", "input": "Hi", "extra_body": word}
            async with client.responses.stream(**asked) as stream:
                text = "".join(
                    [e.delta async for e in stream if e.type == "response.output_text.delta"]
                )
                return text, (await stream.get_final_response()).output_text

    text, final = asyncio.run(ask())
    assert text == final
    assert re.fullmatch("[a-z]{20}", text)


def test_a_conversation_goes_on(server: Running) -> None:
    ask = server.client.responses.create
    own = {"model": "tiny", "max_output_tokens": 12, "extra_body": {"seed": 2}}
    first = ask(**own, input="One", instructions="Only for the first.")
    second = ask(**own, input="Two", previous_response_id=first.id)
    messages = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Two"},
    ]
    assert second.output_text == said(server, messages, seed=2, max_tokens=12)
    items = ask(**own, input=[*messages[:1], *first.output, *messages[2:]])
    assert items.output_text == second.output_text, "sent back item by item"
    unkept = ask(**own, input="One", store=False)
    for lost in (unkept.id, "resp-none"):
        with pytest.raises(openai.NotFoundError, match="send the conversation as `input`"):
            ask(**own, input="Two", previous_response_id=lost)


def test_tools(server: Running) -> None:
    asked = {"model": "tiny", "input": "Weather?", "tools": FLAT, "extra_body": {"seed": 1}}
    choice = {"type": "function", "name": "weather"}
    answer = server.client.responses.create(**asked, tool_choice=choice)
    (call,) = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    jsonschema.validate(json.loads(call.arguments), WEATHER)
    events = list(server.client.responses.create(**asked, tool_choice=choice, stream=True))
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 3
    assert "".join(deltas) == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    ended = server.client.responses.create(
        model="tiny", input=[result], previous_response_id=answer.id, max_output_tokens=5
    )
    assert ended.output_text is not None
    body = ResponsesBody(model="tiny", input=[{"role": "user", "content": "Weather?"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "clock", "arguments": "{}"},
        {"type": "reasoning", "id": "rs_1", "summary": []}, result])  # fmt: skip
    roles = [(m.role, len(m.tool_calls or ())) for m in body.turns()]
    assert roles == [("user", 0), ("assistant", 2), ("tool", 0)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"input": []}, "no message"),
        ({"input": [{"role": "pirate", "content": "x"}]}, "input"),
        ({"input": "x" * 4000}, "context is 2048"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"tool_choice": "required"}, "no `tools`"),
        ({"extra_body": {"max_token": 5}}, "unknown field `max_token`"),
    ],
)
def test_what_is_refused(server: Running, asked: dict[str, object], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.responses.create(**{"model": "tiny", "input": "Hello", **asked})
    assert message in caught.value.body["message"]


def grown(*parts: Part, status: str = "completed") -> tuple[list[dict], list[str]]:
    items = Items()
    events = [e for part in parts for e in items.add(part)]
    events += items.end(status)
    return items.done, [str(e["type"]).removeprefix("response.") for e in events]


def test_items_in_the_order_they_are_written() -> None:
    done, events = grown(
        Reasoning("so"), Reasoning("?"), Content("\n"), Content("yes"), Content("!"),
        Call("f"), Arguments("{"), Arguments("}"), Content("\n"), Call("g", "{}"),
        status="incomplete",
    )  # fmt: skip
    assert [item["type"] for item in done] == ["reasoning", "message", *["function_call"] * 2]
    assert done[0]["content"] == [{"type": "reasoning_text", "text": "so?"}]
    assert done[1]["content"][0]["text"] == "\nyes!"
    assert [call["arguments"] for call in done[2:]] == ["{}", "{}"]
    assert [item["status"] for item in done] == [*["completed"] * 3, "incomplete"]
    assert events.count("output_item.added") == events.count("output_item.done") == 4
    assert events.count("function_call_arguments.delta") == 3
    assert len({item["id"] for item in done}) == 4
    empty, events = grown(Content(" "))
    assert empty[0]["content"][0]["text"] == " "
    assert "output_text.delta" in events


def test_memory_is_bounded() -> None:
    memory = Conversations(1000)
    turn = [ChatMessage(role="user", content="x" * 150)]  # 250 with what a message costs
    for number in range(4):
        memory.keep(str(number), turn)
    assert (len(memory), memory.size) == (4, 1000)
    assert memory.find("0") == turn
    memory.keep("4", turn)
    assert len(memory) == 4
    assert memory.find("0") == turn, "it was used since"
    with pytest.raises(Exception, match="no response `1`"):
        memory.find("1")
    memory.keep("long", [ChatMessage(role="user", content="x" * 901)])
    assert (len(memory), memory.size) == (0, 0)
