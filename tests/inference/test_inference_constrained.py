"""Constrained output: always valid, alone or in a batch, and otherwise the model's own."""

from __future__ import annotations

import json
import re

import jsonschema
import numpy as np
import pytest
import torch
from tiny_generation import END, byte_tokenizer, tiny_model

pytest.importorskip("llguidance")
from treadle.core.errors import TreadleError
from treadle.inference.constrained import JsonSchema, LarkGrammar, Regex
from treadle.inference.constraint import Constraint, Guide
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Completion, Request
from treadle.inference.sampling import Sampling, sample
from treadle.tokenizers.tokenizer import Tokenizer

PROMPT = (10, 20, 30)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "loom": {"enum": ["floor", "table"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "loom"],
    "additionalProperties": False,
}
PERSON = JsonSchema(text=json.dumps(SCHEMA))
LIST = LarkGrammar(text='start: "[" number ("," number)* "]"\nnumber: /[1-9][0-9]{0,2}/')


def engine(slots: int = 16) -> Engine:
    return Engine(tiny_model(context=512), byte_tokenizer(), EngineConfig(slots=slots))


def request(constraint: object, seed: int, **sampling: object) -> Request:
    return Request(PROMPT, Sampling(constraint=constraint, seed=seed, max_tokens=400, **sampling))


def run(*requests: Request) -> list[Completion]:
    return [answer[0] for answer in engine().generate(requests)]


def test_every_output_is_valid() -> None:
    """Different constraints and none, in one batch; checked by other libraries."""
    requests = [request(PERSON, seed, temperature=1.5) for seed in range(8)]
    requests += [request(Regex(pattern="(ab|c){2,5}x?"), seed) for seed in range(8)]
    requests += [request(LIST, seed) for seed in range(8)]
    requests += [Request(PROMPT, Sampling(seed=seed, max_tokens=30)) for seed in range(4)]
    answers = run(*requests)
    for answer in answers[:24]:
        assert answer.finish == "stop"
    for answer in answers[:8]:
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    for answer in answers[8:16]:
        assert re.fullmatch("(ab|c){2,5}x?", answer.text)
    for answer in answers[16:24]:
        assert all(0 < n < 1000 for n in json.loads(answer.text))
    assert len({a.text for a in answers[:8]}) > 4, "they are not all the same"
    alone = run(*requests[24:])
    assert [a.tokens for a in answers[24:]] == [a.tokens for a in alone], "others are left alone"


def test_text_does_not_depend_on_the_batch() -> None:
    wanted = request(PERSON, 5)
    crowd = [request(LIST, 1), wanted, Request(PROMPT, Sampling(seed=2, max_tokens=5))]
    assert run(wanted)[0].tokens == run(*crowd)[1].tokens


def test_masked_distribution_is_the_models_renormalised() -> None:
    """Oracle: rejection. Of the model's own first tokens, those that are allowed."""
    constraint = Regex(pattern="[a-f]{3}")
    it = engine()
    guide = constraint.build(it.tokenizer, 257)
    with torch.no_grad():
        logits = it.model.logits(it.model(torch.tensor([PROMPT]))[0, -1:])
    p = logits.softmax(-1)[0].double().numpy() * guide.mask()
    assert guide.mask().sum() == 6
    n = 3000
    draw = sample(
        logits.expand(n, -1),
        [Sampling(seed=i) for i in range(n)],
        streams=[0] * n,
        steps=[0] * n,
        allowed=torch.from_numpy(guide.mask()).expand(n, -1),
    )
    counts = np.bincount(draw.tokens.numpy(), minlength=257) / n
    assert np.abs(counts - p / p.sum()).max() < 4 / n**0.5 / 2
    free = logits.log_softmax(-1)[0, draw.tokens]
    torch.testing.assert_close(draw.logprobs, free)  # as the model itself has it


def test_greedy_takes_the_best_that_is_allowed() -> None:
    answer = run(request(Regex(pattern="[xyz]{6}"), 0, temperature=0))[0]
    it = engine()
    tokens = list(PROMPT)
    for _ in range(6):
        with torch.no_grad():
            logits = it.model.logits(it.model(torch.tensor([tokens]))[0, -1])
        choices = it.tokenizer.encode("xyz")
        tokens.append(max(choices, key=lambda t: float(logits[t])))
    assert answer.tokens == tuple(tokens[3:])


def test_the_text_may_end_only_where_it_is_whole() -> None:
    guide = Regex(pattern="ab+").build(byte_tokenizer(), 257)
    a, b = byte_tokenizer().encode("ab")
    assert guide.mask().nonzero()[0].tolist() == [a]
    guide.advance(a)
    assert guide.mask().nonzero()[0].tolist() == [b]
    guide.advance(b)
    assert sorted(guide.mask().nonzero()[0].tolist()) == sorted([b, END])
    assert not guide.done


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (JsonSchema(text="{"), "not valid JSON"),
        (JsonSchema(text='{"type": "poem"}'), "JsonSchema"),
        (Regex(pattern="(a"), "Regex"),
        (Regex(pattern="(?=a)b"), "Regex"),
        (LarkGrammar(text="start: nothing"), "LarkGrammar"),
    ],
)
def test_wrong_constraints_are_refused_at_once(constraint: object, message: str) -> None:
    it = engine()
    with pytest.raises(TreadleError, match=message):
        it.submit(request(constraint, 0))
    assert not it.waiting


def test_penalties_bias_and_top_logprobs() -> None:
    """Against the formula on the model's logits."""
    sampling = Sampling(
        temperature=0,
        max_tokens=12,
        presence_penalty=0.7,
        frequency_penalty=0.9,
        logit_bias=((65, 3.0), (END, -100.0)),
        top_logprobs=4,
    )
    it = engine()
    answer = it.generate([Request(PROMPT, sampling)])[0][0]
    tokens: list[int] = []
    for step in range(12):
        with torch.no_grad():
            z = it.model.logits(it.model(torch.tensor([[*PROMPT, *tokens]]))[0, -1]).clone()
        for token in set(tokens):
            z[token] -= 0.7 + 0.9 * tokens.count(token)
        z[65] += 3.0
        z[END] -= 100.0
        top = z.log_softmax(-1).topk(4)
        assert [t for t, _ in answer.tops[step]] == top.indices.tolist()
        assert [lp for _, lp in answer.tops[step]] == pytest.approx(top.values.tolist(), abs=1e-4)
        tokens.append(int(z.argmax()))
    assert list(answer.tokens) == tokens


class Broken(Constraint):
    """One whose guide gives up, as a parser does that reaches its limits."""

    after: int

    def build(self, tokenizer: Tokenizer, vocab: int) -> Guide:
        return BrokenGuide(self.after)


class BrokenGuide(Guide):
    def __init__(self, after: int) -> None:
        self.left = after

    def mask(self) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise TreadleError("too complex")
        return np.ones(257, dtype=bool)

    def advance(self, token: int) -> None: ...

    @property
    def done(self) -> bool:
        return False


def test_a_guide_that_fails_ends_its_own_text_only() -> None:
    bias = ((END, -100.0),)
    broken = Request(PROMPT, Sampling(constraint=Broken(after=3), max_tokens=9, logit_bias=bias))
    other = Request(PROMPT, Sampling(seed=4, max_tokens=9))
    first, second = run(broken, other)
    assert (first.finish, len(first.tokens)) == ("cancelled", 3)
    assert second.tokens == run(other)[0].tokens
