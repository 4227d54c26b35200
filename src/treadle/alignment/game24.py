"""The Game of 24: make 24 from four numbers with + - * /, each number once.

    Make 24 from 4 9 10 13.
    13 - 9 = 4; left 4 4 10
    10 - 4 = 6; left 4 6
    4 * 6 = 24; left 24
    Answer: 24

A complete solver over fractions says of every state whether 24 can still be reached, so it can make
problems, worked steps, and judgements of beginnings, in the words in which a tree search asks for
them. The 1820 multisets of 1 to 13, of which 1362 can be solved, are split by a hash.
Yao et al. 2023, Tree of Thoughts, arXiv:2305.10601.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement, permutations

from pydantic import Field

from treadle.alignment.reasoning_gym import split_of
from treadle.core.cards import Card
from treadle.data.problems import Problems
from treadle.data.records import Chat, Problem, assistant, user
from treadle.data.supervised import Conversations
from treadle.inference.reasoning.tree import ByModel

CARD = Card(
    id="re.tree.game24",
    paper="Yao et al. 2023, Tree of Thoughts, arXiv:2305.10601",
    summary="The Game of 24 with a complete solver: problems, worked steps, judged beginnings.",
    recipe="treadle run game24",
    oracle="tests/alignment/test_alignment_game24.py::test_the_solver_agrees_with_all_expressions",
)
GOAL = 24
ANSWER = f"Answer: {GOAL}"
_MOVE = re.compile(r"(-?\d+(?:/\d+)?) ([-+*/]) (-?\d+(?:/\d+)?) = (-?\d+(?:/\d+)?)(?:;.*)?")

Left = tuple[Fraction, ...]
"""The numbers that are left, in order of size."""


@dataclass(frozen=True)
class Move:
    """Two numbers become one."""

    first: Fraction
    sign: str
    second: Fraction
    result: Fraction
    left: Left

    def __str__(self) -> str:
        left = " ".join(map(str, self.left))
        return f"{self.first} {self.sign} {self.second} = {self.result}; left {left}"


def moves(left: Left) -> Iterator[Move]:
    """Every move; of a + b and b + a, and of products, one is enough."""
    for i, j in permutations(range(len(left)), 2):
        a, b = left[i], left[j]
        rest = [n for k, n in enumerate(left) if k not in (i, j)]
        found = [("-", a - b)]
        if i < j:
            found += [("+", a + b), ("*", a * b)]
        if b:
            found.append(("/", a / b))
        for sign, result in found:
            yield Move(a, sign, b, result, tuple(sorted([*rest, result])))


@lru_cache(maxsize=1 << 18)
def reachable(left: Left) -> bool:
    """Whether 24 can be made of what is left."""
    if len(left) == 1:
        return left[0] == GOAL
    return any(reachable(move.left) for move in moves(left))


def solution(left: Left, draw: random.Random) -> list[Move]:
    """Some way to 24, through whole numbers where there is one; the state must be solvable."""
    path: list[Move] = []
    while len(left) > 1:
        good = [m for m in dict.fromkeys(moves(left)) if reachable(m.left)]
        whole = [m for m in good if m.result.denominator == 1 and m.result >= 0]
        path.append(draw.choice(whole or good))
        left = path[-1].left
    return path


def is_solution(numbers: Sequence[int], text: str) -> bool:
    """Whether a text has three right moves from these numbers to 24, and says so."""
    steps, found, answer = text.strip().partition("Answer:")
    if not found or answer.strip() != str(GOAL):
        return False
    left = [Fraction(n) for n in numbers]
    for line in steps.strip().splitlines():
        match = _MOVE.fullmatch(line.strip())
        if match is None:
            return False
        a, sign, b, result = match.groups()
        try:
            one, other, made = Fraction(a), Fraction(b), Fraction(result)
            left.remove(one)
            left.remove(other)
            if made != _computed(one, sign, other):
                return False
        except (ValueError, ZeroDivisionError):
            return False
        left.append(made)
    return left == [GOAL]


def _computed(a: Fraction, sign: str, b: Fraction) -> Fraction:
    match sign:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case _:
            return a / b


@lru_cache(maxsize=8)
def solvable(most: int, held_out: bool) -> tuple[tuple[int, ...], ...]:
    """The multisets of four numbers up to `most` from which 24 can be made, of one split."""
    wanted = "heldout" if held_out else "train"
    return tuple(
        numbers
        for numbers in combinations_with_replacement(range(1, most + 1), 4)
        if split_of(" ".join(map(str, numbers))) == wanted
        and reachable(tuple(map(Fraction, numbers)))
    )


def question(numbers: Sequence[int]) -> str:
    return f"Make {GOAL} from {' '.join(map(str, numbers))}."


class Game24(Problems):
    """Solvable games, in an order of the seed's; after the last the first comes again."""

    most: int = Field(13, ge=4, le=20)
    held_out: bool = False
    seed: int = 0

    def problem(self, index: int) -> Problem:
        numbers = self.numbers(index)
        return Problem((user(question(numbers)),), str(GOAL), "game24", {"numbers": numbers})

    def numbers(self, index: int) -> tuple[int, ...]:
        """Of problem number `index`."""
        games = solvable(self.most, self.held_out)
        order = list(games)
        random.Random(self.seed + index // len(games)).shuffle(order)
        return order[index % len(games)]

    def score(self, problem: Problem, completion: str) -> float:
        return float(is_solution(problem.metadata["numbers"], completion))


class Game24Lessons(Conversations):
    """Worked games, and among them beginnings that are judged as a tree search asks for it.

    To be learned with `turns=LastTurn()`: the beginnings that are judged are as often bad.
    """

    games: Game24 = Game24()
    judged: float = Field(0.5, ge=0.0, le=1.0)
    """Share of lessons that judge a beginning."""
    request: str = ByModel().request
    seed: int = 0

    def conversation(self, index: int) -> Chat:
        draw = random.Random(f"{self.seed}/{index}")
        asked = self.games.problem(index)
        left: Left = tuple(sorted(map(Fraction, self.games.numbers(index))))
        if draw.random() >= self.judged:
            lines = [*map(str, solution(left, draw)), ANSWER]
            return Chat((*asked.prompt, assistant("\n".join(lines))))
        beginning, good = judged_beginning(left, draw)
        said = "likely" if good else "unlikely"
        text = "".join(f"{move}\n" for move in beginning)
        return Chat((*asked.prompt, assistant(text), user(self.request), assistant(said)))

    def count(self) -> int | None:
        return None


def judged_beginning(left: Left, draw: random.Random) -> tuple[list[Move], bool]:
    """One to three moves, good and bad about as often, and whether 24 can still be reached.

    Half of the bad ones end with a move that is not right: a search finds those that look well, so
    a judge that never saw one is led astray.
    """
    good, right = draw.random() < 0.5, draw.random() < 0.5
    length = draw.choice((1, 2, 2, 3))
    path: list[Move] = []
    while len(path) < length:
        open_ = [m for m in dict.fromkeys(moves(left)) if m.result.denominator == 1]
        last = len(path) == length - 1
        # Up to the last move the way is a good one, so that what is judged is what was just done.
        wanted = [m for m in open_ if reachable(m.left) is (good or not (last and right))]
        path.append(draw.choice(wanted or open_))
        left = path[-1].left
    if good or right:
        return path, reachable(left)
    return [*path[:-1], spoiled(path[-1], draw)], False


def spoiled(move: Move, draw: random.Random) -> Move:
    """The move with another result, or with a number that is not there."""
    off = Fraction(draw.choice((-3, -2, -1, 1, 2, 3)))
    rest = list(move.left)
    rest.remove(move.result)
    first = move.first
    if draw.random() < 0.5 and move.sign != "/":
        first = move.first + off
        result = _computed(first, move.sign, move.second)
    else:
        result = move.result + off
    return Move(first, move.sign, move.second, result, tuple(sorted([*rest, result])))
