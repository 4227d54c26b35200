"""Reward models as rewards: transformers' scores, what cannot be read, and policies that learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from alignment.learn import learn
from tiny_generation import END, byte_tokenizer, tiny_model

from treadle.alignment.aspects import AspectOf
from treadle.alignment.constrained import ConstrainedRollouts
from treadle.alignment.learned_reward import LearnedReward
from treadle.alignment.measure import LikelihoodOf
from treadle.alignment.rewards import Part, Reward, UncertaintyWeighted, Weighted
from treadle.alignment.rollouts import Rollouts
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.core.progress import Silent
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.evals.evaluate import Exam
from treadle.evals.reason import sit
from treadle.inference.engine import Engine
from treadle.inference.reasoning.strategy import Ask, Thinker
from treadle.inference.reasoning.votes import BestOfN, ByReward
from treadle.inference.sampling import Sampling
from treadle.models.hub.save import save_hf
from treadle.models.llama import tiny_llama
from treadle.models.reward_head import RewardHead
from treadle.models.source import ModelSource, Opened, Pretrained
from treadle.objectives.reward_mixture import MixtureHead
from treadle.train.precision import FP32

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
ASKED = Problem((user("what?"),), "", "any")
TEXTS = ("yes", "no, never", "  ", "perhaps")


class Writing(Problems):
    """No answer is right."""

    def problem(self, index: int) -> Problem:
        return Problem((user(f"write {index}"),), "", "any")

    def score(self, problem: Problem, completion: str) -> float:
        return 0.0


class ScoringBytes(ModelSource):
    """A tiny reward model that likes some directions of its hidden states."""

    seed: int = 0
    broken: bool = False
    aspects: int = 0

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.folder / f"tokenizer-{self.seed}"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        body = tiny_model(seed=self.seed, context=64)
        if self.aspects:
            return Opened(MixtureHead(aspects=self.aspects)(body), folder)
        model = RewardHead()(body)
        torch.manual_seed(self.seed)
        torch.nn.init.normal_(model.head.linear.weight)
        if self.broken:
            torch.nn.init.constant_(model.head.linear.weight, torch.nan)
        return Opened(model, folder)


def env(folder: Path, seed: int = 3) -> Env:
    workspace = Workspace(folder, folder, Pipeline(name="p", steps=()), Silent())
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    return Env(tiny_model(seed=seed), tokenizer, scratch=folder, workspace=workspace)


def learned(**fields: object) -> LearnedReward:
    return LearnedReward(**{"model": ScoringBytes(), "precision": FP32(), **fields})


@pytest.mark.parametrize("pad", [None, END, ord("\n")])
def test_rewards_match_transformers(pad: int | None, tmp_path: Path) -> None:
    """A reward model that treadle wrote, asked by transformers for each conversation by itself;
    where its padding ends the turns, both read before that."""
    torch.manual_seed(0)
    model = RewardHead()(tiny_llama(257, dim=32, layers=2, heads=4, kv_heads=2).build())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_hf(model, tmp_path / "scorer", fields={"pad_token_id": pad})
    byte_tokenizer().with_template(TEMPLATE).save(tmp_path / "scorer")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer")
    encode = byte_tokenizer().encode
    reward = learned(model=Pretrained(name=str(tmp_path / "scorer")), centre=0.25, tokens=20)
    found = reward.open(env(tmp_path), 1.0)(ASKED, TEXTS)
    for text, scored in zip(TEXTS, found, strict=True):
        row = encode("u:what?<end>\na:" + text + "<end>\n", parse_special=True)
        with torch.no_grad():
            logit = theirs(torch.tensor([row])).logits[0, 0]
        expected = torch.sigmoid(logit - 0.25) if text.strip() else 0.0
        assert scored.value == pytest.approx(float(expected), rel=1e-4)
        assert not scored.failure
    assert len({s.value for s in found}) == len(TEXTS)


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    long = Problem((user("what? " * 20),), "", "any")
    here = env(tmp_path)
    rows = [
        (learned(), long, "the reward model cannot read it: its prompt has"),
        (learned(model=ScoringBytes(broken=True)), ASKED, "the reward model's score was nan"),
    ]
    for reward, problem, told in rows:
        (found,) = reward.open(here, 1.0)(problem, ["yes"])
        assert found.value == 0.0
        assert found.failure.startswith(told)
    assert learned().open(here, 1.0)(ASKED, ["", "\n"]) == learned().open(here, 1.0)(
        ASKED, [" "] * 2
    )


def test_private_reasoning_is_not_read(tmp_path: Path) -> None:
    rate = learned().open(env(tmp_path), 1.0)
    said, thought, silent = rate(ASKED, ["yes", "<think>no!</think>\nyes", "<think>yes</think>"])
    assert thought == said
    assert silent.value == 0.0


def test_scores_far_out_are_worth_nothing_or_all(tmp_path: Path) -> None:
    here = env(tmp_path)
    for centre, value in ((1e30, 0.0), (-1e30, 1.0)):
        (found,) = learned(centre=centre).open(here, 1.0)(ASKED, ["yes"])
        assert found.value == pytest.approx(value, abs=1e-9)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match="LearnedReward: models are found in pipelines alone"):
        learned().open(replace(env(tmp_path), workspace=None), 1.0)
    save_hf(tiny_model(), tmp_path / "words")
    byte_tokenizer().with_template(TEMPLATE).save(tmp_path / "words")
    wordy = learned(model=Pretrained(name=str(tmp_path / "words"))).open(env(tmp_path), 1.0)
    with pytest.raises(TreadleError, match="gives words, not scores"):
        wordy(ASKED, ["yes"])
    ruleless = Weighted(parts=(Part(name="liked", reward=learned()),))
    with pytest.raises(TreadleError, match="`liked` is no rule but a LearnedReward"):
        ruleless(ASKED, "yes")
    aspect = learned(model=ScoringBytes(aspects=2), judge=AspectOf(number=2))
    with pytest.raises(TreadleError, match="there is no aspect 2"):
        aspect.open(env(tmp_path), 1.0)(ASKED, ["yes"])


def test_judges_say_what_is_read(tmp_path: Path) -> None:
    """A mixture that has no opinion yet is worth one half; likelihoods are rewards as well."""
    here = env(tmp_path)
    mixture = learned(model=ScoringBytes(aspects=2), judge=AspectOf(number=1))
    assert [s.value for s in mixture.open(here, 1.0)(ASKED, ["yes", "no"])] == [0.5, 0.5]
    words = tmp_path / "likely"
    save_hf(tiny_model(), words)
    byte_tokenizer().with_template(TEMPLATE).save(words)
    likely = learned(model=Pretrained(name=str(words)), judge=LikelihoodOf())
    (found,) = likely.open(here, 1.0)(ASKED, ["yes"])
    assert 0 < found.value < 0.5, "a mean log-probability is below 0"


def test_several_models_are_doubted_where_they_differ(tmp_path: Path) -> None:
    here = env(tmp_path)
    models = [learned(model=ScoringBytes(seed=s)) for s in range(3)]
    parts = tuple(Part(name=f"r{i}", reward=m) for i, m in enumerate(models))
    together = Weighted(parts=parts, together=UncertaintyWeighted(doubt=0.5)).open(here, 1.0)
    alone = torch.tensor([[s.value for s in m.open(here, 1.0)(ASKED, TEXTS)] for m in models])
    expected = alone.mean(0) - 0.5 * alone.var(0, unbiased=False)
    found = together(ASKED, TEXTS)
    assert [s.value for s in found] == pytest.approx(expected.tolist(), rel=1e-5)
    assert found[1].parts == pytest.approx({f"r{i}": alone[i, 1].item() for i in range(3)})


def test_a_policy_learns_what_the_reward_model_likes(tmp_path: Path) -> None:
    """Or gives it up, where the model is a cost with a limit below what the policy had."""
    likes = learned(centre=-1.5)
    source = Rollouts(
        problems=Writing(),
        prompts=4,
        completions=8,
        sampling=Sampling(max_tokens=6),
        reward=likes,
    )
    seen = learn(env(tmp_path, seed=4), source, steps=60)
    assert seen.late("reward", 10) > seen.early("reward", 5) + 0.1
    costly = ConstrainedRollouts(
        rollouts=source.replace(reward=Saying()), cost=likes, limit=0.1, rate=0.3
    )
    held = learn(env(tmp_path / "held", seed=4), costly, steps=24)
    assert held.early("cost", 5) > 0.2
    assert held.late("cost", 5) < 0.15


class Saying(Reward):
    """Whatever says something is good."""

    def __call__(self, problem: Problem, completion: str) -> float:
        return float(bool(completion.strip()))


def test_the_best_of_n_is_what_the_reward_model_likes(tmp_path: Path) -> None:
    here = env(tmp_path)
    engine = Engine(here.model, here.tokenizer)
    sampling = Sampling(max_tokens=5)
    best = BestOfN(n=6, sampling=sampling, by=ByReward(reward=learned()))
    exam = Exam(name="writing", problems=Writing(), count=3)
    _, said = sit(engine, best, exam, here, Silent())
    thinker = Thinker(engine, lambda text: text)
    asks = [Ask(i, ({"role": "user", "content": f"write {i}"},)) for i in range(3)]
    rate = learned().open(here, 1.0)
    for i, drawn in enumerate(thinker.ask(asks, sampling, 6)):
        texts = [c.text for c in drawn]
        scores = [s.value for s in rate(Writing().problem(i), texts)]
        assert len(set(scores)) > 1
        assert said[i]["answer"] == texts[scores.index(max(scores))]
    with pytest.raises(TreadleError, match="ByReward: these questions are no problems"):
        best(thinker, [asks[0].turns])
