from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treadle.core.errors import TreadleError
from treadle.data.batch import Piece, assemble
from treadle.data.pack import SplitLong, TruncateLong, pack
from treadle.models.decoder import Decoder
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.objectives.causal import CausalLM

LENGTHS = st.lists(st.integers(1, 32), max_size=60)


def best_fit_decreasing(lengths: list[int], budget: int) -> list[list[int]]:
    """As the textbook says it, in quadratic time."""
    rows: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        rooms = [budget - sum(lengths[d] for d in row) for row in rows]
        fitting = [r for r, room in enumerate(rooms) if room >= lengths[document]]
        if fitting:
            rows[min(fitting, key=lambda r: rooms[r])].append(document)
        else:
            rows.append([document])
    return rows


@given(lengths=LENGTHS, budget=st.integers(32, 100))
def test_rows_match_the_textbook(lengths: list[int], budget: int) -> None:
    assert pack(lengths, budget) == best_fit_decreasing(lengths, budget)


@given(lengths=LENGTHS, budget=st.integers(32, 100))
def test_every_document_once_and_little_waste(lengths: list[int], budget: int) -> None:
    rows = pack(lengths, budget)
    assert sorted(d for row in rows for d in row) == list(range(len(lengths)))
    assert all(sum(lengths[d] for d in row) <= budget for row in rows)
    least = -(-sum(lengths) // budget)
    assert len(rows) <= 11 / 9 * max(least, 1) + 1 + len([n for n in lengths if 2 * n > budget])


@given(length=st.integers(1, 200), budget=st.integers(2, 50))
def test_long_documents_are_cut(length: int, budget: int) -> None:
    assert TruncateLong()(length, budget) == ((0, min(length, budget)),)
    parts = SplitLong()(length, budget)
    assert all(0 < b - a <= budget for a, b in parts)
    predicted = [t for a, b in parts for t in range(a + 1, b)]
    assert predicted == list(range(1, length))


def test_packed_loss_and_gradient_equal_unpacked() -> None:
    """Documents in one row give what they give alone: no sight of each other, positions from 0."""
    torch.manual_seed(0)
    block = Block(mixer=Attention(heads=2), ffn=GatedMLP(hidden=24))
    model = Decoder(vocab=31, dim=16, context=40, blocks=(block,) * 2, std=0.3).build().double()
    lengths = [7, 31, 2, 12, 12, 19, 5, 1, 28]
    documents = [torch.randint(0, 31, (n,)).tolist() for n in lengths]

    def run(rows: list[list[int]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        total, weight = 0.0, 0.0
        for row in rows:
            batch = assemble([Piece(documents[d], [True] * lengths[d]) for d in row])
            if batch.targets.numel():
                output = CausalLM()(model, batch)
                total, weight = total + output.total, weight + output.weight
        loss = total / weight
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    rows = pack(lengths, 40)
    assert len(rows) == 3
    packed, gradients = run(rows)
    alone, expected = run([[d] for d in range(len(lengths))])
    torch.testing.assert_close(packed, alone)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)

    glued = assemble([Piece([t for d in rows[0] for t in documents[d]], [True] * 40)])
    separate = assemble([Piece(documents[d], [True] * lengths[d]) for d in rows[0]])
    assert not torch.isclose(CausalLM()(model, glued).total, CausalLM()(model, separate).total)


def test_mistakes_are_named() -> None:
    with pytest.raises(TreadleError, match="document 1 has 9 tokens, more than the budget of 8"):
        pack([3, 9], 8)
    with pytest.raises(TreadleError, match="document 0 is empty"):
        pack([0, 3], 8)
    with pytest.raises(TreadleError, match="needs two"):
        SplitLong()(5, 1)
    assert pack([], 8) == []
