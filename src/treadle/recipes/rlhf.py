"""Preferences become a reward model, and the model earns by it: Ouyang et al. 2022.

A program that checks instructions stands in for people: it says which of two answers is better,
and no more. What it would have said of the policy's answers is watched beside the learned reward,
so the report shows where the two part.
"""

from __future__ import annotations

from treadle.alignment.instructions import FollowInstructions
from treadle.alignment.iterate import Compare, EveryPair, PairsOf
from treadle.alignment.learned_reward import LearnedReward
from treadle.alignment.measure import MeasurePreferences, ScoreOf
from treadle.alignment.ppo import PPORollouts
from treadle.alignment.preferences import Preferences
from treadle.alignment.reference import NoReference
from treadle.alignment.rewards import Graded, Part, Weighted
from treadle.alignment.samplers import NativeKernels
from treadle.core.pipeline import Pipeline
from treadle.inference.sampling import Sampling
from treadle.optim.adamw import AdamW
from treadle.recipes.instructed import BASE, LONGEST, UNSEEN, followed, rollouts
from treadle.recipes.ppo import ppo
from treadle.recipes.reward_model import reward_model
from treadle.reports.report import Report
from treadle.train.run import Run, Trained


def rlhf() -> Pipeline:
    label = Compare(
        name="label",
        model=BASE,
        problems=FollowInstructions(),
        count=256,
        completions=8,
        pairing=EveryPair(),
        sampling=Sampling(max_tokens=LONGEST),
        minutes=3.0,
    )
    label_unseen = label.replace(name="label-unseen", problems=UNSEEN, count=48, minutes=1.0)
    (learn,) = (step for step in reward_model().steps if isinstance(step, Run))
    pairs = Preferences(
        pairs=PairsOf(step="label"), per_step=32, longest=160, reference=NoReference()
    )
    reward = learn.replace(source=pairs, optimizer=AdamW(lr=5e-4), minutes=4.0)
    agrees = MeasurePreferences(
        name="measure-reward",
        subject="reward",
        model=Trained(step="reward"),
        pairs=PairsOf(step="label-unseen"),
        judge=ScoreOf(),
        minutes=0.5,
    )
    return Pipeline(
        name="rlhf",
        steps=(
            label,
            label_unseen,
            reward,
            agrees,
            followed("base", BASE),
            reinforced(),
            followed("ppo", Trained(step="ppo")),
            Report(),
        ),
    )


def reinforced() -> Run:
    liked = Part(name="liked", reward=LearnedReward(model=Trained(step="reward")))
    watched = Part(name="followed", reward=Graded(), weight=0.0)
    (step,) = (s for s in ppo().steps if isinstance(s, Run))
    lots = rollouts().replace(reward=Weighted(parts=(liked, watched)), sampler=NativeKernels())
    return step.replace(source=PPORollouts(rollouts=lots, epochs=1, minibatches=2))
