from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer

from treadle.core.errors import TreadleError
from treadle.tokenizers.chat import (
    EveryTurn,
    LastTurn,
    default_template,
    encode_chat,
    encode_prompt,
)
from treadle.tokenizers.sandbox import Limits
from treadle.tokenizers.template import CHATML, LLAMA3, ChatTemplate
from treadle.tokenizers.tokenizer import Tokenizer
from treadle.tokenizers.train import ByteLevelBPE

CONVERSATION = [
    {"role": "system", "content": "Weave."},
    {"role": "user", "content": " Hello, naïve 日本 🙂 "},
    {"role": "assistant", "content": "Hi there! 🙂"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "No.\n"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "naïve <b>"}}]

MARKED = """\
{%- macro head(role) -%}
    <|im_start|>{{ role }}
{% endmacro -%}
{%- set seen = namespace(users=0) -%}
{%- if tools %}{{ head('tools') }}{{ tools | tojson(indent=2) }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif -%}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
        {{ raise_exception('unknown role ' ~ message.role) }}
    {%- endif -%}
    {{ head(message.role) }}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{ message.content | trim }}<|im_end|>{%- endgeneration -%}
    {%- else -%}
        {{ message.content }}<|im_end|>
    {%- endif %}

{% endfor -%}
{%- if add_generation_prompt %}{{ head('assistant') }}{% endif -%}
{%- for n in range(5) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor -%}
{{ seen.users }}{{ strftime_now('%Y') }}{{ eos_token }}"""
REWRITES = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}(thinks) {% endif %}{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


@pytest.fixture(scope="module")
def llama3_like(story: str) -> Tokenizer:
    names = ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = ByteLevelBPE(vocab_size=400, special_tokens=names)([story])
    return tokenizer.with_template(default_template(tokenizer))


def learned(tokenizer: Tokenizer, **options) -> list[str]:
    """The runs of tokens that are learned, as text."""
    chat = encode_chat(tokenizer, CONVERSATION, **options)
    runs, previous = [], False
    for token, inside in zip(chat.ids, chat.mask, strict=True):
        if inside and not previous:
            runs.append([])
        if inside:
            runs[-1].append(token)
        previous = inside
    return [tokenizer.decode(run, skip_special=False) for run in runs]


def assert_same_as_transformers(tokenizer: Tokenizer, folder: Path, conversations) -> None:
    tokenizer.save(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    for messages in conversations:
        for prompt in (False, True):
            text = theirs.apply_chat_template(
                messages, tools=TOOLS, tokenize=False, add_generation_prompt=prompt
            )
            assert text == tokenizer.render(messages, tools=TOOLS, add_generation_prompt=prompt)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == encode_prompt(tokenizer, messages)


@pytest.mark.parametrize("template", [CHATML, MARKED, REWRITES])
def test_renders_like_transformers(trained: Tokenizer, template: str, tmp_path: Path) -> None:
    cases = (CONVERSATION, CONVERSATION[:-1], CONVERSATION[1:2])
    assert_same_as_transformers(trained.with_template(template), tmp_path, cases)


def test_llama3_style_renders_like_transformers(llama3_like: Tokenizer, tmp_path: Path) -> None:
    assert llama3_like.chat_template == LLAMA3
    assert_same_as_transformers(llama3_like, tmp_path, (CONVERSATION, CONVERSATION[1:2]))
    assert learned(llama3_like) == ["Hi there! 🙂<|eot_id|>", "No.<|eot_id|>"]


def test_smollm2_renders_like_transformers(
    smollm2_metadata: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_gguf(smollm2_metadata)
    assert_same_as_transformers(tokenizer, tmp_path, (CONVERSATION, CONVERSATION[1:2]))
    assert learned(tokenizer) == ["Hi there! 🙂<|im_end|>", "No.\n<|im_end|>"]


@pytest.mark.slow
def test_real_templates_render_like_transformers(
    real_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    for name, folder in real_tokenizers.items():
        tokenizer = Tokenizer.load(folder)
        if tokenizer.chat_template is not None:
            cases = (CONVERSATION, CONVERSATION[:-1], CONVERSATION[1:2])
            assert_same_as_transformers(tokenizer, tmp_path / name, cases)


def test_marked_turns_match_transformers(trained: Tokenizer, tmp_path: Path) -> None:
    tokenizer = trained.with_template(MARKED)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        CONVERSATION, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encode_chat(tokenizer, CONVERSATION, tools=TOOLS)
    assert ours.ids == theirs["input_ids"]
    assert ours.mask == [bool(m) for m in theirs["assistant_masks"]]
    assert learned(tokenizer) == ["Hi there! 🙂<|im_end|>", "No.<|im_end|>"]


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("reply", ["🙂", "🙂 x🙂", " \t ", " é", "x "])
def test_marks_at_the_edge_of_split_characters(trained: Tokenizer, reply: str, trim: bool) -> None:
    """Several tokens may share one character; none of a neighbour's is taken for the turn's."""
    bare = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer(Backend.from_str(trained.backend.to_str()), chat_template=bare)
    tokenizer.backend.post_processor = processors.ByteLevel(trim_offsets=trim)  # as GPT-2 has it
    messages = [
        {"role": "user", "content": "🙂"},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": "🧵"},
    ]
    chat = encode_chat(tokenizer, messages)
    learned = [i for i, inside in zip(chat.ids, chat.mask, strict=True) if inside]
    assert tokenizer.decode(learned) == reply


def test_turns_are_found_without_marks(trained: Tokenizer) -> None:
    assert learned(trained) == ["Hi there! 🙂<|im_end|>", "No.\n<|im_end|>"]
    assert learned(trained, turns=EveryTurn()) == learned(trained)
    assert learned(trained, turns=LastTurn()) == ["No.\n<|im_end|>"]
    assert learned(trained.with_template(MARKED), turns=LastTurn()) == ["No.<|im_end|>"]
    prompt = encode_prompt(trained, CONVERSATION[:2])
    whole = encode_chat(trained, CONVERSATION)
    assert whole.ids[: len(prompt)] == prompt
    assert whole.mask.index(True) == len(prompt)


def test_a_template_that_rewrites_turns_is_refused(trained: Tokenizer) -> None:
    tokenizer = trained.with_template(REWRITES)
    with pytest.raises(TreadleError, match=r"message 2 with its reply.*`\(thinks\) Hi.*LastTurn"):
        encode_chat(tokenizer, CONVERSATION)
    assert learned(tokenizer, turns=LastTurn()) == ["(thinks) No.\n<|im_end|>"]


def test_tools_and_calls_are_shown(trained: Tokenizer, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    messages = [
        *CONVERSATION[:2],
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    assert_same_as_transformers(trained, tmp_path, (messages,))
    spoken = '<tool_call>{"name": "f", "arguments": {"a": "é"}}</tool_call>'
    chat = encode_chat(trained, messages, tools=TOOLS)
    learned = [i for i, inside in zip(chat.ids, chat.mask, strict=True) if inside]
    expected = f"{spoken * 2}<|im_end|>It is 42.<|im_end|>"
    assert trained.decode(learned, skip_special=False) == expected

    silent = trained.with_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(TreadleError, match="has `tools`, which the chat template does not show"):
        encode_prompt(silent, CONVERSATION, tools=TOOLS)
    with pytest.raises(TreadleError, match="has `tool_calls`, which the chat template"):
        encode_chat(silent, messages)


def test_default_template_follows_the_vocabulary(trained: Tokenizer, story: str) -> None:
    assert default_template(trained) == CHATML == trained.chat_template
    bare = ByteLevelBPE(vocab_size=300, special_tokens=("<|endoftext|>",))([story])
    with pytest.raises(TreadleError, match="no turn tokens"):
        default_template(bare)
    with pytest.raises(TreadleError, match="no chat template"):
        bare.render(CONVERSATION)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", "line 2: Expected an expression"),
        ("a\n\n{{ raise_exception('only two turns') }}", "line 3: only two turns"),
        ("\n{{ messages[0].content.x.y }}", "line 2: 'str object' has no attribute 'x'"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% set n = namespace() %}{% set n.__x = 1 %}", "must not begin with `_`"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{% for a in range(10**6) %}{% endfor %}", "Range too big"),
        ("{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' * 10**10 }}", "value of 10000000000 characters"),
        ("{{ ['a'] * 10**10 }}", "value of 10000000000 characters"),
        ("{{ 9**(10**9) }}", "characters"),
        ("{{ 'a'.ljust(10**10) }}", "value of 10000000000 characters"),
        ("{{ 'a' | center(10**10) }}", "gives 10000000000 to the filter `center`"),
        ("{{ '%9999999999d' % 1 }}", "width"),
        ("{{ '{:9999999999}'.format(1) }}", "width"),
        ("{{ strftime_now('%9999999999d') }}", "width"),
        (
            "{% set n = namespace(s='a') %}{% for a in range(60) %}"
            "{% set n.s = n.s ~ n.s %}{% endfor %}",
            "characters",
        ),
        (
            "{% set n = namespace(s='a') %}{% for a in range(60) %}"
            "{% set n.s = n.s + n.s %}{% endfor %}",
            "characters",
        ),
        ("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "writes more than"),
    ],
)
def test_bad_templates_are_stopped(template: str, message: str) -> None:
    limits = Limits(steps=200_000, characters=1_000_000)
    with pytest.raises(TreadleError, match=f"chat template.*{message}"):
        ChatTemplate(template, limits=limits).render(CONVERSATION)


def test_a_slow_template_is_stopped() -> None:
    slow = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TreadleError, match=r"line 1: runs longer than 0.05 s"):
        ChatTemplate(slow, limits=Limits(seconds=0.05, steps=10**9)).render(CONVERSATION)


def test_messages_are_json() -> None:
    with pytest.raises(TreadleError, match="`messages` must be JSON values"):
        ChatTemplate("").render([{"role": "user", "content": object()}])


def test_the_time_can_be_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}")
    assert template.render([], now=datetime(2024, 7, 26)) == "26 Jul 2024"
