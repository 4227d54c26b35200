"""A prompt and its answers as pieces: what is learned of an answer, and where it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_env import chat_env
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.trees import answer_tree
from treadle.core.errors import TreadleError
from treadle.data.records import assistant, user
from treadle.data.source import Env


def test_an_answer_ends_with_its_turn(tmp_path: Path) -> None:
    env = chat_env(tmp_path)
    prompt, first, second = answer_tree(
        env, (user("warp 7"),), ((assistant("weft"),), (assistant("reed heddle"),)), 64
    )
    assert env.tokenizer.decode(prompt.tokens, skip_special=False).endswith(
        "<|im_start|>assistant\n"
    )
    assert env.tokenizer.decode(first.tokens, skip_special=False) == "weft<|im_end|>"
    assert env.tokenizer.decode(second.tokens, skip_special=False) == "reed heddle<|im_end|>"
    assert not any(prompt.learn)
    assert all((*first.learn, *second.learn))
    assert (first.parent, second.parent) == (0, 0)


def test_what_follows_a_turn_is_read_and_not_learned(tmp_path: Path) -> None:
    """A reward model judges there, as others do that see the whole text."""
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    env = Env(tiny_model(), byte_tokenizer().with_template(template), tmp_path)
    prompt, answer = answer_tree(env, (user("q"),), ((assistant("yes"),),), 64)
    spelled = [env.tokenizer.spelling(t) for t in answer.tokens]
    assert spelled == ["y", "e", "s", "<end>", "\u010a"]
    assert answer.learn == [True] * 4 + [False]
    _, cut = answer_tree(env, (user("q"),), ((assistant("yes"),),), len(prompt.tokens) + 4)
    assert (cut.tokens, cut.learn) == (answer.tokens[:4], answer.learn[:4])


def test_an_answer_is_cut_to_what_is_left(tmp_path: Path) -> None:
    env = chat_env(tmp_path)
    prompt, whole = answer_tree(env, (user("warp"),), ((assistant("weft reed"),),), 64)
    longest = len(prompt.tokens) + 2
    _, cut = answer_tree(env, (user("warp"),), ((assistant("weft reed"),),), longest)
    assert list(cut.tokens) == list(whole.tokens)[:2]


def test_an_answer_by_somebody_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match="no turn of the assistant's"):
        answer_tree(chat_env(tmp_path), (user("warp"),), ((user("weft"),),), 64)
