"""A model learns to look things up that it cannot know: worked plays, then reinforcement."""

from __future__ import annotations

from treadle.alignment.lookups import InventedFacts, LookUps
from treadle.alignment.measure_played import MeasurePlayed
from treadle.alignment.played import Played
from treadle.alignment.samplers import NativeKernels
from treadle.alignment.search import SearchTool
from treadle.alignment.tool_solutions import SearchSolutions
from treadle.alignment.tools import WithTools
from treadle.core.pipeline import Pipeline
from treadle.inference.sampling import Sampling
from treadle.recipes.plays import BASE, reinforced, schooled, watched

FACTS = InventedFacts()
TRAINING = WithTools(
    problems=LookUps(facts=FACTS, hops=2), tools=(SearchTool(documents=FACTS),), calls=3
)


def search() -> Pipeline:
    source = Played(
        environment=TRAINING,
        sampling=Sampling(max_tokens=48),
        turns=4,
        tokens=2048,
        sampler=NativeKernels(),
    )
    held_out = TRAINING.replace(problems=LookUps(facts=FACTS, hops=2, held_out=True))
    exam = MeasurePlayed(
        name="measure-base",
        subject="base",
        model=BASE,
        played=source.replace(
            environment=held_out, sampling=Sampling(temperature=0.0, max_tokens=48)
        ),
        what="questions answered",
    )
    school = schooled(SearchSolutions(environment=TRAINING, amount=128), steps=8)
    return watched("search", school, reinforced("grpo", source, 8, minutes=4.0), exam)
