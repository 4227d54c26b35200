"""Problems that ask for something a program can check: subjects and rules, mixed without end."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from pydantic import Field

from treadle.alignment.reasoning_gym import split_of
from treadle.alignment.rewards import Graded, Reward
from treadle.core.errors import TreadleError
from treadle.data.problems import Problems
from treadle.data.records import Problem, user

SUBJECTS = (
    "the sea", "bread", "a loom", "winter", "an old clock", "bees", "a bridge", "chess", "rain",
    "a mountain village", "salt", "a lighthouse", "ink", "wool", "a garden", "trains",
)  # fmt: skip
Rule = dict[str, Any]


def _words(draw: random.Random) -> tuple[str, Rule]:
    most = draw.choice((10, 15, 20, 30))
    return f"Use at most {most} words.", {"check": "words", "least": 3, "most": most}


def _sentences(draw: random.Random) -> tuple[str, Rule]:
    count = draw.choice((1, 2, 3))
    rule = {"check": "sentences", "least": count, "most": count}
    return f"Write exactly {count} sentence{'s' if count > 1 else ''}.", rule


def _bullets(draw: random.Random) -> tuple[str, Rule]:
    count = draw.choice((2, 3, 4))
    rule = {"check": "bullets", "least": count, "most": count}
    return f'Answer with exactly {count} bullet points, each a line that begins with "- ".', rule


def _mentions(draw: random.Random) -> tuple[str, Rule]:
    word = draw.choice(("slow", "blue", "seven", "morning", "quiet"))
    return f'Use the word "{word}".', {"check": "mentions", "text": word}


def _lower(draw: random.Random) -> tuple[str, Rule]:
    return "Use small letters only.", {"check": "case", "text": "lower"}


def _ends(draw: random.Random) -> tuple[str, Rule]:
    end = draw.choice(("That is all.", "The end.", "So it is."))
    return f'End with "{end}"', {"check": "ends", "text": end}


KINDS: tuple[tuple[Callable[[random.Random], tuple[str, Rule]], ...], ...] = (
    (_words, _sentences, _bullets),
    (_mentions, _lower, _ends),
)
"""Of each row at most one is asked for, so that no two contradict each other."""


class FollowInstructions(Problems):
    """A subject with one or two rules."""

    rules: int = Field(1, ge=1, le=2)
    """Rules in a problem."""
    held_out: bool = False
    """Take those questions that are never trained on."""
    seed: int = 0
    reward: Reward = Graded()

    def problem(self, index: int) -> Problem:
        wanted = "heldout" if self.held_out else "train"
        for attempt in range(256):
            draw = random.Random(f"{self.seed}/{index}/{attempt}")
            rows = draw.sample(KINDS, self.rules)
            found = [draw.choice(row)(draw) for row in rows]
            text = " ".join([f"Tell me about {draw.choice(SUBJECTS)}.", *(f[0] for f in found)])
            if split_of(text) == wanted:
                return Problem((user(text),), json.dumps([f[1] for f in found]), "instructions")
        raise TreadleError(f"256 problems gave none that is {wanted}: take another seed")

    def score(self, problem: Problem, completion: str) -> float:
        return self.reward(problem, completion)
