"""`best_of`, `echo` and log-probabilities of prompts, as the official client sees them."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
import torch

pytest.importorskip("fastapi")
from serving.tiny_server import Running, running, tiny_engine
from tiny_generation import END, byte_tokenizer
from torch import Tensor

from treadle.inference.best_of import BestOf
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.serving.logprobs import TextLogprobs, echoed
from treadle.serving.ticket import Piece
from treadle.tokenizers.tokenizer import Tokenizer

PROMPT = "The löom"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as it:
        yield it


@torch.no_grad()
def model_logprobs(ids: list[int]) -> Tensor:
    """Row t: of the token after the first t + 1, from the model without an engine."""
    model = tiny_engine().runner.model
    hidden = model(torch.tensor(ids), Packed.of(Layout((len(ids),))))
    return model.logits(hidden).float().log_softmax(-1)


def test_a_prompt_is_scored(server: Running) -> None:
    ids = byte_tokenizer().encode(PROMPT)
    answer = server.client.completions.create(
        model="tiny", prompt=PROMPT, echo=True, logprobs=3, max_tokens=0
    )
    (choice,) = answer.choices
    lists, rows = choice.logprobs, model_logprobs(ids)
    assert choice.text == PROMPT
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 0
    assert answer.usage.prompt_tokens == len(ids) == len(lists.tokens)
    assert lists.token_logprobs[0] is None
    assert lists.top_logprobs[0] is None
    wanted = [float(rows[i, token]) for i, token in enumerate(ids[1:])]
    assert lists.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    for i, likely in enumerate(lists.top_logprobs[1:]):
        best = rows[i].topk(3).values.tolist()
        assert sorted(likely.values(), reverse=True)[:3] == pytest.approx(best, abs=1e-4)
    # ö is two tokens, which stand where it stands
    assert lists.tokens[5:7] == ["bytes:\\xc3", "bytes:\\xb6"]
    assert lists.text_offset == [0, 1, 2, 3, 4, 5, 5, 6, 7]


def test_echo_goes_on_into_the_answer(server: Running) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "seed": 4, "logprobs": 0}
    plain = server.client.completions.create(**asked)
    answer = server.client.completions.create(**asked, echo=True, n=2)
    count = len(byte_tokenizer().encode(PROMPT))
    assert answer.choices[0].text == PROMPT + plain.choices[0].text
    alone = plain.choices[0].logprobs
    for choice in answer.choices:
        lists = choice.logprobs
        assert lists.text_offset[count] == len(PROMPT)
        assert lists.token_logprobs[0] is None
        assert lists.token_logprobs[1:count] == answer.choices[0].logprobs.token_logprobs[1:count]
    lists = answer.choices[0].logprobs
    assert lists.token_logprobs[count:] == pytest.approx(alone.token_logprobs, abs=1e-5)
    assert lists.text_offset[count:] == [len(PROMPT) + place for place in alone.text_offset]
    assert alone.text_offset[0] == 0


@pytest.mark.parametrize("prompt", [PROMPT, [72, 101, 195, 182, 33]], ids=["text", "tokens"])
def test_a_streamed_echo_is_the_whole_one(server: Running, prompt: object) -> None:
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "seed": 2, "logprobs": 2}
    asked |= {"echo": True, "n": 2}
    whole = server.client.completions.create(**asked)
    texts, lists = ["", ""], [{}, {}]
    for chunk in server.client.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        for name, values in choice.logprobs.model_dump().items():
            lists[choice.index].setdefault(name, []).extend(values)
    assert texts == [choice.text for choice in whole.choices]
    assert lists == [choice.logprobs.model_dump() for choice in whole.choices]


def test_the_best_are_told(server: Running) -> None:
    asked = {"model": "tiny", "prompt": ["ab", "cd"], "max_tokens": 7, "seed": 6}
    answer = server.client.completions.create(**asked, n=2, best_of=6)
    sampling = Sampling(max_tokens=7, seed=6)
    engine = tiny_engine()
    wanted = []
    for text in asked["prompt"]:
        request = Request(tuple(engine.tokenizer.encode(text)), sampling, n=2)
        wanted += [completion.text for completion in BestOf(of=6)(engine, request)]
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    first = server.client.completions.create(**asked, n=2, best_of=2)
    assert [choice.text for choice in first.choices] != wanted, "no six were drawn"
    plain = server.client.completions.create(**asked, n=2)
    assert [c.text for c in first.choices] == [c.text for c in plain.choices], "in drawn order"
    assert answer.usage.completion_tokens > 2 * plain.usage.completion_tokens, "all six count"


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"best_of": 1, "n": 2}, "best_of", "`best_of` is 1, but `n` is 2"),
        ({"best_of": 3, "stream": True}, "best_of", "leave out `stream` or `best_of`"),
        ({"best_of": 10**6}, "best_of", "`best_of` is 1000000, but at most 16"),
        ({"best_of": 0}, "best_of", "`best_of`"),
        ({"n": 10**6}, "n", "`n` is 1000000, but at most 16"),
        ({"max_tokens": 0}, "max_tokens", "with `echo`"),
        ({"max_tokens": -1, "echo": True}, "max_tokens", "`max_tokens`"),
        ({"logprobs": 21, "echo": True}, "logprobs", "`logprobs`"),
        ({"logprobs": -1}, "logprobs", "`logprobs`"),
        ({"echo": "yes"}, "echo", "`echo`"),
        ({"suffix": "end"}, "suffix", "`suffix`"),
    ],
)
def test_what_does_not_go_together(
    server: Running, asked: dict[str, object], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.completions.create(model="tiny", prompt="abc", **asked)
    assert message in caught.value.body["message"]
    assert caught.value.body["param"] == param
    assert caught.value.body["type"] == "invalid_request_error"


def test_tokens_around_a_text_take_no_room_in_it() -> None:
    plain = byte_tokenizer()
    ids = [END, *plain.encode("añ"), END]
    assert echoed(plain, "añ", ids).starts == [0, 0, 1, 1, 2]
    assert echoed(plain, ids, ids).starts == [0, 0, 1, 1, 2]
    assert echoed(plain, ids, ids).text == "añ"


def test_a_tokenizer_that_drops_the_first_space() -> None:
    import tokenizers

    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, "b": 4}, merges=[("▁", "a")]
        )
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("ab a")
    assert [tokenizer.spelling(i) for i in ids] == ["▁a", "b", "▁a"]
    assert echoed(tokenizer, ids, ids).text == "ab a"
    assert echoed(tokenizer, ids, ids).starts == [0, 1, 2]
    assert echoed(tokenizer, "ab a", ids).starts == [0, 1, 2]


def test_the_token_that_ends_the_answer_is_not_listed() -> None:
    lists, tokenizer = TextLogprobs(1), byte_tokenizer()
    lists.add(tokenizer, Piece(0, "a", [*tokenizer.encode("a"), END], [-1.0, -2.0], [(), ()]))
    assert lists.take() == {
        "tokens": ["a"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{"a": -1.0}],
        "text_offset": [0],
    }
    assert lists.take()["tokens"] == []
