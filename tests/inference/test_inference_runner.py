"""TorchRunner: any mixture of fresh, extended and decoding sequences equals the model itself."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_generation import tiny_model, variants

from treadle.inference.paged_memory import pages_for
from treadle.inference.runner import Batch
from treadle.inference.torch_runner import TorchRunner

LENGTHS = (40, 13, 30, 7, 22)


@pytest.mark.parametrize(
    ("name", "model"), list(variants()), ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("seed", range(3))
def test_chunks_in_any_order_equal_the_whole(name, model, seed: int) -> None:
    dice = random.Random(seed)
    runner = TorchRunner(model, pages=64, page=4)
    texts = [[dice.randrange(256) for _ in range(n)] for n in LENGTHS]
    with torch.no_grad():
        whole = [model.logits(model(torch.tensor(text))) for text in texts]
    free = dice.sample(range(64), 64)
    tables = [[free.pop() for _ in range(-(-n // 4))] for n in LENGTHS]
    done = [0] * len(texts)
    while any(d < n for d, n in zip(done, LENGTHS, strict=True)):
        turn = [i for i, n in enumerate(LENGTHS) if done[i] < n and dice.random() < 0.8]
        dice.shuffle(turn)
        counts = [min(dice.choice((1, 1, 1, 2, 5, 9)), LENGTHS[i] - done[i]) for i in turn]
        if not turn:
            continue
        outputs = [dice.randint(0, n) for n in counts]
        logits = runner.run(
            Batch(
                [t for i, n in zip(turn, counts, strict=True) for t in texts[i][done[i] :][:n]],
                counts,
                [done[i] for i in turn],
                [tables[i] for i in turn],
                outputs,
            )
        )
        expected = []
        for i, n, wanted in zip(turn, counts, outputs, strict=True):
            done[i] += n
            expected.append(whole[i][done[i] - wanted : done[i]])
        torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)


def prefill(runner: TorchRunner, text: list[int], table: list[int]) -> torch.Tensor:
    return runner.run(Batch(text, [len(text)], [0], [table], [1]))


def decode(runner: TorchRunner, token: int, start: int, table: list[int]) -> torch.Tensor:
    return runner.run(Batch([token], [1], [start], [table], [1]))


def test_a_copied_page_goes_its_own_way() -> None:
    runner = TorchRunner(tiny_model(), pages=8, page=4)
    text = [1, 2, 3, 4, 5, 6]
    prefill(runner, text, [0, 1])
    runner.copy(1, 5)
    first, other = decode(runner, 7, 6, [0, 1]), decode(runner, 8, 6, [0, 5])
    fresh = TorchRunner(tiny_model(), pages=8, page=4)
    torch.testing.assert_close(first, prefill(fresh, [*text, 7], [0, 1]))
    torch.testing.assert_close(other, prefill(fresh, [*text, 8], [2, 3]))


def test_a_page_written_anew_is_not_read_from_its_old_row() -> None:
    """The same table and length, other contents: the row that followed the old ones is stale."""
    runner = TorchRunner(tiny_model(), pages=4, page=4)
    fresh = TorchRunner(tiny_model(), pages=4, page=4)
    prefill(runner, [1, 2, 3], [0])
    decode(runner, 4, 3, [0])
    prefill(runner, [9, 8, 7, 6], [0])
    found = decode(runner, 5, 4, [0, 1])
    torch.testing.assert_close(found, prefill(fresh, [9, 8, 7, 6, 5], [0, 1]))


def test_saved_pages_load_into_another_runner() -> None:
    model = tiny_model(6, None)
    runner, other = (TorchRunner(model, pages=6, page=4) for _ in range(2))
    text = list(range(10, 22))
    prefill(runner, text, [0, 1, 2])
    for source, target in ((0, 4), (1, 2), (2, 5)):
        other.load(target, runner.save(source))
    expected = decode(runner, 30, 12, [0, 1, 2, 3])
    torch.testing.assert_close(decode(other, 30, 12, [4, 2, 5, 0]), expected)


def test_pages_are_bounded_by_slots_context_and_memory() -> None:
    model = tiny_model(context=128)
    assert pages_for(model, 3, None) == 3 * 8
    assert pages_for(model, 3, 100) == 7
    assert 8 <= pages_for(model, 10**12, None) < 10**12
