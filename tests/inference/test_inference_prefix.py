"""Prefix caching: the same text, and prefill that is really skipped."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import TreadleError
from treadle.inference.blocks import Blocks
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.prefix_folder import PrefixFolder, fingerprint
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.inference.torch_runner import TorchRunner

SYSTEM = tuple(range(50, 61))


def engine(pages: int = 100, **limits) -> Engine:
    runner = TorchRunner(tiny_model(), pages=pages, page=4)
    return Engine.of_runner(runner, byte_tokenizer(), EngineConfig(**limits))


def asked(*tail: int, seed: int = 0) -> Request:
    return Request((*SYSTEM, *tail), Sampling(seed=seed, max_tokens=6))


def close(found, expected) -> None:
    assert found.tokens == expected.tokens
    torch.testing.assert_close(
        torch.tensor(found.logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0
    )


def test_equals_fresh_and_skips_prefill() -> None:
    it = engine()
    it.generate([asked(1, 2, 3)])
    assert it.prefilled == 14
    second = asked(9, 8, seed=4)
    found = it.generate([second])[0][0]
    # Two pages of the beginning are common: 8 of 13 tokens.
    assert it.prefilled == 14 + 5
    assert found.cached_tokens == 8
    fresh = engine().generate([second])[0][0]
    assert fresh.cached_tokens == 0
    close(found, fresh)


def test_an_answer_is_the_beginning_of_the_next_turn() -> None:
    it = engine()
    first = Request(SYSTEM, Sampling(temperature=0.0, max_tokens=9, logit_bias=((256, -99.0),)))
    answer = it.generate([first])[0][0].tokens
    follow = Request((*SYSTEM, *answer, 7), Sampling(max_tokens=3))
    found = it.generate([follow])[0][0]
    # 11 + 9 tokens, of which the last was never run: 19 computed, 4 full pages.
    assert found.cached_tokens == 16
    close(found, engine().generate([follow])[0][0])


def test_the_last_token_is_always_computed() -> None:
    it = engine()
    request = Request(tuple(range(8)), Sampling(max_tokens=2))
    first = it.generate([request])[0][0]
    again = it.generate([request])[0][0]
    assert again.cached_tokens == 4
    close(again, first)


def test_forget_after_the_weights_change() -> None:
    """Pages of old weights would give other logits: the check fails without `forget`."""
    it, other = engine(), tiny_model(seed=9)
    it.generate([asked(1, 2, 3)])
    it.runner.model.load_state_dict(other.state_dict())
    stale = it.generate([asked(1, 2, 3)])[0][0]
    it.forget()
    found = it.generate([asked(1, 2, 3)])[0][0]
    fresh = engine()
    fresh.runner.model.load_state_dict(other.state_dict())
    expected = fresh.generate([asked(1, 2, 3)])[0][0]
    assert found.cached_tokens == 0
    close(found, expected)
    assert stale.logprobs[0] != expected.logprobs[0]


def test_forget_in_the_middle_of_a_text() -> None:
    it, other = engine(), tiny_model(seed=9)
    request = Request(SYSTEM, Sampling(temperature=0.0, max_tokens=8, logit_bias=((256, -99.0),)))
    it.submit(request)
    for _ in range(3):
        it.step()
    begun = tuple(it.running[0].tokens)
    it.runner.model.load_state_dict(other.state_dict())
    it.forget()
    done = []
    while it.running or it.waiting:
        done += [s.completion() for s in it.step() if s.finish is not None]
    rest = Request((*SYSTEM, *begun), request.sampling.replace(max_tokens=5))
    fresh = engine()
    fresh.runner.model.load_state_dict(other.state_dict())
    assert done[0].tokens == begun + fresh.generate([rest])[0][0].tokens


def test_the_least_recently_used_page_goes_first() -> None:
    blocks = Blocks(4, 2)
    texts = ([1, 2], [3, 4], [5, 6])
    for text in texts:
        page = blocks.take()
        blocks.name(page, next(iter(blocks.chain(text))))
        blocks.release([page])
    (used,) = blocks.find([1, 2, 0])
    blocks.hold([used])
    blocks.release([used])
    assert blocks.available == 4
    taken = [blocks.take(), blocks.take()]
    assert used not in taken
    assert [bool(blocks.find([*t, 0])) for t in texts] == [True, False, True]


def test_a_page_is_known_by_all_that_comes_before_it() -> None:
    blocks = Blocks(4, 2)
    pages = [blocks.take(), blocks.take()]
    for page, key in zip(pages, blocks.chain([1, 2, 3, 4]), strict=True):
        blocks.name(page, key)
    assert blocks.find([1, 2, 3, 4, 5]) == pages
    assert blocks.find([9, 2, 3, 4, 5]) == []
    assert blocks.find([1, 2, 3, 4]) == pages[:1]


def test_another_process_reads_what_one_computed(tmp_path: Path) -> None:
    config = EngineConfig(prefix_folder=str(tmp_path))
    prompt = Request(tuple(range(40, 80)), Sampling(seed=3, max_tokens=4))
    first = Engine(tiny_model(6, None), byte_tokenizer(), config)
    expected = first.generate([prompt])[0][0]
    other = Engine(tiny_model(6, None), byte_tokenizer(), config)
    found = other.generate([prompt])[0][0]
    assert (first.prefilled, other.prefilled, found.cached_tokens) == (40, 8, 32)
    close(found, expected)
    changed = Engine(tiny_model(6, None, seed=1), byte_tokenizer(), config)
    changed.generate([prompt])
    assert changed.prefilled == 40
    other.forget()
    other.generate([prompt])
    assert other.prefilled == 8 + 40
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"broken")
    again = Engine(tiny_model(6, None), byte_tokenizer(), config)
    close(again.generate([prompt])[0][0], expected)
    assert again.prefilled == 40


def test_the_folder_is_bounded_and_drops_the_oldest(tmp_path: Path) -> None:
    folder = PrefixFolder(tmp_path, "m", limit=3000)
    for number in range(6):
        folder.put(bytes([number]), torch.full((128,), float(number)))
    files = list(tmp_path.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 3000
    assert folder.get(bytes([0])) is None
    content = folder.get(bytes([5]))
    assert content is not None
    assert content[0] == 5
    assert PrefixFolder(tmp_path, "m", limit=3000).size == folder.size


def test_the_folder_counts_what_is_on_disk(tmp_path: Path) -> None:
    """A page that is there already is not counted twice; one beyond the limit is not kept."""

    def on_disk() -> int:
        return sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors"))

    content = torch.zeros(128)
    folder = PrefixFolder(tmp_path, "m", limit=10**6)
    for _ in range(3):
        folder.put(b"a", content)
    assert folder.size == on_disk() > 512
    exact = PrefixFolder(tmp_path, "m", limit=2 * on_disk())
    exact.put(b"b", content)  # just as much as there may be
    assert exact.size == on_disk() == exact.limit
    small = PrefixFolder(tmp_path / "small", "m", limit=500)
    changed: list[bytes] = []
    small._shrink = lambda: changed.append(b"")  # type: ignore[method-assign]
    small.put(b"c", content)
    assert small.size == 0
    assert not changed


def test_the_fingerprint_tells_weights_and_precision_apart() -> None:
    marks = [
        fingerprint(tiny_model(), 16, nullcontext, ""),
        fingerprint(tiny_model(seed=1), 16, nullcontext, ""),
        fingerprint(tiny_model(), 8, nullcontext, ""),
        fingerprint(tiny_model(), 16, lambda: torch.autocast("cpu", torch.bfloat16), ""),
    ]
    assert len(set(marks)) == 4
    assert fingerprint(tiny_model(), 16, nullcontext, "") == marks[0]


def test_a_runner_without_a_name_has_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TreadleError, match=r"prefix_folder.*fingerprint.*mark"):
        engine(prefix_folder=str(tmp_path))
