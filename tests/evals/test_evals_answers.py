"""Perplexity of answers against all logits of each conversation by itself, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_generation import byte_tokenizer as plain_tokenizer
from tiny_generation import tiny_model

from treadle.core.errors import TreadleError
from treadle.data.records import Chat, assistant, user
from treadle.data.supervised import Conversations
from treadle.evals.answers import Answers
from treadle.evals.harness import evaluate
from treadle.tokenizers.chat import encode_chat
from treadle.tokenizers.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    tokenizer = plain_tokenizer()
    return tokenizer.with_template(TEMPLATE)


class Sums(Conversations):
    """A few sums, one of them without an answer."""

    amount: int = 5

    def conversation(self, index: int) -> Chat:
        turns = (user(f"{index} + {index}?"), assistant(str(2 * index) * (1 + index)))
        return Chat(turns[: 1 if index == 3 else 2])

    def count(self) -> int:
        return self.amount


def naive(conversations: Sums, longest: int) -> float:
    model, tokenizer = tiny_model().double().eval(), byte_tokenizer()
    total, count = 0.0, 0
    for i in range(conversations.amount):
        chat = [m.plain() for m in conversations.conversation(i).messages]
        encoded = encode_chat(tokenizer, chat)
        ids = torch.tensor(encoded.ids[:longest])
        with torch.no_grad():
            logp = model.logits(model(ids)).log_softmax(-1)
        for place in range(1, len(ids)):
            if encoded.mask[place]:
                total -= float(logp[place - 1, ids[place]])
                count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("longest", [1024, 30])
def test_answers_match_naive_float64_loop(longest: int) -> None:
    task = Answers(conversations=Sums(), longest=longest)
    for budget in (40, 4096):  # several packs, and one
        found = evaluate(tiny_model().eval(), byte_tokenizer(), [task], tokens=budget)
        figure = found.by_name()["answers perplexity"]
        assert figure["value"] == pytest.approx(naive(Sums(), longest), rel=1e-5)
        assert figure["n"] == 4  # one has no answer
        assert figure["low"] <= figure["value"] <= figure["high"]


def test_no_answer_is_refused() -> None:
    task = Answers(conversations=Sums(), longest=4)
    with pytest.raises(TreadleError, match=r"no conversation has an answer within its first 4"):
        evaluate(tiny_model().eval(), byte_tokenizer(), [task])


def test_limit_and_count() -> None:
    assert len(Answers(conversations=Sums(), limit=2).items()) == 2
    assert len(Answers(conversations=Sums(), limit=100).items()) == 5
    assert len(Answers(conversations=Sums(), limit=None).items()) == 5
