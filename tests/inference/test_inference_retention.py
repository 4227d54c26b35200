"""Caches in rows, against the model run anew and against choices written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model, variants
from torch.testing import assert_close

from treadle.core.errors import ConfigError, TreadleError
from treadle.inference.beam import BeamSearch
from treadle.inference.cache import Cache
from treadle.inference.contiguous import Contiguous, RowMemory
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.heavy_hitters import HeavyHitters
from treadle.inference.paged_memory import Paged
from treadle.inference.request import Request
from treadle.inference.rolling import Rolling
from treadle.inference.runner import Batch
from treadle.inference.sampling import Sampling
from treadle.inference.snapkv import SnapKV
from treadle.inference.speculative import NGram
from treadle.inference.torch_runner import TorchRunner
from treadle.kernels.attention import AttentionRule
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.peft.prefix import PrefixTuning

ROOMY = (Contiguous(), Rolling(window=500), HeavyHitters(budget=500), SnapKV(budget=500, window=3))


@torch.no_grad()
def logits_of(model: DecoderModel, text: list[int], change=None) -> torch.Tensor:  # type: ignore[no-untyped-def]
    if change is None:
        return model.logits(model(torch.tensor(text)))

    class Masked(Packed):
        def attend(self, layer, q, k, v, rule: AttentionRule):  # type: ignore[no-untyped-def]
            return super().attend(layer, q, k, v, change(rule))

    context = Packed.of(Layout((len(text),)))
    masked = Masked(context.positions, context.length, context.layout)
    return model.logits(model(torch.tensor(text), masked))


def run(runner: TorchRunner, name: int, text: list[int], start: int, last: bool = True):  # type: ignore[no-untyped-def]
    table = list(range(-(-(start + len(text)) // runner.page)))
    outputs = [len(text) if last else 0]
    return runner.run(Batch(text, [len(text)], [start], [table], outputs, names=[(name, 0)]))


@pytest.mark.parametrize("cache", ROOMY, ids=str)
@pytest.mark.parametrize(
    ("name", "model"), list(variants()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_rows_equal_the_whole(name, model, cache: Cache) -> None:
    """With room for all: several texts, prompts in chunks, forks, rows that come and go."""
    config = EngineConfig(slots=4, prefill_tokens=13, cache=cache)
    engine = Engine(model, byte_tokenizer(), config)
    torch.manual_seed(3)
    lengths, n = (5, 30, 17, 2, 40, 9), (1, 1, 3, 2, 1, 1)
    sampling = Sampling(temperature=1.0, max_tokens=12)
    requests = [
        Request(tuple(torch.randint(0, 256, (size,)).tolist()), sampling, n=count)
        for size, count in zip(lengths, n, strict=True)
    ]
    for request, answers in zip(requests, engine.generate(requests), strict=True):
        for answer in answers:
            whole = logits_of(model, [*request.prompt, *answer.tokens[:-1]]).log_softmax(-1)
            own = whole[len(request.prompt) - 1 :]
            expected = own.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
            assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=1e-4)
    assert not engine.runner.memory.rows


@pytest.mark.parametrize("chunk", [50, 7])
@pytest.mark.parametrize("sinks", [0, 3])
def test_rolling_equals_the_masked_model(chunk: int, sinks: int) -> None:
    """Prompt in one piece or in chunks, then token by token, far beyond the window."""
    model = tiny_model(4, None, None)
    runner = TorchRunner(model, pages=8, cache=Rolling(window=9, sinks=sinks))

    def change(rule: AttentionRule) -> AttentionRule:
        return rule if rule.window == 4 else replace(rule, window=9, sinks=sinks)

    text = torch.randint(0, 256, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = logits_of(model, text, change)
    assert (expected - logits_of(model, text)).abs().max() > 0.1
    for start in range(0, 50, chunk):
        piece = text[start : min(50, start + chunk)]
        found = run(runner, 0, piece, start, last=start + chunk >= 50)
    assert_close(found, expected[50 - len(found) : 50], atol=1e-4, rtol=1e-4)
    for at in range(50, 120):
        assert_close(run(runner, 0, [text[at]], at)[0], expected[at], atol=1e-4, rtol=1e-4)
        (length,) = runner.memory.lengths
        assert length <= 9 + sinks + 32
    assert runner.memory.capacity < 120


def weights_of(model: DecoderModel, text: list[int]) -> list[torch.Tensor]:
    """What each layer's queries attend to, [G Q K], from the formulas."""
    found = []

    class Watching(Packed):
        def attend(self, layer, q, k, v, rule: AttentionRule):  # type: ignore[no-untyped-def]
            scores = torch.einsum("qgsd,kgd->gsqk", q.unflatten(1, (k.shape[1], -1)), k)
            scores = scores * rule.scale
            hidden = torch.ones(len(q), len(q)).triu(1).bool()
            found.append(scores.masked_fill(hidden, -torch.inf).softmax(-1).sum(1))
            return super().attend(layer, q, k, v, rule)

    context = Packed.of(Layout((len(text),)))
    with torch.no_grad():
        model(torch.tensor(text), Watching(context.positions, context.length, context.layout))
    return found


