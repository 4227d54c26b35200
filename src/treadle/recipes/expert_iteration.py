"""Expert iteration: the model learns from its own answers that the verifier accepts."""

from __future__ import annotations

from treadle.alignment.accepted import Accepted
from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.rollouts import Rollouts
from treadle.alignment.worked_solutions import WorkedSolutions
from treadle.core.pipeline import Pipeline
from treadle.data.supervised import Supervised
from treadle.inference.sampling import Sampling
from treadle.models.source import Pretrained
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant, Cosine
from treadle.peft.lora import LoRA
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import measured
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


def expert_iteration() -> Pipeline:
    training = ReasoningGym(families=QUICKSTART)
    start = Run(
        name="sft",
        model=Pretrained(name="smollm2-135m-instruct"),
        transforms=(LoRA(rank=16),),
        source=Supervised(conversations=WorkedSolutions(problems=training, amount=256)),
        objective=CausalLM(),
        optimizer=AdamW(lr=2e-3),
        schedule=Cosine(),
        fit=Fit(steps=8, checkpoint_every=8),
        minutes=2.0,
    )
    iterate = Run(
        name="expert",
        model=Trained(step="sft"),
        source=Accepted(
            rollouts=Rollouts(
                problems=ReasoningGym(families=QUICKSTART, seed=1),
                prompts=32,
                completions=4,
                sampling=Sampling(max_tokens=112),
                tokens=2048,
            )
        ),
        objective=CausalLM(),
        optimizer=AdamW(lr=2e-4),
        schedule=Constant(),
        fit=Fit(steps=12, checkpoint_every=4),
        minutes=6.0,
    )
    stages = (start, measured("sft", Trained(step="sft")))
    after = (iterate, measured("expert", Trained(step="expert")), Report())
    return Pipeline(name="expert-iteration", steps=(*stages, *after))
