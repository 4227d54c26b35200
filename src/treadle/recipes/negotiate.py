"""One model bargains with itself: schooled on scripted deals, then self-play for the payoff."""

from __future__ import annotations

from treadle.alignment.measure_played import MeasurePlayed
from treadle.alignment.negotiation import Negotiation, ScriptedDeals
from treadle.alignment.played import Played
from treadle.alignment.samplers import NativeKernels
from treadle.core.pipeline import Pipeline
from treadle.inference.sampling import Sampling
from treadle.recipes.plays import BASE, reinforced, schooled, watched


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
    return watched("negotiate", school, reinforced("self-play", source, 16, minutes=6.0), exam)
