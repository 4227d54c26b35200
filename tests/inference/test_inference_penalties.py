"""Penalties against transformers' processors and the sums of their definitions."""

from __future__ import annotations

import pytest
import torch

from treadle.core.errors import TreadleError
from treadle.inference.penalties import adjust, forbid
from treadle.inference.sampling import Sampling

VOCAB = 50


def logits() -> torch.Tensor:
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))


def adjusted(prompt=(), answer=(), stops=(), **settings) -> torch.Tensor:
    x = logits()
    adjust(x, Sampling(**settings), prompt, answer, stops)
    return x


def test_repetition_penalty_matches_transformers() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    history = torch.tensor([[3, 9, 3, 12]])
    expected = process.RepetitionPenaltyLogitsProcessor(1.3)(history, logits()[None])[0]
    torch.testing.assert_close(adjusted((3, 9), (3, 12), repetition_penalty=1.3), expected)


def test_bias_matches_transformers() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    biases = {4: 2.0, 7: -3.5}
    processor = process.SequenceBiasLogitsProcessor([[[t], b] for t, b in biases.items()])
    expected = processor(torch.tensor([[1, 2]]), logits()[None])[0]
    torch.testing.assert_close(adjusted(logit_bias=tuple(biases.items())), expected)


def test_min_tokens_matches_transformers() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    processor = process.MinNewTokensLengthLogitsProcessor(2, 3, [8, 9], device="cpu")
    for answer in ((), (1, 2), (1, 2, 3)):
        expected = processor(torch.tensor([[5, 6, *answer]]), logits()[None])[0]
        found = adjusted((5, 6), answer, stops=(8, 9), min_tokens=3)
        torch.testing.assert_close(found, expected)


def test_frequency_and_presence_count_the_answer_alone() -> None:
    found = adjusted((1, 2, 5), (5, 5, 7), frequency_penalty=0.5, presence_penalty=0.25)
    expected = logits()
    expected[5] -= 2 * 0.5 + 0.25
    expected[7] -= 0.5 + 0.25
    torch.testing.assert_close(found, expected)


def test_a_short_mask_forbids_the_rest() -> None:
    x = logits()
    forbid(x, torch.tensor([True, False, True]))
    assert x.isfinite().nonzero().flatten().tolist() == [0, 2]


@pytest.mark.parametrize(("token", "named"), [(-1, "-1"), (VOCAB, "50")])
def test_bias_of_an_unknown_token_is_refused(token: int, named: str) -> None:
    with pytest.raises(TreadleError, match=f"tokens are 0 .. 49, not {named}"):
        adjusted(logit_bias=((3, 1.0), (token, 1.0)))
