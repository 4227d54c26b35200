"""Tree of thoughts: partial solutions are proposed, valued and searched.

    beam (BFS)   of all children of the kept states, keep the b best               level by level
    DFS          the best child first; turn back below a threshold                 until final
    MCTS         a = argmax Q(s, a) + c sqrt(ln N(s) / N(s, a))                    UCT, many times

Yao et al. 2023, arXiv:2305.10601; Kocsis and Szepesvari 2006 (UCT). A state is the text of an
answer so far; a step is a line. The searches know nothing of models: they work on a `Space`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import Field

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.inference.reasoning.strategy import Ask, Strategy, Thinker, Thought, Turns, visible
from treadle.inference.request import Completion
from treadle.inference.sampling import Sampling

CARD = Card(
    id="re.tree",
    paper="Yao et al. 2023, arXiv:2305.10601; Kocsis and Szepesvari 2006",
    summary="Tree of thoughts with beam (BFS), DFS and Monte Carlo tree search.",
    recipe="treadle reason smollm2-135m-instruct "
    "--strategy '{kind: TreeOfThoughts, search: {kind: MCTS, simulations: 8}}'",
    oracle="tests/inference/test_inference_reasoning_tree.py::test_searches_find_the_best_leaf",
)


class Space(ABC):
    """What a search may ask about states."""

    @abstractmethod
    def children(self, states: Sequence[str]) -> list[list[str]]:
        """Next states of each; none where it is final or goes nowhere."""

    @abstractmethod
    def values(self, states: Sequence[str]) -> list[float]:
        """How promising each is, in [0, 1]."""

    @abstractmethod
    def final(self, state: str) -> bool:
        """Whether it is a whole solution."""


class Search(Config):
    """A shape: finds a final state."""

    @abstractmethod
    def __call__(self, space: Space, root: str) -> str:
        """The best state found; the root where nothing is better."""


class Beam(Search):
    """Breadth first, the best few of each level."""

    width: int = Field(3, ge=1)
    depth: int = Field(6, ge=1)

    def __call__(self, space: Space, root: str) -> str:
        level, done = [root], Best(root)
        for _ in range(self.depth):
            found = _unique([c for row in space.children(level) for c in row])
            if not found:
                break
            ranked = sorted(zip(space.values(found), found, strict=True), key=lambda p: -p[0])
            for value, state in ranked:
                done.offer(state, value, final=space.final(state))
            level = [s for _, s in ranked if not space.final(s)][: self.width]
            if not level:
                break
        return done.state


class DepthFirst(Search):
    """The most promising child first; states below the threshold are not entered."""

    threshold: float = Field(0.1, ge=0.0, le=1.0)
    depth: int = Field(6, ge=1)
    visits: int = Field(24, ge=1)
    """States that are looked into at the most."""
    enough: float = Field(0.99, ge=0.0)
    """A final state of this value ends the search."""

    def __call__(self, space: Space, root: str) -> str:
        done, stack, seen = Best(root), [(root, 0)], 0
        while stack and seen < self.visits and not (done.final and done.value >= self.enough):
            state, depth = stack.pop()
            seen += 1
            (children,) = space.children([state])
            found = _unique(children)
            ranked = sorted(zip(space.values(found), found, strict=True), key=lambda p: p[0])
            for value, child in ranked:  # the best is pushed last and popped first
                final = space.final(child)
                done.offer(child, value, final=final)
                if not final and value >= self.threshold and depth + 1 < self.depth:
                    stack.append((child, depth + 1))
        return done.state


class MCTS(Search):
    """Upper confidence bounds for trees; a node's value takes the place of a random playout."""

    simulations: int = Field(16, ge=1)
    exploration: float = Field(1.0, ge=0.0)
    """The constant c."""
    depth: int = Field(6, ge=1)

    def __call__(self, space: Space, root: str) -> str:
        tree, done = Node(root), Best(root)
        for _ in range(self.simulations):
            path = [tree]
            while path[-1].children:
                path.append(
                    max(path[-1].children, key=lambda n: n.bound(path[-1], self.exploration))
                )
            leaf = path[-1]
            if not space.final(leaf.state) and len(path) <= self.depth and not leaf.closed:
                found = _unique(space.children([leaf.state])[0])
                values = space.values(found)
                leaf.children = [Node(s, prior=v) for s, v in zip(found, values, strict=True)]
                leaf.closed = not found
                for child in leaf.children:
                    done.offer(child.state, child.prior, final=space.final(child.state))
                if leaf.children:
                    leaf = max(leaf.children, key=lambda n: n.prior)
                    path.append(leaf)
            for node in path:
                node.visits += 1
                node.total += leaf.prior
        return done.state


