"""The Game of 24: the solver against all expressions, what counts as a solution, the lessons."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from itertools import combinations_with_replacement, permutations, product

import pytest

from treadle.alignment.game24 import (
    Game24,
    Game24Lessons,
    is_solution,
    judged_beginning,
    moves,
    reachable,
    solution,
    solvable,
)
from treadle.inference.reasoning.tree import ByModel


def apply(a: Fraction | None, sign: str, b: Fraction | None) -> Fraction | None:
    if a is None or b is None or (sign == "/" and b == 0):
        return None
    return {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b


def by_all_expressions(numbers: tuple[int, ...]) -> bool:
    """The five ways to put brackets around four numbers, in every order, with all signs."""
    for w, x, y, z in set(permutations(map(Fraction, numbers))):
        for p, q, r in product("+-*/", repeat=3):
            values = (
                apply(apply(apply(w, p, x), q, y), r, z),
                apply(apply(w, p, apply(x, q, y)), r, z),
                apply(apply(w, p, x), q, apply(y, r, z)),
                apply(w, p, apply(apply(x, q, y), r, z)),
                apply(w, p, apply(x, q, apply(y, r, z))),
            )
            if 24 in values:
                return True
    return False


def test_the_solver_agrees_with_all_expressions() -> None:
    games = random.Random(0).sample(list(combinations_with_replacement(range(1, 14), 4)), 40)
    hard = [(1, 3, 4, 6), (1, 5, 5, 5), (3, 3, 8, 8), (1, 1, 1, 1), (13, 13, 13, 13)]
    for numbers in (*games, *hard):
        assert reachable(tuple(map(Fraction, numbers))) is by_all_expressions(numbers), numbers


def test_so_many_can_be_solved() -> None:
    """1362 of 1820, as is known; no game is on both sides."""
    train, held = solvable(13, False), solvable(13, True)
    assert len(train) + len(held) == 1362
    assert not set(train) & set(held)
    assert 0.08 < len(held) / 1362 < 0.17


def test_solutions_solve() -> None:
    draw = random.Random(1)
    for numbers in draw.sample(solvable(13, False), 60):
        path = solution(tuple(map(Fraction, numbers)), draw)
        text = "\n".join([*map(str, path), "Answer: 24"])
        assert is_solution(numbers, text), text
        left = tuple(map(Fraction, numbers))
        for move in path:  # through whole numbers where there are any
            whole = {m.result for m in moves(left) if reachable(m.left) and m.result >= 0}
            whole = {n for n in whole if n == int(n)}
            assert move.result in whole or not whole
            left = move.left
    # Only through fractions: 8 / (3 - 8 / 3).
    path = solution(tuple(map(Fraction, (3, 3, 8, 8))), draw)
    assert [str(m) for m in path] == [
        "8 / 3 = 8/3; left 8/3 3 8",
        "3 - 8/3 = 1/3; left 1/3 8",
        "8 / 1/3 = 24; left 24",
    ]


RIGHT = "13 - 9 = 4; left 4 4 10\n10 - 4 = 6; left 4 6\n4 * 6 = 24; left 24\nAnswer: 24"


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (("", ""), True),
        (("; left 4 6", ""), True),
        (("13 - 9 = 4", "13 - 9 = 5"), False),
        (("13 - 9 = 4", "13 - 8 = 5"), False),
        (("10 - 4 = 6; left 4 6\n", ""), False),
        (("4 * 6 = 24", "4 / 0 = 24"), False),
        (("4 * 6 = 24", "6 * 4 = 24"), True),
        (("4 * 6 = 24", "4 x 6 = 24"), False),
        (("Answer: 24", "Answer: 25"), False),
        (("Answer: 24", ""), False),
        (("Answer: 24", "Answer: 24\n1 + 1 = 2"), False),
    ],
)
def test_what_counts_as_a_solution(change: tuple[str, str], right: bool) -> None:
    assert is_solution((4, 9, 10, 13), RIGHT.replace(*change)) is right


def test_numbers_are_used_once() -> None:
    twice = "4 * 6 = 24; left 24\nAnswer: 24"
    assert is_solution((4, 6), twice)
    assert not is_solution((4, 6, 1, 1), twice)
    assert not is_solution((4, 4), "4 + 4 = 8\n4 * 6 = 24\nAnswer: 24")
    assert not is_solution((5, 5, 5, 9), RIGHT)


def test_moves_are_all_there() -> None:
    results = {
        (str(m.first), m.sign, str(m.second)): m.result for m in moves((Fraction(2), Fraction(6)))
    }
    assert results == {
        ("2", "+", "6"): 8,
        ("2", "*", "6"): 12,
        ("2", "-", "6"): -4,
        ("6", "-", "2"): 4,
        ("2", "/", "6"): Fraction(1, 3),
        ("6", "/", "2"): 3,
    }
    assert not any(m.sign == "/" and m.second == 0 for m in moves((Fraction(0), Fraction(6))))


def test_games_go_round_and_are_scored() -> None:
    games = Game24(held_out=True)
    count = len(solvable(13, True))
    first = [games.numbers(i) for i in range(count)]
    assert sorted(first) == list(solvable(13, True))
    again = [games.numbers(count + i) for i in range(count)]
    assert sorted(again) == sorted(first) != again != first
    assert Game24(seed=1).numbers(0) != Game24().numbers(0)
    problem = games.problem(3)
    assert problem.prompt[0].content == f"Make 24 from {' '.join(map(str, first[3]))}."
    path = solution(tuple(map(Fraction, first[3])), random.Random(0))
    assert games.score(problem, "\n".join([*map(str, path), "Answer: 24"])) == 1.0
    assert games.score(problem, "Answer: 24") == 0.0
    for held in (False, True):  # the smallest game that the configuration allows
        assert Game24(most=4, held_out=held).problem(0)


def test_lessons_are_true() -> None:
    lessons, kinds = Game24Lessons(), {"steps": 0, "likely": 0, "unlikely": 0}
    for index in range(300):
        chat = lessons.conversation(index).messages
        numbers = lessons.games.numbers(index)
        if len(chat) == 2:
            kinds["steps"] += 1
            assert is_solution(numbers, chat[1].content)
            continue
        said = chat[3].content
        kinds[said] += 1
        assert chat[2].content == ByModel().request
        left = tuple(map(Fraction, numbers))
        lines = chat[1].content.splitlines()
        followed = [m for m in moves(left) if str(m) == lines[0]]
        for line in lines[1:]:
            followed = [m for f in followed for m in moves(f.left) if str(m) == line]
        assert any(reachable(m.left) for m in followed) is (said == "likely")
        assert chat[1].content.endswith("\n")
    assert all(count > 40 for count in kinds.values()), kinds


def test_only_the_last_move_of_a_bad_beginning_is_bad() -> None:
    """It leads nowhere, or it is wrongly computed, or takes a number that is not there."""
    draw = random.Random(0)
    seen = Counter()
    for numbers in solvable(13, False)[:240]:
        left = tuple(map(Fraction, numbers))
        path, good = judged_beginning(left, draw)
        assert 1 <= len(path) <= 3
        for move in path[:-1]:
            assert move in set(moves(left))
            whole = [m for m in moves(left) if m.result.denominator == 1]
            assert reachable(move.left) or not any(reachable(m.left) for m in whole)
            left = move.left
        last = path[-1]
        right = last in set(moves(left))
        assert good is (right and reachable(last.left))
        seen[good, right] += 1
        if not right:
            there = apply(last.first, last.sign, last.second) == last.result
            seen[there] += 1
            assert len(last.left) == len(left) - 1
    assert 90 < seen[True, True] < 150
    assert seen[False, True] > 35
    assert min(seen[True], seen[False]) > 10
