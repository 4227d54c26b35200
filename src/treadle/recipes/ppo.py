"""PPO on problems with a verifier, from a model that has seen some solutions."""

from __future__ import annotations

from treadle.alignment.ppo import PPORollouts
from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.rollouts import Rollouts
from treadle.alignment.value_head import ValueHead
from treadle.core.pipeline import Pipeline
from treadle.inference.sampling import Sampling
from treadle.objectives.ppo import PPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.recipes.expert_iteration import expert_iteration
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import measured
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def ppo() -> Pipeline:
    start, before = expert_iteration().steps[:2]
    reinforce = Run(
        name="ppo",
        model=Trained(step="sft"),
        transforms=(ValueHead(),),
        source=PPORollouts(
            rollouts=Rollouts(
                problems=ReasoningGym(families=QUICKSTART, seed=1),
                prompts=16,
                completions=4,
                sampling=Sampling(max_tokens=112),
                tokens=2048,
            )
        ),
        objective=PPO(),
        optimizer=AdamW(lr=1e-4),
        schedule=Constant(),
        fit=Fit(steps=24, checkpoint_every=4),
        minutes=8.0,
    )
    after = (reinforce, measured("ppo", Trained(step="ppo")), Report())
    return Pipeline(name="ppo", steps=(start, before, *after))
