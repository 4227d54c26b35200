"""Tools, reasoning and formats: what the model wrote, told apart, whole and in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator

import jsonschema
import openai
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
from serving.tiny_server import Running, running, tiny_engine

from treadle.serving.parse import Arguments, Call, Content, OutputParser, Part, Reasoning
from treadle.serving.pool import Base
from treadle.serving.prompt import chat_prompt
from treadle.serving.protocol import ChatBody
from treadle.tokenizers.template import LLAMA3

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Ulm", "Bern"]},
        "days": {"type": "integer", "maximum": 9, "minimum": 1},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "clock", "description": "The time."}},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running([Base("tiny", lambda: tiny_engine(context=2048))]) as it:
        yield it


def split(text: str, size: int, **settings: object) -> list[Part]:
    """Parts with equal neighbours joined, the text fed in pieces of `size`."""
    parser, parts = OutputParser(**settings), []
    for start in range(0, len(text), size):
        parts += parser.feed(text[start : start + size], final=False)
    parts += parser.feed("", final=True)
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Arguments):
            joined[-1] = Call(last.name, last.arguments + part.text)
        elif type(last) is type(part) and not isinstance(part, Call):
            joined[-1] = type(part)(last.text + part.text)
        else:
            joined.append(part)
    return joined


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "settings", "parts"),
    [
        ("plain", {}, [Content("plain")]),
        ("<think>a < b</think>\n\nyes", {}, [Reasoning("a < b"), Content("yes")]),
        ("a < b</think>yes", {"mode": "reasoning"}, [Reasoning("a < b"), Content("yes")]),
        ("<think>never ends", {}, [Reasoning("never ends")]),
        ("say <think> twice", {}, [Content("say <think> twice")]),
        ("1 < 2 <tool", {"tools": ["weather"]}, [Content("1 < 2 <tool")]),
        (CALL, {"tools": ["weather"]}, [Call("weather", '{"city": "Ulm"}')]),
        ("so: " + CALL + "!", {"tools": ["weather"]},
         [Content("so: "), Call("weather", '{"city": "Ulm"}'), Content("!")]),
        (CALL, {"tools": ["other"]}, [Content(CALL)]),
        (CALL, {}, [Content(CALL)]),
        ("<tool_call>{broken</tool_call>", {"tools": ["weather"]},
         [Content("<tool_call>{broken</tool_call>")]),
        ('<tool_call>[{"name": "weather", "arguments": {}}, {"name": "weather"}]</tool_call>',
         {"tools": ["weather"]}, [Call("weather", "{}"), Call("weather", "{}")]),
        ('{"name": "weather", "parameters": {"a": 1}}', {"tools": ["weather"], "bare": True},
         [Call("weather", '{"a": 1}')]),
        ('<tool_call>{"name": "weather", "arguments": {"a": "\\"}{", "b": [{}]} , "id": 1}'
         "</tool_call>x", {"tools": ["weather"]},
         [Call("weather", '{"a": "\\"}{", "b": [{}]}'), Content("x")]),
        ('<tool_call>{"name": "weather", "arguments": {"a": [1, ', {"tools": ["weather"]},
         [Call("weather", '{"a": [1, ')]),
        ('<tool_call>{"name": "weather", "arguments": {"a": [1</tool_call>\nsorry',
         {"tools": ["weather"]}, [Call("weather", '{"a": [1'), Content("sorry")]),
        ('<tool_call>{"name": "weather", "arguments": {}} or so', {"tools": ["weather"]},
         [Call("weather", "{}"), Content(" or so")]),
        ('<tool_call>{"arguments": {}, "name": "weather"}</tool_call>', {"tools": ["weather"]},
         [Call("weather", "{}")]),
        ('{"name": "weather", "arguments": {"a": "</tool_call>"}} then',
         {"tools": ["weather"], "bare": True},
         [Call("weather", '{"a": "</tool_call>"}'), Content(" then")]),
        ((CALL + "\n") * 2, {"tools": ["weather"]}, [Call("weather", '{"city": "Ulm"}')] * 2),
        ('{"just": "json"}', {"tools": ["weather"], "bare": True}, [Content('{"just": "json"}')]),
    ],
)  # fmt: skip
def test_parts(text: str, settings: dict[str, object], parts: list[Part], size: int) -> None:
    assert split(text, size, **settings) == parts


def test_a_forced_call_is_one_that_the_tool_takes(server: Running) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        asked = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": choice}
        answer = server.client.chat.completions.create(**asked, seed=1, max_tokens=800)
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None
        if call.function.name == "weather":
            jsonschema.validate(json.loads(call.function.arguments), WEATHER)
        assert choice == "required" or call.function.name == "weather"
        chunks = list(server.client.chat.completions.create(**asked, seed=1, stream=True))
        deltas = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
        assert {d.index for d in deltas} == {0}
        assert (deltas[0].id or "").startswith("call_")
        assert deltas[0].function.name == call.function.name
        assert deltas[0].function.arguments == ""
        assert all(d.id is None and d.function.name is None for d in deltas[1:])
        assert len(deltas) > 3, "arguments come as they are written"
        assert "".join(d.function.arguments for d in deltas) == call.function.arguments
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_formats(server: Running) -> None:
    ask = server.client.chat.completions.create
    schema = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}}
    answer = ask(model="tiny", messages=HELLO, response_format=schema, n=3, seed=0)
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), WEATHER)
    regex = {"type": "regex", "regex": "(yes|no)!{2}"}
    answer = ask(model="tiny", messages=HELLO, response_format=regex)
    assert answer.choices[0].message.content in ("yes!!", "no!!")
    grammar = {"type": "grammar", "grammar": 'start: "a" start "b" | "ab"'}
    answer = ask(model="tiny", messages=HELLO, response_format=grammar, seed=2)
    text = answer.choices[0].message.content
    assert text == "a" * (len(text) // 2) + "b" * (len(text) // 2)
    bias = {"type": "json_object"}
    answer = ask(model="tiny", messages=HELLO, response_format=bias, seed=3, max_tokens=1500)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    wrong = {"type": "regex", "regex": "(a"}
    with pytest.raises(openai.BadRequestError, match="Regex"):
        ask(model="tiny", messages=HELLO, response_format=wrong)
    with pytest.raises(openai.BadRequestError, match="no token id"):
        ask(model="tiny", messages=HELLO, logit_bias={"999": 1})


def test_top_logprobs(server: Running) -> None:
    answer = server.client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, temperature=0, max_tokens=6
    )
    for entry in answer.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert entry.bytes == entry.top_logprobs[0].bytes


def test_logit_bias_forbids(server: Running) -> None:
    bias = {str(token): -100 for token in range(257) if token != 66}
    answer = server.client.completions.create(
        model="tiny", prompt="x", logit_bias=bias, max_tokens=4
    )
    assert answer.choices[0].text == tiny_engine().tokenizer.decode([66] * 4)


def test_tools_reach_the_prompt_of_any_template() -> None:
    """A template that shows tools does; to another they are described in the system prompt."""
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function",
             "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]  # fmt: skip
    body = ChatBody(model="tiny", messages=turns, tools=TOOLS)
    tokenizer = tiny_engine().tokenizer
    known = chat_prompt(tokenizer, body, 1024)
    plain = chat_prompt(tokenizer.with_template(LLAMA3), body, 1024)
    for prompt in (known, plain):
        assert '"name": "weather"' in prompt.text
        assert '{"city": "Ulm"}' in prompt.text
        assert "rain" in prompt.text
        assert prompt.tools == ("weather", "clock")
    assert "<tool_response>\nrain" in plain.text
    none = chat_prompt(tokenizer, body.model_copy(update={"tool_choice": "none"}), 1024)
    assert none.tools == ()
