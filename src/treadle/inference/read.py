"""What the model thought of the prompt, token by token."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from treadle.inference.request import Reading
from treadle.inference.sequence import Active


def read(sequence: Active, logits: Float[Tensor, "n V"]) -> None:
    """Add readings of the tokens that follow the n which a pass is about to count as computed.

    Tokens that were read before the sequence lost its pages are not read twice.
    """
    prompt, known = sequence.request.prompt, len(sequence.readings)
    first = max(0, known - sequence.computed)
    last = min(len(logits), len(prompt) - 1 - sequence.computed)
    if first >= last:
        return
    logp = logits[first:last].float().log_softmax(-1)
    tokens = prompt[sequence.computed + first + 1 : sequence.computed + last + 1]
    best = logp.topk(sequence.request.prompt_logprobs or 0, -1)
    for row, token, names, values in zip(
        logp, tokens, best.indices.tolist(), best.values.tolist(), strict=True
    ):
        top = tuple(zip(names, values, strict=True))
        sequence.readings.append(Reading(float(row[token]), top))
