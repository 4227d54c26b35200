"""The engine: the same text alone or in a batch, streams, stops, cancels, errors."""

from __future__ import annotations

import pytest
import torch
from tiny_generation import END, byte_tokenizer, tiny_model

from treadle.core.errors import TreadleError
from treadle.inference.detokenizer import Detokenizer
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling

PROMPT = (10, 20, 30)


def engine(slots: int = 8) -> Engine:
    return Engine(tiny_model(), byte_tokenizer(), EngineConfig(slots=slots))


def text_of(tokens) -> str:
    tokenizer = byte_tokenizer()
    return tokenizer.decode_bytes([t for t in tokens if t != END]).decode("utf-8", "replace")


def test_text_does_not_depend_on_the_batch() -> None:
    wanted = Request(PROMPT, Sampling(seed=5, max_tokens=12), n=3)
    others = [Request((i, i + 1), Sampling(seed=i, max_tokens=4 + i)) for i in range(9)]
    alone = engine().generate([wanted])[0]
    crowded = engine(slots=4).generate([*others[:5], wanted, *others[5:]])[5]
    assert [c.tokens for c in alone] == [c.tokens for c in crowded]
    assert len({c.tokens for c in alone}) == 3


def test_shared_prompt_is_computed_once() -> None:
    it = engine()
    lengths = []
    forward = it.runner.model.forward
    it.runner.model.forward = lambda tokens, context=None: (
        lengths.append(len(tokens)),
        forward(tokens, context),
    )[1]
    it.generate([Request(PROMPT, Sampling(max_tokens=2), n=6)])
    assert lengths[0] == len(PROMPT)


def test_stream_concatenates_to_full_text() -> None:
    request = Request(PROMPT, Sampling(seed=3, max_tokens=60, temperature=1.5))
    pieces = list(engine().stream(request))
    whole = engine().generate([request])[0][0]
    assert "".join(p.text for p in pieces) == whole.text == text_of(whole.tokens)
    assert [t for p in pieces for t in p.tokens] == list(whole.tokens)
    assert pieces[-1].completion == whole
    # Characters of several bytes never come out broken before the end.
    assert all("�" not in p.text for p in pieces) or "�" in whole.text


def test_closing_a_stream_frees_its_slot() -> None:
    it = engine(slots=1)
    stream = it.stream(Request(PROMPT, Sampling(max_tokens=50)))
    next(stream)
    stream.close()
    assert it.running == []
    assert it.generate([Request(PROMPT, Sampling(max_tokens=2))])


def test_stop_strings_across_tokens() -> None:
    detokenizer = Detokenizer(byte_tokenizer(), ["END", "\n\n"])
    tokenizer = byte_tokenizer()
    shown = ""
    for token in tokenizer.encode("a EN b\nc END d"):
        detokenizer.push(token)
        shown += detokenizer.take(final=detokenizer.stopped)
        assert not shown.endswith(("E", "EN", "\n"))
        if detokenizer.stopped:
            break
    assert shown == "a EN b\nc "


def test_multibyte_characters_are_held_until_whole() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, [])
    shown = []
    for token in tokenizer.encode("é漢🙂"):
        detokenizer.push(token)
        shown.append(detokenizer.take(final=False))
    assert "".join(shown) == "é漢🙂"
    assert [s for s in shown if s] == ["é", "漢", "🙂"]


def test_stop_token_ends_without_its_text() -> None:
    it = engine()
    bias = torch.zeros(257)
    bias[END] = 1e4
    logits = it.runner.model.logits
    it.runner.model.logits = lambda hidden: logits(hidden) + bias
    completion = it.generate([Request(PROMPT, Sampling(max_tokens=9))])[0][0]
    assert completion.tokens == (END,)
    assert completion.text == ""
    assert completion.finish == "stop"


def test_context_bounds_the_length() -> None:
    it = engine()
    prompt = tuple(range(120))
    completion = it.generate([Request(prompt, Sampling(max_tokens=99))])[0][0]
    assert len(completion.tokens) <= 8
    with pytest.raises(TreadleError, match=r"128 tokens.*context is 128.*shorten"):
        it.submit(Request(tuple(range(128)), Sampling()))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), Sampling()), "prompt is empty"),
        (Request(PROMPT, Sampling(), n=99), "n=99 completions.*slots is 8"),
    ],
)
def test_bad_requests(request_: Request, message: str) -> None:
    with pytest.raises(TreadleError, match=message):
        engine().generate([request_])
