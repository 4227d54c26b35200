"""Passes over static tensors, compiled or recorded, equal the model itself."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model, variants
from torch._dynamo.testing import CompileCounter

from treadle.core.errors import ConfigError, TreadleError
from treadle.inference.advance import Ready
from treadle.inference.cuda_graphs import Recorder
from treadle.inference.decode import Compiled, Eager, Graphs, recorded
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.paged_memory import Paged, PagesOnly
from treadle.inference.quantised import Quantised
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.inference.torch_runner import TorchRunner
from treadle.models.decoder import swap
from treadle.nn.rope import RoPE
from treadle.nn.rope_scaling import DynamicNTK

PROMPTS = [3, 17, 5, 31, 2, 9, 26, 4]


class Replays(Recorder):
    """What CUDA graphs do, without a GPU: the function runs on what its tensors hold by then."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, run: Ready) -> Ready:
        self.recorded += 1
        result = torch.empty_like(run())
        return lambda: result.copy_(run())


def requests() -> list[Request]:
    torch.manual_seed(2)
    prompts = [tuple(torch.randint(0, 256, (n,)).tolist()) for n in PROMPTS]
    return [
        Request(p, Sampling(temperature=0.0, max_tokens=5 + 3 * i)) for i, p in enumerate(prompts)
    ]


def check_against_model(model, given: list[Request], answers) -> None:
    for request, (completion,) in zip(given, answers, strict=True):
        text = list(request.prompt)
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
            with torch.no_grad():
                expected = model.logits(model(torch.tensor(text)))[-1].log_softmax(-1)
            assert token == expected.argmax()
            assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
            text.append(token)


def on_graphs(model, recorder: Recorder, over=Eager(), config=EngineConfig(slots=3)) -> Engine:
    engine = Engine(model, byte_tokenizer(), config.replace(cache=config.cache or PagesOnly()))
    runner = engine.runner
    runner.advance = recorded(model, runner.memory, runner.autocast, recorder, over)
    return engine


