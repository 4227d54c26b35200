"""A model that cannot add learns to call a calculator: worked plays, then reinforcement."""

from __future__ import annotations

from treadle.alignment.measure_played import MeasurePlayed
from treadle.alignment.played import Played
from treadle.alignment.reasoning_gym import Family, ReasoningGym
from treadle.alignment.samplers import NativeKernels
from treadle.alignment.tool_solutions import CalculatorSolutions
from treadle.alignment.tools import Calculator, WithTools
from treadle.core.pipeline import Pipeline
from treadle.data.supervised import Supervised
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Pretrained
from treadle.objectives.policy import GRPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.recipes.quickstart import sft
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained

BASE = Pretrained(name="smollm2-135m-instruct")
SUMS = ReasoningGym(
    families=(
        Family(
            name="chain_sum",
            settings=(("min_terms", 3), ("max_terms", 4), ("min_digits", 2), ("max_digits", 3)),
        ),
    ),
    instruction='Give the result after "Answer:".',
)
TRAINING = WithTools(problems=SUMS, tools=(Calculator(),))


def tools() -> Pipeline:
    plays = CalculatorSolutions(environment=TRAINING, amount=256)
    teach = sft(BASE).replace(
        source=Supervised(conversations=plays, per_step=8),
        fit=Fit(steps=8, checkpoint_every=4),
        minutes=2.0,
    )
    source = Played(
        environment=TRAINING.replace(problems=SUMS.replace(seed=1)),
        sampling=Sampling(max_tokens=48),
        turns=3,
        tokens=2048,
        sampler=NativeKernels(),
    )
    reinforce = Run(
        name="grpo",
        model=Trained(step="sft"),
        source=source,
        objective=GRPO(),
        optimizer=AdamW(lr=1e-4),
        schedule=Constant(),
        fit=Fit(steps=8, checkpoint_every=2),
        minutes=4.0,
    )
    return Pipeline(
        name="tools",
        steps=(
            watched("base", BASE, source),
            teach,
            watched("sft", Trained(step="sft"), source),
            reinforce,
            watched("grpo", Trained(step="grpo"), source),
            Report(),
        ),
    )


def watched(subject: str, model: ModelSource, source: Played) -> MeasurePlayed:
    """Held-out sums, one greedy play of each."""
    exam = TRAINING.replace(problems=SUMS.replace(split="heldout"))
    return MeasurePlayed(
        name=f"measure-{subject}",
        subject=subject,
        model=model,
        played=source.replace(environment=exam, sampling=Sampling(temperature=0.0, max_tokens=48)),
        what="sums solved",
    )
