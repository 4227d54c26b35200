"""Self-consistency training: a model learns from the answers on which its samples agree."""

from __future__ import annotations

from treadle.alignment.accepted import Accepted, Agreeing
from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.rollouts import Rollouts
from treadle.core.pipeline import Pipeline
from treadle.inference.sampling import Sampling
from treadle.models.source import Pretrained
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import measured, sft
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def self_consistency() -> Pipeline:
    start = sft(Pretrained(name="smollm2-135m-instruct")).replace(
        fit=Fit(steps=24, checkpoint_every=8), minutes=2.0
    )
    agree = Run(
        name="agree",
        model=Trained(step="sft"),
        source=Accepted(
            rollouts=Rollouts(
                problems=ReasoningGym(families=QUICKSTART, seed=1),
                prompts=16,
                completions=8,
                sampling=Sampling(temperature=0.7, max_tokens=112),
                tokens=2048,
            ),
            accept=Agreeing(),
        ),
        objective=CausalLM(),
        optimizer=AdamW(lr=2e-4),
        schedule=Constant(),
        fit=Fit(steps=12, checkpoint_every=4),
        minutes=5.0,
    )
    stages = (start, measured("sft", Trained(step="sft")))
    after = (agree, measured("agree", Trained(step="agree")), Report())
    return Pipeline(name="self-consistency", steps=(*stages, *after))
