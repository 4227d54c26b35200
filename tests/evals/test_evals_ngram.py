"""Kneser-Ney n-grams against the definition, and as a probability."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from oracles.kneser_ney import NaiveKneserNey

from treadle.core.errors import TreadleError
from treadle.evals.ngram import FALLBACK, KneserNey, NgramModel, discounts

VOCAB = 30


def zipf(seed: int, lengths: tuple[int, ...], vocab: int = VOCAB) -> list[list[int]]:
    """Documents with frequent and rare tokens, and some order in them."""
    draw = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        tokens = [0]
        for _ in range(length - 1):
            jump = int(draw.zipf(1.7)) % vocab
            tokens.append((tokens[-1] * 3 + jump) % (vocab - 3))  # the last three are never drawn
        documents.append(tokens[:length])
    return documents


TRAINING = [*zipf(0, (600, 1, 0, 40, 300, 2, 5)), [1, 27]]  # nothing ever follows 27
HELD_OUT = [*zipf(1, (80, 1, 0, 3, 20)), [29, 28, 27, 0, 3, 29], [5, 5]]


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_matches_the_definition(order: int) -> None:
    model = KneserNey(order=order).build(TRAINING, VOCAB)
    naive = NaiveKneserNey(TRAINING, order, VOCAB)
    for k, level in enumerate(model.levels, 1):  # the paper's formulas are at work, not FALLBACK
        grams = {g for g in naive.count if len(g) == k}
        assert len(level.keys) == len(grams)
    expected = [
        np.log(naive.p(document[i], tuple(document[max(0, i - order + 1) : i])))
        for document in HELD_OUT
        for i in range(1, len(document))
    ]
    np.testing.assert_allclose(model.logprobs(HELD_OUT), expected, rtol=1e-12)


def test_the_corpus_exercises_estimated_discounts() -> None:
    naive = NaiveKneserNey(TRAINING, 3, VOCAB)
    assert sum(tuple(d) != FALLBACK for d in naive.discount.values()) >= 2


@pytest.mark.parametrize("context", [(0,), (0, 3, 9, 1), (29,), (29, 0, 3), (5, 28, 3, 9), (7, 7)])
def test_probabilities_sum_to_one(context: tuple[int, ...]) -> None:
    model = KneserNey(order=5).build(TRAINING, VOCAB)
    logs = model.logprobs([[*context, w] for w in range(VOCAB)]).reshape(VOCAB, len(context))
    assert np.exp(logs[:, -1]).sum() == pytest.approx(1.0, abs=1e-12)
    assert np.isfinite(logs).all()


def test_discounts_are_those_of_the_paper() -> None:
    counts = np.repeat([1, 2, 3, 4, 5, 9], [400, 120, 60, 35, 20, 7])
    y = 400 / (400 + 240)
    expected = (1 - 2 * y * 120 / 400, 2 - 3 * y * 60 / 120, 3 - 4 * y * 35 / 60)
    assert discounts(counts) == pytest.approx(expected)
    assert discounts(np.array([1, 1, 2])) == FALLBACK
    assert discounts(np.repeat([1, 2, 3, 4], [100, 50, 1, 100])) == FALLBACK  # D(3) below 0


def test_a_closed_form() -> None:
    """Bigrams of `0 1 0 1 0 2`, by hand: a(01)=2, a(02)=1, a(10)=2; before 0 only 1, and so on."""
    model = KneserNey(order=2).build([[0, 1, 0, 1, 0, 2]], 4)
    d1, d2 = FALLBACK[:2]
    unigrams = np.array([1, 1, 1, 0])  # different tokens before each
    low = np.where(unigrams > 0, (1 - d1) / 3, 0) + (3 * d1 / 3) / 4
    after_0 = np.array([0, (2 - d2) / 3, (1 - d1) / 3, 0]) + (d2 + d1) / 3 * low
    logs = model.logprobs([[0, w] for w in range(4)])
    np.testing.assert_allclose(np.exp(logs), after_0)
    np.testing.assert_allclose(np.exp(model.logprobs([[3, w] for w in range(4)])), low)


def test_order_of_documents_does_not_matter() -> None:
    a = KneserNey(order=4).build(TRAINING, VOCAB).logprobs(HELD_OUT)
    b = KneserNey(order=4).build(TRAINING[::-1], VOCAB).logprobs(HELD_OUT)
    np.testing.assert_allclose(a, b, rtol=1e-12)


def test_bad_ids_and_no_text() -> None:
    with pytest.raises(TreadleError, match="go from 0 to 30, but the vocabulary has 30"):
        KneserNey().build([[0, 30]], VOCAB)
    with pytest.raises(TreadleError, match="go from -1 to 3"):
        KneserNey().build(TRAINING, VOCAB).logprobs([[3, -1]])
    with pytest.raises(TreadleError, match="has no tokens"):
        KneserNey().build([[], []], VOCAB)


def test_higher_orders_predict_real_text_better(shared_data: Path) -> None:
    with gzip.open(shared_data / "lm" / "tinyshakespeare.txt.gz") as file:
        text = file.read()
    split = len(text) * 9 // 10
    training, held_out = list(text[:split]), list(text[split:])

    def bits(order: int) -> float:
        model: NgramModel = KneserNey(order=order).build([training], 256)
        return float(-model.logprobs([held_out]).mean() / np.log(2))

    measured = [bits(order) for order in (1, 2, 3, 5)]
    assert measured == sorted(measured, reverse=True)
    assert measured[-1] < 2.5
