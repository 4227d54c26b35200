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
    Node,
    Space,
    TreeOfThoughts,
)
from treadle.inference.request import Completion
from treadle.inference.sampling import Sampling


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
        sampling=Sampling(temperature=1.0, max_tokens=6, stop=("\n",)),
    )
    questions = [({"role": "user", "content": q},) for q in ("a", "b")]
    thoughts = strategy(mind, questions)
    for i, thought in enumerate(thoughts):
        assert thought.tokens == mind.spent[i] > 6
        assert thought.text in {*thought.trace, ""}
        assert thought.answer is not None


class Opinionated(Thinker):
    def ask(self, asks: Sequence[Ask], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        said = ["Likely so", "unlikely", " likely"]
        return [[Completion((1,), said[k], (0.0,), "stop") for k in range(n)] for _ in asks]


def test_models_value_states_by_their_word() -> None:
    mind = Opinionated(None, lambda t: None)  # type: ignore[arg-type]
    ask = Ask(0, ({"role": "user", "content": "q"},))
    assert ByModel(samples=3)(mind, ask, ["x"], [0.5]) == [pytest.approx(2 / 3)]
