"""From logits to tokens.

    p = softmax(z / T), truncated to a set of likely tokens, renormalised
    top-k    the k likeliest                                  Fan et al. 2018
    top-p    the likeliest whose mass reaches p               Holtzman et al. 2020
    min-p    those with p_i >= min_p * max p                  Nguyen et al. 2024
    typical  those whose surprise is nearest the entropy, up to mass p   Meister et al. 2023

Penalties, biases and masks change the logits before this: see `penalties.py`.

Each request draws from its own counter-based random numbers, so its text does not depend on what
else is in the batch. One uniform number picks a token through the cumulative distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config

CARD = Card(
    id="inf.sampling",
    paper="Holtzman et al. 2020, arXiv:1904.09751; Meister et al. 2023, arXiv:2202.00666; "
    "Nguyen et al. 2024, arXiv:2407.01082",
    summary="Greedy, temperature, top-k, top-p, min-p, typical, penalties, biases, seeded.",
    recipe="treadle chat smollm2-135m-instruct --temperature 0.7 --top-p 0.9",
    oracle="tests/inference/test_inference_sampling.py::test_truncation_matches_transformers",
)


class Sampling(Config):
    """How to continue a prompt. The default is the model's own distribution."""

    temperature: float = Field(1.0, ge=0.0)
    """0 is greedy."""
    top_k: int | None = Field(None, ge=1)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    typical_p: float = Field(1.0, gt=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, gt=0.0)
    """Divides positive logits of tokens in prompt and answer, multiplies negative ones."""
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    """Taken from a token's logit for each time that the answer has it."""
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    """Taken from a token's logit if the answer has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of some tokens."""
    min_tokens: int = Field(0, ge=0)
    """Tokens before the model may end the text."""
    top_logprobs: int = Field(0, ge=0, le=100)
    """How many of the likeliest tokens to report at each step."""
    max_tokens: int = Field(256, ge=1)
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    seed: int = 0

    @property
    def truncates(self) -> bool:
        limits = min(self.top_p, self.typical_p)
        return self.top_k is not None or limits < 1.0 or self.min_p > 0.0


@dataclass(frozen=True)
class Draw:
    """A token for each row, and its log-probability at the row's temperature."""

    tokens: Int[Tensor, " B"]
    logprobs: Float[Tensor, " B"]
    top: tuple[Int[Tensor, "B K"], Float[Tensor, "B K"]] | None = None
    """The likeliest tokens and their log-probabilities, if a row asks for them."""


def uniform(*words: Sequence[int]) -> Float[np.ndarray, " B"]:
    """Numbers in [0, 1), each a hash of its words alone: splitmix64 (Steele et al. 2014)."""
    z = np.zeros(len(words[0]), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            z = (z ^ np.asarray(word, dtype=np.int64).astype(np.uint64)) + np.uint64(
                0x9E3779B97F4A7C15
            )
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


CANDIDATES = 256
"""Likeliest tokens that are sorted first; rows whose top-p set is larger sort the vocabulary."""


def truncate(
    logits: Float[Tensor, "B V"],
    top_k: Int[Tensor, " B"],
    top_p: Float[Tensor, " B"],
    min_p: Float[Tensor, " B"],
) -> Float[Tensor, "B V"]:
    """Logits with the excluded tokens at -inf; filters apply in the order top-k, top-p, min-p."""
    vocab = logits.shape[-1]
    everything = logits.logsumexp(-1, keepdim=True)
    limited = top_k < vocab
    unbounded = ~limited & (top_p >= 1) & (min_p <= 0)
    size = min(vocab, max(CANDIDATES, int(torch.where(limited, top_k, 0).max())))
    while True:
        values = logits.topk(size, -1).values
        allowed = torch.arange(size, device=logits.device) < top_k[:, None]
        values = torch.where(allowed, values, float("-inf"))
        norm = torch.where(limited[:, None], values.logsumexp(-1, keepdim=True), everything)
        p = (values - norm).exp()
        reached = p.cumsum(-1)
        bounded = (reached[:, -1] >= top_p) | (p[:, -1] < min_p * p[:, 0])
        if size == vocab or bool((bounded | limited | unbounded).all()):
            break
        size = vocab
    # Keep a token while the mass before it is below top_p; the first is always kept.
    kept = ((reached - p) < top_p[:, None]) & (p >= min_p[:, None] * p[:, :1]) & (p > 0)
    kept[:, 0] = True
    last = torch.where(kept, values, float("inf")).amin(-1, keepdim=True)
    return torch.where((logits >= last) | unbounded[:, None], logits, float("-inf"))


def typical(logits: Float[Tensor, "B V"], mass: Float[Tensor, " B"]) -> Float[Tensor, "B V"]:
    """Logits with the atypical tokens at -inf: those whose surprise -log p is far from the entropy.

    Kept are the most typical ones until their mass reaches `mass`.
    """
    logp = logits.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1, keepdim=True)
    order = (-logp - entropy).abs().argsort(-1)
    ordered = p.gather(-1, order)
    out = (ordered.cumsum(-1) - ordered >= mass[:, None]) & (mass < 1)[:, None]
    return logits.masked_fill(out.scatter(-1, order, out), float("-inf"))


Peaks = Callable[[Tensor], tuple[Tensor, Tensor]]


def peaks(logits: Float[Tensor, "B V"]) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Of each row the likeliest token, the first where several are, and log sum exp."""
    return logits.argmax(-1), logits.logsumexp(-1)


def sample(
    logits: Float[Tensor, "B V"],
    samplings: Sequence[Sampling],
    *,
    streams: Sequence[int],
    steps: Sequence[int],
    peaks: Peaks = peaks,
) -> Draw:
    """Draw a token for each row.

    A row's random number depends on its sampling's seed, its stream (which of the n completions
    of a request it is) and its step (how many tokens it has drawn). `peaks` does what the function
    of that name does.
    """
    device, vocab = logits.device, logits.shape[-1]
    logits = logits.float()

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=device)

    temperature = column([s.temperature for s in samplings])
    greedy = temperature == 0
    divisor = torch.where(greedy, 1.0, temperature)
    if bool((divisor != 1).any()):
        logits = logits / divisor[:, None]
    tokens, normalisers = peaks(logits)
    normaliser = normalisers[:, None]
    if not bool(greedy.all()):
        kept = logits
        if any(s.truncates for s in samplings):
            kept = truncate(
                logits,
                torch.tensor([s.top_k or vocab for s in samplings], device=device).clamp(max=vocab),
                column([s.top_p for s in samplings]),
                column([s.min_p for s in samplings]),
            )
            if any(s.typical_p < 1.0 for s in samplings):
                kept = typical(kept, column([s.typical_p for s in samplings]))
        cumulative = (kept - kept.amax(-1, keepdim=True)).exp().cumsum(-1)
        u = torch.from_numpy(uniform([s.seed for s in samplings], streams, steps))
        target = u.to(device, torch.float32)[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=vocab - 1)
        tokens = torch.where(greedy, tokens, drawn)
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - normaliser[:, 0]
    wanted = max(s.top_logprobs for s in samplings)
    if not wanted:
        return Draw(tokens, logprobs)
    best = logits.topk(min(wanted, vocab), -1)
    return Draw(tokens, logprobs, (best.indices, best.values - normaliser))
