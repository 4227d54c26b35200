"""Preference trees of a tiny model, and the same answers as separate padded rows for TRL."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tiny_generation import tiny_model

from treadle.alignment.trees import assemble_trees, extended
from treadle.data.batch import Piece
from treadle.models.decoder import DecoderModel
from treadle.objectives.dpo import PreferenceBatch, sequence_logprobs

PAIRS = [
    ([3, 4, 5], [1, 2, 3, 7], [4, 5]),
    ([7, 8, 9, 10, 11], [5, 1, 9, 2], [9, 9, 1, 2, 6, 30]),
    ([40, 2], [3, 1, 22, 19], [6, 7, 8]),
]
"""Prompt, chosen, rejected; the chosen are equally long, where TRL means over a batch's tokens."""
WIDTH = 6


def moved(seed: int = 3) -> DecoderModel:
    """The tiny model some way off."""
    model = tiny_model()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def pair_trees() -> list[list[Piece]]:
    return [
        [Piece(p, [False] * len(p)), *(Piece(a, [True] * len(a), 0) for a in answers)]
        for p, *answers in PAIRS
    ]


def pair_batch(*, reference: bool = True) -> PreferenceBatch:
    batch = assemble_trees(pair_trees())
    with torch.no_grad():
        logp = sequence_logprobs(tiny_model(), batch)
    return extended(PreferenceBatch, batch, reference=logp if reference else None)


def answer_logprobs(model: DecoderModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of each token of an answer after its own copy of the prompt."""
    logp = model.logits(model(torch.tensor(prompt + answer))).log_softmax(-1)
    return logp[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer)[:, None])[:, 0]


def padded_logprobs(model: DecoderModel) -> torch.Tensor:
    """All chosen answers, then all rejected ones, padded with zeros: [2P, WIDTH]."""
    rows = [answer_logprobs(model, p, a) for p, a, _ in PAIRS]
    rows += [answer_logprobs(model, p, a) for p, _, a in PAIRS]
    return torch.stack([torch.nn.functional.pad(r, (0, WIDTH - len(r))) for r in rows])


def padded_mask() -> torch.Tensor:
    """Of completion tokens, one column for the prompt before them: [2P, 1 + WIDTH]."""
    lengths = [len(a) for _, a, _ in PAIRS] + [len(a) for _, _, a in PAIRS]
    return torch.tensor([[0] + [1] * n + [0] * (WIDTH - n) for n in lengths])


def outputs_of(logprobs: torch.Tensor) -> SimpleNamespace:
    """A model's output as TRL's losses read it; all but `log_probs` is for their logs."""
    ones = torch.ones_like(logprobs)
    return SimpleNamespace(log_probs=logprobs, entropy=ones, mean_logits=ones, is_top1=ones.bool())
