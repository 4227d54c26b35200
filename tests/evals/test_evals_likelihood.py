"""Likelihoods in shared trees against one sequence at a time; the split of context and answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evals.lm_eval_oracle import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.evals.likelihood import (
    WORTH_SHARING,
    Forest,
    Scored,
    encode_pairs,
    log_likelihoods,
    packs,
)
from treadle.models.decoder import Decoder, DecoderModel
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.tokenizers.tokenizer import Tokenizer


def small() -> DecoderModel:
    torch.manual_seed(0)
    block = Block(mixer=Attention(heads=2), ffn=GatedMLP(hidden=24))
    return Decoder(vocab=50, dim=16, context=40, blocks=(block, block), std=0.4).build().eval()


def naive(model: DecoderModel, item: Scored) -> float:
    """log p of each scored token from the whole logits of that sequence alone, in float64."""
    tokens = list(item.tokens)
    logits = model.logits(model(torch.tensor(tokens[:-1]))).double().log_softmax(-1)
    places = range(item.start, len(tokens))
    return float(sum(logits[i - 1, tokens[i]] for i in places))


def family(seed: int) -> list[Scored]:
    """Sequences with a long common prefix, some with a second, equal ones, odd ones out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 50, (n,), generator=generator).tolist())

    prefix = draw(12)
    questions = [prefix + draw(WORTH_SHARING + n) for n in (0, 3, 5)]
    answers = [Scored(q + a, len(q)) for q in questions for a in (draw(1), draw(1), draw(4))]
    alone = [Scored(draw(7), 1), Scored(draw(2), 1), Scored((*prefix, 1, 2), 12)]
    return [*answers, *alone, answers[0]]


@torch.inference_mode()
def test_trees_score_what_single_sequences_score() -> None:
    model, items = small(), family(0)
    found = log_likelihoods(model, items)
    assert found == pytest.approx([naive(model, item) for item in items], abs=1e-4)


@torch.inference_mode()
def test_only_the_end_of_what_is_too_long_is_read() -> None:
    model = small()
    tokens = (*range(45), 3, 4, 5)
    kept = Scored(tokens[-41:], 38)
    assert Scored(tokens, 45).cut(40) == kept
    assert log_likelihoods(model, [Scored(tokens, 45)]) == pytest.approx([naive(model, kept)])
    assert Scored(tokens, 2).cut(40) == Scored(tokens[-41:], 1)


def test_shared_tokens_are_computed_once() -> None:
    items = family(1)
    forest = Forest.of([item.tokens[:-1] for item in items])
    distinct = {item.tokens[:-1] for item in items}
    assert set(forest.paths) == distinct
    laid = sum(map(len, forest.segments))
    # One prefix, three questions, their three long answers, and the odd ones out.
    assert laid == 12 + (8 + 11 + 13) + 3 * 3 + 6 + 1 + 1


sequences = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=24).map(tuple), min_size=1, max_size=12
)


@given(sequences)
@settings(max_examples=200, deadline=None)
def test_paths_spell_the_sequences(drawn: list[tuple[int, ...]]) -> None:
    forest = Forest.of(drawn)
    for tokens, path in forest.paths.items():
        assert sum((forest.segments[s] for s in path), ()) == tokens
        assert [forest.parents[s] for s in path] == [-1, *path[:-1]]
    assert set(forest.paths) == set(drawn)
    assert all(parent < i for i, parent in enumerate(forest.parents))


def test_packs_hold_every_group_once_within_the_budget() -> None:
    groups = [[item] for item in family(2)] + [[Scored(tuple(range(30)), 1)]]
    found = list(packs(groups, 30))
    assert sorted(g for pack in found for g in pack) == list(range(len(groups)))
    for pack in found:
        forest = Forest.of([item.tokens[:-1] for g in pack for item in groups[g]])
        size = sum(map(len, forest.segments))
        # Prefixes that are not worth a segment are counted as shared.
        assert len(pack) == 1 or size <= 30 + WORTH_SHARING * len(pack)


@pytest.mark.parametrize("bos", [False, True])
def test_pairs_are_split_as_lm_eval_splits_them(bos: bool, tmp_path: Path) -> None:
    model = tiny(tmp_path, bos=bos)
    tokenizer = Tokenizer.load(tmp_path)
    pairs = [
        ("Question: who?\nAnswer:", " the sun"),
        ("Answer: ", "water"),
        ("ends with spaces  \n ", " energy"),
        ("a", " b"),
    ]
    found = encode_pairs(tokenizer, [*pairs, ("", " food"), ("ans", "wer")])
    for (context, continuation), ours in zip(pairs, found, strict=False):
        before, after = model.lm._encode_pair(context, continuation)
        assert (list(ours.tokens[: ours.start]), list(ours.tokens[ours.start :])) == (before, after)
    prefix = model.lm.prefix_token_id
    food = model.lm.tok_encode(" food", add_special_tokens=False)
    assert found[-2] == Scored((prefix, *food), 1)
    # The context's last token is joined with the continuation: it is scored, or nothing would be.
    assert found[-1].tokens == tuple(model.lm.tok_encode("answer"))
    assert found[-1].start == len(found[-1].tokens) - 1
