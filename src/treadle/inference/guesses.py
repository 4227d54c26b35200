"""Tree verification: several continuations of a sequence, all checked in one pass.

The paths of a tree of guesses run as rows of the batch. The first has the sequence's own pages;
each other shares those that are full, and has a copy of the last and fresh ones behind it: a copy
is a page, a pass is all weights, so that no kernel needs to know of trees. Tokens are drawn as
ever, by the random number of their step; a draw keeps the paths that guessed it and is followed
by the logits of the first of them. What is left at the end gives the sequence its pages.

        path 0    x | a b c        draw a:  0 and 1 live, logits behind a from path 0
        path 1    x | a d e        draw d:  1 lives, logits behind d from path 1
        path 2    x | f            the pages of path 1 become the sequence's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from treadle.core.cards import Card

CARD = Card(
    id="inf.speculative.tree",
    paper="Miao et al. 2024, SpecInfer, arXiv:2305.09781; Cai et al. 2024, Medusa, "
    "arXiv:2401.10774",
    summary="Several guessed continuations, verified in one pass; the longest right one is kept.",
    recipe="treadle generate smollm2-135m-instruct 'One two three. One two' "
    "--draft '{kind: NGram, branches: 3}'",
    oracle="tests/inference/test_inference_tree.py::test_draws_have_the_distribution_of_the_target",
)


@dataclass(eq=False)
class Path:
    """Tokens that may follow the last known one."""

    tokens: list[int]
    shared: int = 0
    """How many of them a path before it has too: their logits are asked for once."""
    pages: list[int] = field(default_factory=list)
    """Of its own, from the page of its first new token; empty for the first path, which has the
    sequence's."""
    end: int = 0
    """Row behind its last logits in this pass."""

    def row(self, right: int) -> int:
        """Of the logits behind so many of its tokens."""
        return self.end - 1 - (len(self.tokens) - right)


@dataclass(eq=False)
class Guesses:
    """The paths of one sequence in one pass."""

    paths: list[Path]
    right: int = 0
    """Tokens drawn in this pass that were guessed."""

    def __post_init__(self) -> None:
        self.keep(self.paths)

    @staticmethod
    def of(continuations: Sequence[Sequence[int]]) -> Guesses:
        """Without those that say no more than one before them."""
        kept: list[list[int]] = []
        for tokens in map(list, continuations):
            if tokens and not any(before[: len(tokens)] == tokens for before in kept):
                kept.append(tokens)
        return Guesses([Path(tokens) for tokens in kept])

    @property
    def trunk(self) -> list[int]:
        """Tokens of the path on the sequence's own pages."""
        return self.paths[0].tokens if self.paths else []

    @property
    def checked(self) -> int:
        """How many guesses the tree has."""
        return sum(len(path.tokens) - path.shared for path in self.paths)

    def keep(self, paths: list[Path]) -> None:
        """Only these run."""
        self.paths = paths
        self.live = list(paths)
        """Those that agree with all that was drawn; at first all of them."""
        for i, path in enumerate(paths):
            path.shared = max((_common(path.tokens, p.tokens) for p in paths[:i]), default=0)

    def follow(self, token: int) -> int | None:
        """Row of the logits behind a token that was drawn; None where no path has it."""
        at = self.right
        live = [p for p in self.live if len(p.tokens) > at and p.tokens[at] == token]
        if not live:
            return None
        self.live, self.right = live, at + 1
        return live[0].row(at + 1)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905
