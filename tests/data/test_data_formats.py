from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from treadle.core.config import from_yaml, to_yaml
from treadle.core.errors import FileFormatError
from treadle.data.convert import convert, detect
from treadle.data.formats import (
    AlpacaFormat,
    FlanFormat,
    Format,
    KTOFormat,
    LabelledMessagesFormat,
    MessagesFormat,
    PreferenceFormat,
    ProblemFormat,
    ShareGPTFormat,
    ShareGPTPreferenceFormat,
    TextFormat,
    TranscriptFormat,
)
from treadle.data.records import (
    Chat,
    Labelled,
    Message,
    Preference,
    Problem,
    Text,
    assistant,
    record_text,
    user,
)

USER = {"role": "user", "content": "Weave?"}
REPLY = {"role": "assistant", "content": "Yes."}
OTHER = {"role": "assistant", "content": "No."}
TOOL = {"name": "f", "parameters": {}}

ROWS: list[tuple[dict[str, Any], Format, Any]] = [
    ({"text": "a"}, TextFormat(), Text("a")),
    (
        {"instruction": "Weave?", "input": "", "output": "Yes."},
        AlpacaFormat(),
        Chat((user("Weave?"), assistant("Yes."))),
    ),
    (
        {
            "instruction": "Weave?",
            "input": "Cloth",
            "response": "Yes.",
            "system": "S",
            "history": [["a", "b"]],
        },
        AlpacaFormat(output="response"),
        Chat(
            (
                Message("system", "S"),
                user("a"),
                assistant("b"),
                user("Weave?\n\nCloth"),
                assistant("Yes."),
            )
        ),
    ),
    (
        {"messages": [USER, REPLY], "tools": [TOOL]},
        MessagesFormat(),
        Chat((user("Weave?"), assistant("Yes.")), ({"type": "function", "function": TOOL},)),
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [1], "name": None},
            ]
        },
        MessagesFormat(),
        Chat((user("ab"), Message("assistant", "", {"tool_calls": [1]}))),
    ),
    (
        {"conversations": [USER, REPLY]},
        MessagesFormat(messages="conversations"),
        Chat((user("Weave?"), assistant("Yes."))),
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "Weave?"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "Yes."},
            ],
            "system": "S",
            "tools": json.dumps([TOOL]),
        },
        ShareGPTFormat(),
        Chat(
            (
                Message("system", "S"),
                user("Weave?"),
                Message(
                    "assistant",
                    "",
                    {
                        "tool_calls": [
                            {
                                "type": "function",
                                "function": {"name": "f", "arguments": {"a": 1}},
                            }
                        ]
                    },
                ),
                Message("tool", "3"),
                assistant("Yes."),
            ),
            ({"type": "function", "function": TOOL},),
        ),
    ),
    (
        {"inputs": "Weave?", "targets": "Yes."},
        FlanFormat(),
        Chat((user("Weave?"), assistant("Yes."))),
    ),
    (
        {"prompt": "Weave?", "completion": "Yes."},
        FlanFormat(inputs="prompt", targets="completion"),
        Chat((user("Weave?"), assistant("Yes."))),
    ),
    (
        {"prompt": "Weave?", "chosen": "Yes.", "rejected": "No."},
        PreferenceFormat(),
        Preference((user("Weave?"),), (assistant("Yes."),), (assistant("No."),)),
    ),
    (
        {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]},
        PreferenceFormat(),
        Preference((user("Weave?"),), (assistant("Yes."),), (assistant("No."),)),
    ),
    (
        {"prompt": "Weave?", "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
        PreferenceFormat(),
        Preference((user("Weave?"),), (assistant("Yes."),), (assistant("No."),)),
    ),
    (
        {
            "chosen": "\n\nHuman: Weave?\n\nAssistant: Hm.\n\nHuman: So?\n\nAssistant: Yes.",
            "rejected": "\n\nHuman: Weave?\n\nAssistant: Hm.\n\nHuman: So?\n\nAssistant: No.",
        },
        TranscriptFormat(),
        Preference(
            (user("Weave?"), assistant("Hm."), user("So?")),
            (assistant("Yes."),),
            (assistant("No."),),
        ),
    ),
    (
        {
            "conversations": [{"from": "human", "value": "Weave?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        ShareGPTPreferenceFormat(),
        Preference((user("Weave?"),), (assistant("Yes."),), (assistant("No."),)),
    ),
    (
        {"prompt": "Weave?", "completion": "Yes.", "label": False},
        KTOFormat(),
        Labelled((user("Weave?"),), (assistant("Yes."),), False),
    ),
    (
        {"messages": [USER, REPLY], "label": True},
        LabelledMessagesFormat(),
        Labelled((user("Weave?"),), (assistant("Yes."),), True),
    ),
    (
        {"question": "2+2?", "answer": "two and two\n#### 4", "id": 7},
        ProblemFormat(answer_after="####"),
        Problem((user("2+2?"),), "4", "number", {"id": 7}),
    ),
]


@pytest.mark.parametrize(("row", "format", "record"), ROWS)
def test_each_format(row: dict[str, Any], format: Format, record: Any) -> None:
    assert detect(row) == format
    assert format(row) == record
    assert list(convert([row, row])) == [record, record]
    assert from_yaml(to_yaml(format), expect=Format) == format
    assert record_text(record)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        yield from map(json.loads, file)


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("sft/gpteacher_codegen", Chat, 4535),
        ("sft/openbookqa_train_instruct", Chat, 4957),
        ("sft/glaive_toolcall_en_demo", Chat, 300),
        ("sft/gsm8k_test", Problem, 1319),
        ("pref/dpo_en_demo", Preference, 300),
        ("pref/hh_rlhf_harmless_test", Preference, 2312),
        ("pref/kto_en_demo", Labelled, 300),
    ],
)
def test_real_data(shared_data: Path, name: str, kind: type, count: int) -> None:
    path = shared_data / f"{name}.jsonl.gz"
    records = list(convert(rows(path), name=name))
    assert len(records) == count
    assert {type(r) for r in records} == {kind}


def test_glaive_keeps_calls_and_results(shared_data: Path) -> None:
    path = shared_data / "sft" / "glaive_toolcall_en_demo.jsonl.gz"
    messages = [m for chat in convert(rows(path)) for m in chat.messages]
    assert sum("tool_calls" in m.extra for m in messages) == 211
    assert Counter(m.role for m in messages) == {"user": 746, "assistant": 957, "tool": 211}


def test_hh_loses_no_turn(shared_data: Path) -> None:
    path = shared_data / "pref" / "hh_rlhf_harmless_test.jsonl.gz"
    for row, record in zip(rows(path), convert(rows(path)), strict=True):
        for key, answer in (("chosen", record.chosen), ("rejected", record.rejected)):
            names = {"user": "Human", "assistant": "Assistant"}
            told = "".join(f"\n\n{names[m.role]}: {m.content}" for m in (*record.prompt, *answer))
            assert "".join(told.split()) == "".join(row[key].split())
        assert record.prompt[-1].role == "user"
        assert record.chosen[0].role == record.rejected[0].role == "assistant"
        assert record.chosen != record.rejected


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        (TextFormat(), {"txt": "a"}, r"key `text` is missing; did you mean `txt`\?"),
        (TextFormat(), {"text": None}, "key `text` is null"),
        (TextFormat(), {"text": 3}, "key `text`: expected text, found int"),
        (AlpacaFormat(), {"instruction": "a", "output": ["b"]}, "`output`: expected text"),
        (AlpacaFormat(), {"instruction": "a", "output": "b", "history": ["x"]}, "`history`: ex"),
        (MessagesFormat(), {"messages": []}, "`messages`: expected a list of messages, found an"),
        (MessagesFormat(), {"messages": [USER, {"role": "user"}]}, r"`messages\[1\]`: `content`"),
        (MessagesFormat(), {"messages": [{"content": "a"}]}, r"`messages\[0\]`: expected a mess"),
        (
            MessagesFormat(),
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "parts that are not text",
        ),
        (MessagesFormat(), {"messages": [USER], "tools": "{"}, "`tools`: not valid JSON"),
        (
            ShareGPTFormat(),
            {"conversations": [{"from": "humn", "value": "a"}]},
            r"`conversations\[0\]`: unknown tag `humn`; did you mean `human`\?",
        ),
        (
            ShareGPTFormat(),
            {"conversations": [{"from": "function_call", "value": "[1]"}]},
            "needs `name` and `arguments`",
        ),
        (PreferenceFormat(), {"chosen": "a", "rejected": "b"}, "key `prompt` is missing"),
        (PreferenceFormat(), {"chosen": [USER], "rejected": [USER]}, "do not part at an answer"),
        (TranscriptFormat(), {"chosen": "x", "rejected": "y"}, "begins with `Human:`"),
        (KTOFormat(), {"prompt": "a", "completion": "b", "label": "good"}, "expected true or fal"),
        (LabelledMessagesFormat(), {"messages": [USER], "label": 1}, "not the assistant's"),
        (
            ProblemFormat(answer_after="####"),
            {"question": "a", "answer": "4"},
            "no `####` in it",
        ),
    ],
)
def test_wrong_rows_are_named(format: Format, row: dict[str, Any], message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        format(row)


def test_the_row_is_named() -> None:
    with pytest.raises(FileFormatError, match=r"x.jsonl: row 1: key `text` is missing.*TextFormat"):
        list(convert([{"text": "a"}, {"txt": "b"}], name="x.jsonl"))
    with pytest.raises(FileFormatError, match="x: there are no rows"):
        list(convert([], name="x"))
    with pytest.raises(FileFormatError, match="x: row 0: no known format has the keys en, fr"):
        list(convert([{"en": "a", "fr": "b"}], name="x"))
