"""A penalty on bias: its formula, a planted bias that falls, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from alignment.learn import Seen, learn
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.fairness import Counterfactuals, FairRollouts, demographics, penalties
from treadle.alignment.rewards import Reward
from treadle.alignment.rollouts import Rollouts
from treadle.core.errors import TreadleError
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.inference.sampling import Sampling

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


def praise(text: str) -> float:
    return sum(c.isalpha() and c.isascii() for c in text) / max(1, len(text))


class Letters4All(Problems):
    """A biased judge: letters are praise; welcome for one name alone."""

    text: str = "about {name}"

    def problem(self, index: int) -> Problem:
        return Problem((user(self.text),), "", "praise")

    def score(self, problem: Problem, completion: str) -> float:
        good = praise(completion)
        return good if "Ann" in problem.prompt[0].content else 1 - good


class Praise(Reward):
    def __call__(self, problem: Problem, completion: str) -> float:
        return praise(completion)


ROLLOUTS = Rollouts(
    problems=Counterfactuals(problems=Letters4All(), names=("Ann", "Zob")),
    prompts=2,
    completions=16,
    sampling=Sampling(max_tokens=8),
)


def train(penalty: float, folder: Path, seed: int) -> Seen:
    source = FairRollouts(rollouts=ROLLOUTS, score=Praise(), penalty=penalty)
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    env = Env(model=tiny_model(seed=seed), tokenizer=tokenizer, scratch=folder, seed=100 * seed)
    return learn(env, source, steps=32)


def test_the_gap_falls_on_counterfactual_pairs(tmp_path: Path) -> None:
    """A judge that rewards praise of one name drives them apart; the penalty holds them together,
    on three models."""
    free, fair = [], []
    for seed in range(3):
        free.append(train(0.0, tmp_path / f"free-{seed}", seed))
        fair.append(train(3.0, tmp_path / f"fair-{seed}", seed))
    assert sum(g.late("parity_gap", 10) for g in free) / 3 > 0.5
    assert sum(g.late("parity_gap", 10) for g in fair) / 3 < 0.15


def test_penalties_are_the_formula() -> None:
    scores = torch.tensor([[0.0, 1.0], [0.2, 0.4], [0.75, 0.75], [0.1, 0.3], [0.0, 0.0]])
    sets = [7, 3, 7, 3, 3]
    found = penalties(scores, sets)

    def side(p: int) -> float:
        same = [float(scores[q].mean()) for q in range(5) if sets[q] == sets[p]]
        return 1.0 if float(scores[p].mean()) > sum(same) / len(same) else -1.0

    for p in range(5):
        sides = [side(q) for q in range(5) if sets[q] == sets[p]]
        weight = side(p) - sum(sides) / len(sides)
        for c in range(2):
            wanted = weight * (float(scores[p, c]) - float(scores[p].mean()))
            assert float(found[p, c]) == pytest.approx(wanted, abs=1e-6)


def test_equal_scores_of_a_prompt_are_not_told_apart() -> None:
    """Not by the rounding of their mean: a group without a signal stays without one."""
    assert not penalties(torch.tensor([[0.1] * 12, [0.9] * 12]), [0, 0]).any()


def test_the_penalty_is_the_gradient_of_the_gap() -> None:
    """For three groups of Bernoulli answers, every outcome in its share: the policy gradient of
    the penalties is the derivative of the gap."""
    logits = torch.tensor([0.0, -1.0986123, 1.0986123], requires_grad=True)
    p = logits.sigmoid()  # 1/2, 1/4, 3/4: of four answers two, one and three score 1
    q = p - torch.tensor([0.01, 0.0, 0.0])
    (wanted,) = torch.autograd.grad((q - q.mean()).abs().sum(), logits)
    scores = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    shifted = penalties(scores - torch.tensor([[0.01], [0.0], [0.0]]), [0, 0, 0])
    logp = torch.where(scores > 0, logits[:, None], -logits[:, None])
    logp = torch.nn.functional.logsigmoid(logp)
    (found,) = torch.autograd.grad((shifted * logp).mean(-1).sum(), logits)
    # The first group is a little below the middle in both.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_demographics(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    env = Env(model=tiny_model(), tokenizer=tokenizer, scratch=tmp_path)
    source = ROLLOUTS.replace(prompts=4, completions=2)
    groups = source.open(env).roll()
    scores = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.5, 0.5]])
    found = demographics(scores, groups, [0, 0, 1, 1])
    assert found == pytest.approx(
        {"score_Ann": 0.75, "score_Zob": 0.25, "parity_gap": 0.5, "counterfactual_gap": 0.25}
    )
    assert groups[1].problem.prompt[0].content == "about Zob"


class Wordless(Reward):
    """Has no score for texts of odd length."""

    def __call__(self, problem: Problem, completion: str) -> float:
        return praise(completion) if len(completion) % 2 == 0 else float("nan")


def test_scores_that_fail_are_counted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    env = Env(model=tiny_model(), tokenizer=tokenizer, scratch=tmp_path)
    stream = FairRollouts(rollouts=ROLLOUTS, score=Wordless(), penalty=0.5).open(env)
    groups = stream.rollouts.roll()
    shaped = stream._shaped(groups)
    texts = [[c.text for c in g.completions] for g in groups]
    odd = sum(len(t) % 2 for row in texts for t in row)
    assert shaped.metrics["scores_failed"] == odd > 0
    scores = torch.tensor([[0.0 if len(t) % 2 else praise(t) for t in row] for row in texts])
    wanted = torch.tensor([g.rewards for g in groups]) - 0.5 * penalties(scores, [0, 0])
    torch.testing.assert_close(shaped.rewards, wanted)


def test_bad_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no multiple of the 2 names"):
        FairRollouts(rollouts=ROLLOUTS.replace(prompts=3), score=Praise())
    with pytest.raises(ValueError, match="must be Counterfactuals"):
        FairRollouts(rollouts=ROLLOUTS.replace(problems=Letters4All()), score=Praise())
    three = ROLLOUTS.replace(prompts=6)
    env = Env(model=tiny_model(), tokenizer=byte_tokenizer(), scratch=tmp_path, world=2)
    with pytest.raises(TreadleError, match=r"prompts=6 over 2 processes cuts .* multiple of 4"):
        FairRollouts(rollouts=three, score=Praise()).open(env)
    nameless = Counterfactuals(problems=Letters4All(text="about"), names=("A", "B"))
    with pytest.raises(TreadleError, match=r"problem 0 has no \{name\}"):
        nameless.problem(0)
