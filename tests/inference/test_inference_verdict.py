"""Best-of-N by the model's word."""

from __future__ import annotations

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import TreadleError
from treadle.inference.engine import Engine
from treadle.inference.reasoning import verdict
from treadle.inference.reasoning.strategy import Ask, Thinker
from treadle.inference.reasoning.verdict import ASK, ByVerdict
from treadle.inference.reasoning.votes import BestOfN
from treadle.inference.request import Completion
from treadle.inference.sampling import Sampling

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TURNS = ({"role": "user", "content": "1+1?"},)


def asker() -> Thinker:
    return Thinker(
        Engine(tiny_model(context=512), byte_tokenizer().with_template(TEMPLATE)), lambda text: text
    )


def test_the_score_is_the_probability_of_yes() -> None:
    """Computed by a pass of the model over the text that it is shown."""
    thinker = asker()
    model, encode = thinker.engine.runner.model, thinker.engine.tokenizer.encode
    texts = ["Answer: 2", "<think>hm</think>Answer: 3", "so it goes"]
    paths = [Completion((), t, (), "stop") for t in texts]
    found = ByVerdict()(thinker, Ask(0, TURNS), texts, paths)
    for text, score in zip(("Answer: 2", "Answer: 3", "so it goes"), found, strict=True):
        shown = f"u:1+1?\na:{text}\nu:{ASK}\na:"
        with torch.no_grad():
            logits = model.logits(model(torch.tensor(encode(shown)))[-1:])[0]
        both = logits[encode("Y") + encode("N")].softmax(0)
        assert score == pytest.approx(float(both[0]), abs=1e-4)
    assert len({round(score, 3) for score in found}) == 3
    assert thinker.spent == {0: 3}, "a verdict costs a token"


def test_words_that_begin_alike_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their odds would be those of one token against itself: every text would be worth a half."""
    monkeypatch.setattr(verdict, "NO", "Yikes.")
    with pytest.raises(TreadleError, match=r"begins `Yes\.` and `Yikes\.` alike"):
        ByVerdict()(asker(), Ask(0, TURNS), ["x"], [Completion((), "x", (), "stop")])


def test_a_text_without_room_for_a_verdict_comes_last() -> None:
    thinker, texts = asker(), ["Answer: 2", "long " * 120, "Answer: 3"]
    paths = [Completion((), t, (), "stop") for t in texts]
    first, long, last = ByVerdict()(thinker, Ask(0, TURNS), texts, paths)
    assert (long, thinker.overflows) == (0.0, 1)
    assert first > 0
    assert last > 0


def test_the_best_is_the_one_it_calls_right() -> None:
    thinker = asker()
    sampling = Sampling(temperature=1.0, max_tokens=6)
    (thought,) = BestOfN(n=5, sampling=sampling, by=ByVerdict())(thinker, [TURNS])
    paths = [Completion((), t, (), "stop") for t in thought.trace]
    scores = ByVerdict()(thinker, Ask(0, TURNS), thought.trace, paths)
    assert thought.text == thought.trace[scores.index(max(scores))]
    assert max(scores) > min(scores)
