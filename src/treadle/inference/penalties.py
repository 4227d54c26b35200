"""Changes of the logits before a token is drawn, each for one row and only where it applies.

repetition   z_i / r if z_i > 0 else z_i r, for i in prompt and answer     Keskar et al. 2019
frequency    z_i - f times how often the answer has i
presence     z_i - a, for i in the answer
bias         z_i + b_i
masks        -inf for what a constraint forbids, and for stops before `min_tokens`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.inference.sampling import Sampling


def adjust(
    logits: Float[Tensor, " V"],
    sampling: Sampling,
    prompt: Sequence[int],
    answer: Sequence[int],
    stops: Iterable[int],
) -> None:
    """Change one row in place as its sampling asks; nothing is touched where nothing is asked.

    Raises:
        TreadleError: a bias for a token that the model does not have.
    """
    if sampling.repetition_penalty != 1.0:
        seen = _indices({*prompt, *answer}, logits)
        z, r = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(z > 0, z / r, z * r)
    if answer and (sampling.frequency_penalty or sampling.presence_penalty):
        counts = Counter(answer)
        often = torch.tensor(list(counts.values()), device=logits.device)
        logits[_indices(counts, logits)] -= (
            sampling.frequency_penalty * often + sampling.presence_penalty
        )
    if sampling.logit_bias:
        tokens, biases = zip(*sampling.logit_bias, strict=True)
        if not 0 <= min(tokens) <= max(tokens) < len(logits):
            raise TreadleError(
                f"logit_bias: tokens are 0 .. {len(logits) - 1}, not "
                f"{min(tokens) if min(tokens) < 0 else max(tokens)}"
            )
        logits.index_add_(0, _indices(tokens, logits), torch.tensor(biases, device=logits.device))
    if len(answer) < sampling.min_tokens:
        logits[_indices(stops, logits)] = float("-inf")


def forbid(logits: Float[Tensor, " V"], allowed: Bool[Tensor, " A"]) -> None:
    """Set what is not allowed to -inf, in place; the mask may be shorter than the logits."""
    size = min(len(allowed), len(logits))
    logits[:size].masked_fill_(~allowed[:size].to(logits.device), float("-inf"))
    logits[size:] = float("-inf")


def _indices(tokens: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.long, device=like.device)
