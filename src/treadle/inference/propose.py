"""Guesses from logits that are near the target's: drawn as the engine will draw the token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.inference.penalties import adjust
from treadle.inference.sampling import sample
from treadle.inference.sequence import Active

Width = Annotated[int, Field(ge=1)]
"""How many tokens a path tries in one place."""


def propose(
    logits: Float[Tensor, "B V"],
    paths: Sequence[tuple[Active, list[int]]],
    stops: Collection[int],
    wide: int,
) -> list[list[int]]:
    """Tokens that may follow each sequence and its guesses so far: a draw by the random number
    that the engine has for this step, and the likeliest others. The logits are changed."""
    for row, (sequence, guesses) in zip(logits, paths, strict=True):
        request = sequence.request
        adjust(row, request.sampling, request.prompt, [*sequence.tokens, *guesses], stops)
    drawn = sample(
        logits,
        [sequence.request.sampling for sequence, _ in paths],
        streams=[sequence.index for sequence, _ in paths],
        steps=[len(sequence.tokens) + len(guesses) for sequence, guesses in paths],
    ).tokens.tolist()
    if wide == 1:
        return [[token] for token in drawn]
    likely = logits.topk(min(wide, logits.shape[-1])).indices.tolist()
    return [
        [token, *(other for other in others if other != token)][:wide]
        for token, others in zip(drawn, likely, strict=True)
    ]
