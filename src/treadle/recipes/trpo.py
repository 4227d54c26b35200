"""TRPO on problems with a verifier, from a model that has seen some solutions."""

from __future__ import annotations

from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.rollouts import Rollouts
from treadle.alignment.trust_region import TRPO
from treadle.core.pipeline import Pipeline
from treadle.inference.sampling import Sampling
from treadle.recipes.expert_iteration import expert_iteration
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import measured
from treadle.reports.report import Report
from treadle.train.run import Trained


def trpo() -> Pipeline:
    start, before = expert_iteration().steps[:2]
    reinforce = TRPO(
        model=Trained(step="sft"),
        source=Rollouts(
            problems=ReasoningGym(families=QUICKSTART, seed=1),
            prompts=8,
            completions=4,
            sampling=Sampling(max_tokens=112),
            tokens=1024,
        ),
        steps=12,
        iterations=5,
        checkpoint_every=2,
        minutes=12.0,
    )
    after = (reinforce, measured("trpo", Trained(step="trpo")), Report())
    return Pipeline(name="trpo", steps=(start, before, *after))
