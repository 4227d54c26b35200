"""A teacher that reads the student's text with a tokenizer of its own.

Both predict what follows a text. Where a token of the student and one of the teacher begin at the
same byte, both have read the same text before it, and their predictions are a pair. Where only one
of them has a boundary there is nothing to compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.data.batch import Batch, Piece, assemble
from treadle.data.source import Env
from treadle.distillation.rewritten import sequences
from treadle.distillation.taught import Lesson, Pupil, Teacher, taught
from treadle.kernels.linear_cross_entropy import chunks, head_logits
from treadle.models.decoder import DecoderModel
from treadle.nn.linear import bias_of
from treadle.objectives.distil import TaughtBatch
from treadle.objectives.objective import head_rule
from treadle.tokenizers.tokenizer import Tokenizer


class OtherTokenizer(Lesson):
    """The teacher's probabilities in order of rank, for RankedLabels."""

    ranks: int = Field(64, ge=1)
    """How many of them; the rest counts as one."""

    def open(self, teacher: Teacher, env: Env) -> Pupil:
        return _OtherPupil(self, teacher, env)


class _OtherPupil:
    def __init__(self, config: OtherTokenizer, teacher: Teacher, env: Env) -> None:
        self.config, self.teacher, self.env = config, teacher, env

    @torch.no_grad()
    def __call__(self, batch: Batch, step: int) -> TaughtBatch:
        model, theirs = self.teacher.model, self.teacher.tokenizer
        pieces: list[Piece] = []
        rows: list[int] = []
        first = 0
        for sequence in sequences(batch):
            learned = [i for i, learn in enumerate(sequence.learn) if learn]
            tokens, places = reread(self.env.tokenizer, theirs, sequence.tokens)
            pairs = {places[i]: first + n for n, i in enumerate(learned) if places[i] > 0}
            first += len(learned)
            if pairs:
                pieces.append(Piece(tokens, [i in pairs for i in range(len(tokens))]))
                rows += [pairs[place] for place in sorted(pairs)]
        found = torch.tensor(rows, dtype=torch.long)
        ranks = min(self.config.ranks, model.config.vocab - 1)
        logprobs = torch.empty(0, ranks)
        if pieces:
            self._check_length(pieces, model)
            with self.env.autocast():
                logprobs = likeliest(model, assemble(pieces).to(self.env.device), ranks)
        here = batch.to(self.env.device)
        return taught(
            here,
            step=step,
            ranked_rows=found.to(self.env.device),
            ranked_logprobs=logprobs.to(self.env.device),
        )

    def _check_length(self, pieces: Sequence[Piece], model: DecoderModel) -> None:
        longest = max(len(piece.tokens) for piece in pieces)
        if longest > model.config.context:
            raise TreadleError(
                f"OtherTokenizer: a text is {longest} tokens long for the teacher, whose context "
                f"is {model.config.context}: shorten the student's sequences"
            )

    def settle(self) -> None:
        return


def reread(
    ours: Tokenizer, theirs: Tokenizer, tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The other tokenizer's ids of a text, and for each of our tokens the place of the one that
    begins where it does, or -1. A special token that both have is one to both."""
    read: list[int] = []
    place_at: dict[int, int] = {}
    at = 0
    for part in _parts(ours, tokens):
        text, ids = ours.decode_bytes(part), _in_theirs(ours, theirs, part)
        spelled = theirs.decode_bytes(ids)
        # Some tokenizers put a space before a text, and it is a part of their first token.
        before = len(spelled) - len(text)
        for token, begin in zip(ids, _begins(theirs, ids), strict=True):
            if spelled[before:] == text:
                place_at.setdefault(at + max(0, begin - before), len(read))
            read.append(token)
        at += len(text)
    return read, [place_at.get(begin, -1) for begin in _begins(ours, tokens)]


def _parts(tokenizer: Tokenizer, tokens: Sequence[int]) -> Iterator[list[int]]:
    """The text between special tokens, and each of those by itself."""
    for special, group in groupby(tokens, tokenizer.special_ids.__contains__):
        part = list(group)
        yield from ([token] for token in part) if special else (part,)


def _in_theirs(ours: Tokenizer, theirs: Tokenizer, part: list[int]) -> list[int]:
    if part[0] in ours.special_ids:
        same = theirs.token_id(ours.spelling(part[0]))
        if same is not None and same in theirs.special_ids:
            return [same]
    return theirs.encode_bytes(ours.decode_bytes(part))


def _begins(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """The byte at which each token begins."""
    return list(accumulate((len(tokenizer.token_bytes(t)) for t in tokens), initial=0))[:-1]


def likeliest(model: DecoderModel, batch: Batch, ranks: int) -> Float[Tensor, "M K"]:
    """Log-probabilities of the likeliest next tokens of each prediction, in descending order."""
    hidden = model(batch.tokens, batch.context())[batch.sources]
    weight, bias, rule = model.head_weight(), bias_of(model.head), head_rule(model)
    found = []
    for rows in chunks(len(hidden), len(weight)):
        logits, _ = head_logits(hidden[rows], weight, bias, rule)
        found.append(logits.topk(ranks, -1).values - logits.logsumexp(-1, keepdim=True))
    return torch.cat(found)
