"""Reward hacking: its signs are logged, and a part that can be gamed does not carry the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from alignment.learn import Seen, learn
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.rewards import (
    ArithmeticMean,
    Combination,
    GeometricMean,
    Part,
    Reward,
    Weighted,
    WorstOf,
)
from treadle.alignment.rollouts import Rollouts
from treadle.alignment.watch import repetition, signs
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.inference.request import Completion
from treadle.inference.sampling import Sampling

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


def said(*tokens: int) -> Completion:
    return Completion(tokens=tokens, text="", logprobs=(0.0,) * len(tokens), finish="stop")


def test_repetition_is_the_share_of_copies() -> None:
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4]) == 0.0
    assert repetition([7] * 8) == pytest.approx(4 / 5)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([1, 2, 3, 4, 5, 1, 2, 3, 5]) == 0.0


def test_signs_are_of_what_was_rewarded() -> None:
    short, long, again = said(1, 2), said(1, 2, 3, 4, 5, 6), said(*[9] * 8)
    groups = [[short, long, again, short], [long, long, short, short], [short, again, long, long]]
    rewards = [[0.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5], [1.0, 0.5, 0.0, 0.5]]
    found = signs(groups, rewards)
    assert found["repetition"] == pytest.approx(2 * (4 / 5) / 12)
    assert found["length_rewarded"] == pytest.approx(((6 + 8) / 2 - 2 + 2 - 6) / 2)
    assert found["repeated_rewarded"] == pytest.approx((4 / 5 / 2 - 0 + 0 - 0) / 2)
    assert signs([[short, long]], [[1.0, 1.0]])["length_rewarded"] == 0.0


@pytest.mark.parametrize(
    ("together", "wanted"),
    [
        (ArithmeticMean(), (0.25 + 3 * 0.81) / 4),
        (GeometricMean(), (0.25 * 0.81**3) ** 0.25),
        (WorstOf(), 0.25),
    ],
)
def test_rewards_together(together: Combination, wanted: float) -> None:
    assert together([0.25, 0.81], [1.0, 3.0]) == pytest.approx(wanted)
    assert together([0.4, 0.4], [1.0, 3.0]) == pytest.approx(0.4)
    if not isinstance(together, ArithmeticMean):
        assert together([0.0, 1.0], [1.0, 9.0]) == 0.0


class Plainly(Reward):
    """What is wanted: letters."""

    def __call__(self, problem: Problem, completion: str) -> float:
        return sum(c.isascii() and c.isalpha() for c in completion) / max(1, len(completion))


class Gameable(Reward):
    """Meant to reward a little emphasis, it pays for each mark."""

    def __call__(self, problem: Problem, completion: str) -> float:
        return sum(c in "!?*#" for c in completion) / max(1, len(completion))


class Emphasis(Problems):
    def problem(self, index: int) -> Problem:
        return Problem((user(f"say {index % 3}"),), "", "none")

    def score(self, problem: Problem, completion: str) -> float:
        raise AssertionError("the rollouts' reward scores")


def trained(together: Combination, folder: Path) -> Seen:
    parts = (
        Part(name="wanted", reward=Plainly()),
        Part(name="gamed", reward=Gameable(), weight=3.0),
    )
    source = Rollouts(
        problems=Emphasis(),
        prompts=4,
        completions=16,
        sampling=Sampling(max_tokens=8),
        reward=Weighted(parts=parts, together=together),
    )
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    env = Env(model=tiny_model(), tokenizer=tokenizer, scratch=folder)
    return learn(env, source, steps=26)


def test_a_planted_gameable_reward_is_resisted(tmp_path: Path) -> None:
    """Weighed three times what is wanted, the gameable part takes all under the usual mean; the
    geometric mean, best at one to three, keeps what is wanted. The log shows it: each reward by
    name, and repetition."""
    mean = trained(ArithmeticMean(), tmp_path / "mean")
    held = trained(GeometricMean(), tmp_path / "held")
    assert mean.late("reward_gamed", 5) > 0.9
    assert mean.late("reward_wanted", 5) < 0.03
    assert held.late("reward_wanted", 5) > 0.1
    assert mean.late("repetition", 5) > 2 * held.late("repetition", 5)