TEXT = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(1)).tolist()


def kept_of(runner: TorchRunner, layer: int) -> list[list[int]]:
    """Positions that row 0 keeps, of each head."""
    memory = runner.memory
    assert isinstance(memory, RowMemory)
    return memory.layers[layer].positions[0, :, : memory.lengths[0]].tolist()


@pytest.mark.parametrize("chunk", [300, 90])
def test_heavy_hitters_are_those_counted(chunk: int) -> None:
    """More queries than are watched at once; a prompt in chunks has the same choice."""
    model = tiny_model(context=512)
    runner = TorchRunner(model, pages=32, cache=HeavyHitters(budget=20, recent=8))
    for start in range(0, 300, chunk):
        run(runner, 0, TEXT[start : start + chunk], start, last=start + chunk >= 300)
    for layer, weights in enumerate(weights_of(model, TEXT)):
        scores = weights.sum(1)[:, :-8]
        best = [sorted(row.topk(12).indices.tolist()) for row in scores]
        assert kept_of(runner, layer) == [[*b, *range(292, 300)] for b in best]


def test_heavy_hitters_are_counted_on() -> None:
    """Behind the prompt scores grow by what the kept tokens get, and the choice is made again."""
    model = tiny_model(context=512)
    runner = TorchRunner(model, pages=32, cache=HeavyHitters(budget=20, recent=8))
    run(runner, 0, TEXT[:60], 0)
    before = runner.memory.layers[0].scores[0, :, :20].clone()
    held = kept_of(runner, 0)
    for at in range(60, 91):
        run(runner, 0, [TEXT[at]], at)
    assert runner.memory.lengths[0] == 51
    after = runner.memory.layers[0].scores[0, :, :51].clone()
    # 31 queries in each of the heads of a group gave a weight of one in all.
    grown = after.sum(-1) - before.sum(-1)
    assert_close(grown, torch.full_like(grown, 31.0 * 2))
    assert (after[:, :20] > before).all()
    run(runner, 0, [TEXT[91]], 91)
    kept = kept_of(runner, 0)
    assert runner.memory.lengths[0] == 20
    for head, places in enumerate(kept):
        assert places[-8:] == list(range(84, 92))
        assert set(places) <= {*held[head], *range(60, 92)}


@pytest.mark.parametrize("smoothing", [1, 5])
def test_snapkv_keeps_what_the_end_attends_to(smoothing: int) -> None:
    model = tiny_model(context=512)
    cache = SnapKV(budget=24, window=6, smoothing=smoothing)
    runner = TorchRunner(model, pages=32, cache=cache)
    run(runner, 0, TEXT, 0)
    around = smoothing // 2
    for layer, weights in enumerate(weights_of(model, TEXT)):
        scores = weights[:, -6:].sum(1)
        smooth = [
            [sum(row[max(0, j - around) : j + around + 1].tolist()) for j in range(294)]
            for row in scores
        ]
        best = [sorted(sorted(range(294), key=lambda j: -s[j])[:18]) for s in smooth]
        assert kept_of(runner, layer) == [[*b, *range(294, 300)] for b in best]
    for at in range(3):
        run(runner, 0, [7], 300 + at)
    assert runner.memory.lengths == [27]


