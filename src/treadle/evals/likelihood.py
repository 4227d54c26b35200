"""Log-likelihoods of continuations, each shared prefix computed once.

The sequences of a pack are laid out as a radix tree: the few-shot examples of a whole subject are
one segment, each question a child of it, each answer a child of its question. The last token of a
sequence is only predicted, never read, so one-letter answers cost no computation of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treadle.kernels.linear_cross_entropy import token_logprobs
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.nn.linear import bias_of
from treadle.objectives.objective import head_rule
from treadle.tokenizers.tokenizer import Tokenizer

WORTH_SHARING = 8
"""Prefixes of fewer tokens are computed again: a segment of its own would cost more."""


@dataclass(frozen=True)
class Scored:
    """Tokens, of which those from `start` on are to be scored."""

    tokens: tuple[int, ...]
    start: int

    def cut(self, context: int) -> Scored:
        """As much of the end as the model can read: `context` tokens and one more to predict."""
        drop = max(0, len(self.tokens) - context - 1)
        return Scored(self.tokens[drop:], max(1, self.start - drop))


def prefix_token(tokenizer: Tokenizer) -> int:
    """What stands before the first token of a text: BOS, or EOS where there is none."""
    token = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    assert token is not None, "the tokenizer has neither a BOS nor an EOS token"
    return token


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
    """Context and continuation as one text; tokens that are not the context's own are scored.

    Spaces at the end of the context go over to the continuation, to which they are joined in
    most vocabularies.
    """
    moved = [_move_spaces(context, continuation) for context, continuation in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved if context))
    encoded = tokenizer.encode_batch(contexts, add_special=True)
    own = dict(zip(contexts, encoded, strict=True))
    wholes = iter(tokenizer.encode_batch([c + t for c, t in moved if c], add_special=True))
    alone = iter(tokenizer.encode_batch([t for c, t in moved if not c]))
    scored = []
    for context, _ in moved:
        if context:
            tokens = tuple(next(wholes))
            scored.append(Scored(tokens, max(1, _shared(tokens, own[context]))))
        else:
            scored.append(Scored((prefix_token(tokenizer), *next(alone)), 1))
    return scored


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def packs(groups: Sequence[Sequence[Scored]], budget: int) -> Iterator[list[int]]:
    """Groups (the answers of one question) in packs of about `budget` tokens to compute.

    Neighbours share prefixes, so the order is that of the tokens.
    """
    order = sorted(range(len(groups)), key=lambda g: groups[g][0].tokens)
    pack: list[int] = []
    size = 0
    last: tuple[int, ...] = ()
    for g in order:
        cost, tail = _cost(groups[g], last)
        if pack and size + cost > budget:
            yield pack
            pack, size = [], 0
            cost, tail = _cost(groups[g], ())
        pack.append(g)
        size, last = size + cost, tail
    if pack:
        yield pack


def _cost(group: Sequence[Scored], last: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    cost = 0
    for tokens in sorted(item.tokens[:-1] for item in group):
        cost += len(tokens) - _shared(last, tokens)
        last = tokens
    return cost, last


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


@dataclass
class Forest:
    """A radix tree of token sequences, as the segments of a `Layout`."""

    segments: list[tuple[int, ...]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    paths: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    """Of each sequence the segments it is made of, from the root down."""

    @staticmethod
    def of(sequences: Sequence[tuple[int, ...]]) -> Forest:
        forest = Forest()
        forest._grow(sorted(set(sequences)), 0, 0, ())
        return forest

    def _grow(
        self, sequences: list[tuple[int, ...]], laid: int, shared: int, path: tuple[int, ...]
    ) -> None:
        """Add sorted sequences that agree in `shared` tokens, of which `laid` lie in `path`."""
        shared += _shared(sequences[0][shared:], sequences[-1][shared:])
        if shared - laid >= (1 if len(sequences) == 1 else WORTH_SHARING):
            self.segments.append(sequences[0][laid:shared])
            self.parents.append(path[-1] if path else -1)
            path, laid = (*path, len(self.segments) - 1), shared
        start = 0
        while start < len(sequences):
            if len(sequences[start]) == laid:
                self.paths[sequences[start]] = path
                start += 1
                continue
            branch = sequences[start][shared : shared + 1]
            stop = start + 1
            while stop < len(sequences) and sequences[stop][shared : shared + 1] == branch:
                stop += 1
            self._grow(sequences[start:stop], laid, shared, path)
            start = stop


@torch.inference_mode()
def log_likelihoods(model: DecoderModel, items: Sequence[Scored]) -> list[float]:
    """Sum of the log-probabilities of each item's scored tokens, in one pass of the model."""
    items = [item.cut(model.config.context) for item in items]
    forest = Forest.of([item.tokens[:-1] for item in items])
    layout = Layout(tuple(map(len, forest.segments)), tuple(forest.parents))
    sources: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for number, item in enumerate(items):
        places = [i for s in forest.paths[item.tokens[:-1]] for i in layout.span(s)]
        sources += places[item.start - 1 :]
        targets += item.tokens[item.start :]
        owners += [number] * (len(item.tokens) - item.start)
    weight = model.head_weight()
    tokens = _tensor([t for segment in forest.segments for t in segment], weight)
    hidden = model(tokens, Packed.of(layout, weight.device))
    logprobs = token_logprobs(
        hidden[_tensor(sources, weight)],
        weight,
        _tensor(targets, weight),
        bias=bias_of(model.head),
        rule=head_rule(model),
    )
    sums = torch.zeros(len(items), dtype=torch.float64)
    return sums.index_add_(0, torch.tensor(owners), logprobs.double().cpu()).tolist()


def _tensor(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=like.device)
