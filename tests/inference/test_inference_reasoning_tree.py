"""Tree searches against exhaustive search on planted trees; trees of lines with a real engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from tiny_generation import byte_tokenizer, tiny_model

from treadle.inference.engine import Engine
from treadle.inference.reasoning.strategy import Ask, Thinker
from treadle.inference.reasoning.tree import (
    MCTS,
    Beam,
    ByModel,
    DepthFirst,
    LineSpace,
    Node,
    Space,
    TreeOfThoughts,
)
from treadle.inference.request import Completion
from treadle.inference.sampling import Sampling

(NEWLINE,) = byte_tokenizer().encode("\n")


class Planted(Space):
    """All words of `depth` letters; a beginning is worth the best word below it, or is noisy."""

    def __init__(self, seed: int, depth: int = 3, letters: str = "abc", noise: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        words = ["".join(w) for w in itertools.product(letters, repeat=depth)]
        self.worth = dict(zip(words, rng.random(len(words)).tolist(), strict=True))
        self.depth, self.letters, self.noise, self.rng = depth, letters, noise, rng
        self.looked = 0

    def children(self, states: Sequence[str]) -> list[list[str]]:
        self.looked += len(states)
        return [[s + c for c in self.letters] if len(s) < self.depth else [] for s in states]

    def values(self, states: Sequence[str]) -> list[float]:
        return [
            max(v for w, v in self.worth.items() if w.startswith(s))
            + (self.noise * self.rng.standard_normal() if len(s) < self.depth else 0.0)
            for s in states
        ]

    def final(self, state: str) -> bool:
        return len(state) == self.depth

    @property
    def best(self) -> str:
        return max(self.worth, key=self.worth.__getitem__)


@pytest.mark.parametrize(
    "search", [Beam(width=1), DepthFirst(threshold=0.0, enough=2.0), MCTS(simulations=30)]
)
@pytest.mark.parametrize("seed", range(5))
def test_searches_find_the_best_leaf(search, seed: int) -> None:
    """With true values every search finds what trying all words finds."""
    space = Planted(seed)
    assert search(space, "") == space.best


def test_wide_and_long_searches_are_exhaustive() -> None:
    """Under noise too, where a beam of one goes wrong."""
    wrong = 0
    for seed in range(8):
        assert Beam(width=27)(Planted(seed, noise=1.0), "") == Planted(seed).best
        exhaustive = DepthFirst(threshold=0.0, visits=99, enough=99.0)
        low = Planted(seed, noise=0.0)
        assert exhaustive(low, "") == low.best
        wrong += Beam(width=1)(Planted(seed, noise=1.0), "") != Planted(seed).best
    assert wrong > 0


def test_searches_keep_to_their_means() -> None:
    space = Planted(0, depth=5)
    DepthFirst(visits=4, threshold=0.0)(space, "")
    assert space.looked <= 4
    space = Planted(0, depth=5)
    MCTS(simulations=6)(space, "")
    assert space.looked <= 6
    assert len(Beam(width=2, depth=2)(Planted(0, depth=5), "")) == 2
    assert DepthFirst(threshold=0.99)(Planted(0, depth=5), "") != ""


def test_upper_confidence_bound() -> None:
    parent, child = Node("", visits=10), Node("a", prior=0.3, visits=4, total=2.0)
    assert child.bound(parent, 0.5) == pytest.approx(0.5 + 0.5 * np.sqrt(np.log(10) / 4))
    assert Node("b", prior=0.1).bound(parent, 0.5) > child.bound(parent, 0.5)


class Watched(Planted):
    """Keeps which states were looked into, in order."""

    def __init__(self, seed: int, depth: int = 3) -> None:
        super().__init__(seed, depth)
        self.order: list[str] = []

    def children(self, states: Sequence[str]) -> list[list[str]]:
        self.order.extend(states)
        return super().children(states)


@pytest.mark.parametrize(("depth", "threshold"), [(3, 0.0), (2, 0.0), (3, 0.6)])
@pytest.mark.parametrize("seed", range(3))
def test_depth_first_looks_in_the_order_of_worth(seed: int, depth: int, threshold: float) -> None:
    def visit(state: str, level: int) -> list[str]:
        found = [state]
        children = space.children([state])[0]
        worth = dict(zip(children, space.values(children), strict=True))
        for child in sorted(children, key=lambda c: -worth[c]):
            if not space.final(child) and worth[child] >= threshold and level + 1 < depth:
                found += visit(child, level + 1)
        return found

    space, watched = Planted(seed), Watched(seed)
    DepthFirst(threshold=threshold, depth=depth, visits=99, enough=9.0)(watched, "")
    assert watched.order == visit("", 0)


def test_depth_first_ends_with_what_is_enough() -> None:
    best = max(Planted(0).worth.values())
    eager, keen = Watched(0), Watched(0)
    DepthFirst(threshold=0.0, enough=best, visits=99)(eager, "")
    DepthFirst(threshold=0.0, enough=best + 1e-9, visits=99)(keen, "")
    assert len(eager.order) == 3
    assert len(keen.order) == 13


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_monte_carlo_looks_where_the_bound_is_highest(c: float) -> None:
    """Against UCT written out over tables of all simulations."""
    space, watched = Planted(3, depth=4), Watched(3, depth=4)
    MCTS(simulations=20, exploration=c)(watched, "")
    order, runs = [], []  # a run: the states passed, and the value that came back
    known: dict[str, list[str]] = {}
    for _ in range(20):
        path = [""]
        while path[-1] in known:
            here = [value for states, value in runs if path[-1] in states]
            bounds = []
            for child in known[path[-1]]:
                through = [value for states, value in runs if child in states]
                if through:
                    mean, log = np.mean(through), np.log(len(here))
                    bounds.append((0, mean + c * np.sqrt(log / len(through))))
                else:
                    bounds.append((1, space.values([child])[0]))
            path.append(known[path[-1]][max(range(3), key=lambda i: bounds[i])])
        if not space.final(path[-1]):
            order.append(path[-1])
            known[path[-1]] = space.children([path[-1]])[0]
            path.append(max(known[path[-1]], key=lambda s: space.values([s])[0]))
        runs.append((set(path), space.values([path[-1]])[0]))
    assert watched.order == order


def thinker() -> Thinker:
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    engine = Engine(tiny_model(context=256), byte_tokenizer().with_template(template))
    return Thinker(engine, lambda text: text[-2] if text.count("\n") >= 2 else None)


@pytest.mark.parametrize(
    "search", [Beam(depth=3), DepthFirst(visits=3, threshold=0.0), MCTS(simulations=3)]
)
def test_lines_are_searched_with_an_engine(search) -> None:
    """States are lines of one answer, and every token of every branch is counted."""
    mind = thinker()
    strategy = TreeOfThoughts(
        search=search,
        branching=3,
        sampling=Sampling(
            temperature=1.0, max_tokens=6, stop=("\n",), logit_bias=((NEWLINE, 4.0),)
        ),
    )
    questions = [({"role": "user", "content": q},) for q in ("a", "b")]
    thoughts = strategy(mind, questions)
    for i, thought in enumerate(thoughts):
        assert thought.tokens == mind.spent[i] > 6
        assert thought.text in {*thought.trace, ""}
        assert thought.answer is not None


class Muttering(Thinker):
    """Continues every state by the same lines, and keeps the seeds. After an empty line it is
    sure, and it never says the end of its words."""

    def __init__(self) -> None:
        super().__init__(thinker().engine, lambda t: None)
        self.seeds: list[int] = []

    def ask(self, asks: Sequence[Ask], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        self.seeds.append(sampling.seed)
        lines = [("x", (-1.0, -3.0)), ("", (-1.0,)), (" y ", (-0.5,))]
        row = [Completion((NEWLINE,) * len(p), t, p, "stop") for t, p in lines]
        end = Completion((256,), "", (-0.1,), "stop")
        after = [Completion((2,), " z", (-0.25,), "length"), end]
        return [after[:n] if ask.prefix.endswith("\n\n") else [*row, end][:n] for ask in asks]


def test_lines_are_as_sure_as_their_tokens() -> None:
    """The geometric mean of a line's own tokens; empty lines are none; each call draws anew.

    A model that says nothing more, and not an empty line, is not asked to go on."""
    mind = Muttering()
    config = TreeOfThoughts(branching=3, sampling=Sampling(seed=5))
    space = LineSpace(config, mind, Ask(0, ({"role": "user", "content": "q"},)))
    assert space.children(["a\n\n", "a\n"]) == [
        ["a\n\nz"],
        ["a\nx\n", "a\ny\n", "a\n\nz"],
    ]
    states = ["a\nx\n", "a\ny\n", "a\n\nz"]
    assert space.values(states) == pytest.approx(np.exp([-2.0, -0.5, -0.25]))
    assert mind.seeds == [5, 5]
    assert space.children(["a\n\nz"]) == [["a\n\nzx\n", "a\n\nz y\n", "a\n\nz\nx\n"]]
    assert mind.seeds == [5, 5, 8, 8]


def test_an_answer_in_private_is_not_final() -> None:
    """What the caller does not see is not taken for the end of a search either."""
    mind = Thinker(None, lambda t: "5" if "Answer: 5" in t else None)  # type: ignore[arg-type]
    space = LineSpace(TreeOfThoughts(), mind, Ask(0, ({"role": "user", "content": "q"},)))
    hidden, said = "<think>\nAnswer: 5\n", "<think>\n</think>\nAnswer: 5"
    assert [space.final(s) for s in (hidden, said, f"{said}\n", "")] == [False, False, True, False]


class Opinionated(Thinker):
    def ask(self, asks: Sequence[Ask], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        said = ["Likely so", "unlikely", " likely"]
        return [[Completion((1,), said[k], (0.0,), "stop") for k in range(n)] for _ in asks]


def test_models_value_states_by_their_word() -> None:
    mind = Opinionated(None, lambda t: None)  # type: ignore[arg-type]
    ask = Ask(0, ({"role": "user", "content": "q"},))
    assert ByModel(samples=3)(mind, ask, ["x"], [0.5]) == [pytest.approx(2 / 3)]
