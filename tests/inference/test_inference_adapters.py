"""Many adapters in one batch: each sequence gets what it would get from its own model."""

from __future__ import annotations

import copy
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.hf_zoo import save
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import ConfigError, TreadleError
from treadle.inference.adapters import Adapters
from treadle.inference.attach import attach, detach
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.prefix_folder import fingerprint
from treadle.inference.request import Request
from treadle.inference.runner import Batch, Runner
from treadle.inference.sampling import Sampling
from treadle.inference.torch_runner import TorchRunner
from treadle.models.decoder import DecoderModel
from treadle.models.hub.load import load_model
from treadle.peft.adalora import AdaLoRA
from treadle.peft.adapter import Adapter, adapted, merge
from treadle.peft.dora import DoRA
from treadle.peft.files import load_adapter, save_adapter
from treadle.peft.ia3 import IA3
from treadle.peft.lora import LoRA

KINDS: dict[str, Adapter] = {
    "small": LoRA(rank=2, targets=("q", "v")),
    "large": LoRA(rank=5, alpha=3),
    "dora": DoRA(rank=3),
    "adalora": AdaLoRA(rank=4, targets=("o", "gate")),
    "ia3": IA3(),
    "headed": LoRA(rank=3, targets=("head", "up")),
}


def folder_of(kind: Adapter, folder: Path, base: DecoderModel, seed: int) -> Path:
    """A wild adapter of this kind, saved."""
    torch.manual_seed(seed)
    model = kind(copy.deepcopy(base))
    with torch.no_grad():
        for layer in adapted(model).values():
            for parameter in layer.trained():
                parameter.add_(torch.randn_like(parameter), alpha=0.4)
    save_adapter(model, folder)
    return folder


def biased(model: DecoderModel) -> DecoderModel:
    """DoRA and (IA)^3 treat the bias each in its own way."""
    config = model.config
    blocks = tuple(
        b.replace(ffn=b.ffn.replace(bias=True), mixer=b.mixer.replace(qkv_bias=True))
        for b in config.blocks
    )
    torch.manual_seed(3)
    made = config.replace(blocks=blocks).build().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return made


def engine_with(folders: dict[str, Path], base: DecoderModel, **limits) -> Engine:
    engine = Engine(copy.deepcopy(base), byte_tokenizer(), EngineConfig(**limits))
    for name, folder in folders.items():
        attach(engine, name, folder)
    return engine


def request(name: str | None, *prompt: int, tokens: int = 8) -> Request:
    sampling = Sampling(temperature=0.0, max_tokens=tokens, logit_bias=((256, -99.0),))
    return Request(prompt or (1, 2, 3, 4, 5), sampling, adapter=name)


def alone(base: DecoderModel, folder: Path | None) -> Engine:
    """An engine whose only model has the adapter merged into it."""
    model = copy.deepcopy(base)
    if folder is not None:
        merge(load_adapter(model, folder))
    return Engine(model, byte_tokenizer())


def same(found, expected) -> None:
    assert found.tokens == expected.tokens
    torch.testing.assert_close(
        torch.tensor(found.logprobs), torch.tensor(expected.logprobs), atol=2e-4, rtol=2e-4
    )


