"""reasoning-gym's families of procedurally generated problems, each with a verifier of its own.

Stojanovski et al. 2025, Reasoning Gym, arXiv:2505.24760. The library is optional.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any

from treadle.core.errors import TreadleError, did_you_mean
from treadle.data.records import Problem

Scalar = bool | int | float | str
Settings = tuple[tuple[str, Scalar], ...]


SIZE = 2**14
"""Items of an opened family: some families prepare all of them when they are opened."""


@lru_cache(maxsize=64)
def open_family(name: str, settings: Settings = (), seed: int = 0) -> Any:
    """A family's data set of `SIZE` items; item i is drawn from the seed `seed + i`.

    Raises:
        TreadleError: the library is absent, or does not know the family, a setting or its value.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise TreadleError(
            f"the problems of `{name}` come from reasoning-gym: pip install 'treadle[tasks]'"
        ) from None
    if name not in DATASETS:
        raise TreadleError(f"reasoning-gym has no family `{name}`{did_you_mean(name, DATASETS)}")
    known = {field.name for field in fields(DATASETS[name][1])} - {"seed", "size"}
    for key, _ in settings:
        if key not in known:
            raise TreadleError(f"family `{name}` has no setting `{key}`{did_you_mean(key, known)}")
    try:
        return create_dataset(name, seed=seed, size=SIZE, **dict(settings))
    except (AssertionError, ValueError, TypeError) as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in settings)
        raise TreadleError(f"family `{name}` does not accept {shown}: {error}") from None


def family_marks(name: str, problem: Problem, answer: str | None) -> float:
    """The family's own marks for an answer, in [0, 1]; partial credit is its own affair."""
    entry = {
        "question": problem.metadata.get("question", ""),
        "answer": problem.answer,
        "metadata": problem.metadata,
    }
    return float(open_family(name).score_answer(answer, entry))
