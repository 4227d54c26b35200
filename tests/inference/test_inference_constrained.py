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
from treadle.inference.constrained import JsonSchema, Language, LarkGrammar, Regex
from treadle.inference.constraint import Constraint
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.penalties import forbid
from treadle.inference.request import Completion, Request
from treadle.inference.sampling import Sampling, sample

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


def request(language: Language, seed: int, **sampling: object) -> Request:
    constraint = language.build(byte_tokenizer(), 257)
    sampling = Sampling(seed=seed, max_tokens=400, **sampling)
    return Request(PROMPT, sampling, constraint=constraint)


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
        logits = it.runner.model.logits(it.runner.model(torch.tensor([PROMPT]))[0, -1:])
    allowed = guide.mask()
    p = logits.softmax(-1)[0].double().numpy() * allowed.numpy()
    assert int(allowed.sum()) == 6
    rows = logits.repeat(3000, 1)
    for row in rows:
        forbid(row, allowed)
    n = 3000
    draw = sample(
        rows,
        [Sampling(seed=i) for i in range(n)],
        streams=[0] * n,
        steps=[0] * n,
    )
    counts = np.bincount(draw.tokens.numpy(), minlength=257) / n
    assert np.abs(counts - p / p.sum()).max() < 4 / n**0.5 / 2


def test_greedy_takes_the_best_that_is_allowed() -> None:
    answer = run(request(Regex(pattern="[xyz]{6}"), 0, temperature=0))[0]
    it = engine()
    tokens = list(PROMPT)
    for _ in range(6):
        with torch.no_grad():
            logits = it.runner.model.logits(it.runner.model(torch.tensor([tokens]))[0, -1])
        choices = it.tokenizer.encode("xyz")
        tokens.append(max(choices, key=lambda t: float(logits[t])))
    assert answer.tokens == tuple(tokens[3:]), "and no token for the end, which is certain"


def test_the_text_may_end_only_where_it_is_whole() -> None:
    guide = Regex(pattern="ab+").build(byte_tokenizer(), 257)
    a, b = byte_tokenizer().encode("ab")
    assert guide.mask().nonzero()[:, 0].tolist() == [a]
    guide.advance(a)
    assert guide.mask().nonzero()[:, 0].tolist() == [b]
    guide.advance(b)
    assert sorted(guide.mask().nonzero()[:, 0].tolist()) == sorted([b, END])


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
def test_wrong_constraints_are_refused_at_once(constraint: Language, message: str) -> None:
    with pytest.raises(TreadleError, match=message):
        constraint.build(byte_tokenizer(), 257)


class Broken(Constraint):
    """One that gives up, as a parser does that reaches its limits."""

    def __init__(self, after: int) -> None:
        self.left = after

    def fork(self) -> Constraint:
        return Broken(self.left)

    def mask(self) -> torch.Tensor | None:
        self.left -= 1
        if self.left < 0:
            raise TreadleError("too complex")
        return None

    def advance(self, token: int) -> None: ...

    def done(self) -> bool:
        return False


def test_a_complete_text_ends_without_another_pass() -> None:
    """Nothing may follow, so no pass asks the model for the end; where more may, one does."""
    for language, text in ((Regex(pattern="ab!"), "ab!"), (LarkGrammar(text='start: "a"'), "a")):
        it = engine()
        (answer,) = it.generate([request(language, 1)])[0]
        assert (answer.text, answer.finish) == (text, "stop")
        assert len(answer.tokens) == len(text), "a byte a token, and no token for the end"
    open_ended = run(request(Regex(pattern="a+"), 1, logit_bias=((END, 50.0),)))[0]
    assert open_ended.text == "a"
    assert open_ended.tokens[-1] == END
    answer = run(request(Regex(pattern="(yes|no)"), 3, min_tokens=9))[0]
    assert answer.text in ("yes", "no"), "a complete text ends whatever it should have had"


def test_a_constraint_that_fails_ends_its_own_text_only() -> None:
    sampling = Sampling(max_tokens=9, logit_bias=((END, -100.0),))
    broken = Request(PROMPT, sampling, constraint=Broken(3))
    other = Request(PROMPT, Sampling(seed=4, max_tokens=9))
    first, second = run(broken, other)
    assert (first.finish, len(first.tokens)) == ("cancelled", 3)
    assert second.tokens == run(other)[0].tokens
