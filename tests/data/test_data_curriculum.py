"""Curricula: what is open when, beside formulas by hand; difficulty beside a plain loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from chat_env import Numbered, chat_env

from treadle.core.errors import ConfigError
from treadle.data.curriculum import (
    AnswerLength,
    Curriculum,
    LinearPace,
    ModelLoss,
    Paced,
    Pacing,
    RootPace,
    StaircasePace,
)
from treadle.data.supervised import Supervised, piece_of

NUMBERED = Numbered(word="loom", amount=20)
EASIEST_FIRST = tuple(sorted(range(20), key=lambda i: (7 * i) % 20))


@pytest.mark.parametrize(
    ("pace", "expected"),
    [
        (LinearPace(start=0.2, steps=8), {0: 0.2, 2: 0.4, 4: 0.6, 8: 1.0, 9: 1.0}),
        (RootPace(start=0.6, steps=16), {0: 0.6, 7: 0.8, 16: 1.0, 17: 1.0}),
        (StaircasePace(start=0.1, every=3, grow=2.0), {0: 0.1, 2: 0.1, 3: 0.2, 6: 0.4, 12: 1.0}),
        (StaircasePace(start=0.1, every=1, grow=2.0), {3: 0.8, 4: 1.0, 10**5: 1.0}),
        (StaircasePace(start=1.0, every=1), {0: 1.0, 10**5: 1.0}),
    ],
)
def test_paces_by_hand(pace: Pacing, expected: dict[int, float]) -> None:
    for step, share in expected.items():
        assert pace(step) == pytest.approx(share)


def test_draws_are_from_the_easiest() -> None:
    """At step t exactly the easiest ceil(g(t) n) are drawn: none other, and all of them."""
    paced = Paced(
        conversations=NUMBERED,
        order=EASIEST_FIRST,
        pacing=LinearPace(start=0.1, steps=6),
        per_step=200,
    )
    for step, open_ in ((0, 2), (2, 8), (4, 14), (6, 20), (9, 20)):
        drawn = {
            int(paced.conversation(step * 200 + i).messages[0].content.split()[1])
            for i in range(200)
        }
        assert drawn == set(EASIEST_FIRST[:open_])


def test_the_source_orders_by_difficulty_and_resumes(tmp_path: Path) -> None:
    env = chat_env(tmp_path)
    source = Supervised(conversations=NUMBERED, per_step=4)
    curriculum = Curriculum(source=source, pacing=LinearPace(start=0.1, steps=10))
    stream = curriculum.open(env)
    lengths = []
    for _ in range(12):
        (batch,) = next(stream).batches
        lengths.append(int(batch.per_sequence(batch.weights).max()))
    assert lengths[0] < lengths[-1]
    again = curriculum.open(env)
    for _ in range(5):
        next(again)
    state = again.state()
    expected = next(again).batches[0].tokens
    resumed = curriculum.open(env)
    resumed.restore(state)
    assert torch.equal(next(resumed).batches[0].tokens, expected)


def test_difficulty(tmp_path: Path) -> None:
    """Answer length by hand; loss against cross-entropy over one conversation at a time."""
    env = chat_env(tmp_path)
    source = Supervised(conversations=NUMBERED, tokens=64)
    lengths = AnswerLength()(source, 20, env)
    assert lengths == [1 + (7 * i) % 20 for i in range(20)]
    losses = ModelLoss()(source, 20, env)
    for i, loss in enumerate(losses):
        piece = piece_of(NUMBERED.conversation(i), source, env.tokenizer)
        tokens = torch.tensor(piece.tokens)
        logits = env.model.logits(env.model(tokens))[:-1]
        learned = torch.tensor(piece.learn)[1:]
        expected = F.cross_entropy(logits[learned], tokens[1:][learned])
        assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert len(set(losses)) > 10


def test_the_order_is_kept_when_the_model_has_learned(tmp_path: Path) -> None:
    env = chat_env(tmp_path)
    curriculum = Curriculum(
        source=Supervised(conversations=NUMBERED, per_step=4),
        pacing=LinearPace(start=0.1, steps=10),
        difficulty=ModelLoss(),
    )
    before = next(curriculum.open(env)).batches[0].tokens
    with torch.no_grad():
        for parameter in env.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(next(curriculum.open(env)).batches[0].tokens, before)


def test_endless_conversations_have_no_order(tmp_path: Path) -> None:
    endless = Supervised(conversations=Numbered(word="loom", endless=True))
    with pytest.raises(ConfigError, match="Numbered never ends"):
        Curriculum(source=endless, pacing=LinearPace(steps=3)).open(chat_env(tmp_path))
