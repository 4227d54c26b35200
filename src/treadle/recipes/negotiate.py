"""One model bargains with itself: schooled on scripted deals, then self-play for the payoff.

A payoff against itself says how well both agree; who bargains better, it says against the schooled.
"""

from __future__ import annotations

from treadle.alignment.measure_played import MeasurePlayed
from treadle.alignment.negotiation import Negotiation, ScriptedDeals
from treadle.alignment.played import Played
from treadle.alignment.samplers import NativeKernels
from treadle.core.pipeline import Pipeline
from treadle.inference.sampling import Sampling
from treadle.recipes.plays import BASE, reinforced, schooled, watched
from treadle.train.run import Trained


def negotiate() -> Pipeline:
    game = Negotiation()
    source = Played(
        environment=game.replace(seed=1),
        sampling=Sampling(max_tokens=24),
        turns=game.offers,
        tokens=2048,
        sampler=NativeKernels(),
    )
    exam = MeasurePlayed(
        name="measure-base",
        subject="base",
        model=BASE,
        played=source.replace(environment=Negotiation(held_out=True)),
        what="payoff",
        count=96,
    )
    school = schooled(ScriptedDeals(negotiation=game), steps=16)
    play = reinforced("self-play", source, 16, minutes=6.0)
    *steps, report = watched("negotiate", school, play, exam).steps
    duels = (
        exam.replace(
            name=f"duel-{run.name}",
            subject=run.name,
            model=Trained(step=run.name),
            opponent=Trained(step=school.name),
            what="payoff against the schooled",
        )
        for run in (school, play)
    )
    return Pipeline(name="negotiate", steps=(*steps, *duels, report))
