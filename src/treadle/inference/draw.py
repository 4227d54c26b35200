"""After a pass: tokens for the sequences that are ready, and what follows from them."""

from __future__ import annotations

from collections.abc import Collection

from jaxtyping import Float
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.inference.penalties import adjust, forbid
from treadle.inference.sampling import Peaks, sample
from treadle.inference.sequence import Active


def draw(
    sequences: list[Active],
    rows: list[int],
    logits: Float[Tensor, "N V"],
    stops: Collection[int],
    context: int,
    peaks: Peaks,
) -> list[int]:
    """Tokens for sequences whose logits begin at `rows`; more where a guess was right.

    Returns the rows that their last tokens are from.
    """
    drawn, last = list(zip(sequences, rows, strict=True)), dict(zip(sequences, rows, strict=True))
    while drawn:
        rows = [row for _, row in drawn]
        every = rows == list(range(len(logits)))
        _sample([s for s, _ in drawn], logits if every else logits[rows], stops, context, peaks)
        right = []
        for sequence, _ in drawn:
            behind = None
            if sequence.finish is None:
                behind = sequence.guesses.follow(sequence.tokens[-1])
            if behind is not None:
                sequence.computed += 1
                right.append((sequence, behind))
        drawn = right
        last |= right
    return list(last.values())


def _sample(
    sequences: list[Active],
    logits: Float[Tensor, "B V"],
    stops: Collection[int],
    context: int,
    peaks: Peaks,
) -> None:
    """One token for each row; the logits are changed on the way."""
    for row, sequence in zip(logits, sequences, strict=True):
        request = sequence.request
        adjust(row, request.sampling, request.prompt, sequence.tokens, stops)
        if sequence.constraint is not None:
            try:
                allowed = sequence.constraint.mask()
            except TreadleError:  # it cannot be followed further: that ends this text only
                sequence.end("cancelled")
                continue
            if allowed is not None:
                forbid(row, allowed)
    going = [s for s in sequences if s.finish is None]
    found = sample(
        logits,
        [s.request.sampling for s in sequences],
        streams=[s.index for s in sequences],
        steps=[len(s.tokens) for s in sequences],
        peaks=peaks,
    )
    tokens, logprobs = found.tokens.tolist(), found.logprobs.tolist()
    for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
        if sequence not in going:
            continue
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        _follow(sequence, token, stops, context)
    if found.top is not None:
        names, values = (t.tolist() for t in found.top)
        for row, sequence in enumerate(sequences):
            if sequence not in going:
                continue
            best = zip(names[row], values[row], strict=True)
            sequence.top.append(tuple(best)[: sequence.request.sampling.top_logprobs])


def _follow(sequence: Active, token: int, stops: Collection[int], context: int) -> None:
    """Text, constraint and end of a sequence that got a token."""
    if token in stops:
        sequence.end("stop")
        return
    sequence.text.push(token)
    constraint = sequence.constraint
    if constraint is not None:
        constraint.advance(token)
    if sequence.text.stopped or (constraint is not None and constraint.done()):
        sequence.end("stop")
    elif len(sequence.tokens) >= sequence.request.limit(context):
        sequence.end("length")
