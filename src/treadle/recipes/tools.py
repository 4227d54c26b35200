"""A model that cannot add learns to call a calculator: worked plays, then reinforcement."""

from __future__ import annotations

from treadle.alignment.measure_played import MeasurePlayed
from treadle.alignment.played import Played
from treadle.alignment.reasoning_gym import Family, ReasoningGym
from treadle.alignment.samplers import NativeKernels
from treadle.alignment.tool_solutions import CalculatorSolutions
from treadle.alignment.tools import Calculator, WithTools
from treadle.core.pipeline import Pipeline
from treadle.inference.sampling import Sampling
from treadle.recipes.plays import BASE, reinforced, schooled, watched

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
    source = Played(
        environment=TRAINING.replace(problems=SUMS.replace(seed=1)),
        sampling=Sampling(max_tokens=48),
        turns=3,
        tokens=2048,
        sampler=NativeKernels(),
    )
    held_out = TRAINING.replace(problems=SUMS.replace(split="heldout"))
    greedy = Sampling(temperature=0.0, max_tokens=48)
    exam = MeasurePlayed(
        name="measure-base",
        subject="base",
        model=BASE,
        played=source.replace(environment=held_out, sampling=greedy),
        what="sums solved",
    )
    school = schooled(CalculatorSolutions(environment=TRAINING, amount=256), steps=8)
    return watched("tools", school, reinforced("grpo", source, 8, minutes=4.0), exam)