@pytest.mark.parametrize("cache", [HeavyHitters(budget=20, recent=8), SnapKV(budget=20, window=4)])
def test_answers_see_what_is_kept(cache: Cache) -> None:
    """The next token's logits are those of attention on the kept tokens alone."""
    model = tiny_model(context=512)
    runner = TorchRunner(model, pages=32, cache=cache)
    run(runner, 0, TEXT[:100], 0)
    kept = [kept_of(runner, layer) for layer in range(2)]

    class Choosy(Packed):
        def attend(self, layer, q, k, v, rule: AttentionRule):  # type: ignore[no-untyped-def]
            out = super().attend(layer, q, k, v, rule).clone()
            for head in range(q.shape[1]):
                group = head // 2
                seen = [*kept[layer][group], 100]
                weights = (k[seen, group] @ q[100, head] * rule.scale).softmax(0)
                out[100, head] = weights @ v[seen, group]
            return out

    context = Packed.of(Layout((101,)))
    with torch.no_grad():
        text = torch.tensor([*TEXT[:100], 65])
        hidden = model(text, Choosy(context.positions, context.length, context.layout))
        expected = model.logits(hidden)[-1]
    assert_close(run(runner, 0, [65], 100)[0], expected, atol=1e-4, rtol=1e-4)


def test_preemption_and_company_change_nothing() -> None:
    """Contiguous and rolling caches are exact: few pages, many requests, the same texts."""
    requests = [
        Request(tuple(TEXT[i : i + 20 + i]), Sampling(max_tokens=30, seed=i)) for i in range(6)
    ]
    for cache in (Contiguous(), Rolling(window=16, sinks=2)):
        alone = [
            Engine(tiny_model(), byte_tokenizer(), EngineConfig(cache=cache)).generate([r])[0]
            for r in requests
        ]
        config = EngineConfig(cache=cache, cache_tokens=160, prefill_tokens=16)
        crowd = Engine(tiny_model(), byte_tokenizer(), config)
        assert [[c.tokens for c in r] for r in crowd.generate(requests)] == [
            [c.tokens for c in r] for r in alone
        ]
        assert crowd.scheduler.preemptions > 0
        assert crowd.scheduler.blocks.available == crowd.scheduler.blocks.pages
        assert not crowd.runner.memory.rows
        assert not crowd.runner.memory.unread
        memory = crowd.runner.memory
        assert sorted(memory.free) == list(range(len(memory.lengths)))
        assert len(memory.lengths) <= len(requests)


@torch.no_grad()
def test_learned_prefixes_are_held() -> None:
    """Prompts whole and in chunks, then answers, of a model that was tuned by a prefix."""
    model = PrefixTuning(tokens=5)(tiny_model(6, None)).eval()
    with pytest.raises(ConfigError, match="learned prefix, which pages do not hold"):
        Engine(model, byte_tokenizer(), EngineConfig(cache=Paged()))
    with pytest.raises(ConfigError, match="must be kept whole: use the Contiguous cache"):
        Engine(model, byte_tokenizer(), EngineConfig(cache=Rolling()))
    engine = Engine(model, byte_tokenizer(), EngineConfig(prefill_tokens=11))
    assert engine.runner.context == 123
    sampling = Sampling(max_tokens=10)
    requests = [Request(tuple(TEXT[i : i + 9 * i + 1]), sampling, n=2) for i in range(4)]
    for request, answers in zip(requests, engine.generate(requests), strict=True):
        for answer in answers:
            whole = logits_of(model, [*request.prompt, *answer.tokens[:-1]]).log_softmax(-1)
            own = whole[len(request.prompt) - 1 :]
            expected = own.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
            assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_what_needs_lasting_pages_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = tiny_model(), byte_tokenizer()
    for field in ({"prefix_folder": str(tmp_path)}, {"draft": NGram()}):
        with pytest.raises(ConfigError, match=f"{next(iter(field))} needs pages that last"):
            Engine(model, tokenizer, EngineConfig(cache=Contiguous(), **field))
    engine = Engine(model, tokenizer, EngineConfig(cache=Rolling()))
    with pytest.raises(TreadleError, match="a search needs pages that last"):
        BeamSearch(width=2)(engine, Request((1, 2), Sampling()))


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="recent=9 is more than budget=8"):
        HeavyHitters(budget=8, recent=9)
    with pytest.raises(ValueError, match="window=9 is more than budget=8"):
        SnapKV(budget=8, window=9)
    with pytest.raises(ValueError, match="smoothing=4 has no middle"):
        SnapKV(smoothing=4)