@dataclass
class Node:
    """A state in the tree of MCTS."""

    state: str
    prior: float = 0.0
    visits: int = 0
    total: float = 0.0
    children: list[Node] = field(default_factory=list)
    closed: bool = False
    """It has been looked into and has no children."""

    def bound(self, parent: Node, c: float) -> float:
        """Q + c sqrt(ln N / n); a state that was never tried goes first, by its own value."""
        if self.visits == 0:
            return 1e9 + self.prior
        return self.total / self.visits + c * math.sqrt(math.log(parent.visits) / self.visits)


@dataclass
class Best:
    """The best state so far: a final one before any other, then by value, then the latest, which is
    further on."""

    state: str
    value: float = -math.inf
    final: bool = False

    def offer(self, state: str, value: float, *, final: bool) -> None:
        if (final, value) >= (self.final, self.value):
            self.state, self.value, self.final = state, value, final


def _unique(states: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(states))


class Valuation(Config):
    """A shape: how promising partial answers are."""

    @abstractmethod
    def __call__(
        self, thinker: Thinker, ask: Ask, states: Sequence[str], sureness: Sequence[float]
    ) -> list[float]:
        """In [0, 1], given how sure the model was of each state's last line."""


class BySureStep(Valuation):
    """The probability of a token of the last line, the geometric mean: costs nothing more."""

    def __call__(
        self, thinker: Thinker, ask: Ask, states: Sequence[str], sureness: Sequence[float]
    ) -> list[float]:
        return list(sureness)


class ByModel(Valuation):
    """The model says how likely a partial answer leads to the right one: the share of samples that
    begin with the good word."""

    samples: int = Field(3, ge=1)
    request: str = (
        "Can this beginning of a solution still lead to the right answer? Say likely or unlikely."
    )
    good: str = "likely"

    def __call__(
        self, thinker: Thinker, ask: Ask, states: Sequence[str], sureness: Sequence[float]
    ) -> list[float]:
        talks = [
            (
                *ask.turns,
                {"role": "assistant", "content": state},
                {"role": "user", "content": self.request},
            )
            for state in states
        ]
        sampling = Sampling(temperature=1.0, max_tokens=4)
        found = thinker.ask([Ask(ask.question, t) for t in talks], sampling, self.samples)
        return [
            sum(c.text.strip().lower().startswith(self.good) for c in row) / self.samples
            for row in found
        ]


class TreeOfThoughts(Strategy):
    """Lines of an answer as the steps of a search."""

    search: Search = Beam()
    branching: int = Field(4, ge=1)
    """Lines that are proposed for each state."""
    valuation: Valuation = BySureStep()
    sampling: Sampling = Sampling(temperature=0.8, max_tokens=48, stop=("\n",))

    def __call__(self, thinker: Thinker, questions: Sequence[Turns]) -> list[Thought]:
        thoughts = []
        for i, turns in enumerate(questions):
            space = LineSpace(self, thinker, Ask(i, turns))
            state = self.search(space, "")
            thoughts.append(thinker.thought(i, state, tuple(space.sureness)))
        return thoughts


class LineSpace(Space):
    """Answers of one question, line by line, as the model continues them.

    A line that was cut short goes on in the next step; an empty line between two is no step.
    """

    def __init__(self, config: TreeOfThoughts, thinker: Thinker, ask: Ask) -> None:
        self.config, self.thinker, self.ask = config, thinker, ask
        self.sureness: dict[str, float] = {}

    def children(self, states: Sequence[str]) -> list[list[str]]:
        config = self.config
        seed = config.sampling.seed + len(self.sureness)
        sampling = config.sampling.replace(seed=seed)
        rows = []
        for state, found in zip(
            states, self._continued(states, sampling, config.branching), strict=True
        ):
            row = [self._child(state, part) for part in found]
            if empty := sum(map(self._is_empty_line, found)):
                (after,) = self._continued([f"{state}\n"], sampling, empty)
                row += [self._child(f"{state}\n", part) for part in after]
            rows.append([child for child in row if child])
        return rows

    def _continued(
        self, states: Sequence[str], sampling: Sampling, n: int
    ) -> list[list[Completion]]:
        asks = [Ask(self.ask.question, self.ask.turns, state) for state in states]
        return self.thinker.ask(asks, sampling, n)

    def _child(self, state: str, part: Completion) -> str:
        """The state with what follows; nothing where that is nothing."""
        text = part.text if state and not state.endswith("\n") else part.text.lstrip()
        if not text.strip():
            return ""
        child = state + (text if part.finish == "length" else f"{text.rstrip()}\n")
        self.sureness[child] = math.exp(math.fsum(part.logprobs) / len(part.logprobs))
        return child

    def _is_empty_line(self, part: Completion) -> bool:
        """Rather than the end of the answer."""
        return not part.text.strip() and "\n" in self.thinker.engine.tokenizer.decode(part.tokens)

    def values(self, states: Sequence[str]) -> list[float]:
        known = [self.sureness[s] for s in states]
        return self.config.valuation(self.thinker, self.ask, states, known) if states else []

    def final(self, state: str) -> bool:
        return state.endswith("\n") and self.thinker.extract(visible(state)) is not None
