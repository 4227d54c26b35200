"""The teacher's cache: which contexts are one and the same, and what becomes of its shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from treadle.core.errors import FileFormatError
from treadle.data.batch import Piece, assemble
from treadle.distillation import cached
from treadle.distillation.cached import TopStore, sequence_keys


def keys(*pieces: Piece) -> list[bytes]:
    return [key for key, _ in sequence_keys(assemble(pieces))]


def document(*tokens: int, learned: tuple[int, ...] = (3, 4)) -> Piece:
    return Piece(tokens, [i in learned for i in range(len(tokens))])


def test_a_context_is_known_by_what_decides_its_answers() -> None:
    """Every token before the last prediction counts, wherever it stands; nothing after it does."""
    (key,) = keys(document(1, 2, 3, 4, 5))
    assert keys(document(1, 2, 3, 4, 9)) == [key]
    assert keys(document(1, 2, 3, 4, 5, 6, 7)) == [key]
    for other in ((9, 2, 3, 4, 5), (1, 9, 3, 4, 5), (1, 2, 9, 4, 5), (1, 2, 3, 9, 5)):
        assert keys(document(*other)) != [key], other
    assert keys(document(1, 2, 3, 4, 5, learned=(2, 4))) != [key]
    assert keys(document(1, 2, 3, 4, 5, learned=(3,))) != [key]


def test_a_shared_beginning_is_as_good_as_its_own() -> None:
    """A text in three pieces, of which others continue the first two as well."""
    (whole,) = keys(document(1, 2, 3, 4, 5, 6, learned=(4, 5)))
    parts = [
        Piece([8, 8], [False] * 2),
        Piece([1, 2], [False] * 2),
        Piece([3, 4], [False] * 2, parent=1),
        Piece([7, 7], [True, True], parent=2),
        Piece([5, 6], [True, True], parent=2),
    ]
    siblings = keys(*parts)
    assert siblings[1] == whole
    assert siblings[0] != whole
    for place in (1, 2):
        changed = list(parts)
        changed[place] = Piece([9, parts[place].tokens[1]], [False] * 2, parts[place].parent)
        assert keys(*changed)[1] != whole


def answers(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 99, (rows, 2), generator=generator)
    return tokens, -torch.rand(rows, 2, generator=generator)


def key_of(number: int) -> bytes:
    return bytes([number] * 16)


def test_shards_are_written_when_they_are_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "SHARD_ROWS", 5)
    store = TopStore(tmp_path, k=2)
    store.add(key_of(1), *answers(1, 3))
    assert not list(tmp_path.iterdir())
    store.add(key_of(2), *answers(2, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["rank0-000000.safetensors"]
    store.add(key_of(3), *answers(3, 1))
    store.flush()
    again = TopStore(tmp_path, k=2, rank=1)
    assert again.written == 0
    for number, rows in ((1, 3), (2, 2), (3, 1)):
        tokens, logprobs = again.known[key_of(number)]
        assert torch.equal(tokens, answers(number, rows)[0].int())
        assert torch.equal(logprobs, answers(number, rows)[1].half())


def test_a_shard_that_was_deleted_costs_no_other(tmp_path: Path) -> None:
    """Of three shards the first is deleted, as its error says, and what it held is made anew."""
    for number in range(3):
        store = TopStore(tmp_path, k=2)
        store.add(key_of(number), *answers(number, 1))
        store.flush()
    (tmp_path / "rank0-000000.safetensors").unlink()
    store = TopStore(tmp_path, k=2)
    store.add(key_of(0), *answers(0, 1))
    store.flush()
    assert set(TopStore(tmp_path, k=2).known) == {key_of(n) for n in range(3)}


def test_files_that_are_no_shards_are_named(tmp_path: Path) -> None:
    store = TopStore(tmp_path, k=2)
    store.add(key_of(1), *answers(1, 3))
    store.flush()
    (path,) = tmp_path.iterdir()
    with pytest.raises(FileFormatError, match="cache is damaged: delete it"):
        TopStore(tmp_path, k=3)
    tensors = load_file(path)
    for lost in tensors:
        save_file({name: t for name, t in tensors.items() if name != lost}, path)
        with pytest.raises(FileFormatError, match="cache is damaged: delete it"):
            TopStore(tmp_path, k=2)
