"""A model learns to name the first mistake of its answers and to write them anew."""

from __future__ import annotations

from treadle.alignment.reviewed import LearnCritique
from treadle.core.pipeline import Pipeline
from treadle.inference.reasoning.critique import CritiqueAndRefine
from treadle.inference.reasoning.prompting import OneAnswer
from treadle.recipes.verification import self_checking


def critique() -> Pipeline:
    """Are answers better after a critique and a second try than before?"""
    return self_checking("critique", LearnCritique(), (OneAnswer(), CritiqueAndRefine()))
