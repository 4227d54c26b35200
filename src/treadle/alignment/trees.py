"""A prompt and its answers as a tree of pieces: the prompt is computed once for all of them."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from treadle.core.errors import TreadleError
from treadle.core.files import write_json
from treadle.data.batch import Batch, Piece, assemble, within_budget
from treadle.data.order import Order, Place
from treadle.data.records import Messages
from treadle.data.source import Env, Stream, Work
from treadle.tokenizers.chat import LastTurn, encode_chat, encode_prompt

Tree = list[Piece]
B = TypeVar("B", bound=Batch)
SHOWN = 3
"""Reasons that an error message repeats."""


def answer_tree(env: Env, prompt: Messages, answers: Sequence[Messages], longest: int) -> Tree:
    """The prompt, and each answer as its child; every token of an answer is learned.

    What a template writes after the end of a turn is read and not learned, since no model ever
    writes it; a reward model judges at the end of it, as others do that see the whole text.

    Raises:
        TreadleError: an answer says nothing, or the prompt leaves no room for it.
    """
    messages = [m.plain() for m in prompt]
    root = encode_prompt(env.tokenizer, messages)
    longest = min(longest, env.model.config.context)
    if len(root) >= longest:
        raise TreadleError(
            f"its prompt has {len(root)} tokens, which leaves no room for an answer in "
            f"longest={longest}"
        )
    children = []
    for answer in answers:
        if not says_something(answer):
            raise TreadleError("an answer is empty")
        chat = [*messages, *(m.plain() for m in answer)]
        tokens = encode_chat(env.tokenizer, chat, turns=LastTurn())
        end = max((i for i, written in enumerate(tokens.mask, 1) if written), default=0)
        ids = tokens.ids[len(root) : longest]
        written = min(end - len(root), len(ids))
        if written <= 0:
            raise TreadleError("an answer has no turn of the assistant's")
        learn = [True] * written + [False] * (len(ids) - written)
        children.append(Piece(ids, learn, parent=0))
    return [Piece(root, [False] * len(root)), *children]


def says_something(answer: Messages) -> bool:
    """Whether an answer holds a word, or a call of a tool."""
    return any(m.content.strip() or m.extra for m in answer)


def assemble_trees(trees: Sequence[Sequence[Piece]]) -> Batch:
    """One batch of several trees, whose parents are counted within each."""
    pieces: list[Piece] = []
    for tree in trees:
        root = len(pieces)
        pieces += [Piece(p.tokens, p.learn, p.parent + root if p.parent >= 0 else -1) for p in tree]
    return assemble(pieces)


def tree_size(tree: Sequence[Piece]) -> int:
    return sum(len(p.tokens) for p in tree)


def in_parts(numbers: Sequence[int], size: int = 256) -> Iterator[Sequence[int]]:
    """As many at once as their trees may take memory."""
    return (numbers[i : i + size] for i in range(0, len(numbers), size))


def usable(count: int, tree: Callable[[int], object], path: Path, what: str) -> list[int]:
    """Numbers below `count` for which `tree` works; what is left out is named in `path`, and why.

    Raises:
        TreadleError: nothing is left.
    """
    if not path.exists():
        wrong: dict[str, str] = {}
        for index in range(count):
            try:
                tree(index)
            except TreadleError as error:
                wrong[str(index)] = str(error)
        write_json(path, wrong)
    left_out: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    kept = [i for i in range(count) if str(i) not in left_out]
    if not kept:
        shown = "; ".join(f"{what} {i}: {why}" for i, why in list(left_out.items())[:SHOWN])
        raise TreadleError(
            f"none of {count} {what}s can be learned from: {shown or 'none is there'}"
        )
    return kept


class TreeStream(Stream):
    """Trees in a shuffled order, those that cannot be learned from left out and named in
    `left_out.json`. Its state is the place in the order."""

    def __init__(self, env: Env, *, count: int, per_step: int, tokens: int, what: str) -> None:
        if per_step < env.world:
            raise TreadleError(
                f"per_step={per_step} leaves some of {env.world} processes without {what}s: choose "
                f"at least {env.world}"
            )
        self.env, self.per_step, self.tokens, self.what = env, per_step, tokens, what
        self.kept = usable(count, self.tree, env.scratch / "left_out.json", what)
        self.left_out = count - len(self.kept)
        self.order, self.place = Order(len(self.kept), env.seed), Place()

    @abstractmethod
    def tree(self, index: int) -> Tree:
        """Tree number `index` of all.

        Raises:
            TreadleError: it cannot be learned from.
        """

    @abstractmethod
    def batch(self, trees: list[Tree], places: list[int]) -> Batch:
        """A micro-batch of trees, given their places among those kept."""

    def coming(self) -> list[int]:
        """Places, among the trees kept, of those that the run's steps take; all if it is not known
        how many steps there are."""
        steps, size = self.env.steps, len(self.kept)
        if steps is None or steps * self.per_step >= size:
            return list(range(size))
        return sorted(self.order.take(Place(), steps * self.per_step))

    def __next__(self) -> Work:
        mine = self.order.take(self.place, self.per_step, rank=self.env.rank, world=self.env.world)
        self.place = self.order.after(self.place, self.per_step)
        trees = [self.tree(self.kept[i]) for i in mine]
        runs = within_budget([tree_size(t) for t in trees], self.tokens)
        batches = [self.batch([trees[i] for i in run], [mine[i] for i in run]) for run in runs]
        return Work(tuple(batches), {f"{self.what}s_left_out": float(self.left_out)})

    def state(self) -> dict[str, Any]:
        return dict(self.place.state())

    def restore(self, state: Mapping[str, Any]) -> None:
        self.place = Place.restore(state)


def extended(kind: type[B], batch: Batch, **fields: Any) -> B:
    """A batch of another kind with the same tokens and predictions."""
    return kind(**{name: getattr(batch, name) for name in Batch.__dataclass_fields__}, **fields)