def test_mixed_batch_matches_peft(tmp_path: Path) -> None:
    """PEFT's own batches of several adapters: logits of a prompt, and of a token behind it."""
    from peft import LoraConfig, get_peft_model

    theirs = save("llama", tmp_path / "base").eval()
    first = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    wrapped = get_peft_model(theirs, first, adapter_name="a")
    second = LoraConfig(r=6, lora_alpha=4, use_rslora=True, target_modules=["v_proj", "down_proj"])
    wrapped.add_adapter("b", second)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    wrapped.eval().save_pretrained(tmp_path)
    runner = TorchRunner(load_model(tmp_path / "base").model, pages=16, page=4)
    runner.adapters = Adapters(runner.model, slots=4)
    for name in ("a", "b"):
        runner.adapters.load(name, tmp_path / name)
    tokens = torch.randint(0, 61, (4, 7))
    names = ["b", None, "a", "b"]
    with torch.no_grad():
        expected = wrapped(tokens, adapter_names=[n or "__base__" for n in names]).logits
    tables = [[2 * i, 2 * i + 1] for i in range(4)]
    prompt = tokens[:, :6].flatten().tolist()
    logits = runner.run(Batch(prompt, [6] * 4, [0] * 4, tables, [6] * 4, names))
    torch.testing.assert_close(logits.unflatten(0, (4, 6)), expected[:, :6], atol=1e-4, rtol=1e-4)
    last = tokens[:, 6].tolist()
    logits = runner.run(Batch(last, [1] * 4, [6] * 4, tables, [1] * 4, names))
    torch.testing.assert_close(logits, expected[:, 6], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slots", [6, 3])
def test_every_kind_beside_every_other(tmp_path: Path, slots: int) -> None:
    """Prompts of many lengths, some pages short: preempted, evicted and undisturbed all agree."""
    base = biased(tiny_model(8, None))
    base.head.weight = torch.nn.Parameter(base.head.weight.detach().clone())
    folders = {n: folder_of(k, tmp_path / n, base, i) for i, (n, k) in enumerate(KINDS.items())}
    dice = random.Random(0)
    requests = [
        request(name, *(dice.randrange(256) for _ in range(dice.choice((3, 9, 40, 70)))), tokens=24)
        for name in [*folders, None] * 2
    ]
    engine = engine_with(folders, base, cache_tokens=160, adapters=slots, prefill_tokens=200)
    found = engine.generate(requests)
    assert engine.scheduler.preemptions
    shelf = engine.runner.adapters
    assert len(shelf.resident) == slots
    texts = set()
    for asked, (answer,) in zip(requests, found, strict=True):
        name = asked.adapter
        bare = replace(asked, adapter=None)
        same(answer, alone(base, folders.get(name)).generate([bare])[0][0])
        texts.add(answer.tokens)
    assert len(texts) == len(requests), "the adapters are too tame to tell apart"


def test_a_prefix_is_that_of_its_adapter(tmp_path: Path) -> None:
    base = tiny_model()
    folders = {n: folder_of(KINDS["large"], tmp_path / n, base, ord(n)) for n in "ab"}
    folders["twin"] = folders["a"]
    prompt = tuple(range(40))
    mark = fingerprint(base, 16, lambda: torch.autocast("cpu", enabled=False), "")
    runner = TorchRunner(copy.deepcopy(base), pages=64)
    limits = EngineConfig(prefix_folder=str(tmp_path / "pages"))
    engine = Engine.of_runner(runner, byte_tokenizer(), limits, mark=mark)
    for name, folder in folders.items():
        attach(engine, name, folder)
    cached = {}
    for name in ("a", None, "b", "a", "twin"):
        (answer,) = engine.generate([request(name, *prompt)])[0]
        same(answer, alone(base, folders.get(name)).generate([request(None, *prompt)])[0][0])
        cached.setdefault(name, []).append(answer.cached_tokens)
    # equal weights under another name are the same prefix
    assert cached == {"a": [0, 32], None: [0], "b": [0], "twin": [32]}
    again = Engine.of_runner(TorchRunner(base, pages=64), byte_tokenizer(), limits, mark=mark)
    attach(again, "b", folders["b"])
    (answer,) = again.generate([request("b", *prompt)])[0]
    assert answer.cached_tokens == 32  # from disk, in another process


def test_loads_and_unloads_while_others_run(tmp_path: Path) -> None:
    base = tiny_model()
    folders = {n: folder_of(KINDS["large"], tmp_path / n, base, ord(n)) for n in "abc"}
    engine = engine_with({"a": folders["a"]}, base)
    jobs = {engine.submit(request("a", tokens=12)): "a"}
    done = {}

    def steps(count: int) -> None:
        for _ in range(count):
            for sequence in engine.step():
                if sequence.finish:
                    done[jobs[sequence.job]] = sequence.completion()

    steps(3)
    attach(engine, "b", folders["b"])
    jobs[engine.submit(request("b", tokens=12))] = "b"
    steps(4)
    with pytest.raises(TreadleError, match="`a` is in use by 1 requests"):
        detach(engine, "a")
    steps(8)
    detach(engine, "a")
    with pytest.raises(TreadleError, match="no adapter `a`"):
        engine.submit(request("a"))
    attach(engine, "a", folders["c"])
    jobs[engine.submit(request("a", tokens=12))] = "c"
    steps(20)
    for name, folder in folders.items():
        same(done[name], alone(base, folder).generate([request(None, tokens=12)])[0][0])
    before = engine.runner.adapters.nbytes
    detach(engine, "a")
    detach(engine, "b")
    assert before
    assert engine.runner.adapters.nbytes == 0
    same(engine.generate([request(None)])[0][0], alone(base, None).generate([request(None)])[0][0])


def test_memory_is_bounded_and_the_least_used_goes(tmp_path: Path) -> None:
    base = tiny_model()
    kind = LoRA(rank=4)
    folders = {n: folder_of(kind, tmp_path / n, base, ord(n)) for n in "abcd"}
    engine = engine_with(folders, base, adapters=2)
    shelf = engine.runner.adapters
    assert shelf.resident == ("a", "b")
    one = sum(p.nbytes for p in (load_adapter(copy.deepcopy(base), folders["a"])).parameters())
    one -= sum(p.nbytes for p in base.parameters())
    assert shelf.nbytes == 2 * one
    engine.generate([request("a")])
    engine.generate([request("c")])
    assert shelf.resident == ("a", "c")
    found = engine.generate([request(n) for n in "dcbabcda"])
    for name, (answer,) in zip("dcbabcda", found, strict=True):
        same(answer, alone(base, folders[name]).generate([request(None)])[0][0])
    assert len(shelf.resident) == 2
    assert shelf.nbytes == 2 * one
    evicted = next(n for n in "abcd" if n not in shelf.resident)
    folder_of(LoRA(rank=5), tmp_path / "new", base, 9)
    for file in (tmp_path / "new").iterdir():
        (folders[evicted] / file.name).write_bytes(file.read_bytes())
    with pytest.raises(TreadleError, match="has changed since"):
        shelf.bring({evicted})
    ended = engine.generate([request(evicted), request(None)])
    assert [answer.finish for (answer,) in ended] == ["cancelled", "length"]


def test_bad_adapters_are_refused_by_name(tmp_path: Path) -> None:
    base = tiny_model()
    engine = Engine(base, byte_tokenizer())
    with pytest.raises(TreadleError, match="no adapter `x`"):
        engine.submit(request("x"))
    good = folder_of(LoRA(rank=2), tmp_path / "good", base, 0)
    attach(engine, "good", good)
    with pytest.raises(TreadleError, match="no adapter `goof`; did you mean `good`"):
        engine.submit(request("goof"))
    with pytest.raises(TreadleError, match="`good` is loaded already"):
        attach(engine, "good", good)
    table = folder_of(LoRA(rank=2, targets=("embedding",)), tmp_path / "table", base, 0)
    with pytest.raises(TreadleError, match="LoRA on `embedding` cannot share a batch"):
        attach(engine, "table", table)
    other = folder_of(LoRA(rank=2), tmp_path / "other", tiny_model(seed=7), 0)
    with pytest.raises(TreadleError, match="trained on another base"):
        attach(engine, "other", other)
    broken = LoRA(rank=2)(copy.deepcopy(base))
    with torch.no_grad():
        next(iter(adapted(broken).values())).A[0, 0] = torch.nan
    save_adapter(broken, tmp_path / "broken")
    with pytest.raises(TreadleError, match="not finite"):
        attach(engine, "broken", tmp_path / "broken")
    odd = shutil.copytree(good, tmp_path / "odd")
    text = (good / "adapter_config.json").read_text()
    (odd / "adapter_config.json").write_text(text.replace("{", '{"rank_pattern": {"q": 1},', 1))
    with pytest.raises(ConfigError, match="rank_pattern"):
        attach(engine, "odd", odd)
    assert engine.runner.adapters.names == ("good",)
    with pytest.raises(TreadleError, match="no adapter `x`"):
        detach(Engine(tiny_model(), byte_tokenizer()), "x")


def test_other_runners_say_so(tmp_path: Path) -> None:
    class Silent(Runner):
        page, pages, vocab, context = 4, 4, 257, 16

        def run(self, batch):
            raise NotImplementedError

        copy = save = load = run

    engine = Engine.of_runner(Silent(), byte_tokenizer())
    with pytest.raises(TreadleError, match="Silent runs a model without adapters"):
        attach(engine, "x", tmp_path)


def test_bfloat16_and_autocast(tmp_path: Path) -> None:
    """The base's precision, or autocast's, is that of the adapters' products."""
    base = tiny_model()
    folder = folder_of(KINDS["large"], tmp_path / "a", base, 1)
    half = copy.deepcopy(base).bfloat16()
    cast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    for model, options in ((half, {}), (base, {"autocast": cast})):
        logits = []
        for name in ("a", None):
            runner = TorchRunner(copy.deepcopy(model), pages=4, **options)
            if name:
                runner.adapters = Adapters(runner.model, slots=2)
                runner.adapters.load("a", folder)
            else:
                load_adapter(runner.model, folder)
            logits.append(runner.run(Batch([5, 6, 7], [3], [0], [[0]], [3], [name])))
        found, expected = logits
        assert (found - expected).norm() < 0.02 * expected.norm()
