"""Problems of reasoning-gym's families: endless, verifiable, the same on every machine.

Training and held-out problems come from disjoint ranges of seeds. Seeds alone do not keep them
apart, since small families repeat themselves, so the text decides too: a hash of the question
puts it on one side for good, and no question is ever on both.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import Field

from treadle.alignment.gym import SIZE, Scalar, open_family
from treadle.alignment.rewards import Reward, Verified
from treadle.alignment.verifiers import GYM
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.problems import Problems
from treadle.data.records import Problem, user

Split = Literal["train", "heldout"]
INSTRUCTION = 'Work it out step by step, then give the result after "Answer:".'
HELD_OUT_SHARE = 8
"""One question in so many is held out."""
DRAWS = 256
"""Seeds that belong to one index: the first whose question is on the right side is taken."""
RANGE = 2**30
"""Seeds of a split; those of the held-out problems begin where those for training end."""


class Family(Config):
    """One family and how hard its problems are."""

    name: str
    """As reasoning-gym calls it, such as `leg_counting`."""
    settings: tuple[tuple[str, Scalar], ...] = ()
    """Fields of the family's configuration, such as `(("max_animals", 4),)`."""


class ReasoningGym(Problems):
    """Problems of several families in turn."""

    families: tuple[Family, ...] = Field(min_length=1)
    split: Split = "train"
    seed: int = 0
    instruction: str = INSTRUCTION
    """Follows the question on a line of its own; empty for none."""
    reward: Reward = Verified()

    def problem(self, index: int) -> Problem:
        """Problem number `index`, from 0.

        Raises:
            TreadleError: the family's problems are too few for the split.
        """
        turn, place = index % len(self.families), index // len(self.families)
        family = self.families[turn]
        entry = self._entry(family, place)
        question = entry["question"].strip()
        prompt = f"{question}\n{self.instruction}" if self.instruction else question
        return Problem(
            prompt=(user(prompt),),
            answer=str(entry["answer"]),
            verifier=f"{GYM}/{family.name}",
            metadata={**entry["metadata"], "question": entry["question"]},
        )

    def score(self, problem: Problem, completion: str) -> float:
        return self.reward(problem, completion)

    def _entry(self, family: Family, place: int) -> dict[str, Any]:
        first = _first_seed(family.name, self.split, self.seed)
        block, start = divmod(place * DRAWS, SIZE)
        items = open_family(family.name, family.settings, first + block * SIZE)
        for draw in range(start, start + DRAWS):
            entry: dict[str, Any] = items[draw]
            if split_of(entry["question"]) == self.split:
                return entry
        raise TreadleError(
            f"{DRAWS} problems of `{family.name}` gave none for the split `{self.split}`: the "
            f"family has too few different questions with {family.settings}; widen its settings"
        )


def split_of(question: str) -> Split:
    """The side on which a question is, by its words alone."""
    words = " ".join(question.split())
    number = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big")
    return "heldout" if number % HELD_OUT_SHARE == 0 else "train"


def _first_seed(family: str, split: Split, seed: int) -> int:
    """Somewhere in the lower half of the split's range, so that seeds give other problems."""
    digest = hashlib.sha256(f"{family}/{seed}".encode()).digest()
    offset = int.from_bytes(digest[:8], "big") % (RANGE // 2)
    return offset if split == "train" else RANGE + offset
