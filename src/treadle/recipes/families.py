"""The task families of the quickstart: chosen because the base model fails them all."""

from __future__ import annotations

from treadle.alignment.reasoning_gym import Family

QUICKSTART = (
    Family(name="leg_counting", settings=(("min_animals", 2), ("max_animals", 4))),
    Family(name="gcd", settings=(("max_value", 100),)),
)
