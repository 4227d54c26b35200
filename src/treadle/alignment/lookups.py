"""Questions about an invented country: no model knows the answer, so it has to look it up.

    one hop     In which year was the mill of Varno built?
    two hops    In which year was the founder of the mill of Varno born?     (who is that?)

Each town has all kinds of buildings and each founder a namesake, so a passage about the right
town, or the right family, is not enough.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from pydantic import Field

from treadle.alignment.reasoning_gym import split_of
from treadle.alignment.rewards import Reward, Verified
from treadle.core.errors import TreadleError
from treadle.data.documents import Documents
from treadle.data.problems import Problems
from treadle.data.records import Problem, Text, user

BUILDINGS = ("mill", "bridge", "school", "library", "tower")
BEGINNINGS = ("Var", "Tel", "Mor", "Kes", "Lun", "Dar", "Sol", "Bren", "Ost", "Fal", "Hin", "Quor")
MIDDLES = ("a", "o", "e", "i", "u", "an", "el", "ir")
ENDS = ("no", "ma", "dor", "wick", "sted", "len", "ba", "gard")
FIRST = ("Ada", "Boris", "Clara", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Irma", "Jonas")
INSTRUCTION = 'Give the year after "Answer:".'


@dataclass(frozen=True)
class Building:
    """What is known of one."""

    kind: str
    town: str
    built: int
    founder: str
    born: int

    @property
    def name(self) -> str:
        return f"the {self.kind} of {self.town}"


class InventedFacts(Documents):
    """All that is known of the country, a sentence a document."""

    seed: int = 0
    towns: int = Field(120, ge=4, le=len(BEGINNINGS) * len(MIDDLES) * len(ENDS))

    def training(self) -> Iterator[Text]:
        for b in buildings(self):
            yield Text(f"The {b.kind} of {b.town} was built in {b.built}.")
            yield Text(f"The {b.kind} of {b.town} was founded by {b.founder}.")
            yield Text(f"{b.founder} was born in {b.born}.")

    def held_out(self) -> Iterator[Text]:
        """None: what is held out are questions."""
        return iter(())


@lru_cache(maxsize=8)
def buildings(facts: InventedFacts) -> tuple[Building, ...]:
    """Every kind in every town; no two founders have the same name."""
    draw = random.Random(facts.seed)
    towns = ["".join(parts) for parts in product(BEGINNINGS, MIDDLES, ENDS)]
    draw.shuffle(towns)
    families = towns[facts.towns :] + towns[: facts.towns]
    people = [f"{first} {family}" for family in families for first in FIRST]
    names = iter(people)
    found = []
    for town in towns[: facts.towns]:
        for kind in BUILDINGS:
            built = draw.randint(1500, 1950)
            found.append(Building(kind, town, built, next(names), built - draw.randint(20, 70)))
    draw.shuffle(found)
    return tuple(found)


class LookUps(Problems):
    """A question about each building in turn; those of one town are on one side."""

    facts: InventedFacts = InventedFacts()
    hops: int = Field(1, ge=1, le=2)
    held_out: bool = False
    reward: Reward = Verified()

    def problem(self, index: int) -> Problem:
        """Raises TreadleError where the country is too small for this side."""
        mine = _asked(self.facts, self.held_out)
        if not mine:
            raise TreadleError(
                f"LookUps: none of {self.facts.towns} towns is on this side: take more towns"
            )
        building = mine[index % len(mine)]
        queries: tuple[str, ...] = (f"{building.kind} of {building.town} built",)
        question, answer = f"In which year was {building.name} built?", building.built
        if self.hops == 2:
            queries = (
                f"{building.kind} of {building.town} founded by",
                f"{building.founder} born",
            )
            question = f"In which year was the founder of {building.name} born?"
            answer = building.born
        return Problem(
            (user(f"{question} {INSTRUCTION}"),), str(answer), "number", {"queries": queries}
        )

    def score(self, problem: Problem, completion: str) -> float:
        return self.reward(problem, completion)


@lru_cache(maxsize=8)
def _asked(facts: InventedFacts, held_out: bool) -> tuple[Building, ...]:
    wanted = "heldout" if held_out else "train"
    return tuple(b for b in buildings(facts) if split_of(b.town) == wanted)