@pytest.mark.parametrize(
    ("name", "model"), list(variants()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_pages_alone_equal_uncached(name, model) -> None:
    engine = Engine(model, byte_tokenizer(), EngineConfig(slots=3, cache=PagesOnly()))
    check_against_model(model, requests(), engine.generate(requests()))
    assert engine.runner.memory.rows is None


@pytest.mark.parametrize(
    ("name", "model"), list(variants()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_recorded_equals_the_model_itself(name, model) -> None:
    recorder = Replays()
    engine = on_graphs(model, recorder)
    check_against_model(model, requests(), engine.generate(requests()))
    assert recorder.recorded == len(engine.runner.advance.frames) >= 3
    check_against_model(model, requests(), engine.generate(requests()))
    assert recorder.recorded == len(engine.runner.advance.frames)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """torch.compile traces and guards as ever, but runs what it traced as it is."""
    counter = CompileCounter()
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **settings: real(f, backend=counter, **settings)
    )
    return counter


@pytest.mark.parametrize("cache", [None, Quantised(group=4)], ids=["pages", "quantised"])
def test_each_shape_is_compiled_once(counted: CompileCounter, cache) -> None:
    model = tiny_model(6, None)
    config = EngineConfig(slots=3, decode=Compiled(), cache=cache)
    engine = Engine(model, byte_tokenizer(), config)
    answers = engine.generate(requests())
    if cache is None:
        check_against_model(model, requests(), answers)
    else:
        plain = Engine(model, byte_tokenizer(), EngineConfig(slots=3, cache=cache))
        tokens = [[c.tokens for c in answer] for answer in answers]
        assert tokens == [[c.tokens for c in a] for a in plain.generate(requests())]
    shapes = len(engine.runner.advance.frames)
    assert counted.frame_count == shapes >= 3
    engine.generate(requests())
    engine.forget()  # nothing moved
    engine.generate(requests()[:2])
    assert counted.frame_count == shapes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"), list(variants()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_compiled_equals_the_model_itself(name, model) -> None:
    """By Inductor, in C++. Two numbers of sequences, pages taken while the text grows."""
    engine = Engine(model, byte_tokenizer(), EngineConfig(slots=2, decode=Compiled()))
    torch._dynamo.utils.counters.clear()
    check_against_model(model, requests()[:4], engine.generate(requests()[:4]))
    shapes = len(engine.runner.advance.frames)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == shapes == 2
    check_against_model(model, requests()[4:], engine.generate(requests()[4:]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == shapes


def test_rows_without_a_sequence_change_nothing() -> None:
    """Five sequences in a pass of eight rows: pages hold what those five wrote, others nothing."""
    model = tiny_model()
    engine = on_graphs(model, Replays(), config=EngineConfig(slots=5, cache_tokens=640))
    for prompt in range(5):
        engine.submit(Request((prompt, 7, 9), Sampling(temperature=0.0, max_tokens=8)))
    engine.step()
    store = engine.runner.memory.store
    before = {layer: [p.clone() for p in planes] for layer, planes in store.planes.items()}
    places = [s.table[0] * store.page + 3 for s in engine.running]
    engine.step()
    assert [frame.rows for frame in engine.runner.advance.frames.values()] == [8]
    for layer, planes in store.planes.items():
        for old, new in zip(before[layer], planes, strict=True):
            changed = ((old != new) & ~(old.isnan() & new.isnan())).flatten(1).any(1)
            assert changed.nonzero().flatten().tolist() == sorted(places)


def test_random_traffic_on_recorded_passes() -> None:
    """Joins, ends, several completions, preemptions: the text of each is what it is alone."""
    model, dice = tiny_model(6, None), random.Random(4)
    given = [
        Request(
            tuple(dice.randrange(256) for _ in range(dice.randrange(1, 20))),
            Sampling(temperature=0.8, max_tokens=dice.randrange(10, 30), seed=i),
            n=dice.choice((1, 1, 2)),
        )
        for i in range(8)
    ]
    config = EngineConfig(slots=6, cache_tokens=96, prefill_tokens=24)
    engine = on_graphs(model, Replays(), config=config)
    answers = engine.generate(given)
    assert engine.scheduler.preemptions
    for request, answer in zip(given, answers, strict=True):
        (alone,) = Engine(model, byte_tokenizer(), EngineConfig(slots=3)).generate([request])
        assert [c.tokens for c in answer] == [c.tokens for c in alone]


def test_weights_that_change_in_place_need_no_new_recording() -> None:
    model, recorder = tiny_model(), Replays()
    engine = on_graphs(model, recorder)
    engine.generate(requests())
    first = recorder.recorded
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    engine.forget()
    check_against_model(model, requests(), engine.generate(requests()))
    assert recorder.recorded == first


def test_weights_that_move_are_recorded_anew() -> None:
    model, recorder = tiny_model(), Replays()
    engine = on_graphs(model, recorder)
    engine.generate(requests())
    first = recorder.recorded
    model.to(torch.bfloat16)
    engine.forget()
    low = Engine(model, byte_tokenizer(), EngineConfig(slots=3, cache=PagesOnly()))
    found = [[c.tokens for c in answer] for answer in engine.generate(requests())]
    assert found == [[c.tokens for c in answer] for answer in low.generate(requests())]
    assert recorder.recorded == 2 * first


@pytest.mark.parametrize("decode", [Compiled(), Graphs()])
def test_a_cache_with_rows_is_refused(decode) -> None:
    with pytest.raises(ConfigError, match=f"{type(decode).__name__} decoding .*--cache PagesOnly"):
        TorchRunner(tiny_model(), pages=4, cache=Paged(), decode=decode)


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match="the model is on cpu: take --decode Compiled"):
        Engine(tiny_model(), byte_tokenizer(), EngineConfig(decode=Graphs()))


def test_a_rotation_by_the_longest_text_is_refused() -> None:
    scaled = RoPE(scaling=DynamicNTK(factor=2.0, original_context=32))
    model = swap(tiny_model().config, RoPE, lambda rope: scaled).build().eval()
    with pytest.raises(ConfigError, match=r"DynamicNTK rotates .*--decode Eager"):
        Engine(model, byte_tokenizer(), EngineConfig(decode=Compiled()))


def test_a_model_that_cannot_be_compiled_whole_is_refused(counted: CompileCounter) -> None:
    model = tiny_model()
    norm = model.norm
    model.norm.forward = lambda x: type(norm).forward(norm, x if (x > -99).any() else -x)
    engine = Engine(model, byte_tokenizer(), EngineConfig(decode=Compiled()))
    with pytest.raises(TreadleError, match=r"cannot be compiled whole: .*--decode Eager"):
        engine.generate(requests()[:1])
