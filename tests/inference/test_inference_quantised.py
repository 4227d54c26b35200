"""Integer caches: attention on keys and values that were rounded, by formulas written out."""

from __future__ import annotations

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import ConfigError
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.paged_memory import Paged
from treadle.inference.quantised import Quantised, Smoothed, Unscaled
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.inference.speculative import NGram
from treadle.inference.torch_runner import TorchRunner
from treadle.kernels.attention import AttentionRule
from treadle.nn.context import Packed
from treadle.nn.layout import Layout

TEXTS = [
    tuple(torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (60, 13, 37, 22)
]


def rounded(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """One group at a time."""
    parts = x.double().reshape(-1, group)
    result = []
    for part in parts:
        least, most = float(part.min()), float(part.max())
        scale = float(torch.tensor((most - least) / (2**bits - 1)).half())
        least = float(torch.tensor(least).half())
        codes = [min(2**bits - 1, max(0, round((float(p) - least) / scale))) for p in part]
        result.append([least + scale * c for c in codes])
    return torch.tensor(result).reshape(x.shape)


@pytest.mark.parametrize(("bits", "group"), [(8, 4), (4, 4), (4, 2)])
def test_equals_attention_on_rounded_keys(bits: int, group: int) -> None:
    """Every token of a text, the prompt's own included, sees rounded keys and values."""
    model = tiny_model(6, None)
    cache = Quantised(bits=bits, group=group)
    engine = Engine(model, byte_tokenizer(), EngineConfig(cache=cache, prefill_tokens=25))
    requests = [Request(text, Sampling(max_tokens=8)) for text in TEXTS]

    class Rounding(Packed):
        def attend(self, layer, q, k, v, rule: AttentionRule):  # type: ignore[no-untyped-def]
            k, v = (rounded(t, bits, group).to(q.dtype) for t in (k, v))
            return super().attend(layer, q, k, v, rule)

    for request, (answer,) in zip(requests, engine.generate(requests), strict=True):
        text = [*request.prompt, *answer.tokens[:-1]]
        context = Packed.of(Layout((len(text),)))
        with torch.no_grad():
            rounding = Rounding(context.positions, context.length, context.layout)
            whole = model.logits(model(torch.tensor(text), rounding))
        own = whole.log_softmax(-1)[len(request.prompt) - 1 :]
        expected = own.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
        # A value on the edge between two codes may fall to either side.
        near = torch.tensor(answer.logprobs) - expected
        assert near.abs().median() < 1e-4
        assert near.abs().max() < 0.2


def test_smoothed_keys_are_rounded_in_units_of_their_channels() -> None:
    """By formula, one group at a time, with the sizes taken from keys that a hook saw."""
    model = tiny_model()
    seen: list[torch.Tensor] = []

    class Keys(Packed):
        def attend(self, layer, q, k, v, rule: AttentionRule):  # type: ignore[no-untyped-def]
            seen.append(k)
            return super().attend(layer, q, k, v, rule)

    tokens = torch.randint(257, (50,), generator=torch.Generator().manual_seed(0))
    plain = Packed.of(Layout((50,)))
    with torch.no_grad():
        model(tokens, Keys(plain.positions, plain.length, plain.layout))
    cache = Quantised(bits=4, group=4, keys=Smoothed(strength=0.7, tokens=50))
    store = TorchRunner(model, pages=4, cache=cache).memory.store
    k, v = torch.randn(2, 16, 2, 4) * torch.tensor([0.1, 1.0, 5.0, 30.0])
    for layer in (0, 1):
        size = seen[layer].double().square().mean(0).sqrt() ** 0.7
        store.reserve(0)
        store.write(layer, k, v, torch.arange(16))
        keys, values = store.read(layer, torch.arange(16), torch.float32)
        torch.testing.assert_close(keys, (rounded(k / size, 4, 4) * size).float())
        torch.testing.assert_close(values, rounded(v, 4, 4).float())


def test_a_large_channel_costs_the_others_less_when_keys_are_smoothed() -> None:
    """The model's own keys, one of whose channels is made thirty times as large."""
    model = tiny_model()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.k.weight[1] *= 30
    errors = {}
    for keys in (Unscaled(), Smoothed()):
        cache = Quantised(bits=4, group=4, keys=keys)
        engine = Engine(model, byte_tokenizer(), EngineConfig(cache=cache))
        plain = Engine(model, byte_tokenizer())
        request = Request(TEXTS[0], Sampling(max_tokens=1), prompt_logprobs=0)
        (a,), (b,) = engine.generate([request])[0], plain.generate([request])[0]
        pairs = zip(a.prompt, b.prompt, strict=True)
        errors[type(keys)] = sum(abs(x.logprob - y.logprob) for x, y in pairs)
    assert errors[Smoothed] < 0.8 * errors[Unscaled]


def texts_of(cache, requests, **limits) -> list[tuple[int, ...]]:  # type: ignore[no-untyped-def]
    engine = Engine(tiny_model(6, None), byte_tokenizer(), EngineConfig(cache=cache, **limits))
    return [c.tokens for answers in engine.generate(requests) for c in answers]


def test_chunks_company_and_guesses_change_nothing() -> None:
    cache = Quantised(bits=4, group=4, keys=Smoothed())
    requests = [Request(text, Sampling(max_tokens=20, seed=1), n=2) for text in TEXTS]
    alone = [tokens for request in requests for tokens in texts_of(cache, [request])]
    assert texts_of(cache, requests, prefill_tokens=9, cache_tokens=256) == alone
    assert texts_of(cache, requests, draft=NGram(shortest=1)) == alone


def test_the_memory_is_that_of_its_bits(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """And pages come back from disk as they were."""
    model = tiny_model()
    runners = {
        cache: TorchRunner(model, pages=8, cache=cache)
        for cache in (Paged(), Quantised(group=4), Quantised(bits=4, group=4))
    }
    for runner in runners.values():
        runner.memory.store.reserve(7)
        k = torch.randn(128, 2, 4)
        runner.memory.store.write(0, k, 2 * k, torch.arange(128))
    plain, eight, four = (r.memory.store.bytes for r in runners.values())
    channels, groups = 128 * 2 * 4 * 2, 128 * 2 * 2
    assert plain == 4 * channels
    assert eight == channels + 4 * groups
    assert four == channels // 2 + 4 * groups
    store = runners[Quantised(bits=4, group=4)].memory.store
    content, places = store.save(3), torch.arange(48, 64)
    before = store.read(0, places, torch.float32)
    store.write(0, torch.zeros(16, 2, 4), torch.zeros(16, 2, 4), places)
    store.load(3, content)
    for old, new in zip(before, store.read(0, places, torch.float32), strict=True):
        assert torch.equal(old, new)
    assert (before[1] - 2 * before[0]).abs().max() < 0.7


def test_prefixes_on_disk_are_of_one_kind_of_cache(tmp_path) -> None:  # type: ignore[no-untyped-def]
    request = Request(TEXTS[0], Sampling(max_tokens=4))
    limits = {"prefix_folder": str(tmp_path)}
    plain = texts_of(Paged(), [request], **limits)
    cache = Quantised(bits=4, group=4)
    first = texts_of(cache, [request], **limits)
    assert texts_of(cache, [request], **limits) == first == texts_of(cache, [request])
    assert texts_of(Paged(), [request], **limits) == plain
    assert len(list(tmp_path.iterdir())) == 2


def test_groups_must_divide_heads() -> None:
    engine = Engine(tiny_model(), byte_tokenizer(), EngineConfig(cache=Quantised()))
    with pytest.raises(ConfigError, match="group=32 does not divide heads of 4 channels"):
        engine.generate([Request((1, 2), Sampling(max_tokens=2))])
