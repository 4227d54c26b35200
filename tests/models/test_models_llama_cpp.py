"""llama.cpp against what treadle reads and writes."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.hf_zoo import ZOO, build_of, save
from models.test_models_hub import NO_GGUF
from torch import Tensor
from torch.testing import assert_close

from treadle.core.errors import TreadleError
from treadle.models.decoder import DecoderModel
from treadle.models.family import explicit
from treadle.models.hub.gguf import GGUFFile
from treadle.models.hub.load import load_model
from treadle.models.hub.pull import pull
from treadle.models.hub.save import save_gguf
from treadle.models.llama import smollm2_135m

pytestmark = pytest.mark.slow
PROMPT = "The capital of France is Paris. The capital of Germany is"
FLOAT32_CACHE: dict[str, Any] = {"type_k": 0, "type_v": 0, "flash_attn": False}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return pull("smollm2-135m-instruct").path
    except TreadleError as error:
        pytest.skip(str(error))


def llama_cpp(path: Path, **options: Any) -> Any:
    module = pytest.importorskip("llama_cpp")
    return module.Llama(
        str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=2, **options
    )


def their_logits(path: Path, tokens: list[int], **options: Any) -> Tensor:
    llama = llama_cpp(path, **options)
    llama.eval(tokens)
    scores = torch.tensor(llama.scores[: len(tokens)].copy())
    llama.close()
    return scores


def greedy(path: Path, count: int) -> tuple[list[int], int]:
    """The prompt and what llama.cpp says next; the number of tokens of the prompt."""
    llama = llama_cpp(path)
    tokens = llama.tokenize(PROMPT.encode(), add_bos=False)
    start = len(tokens)
    llama.eval(tokens)
    for _ in range(count):
        tokens.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(tokens[-1:])
    llama.close()
    return tokens, start


def logits(model: DecoderModel, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model.logits(model(torch.tensor(tokens)))


@pytest.mark.parametrize("name", [n for n in ZOO if n not in NO_GGUF])
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    """Tiny models of every family in float32: names, orders of rows, shifts, ropes, windows."""
    save(name, tmp_path / "theirs")
    model = load_model(tmp_path / "theirs").model
    file = tmp_path / "m.gguf"
    save_gguf(model, file, format="F32", metadata={"tokenizer.ggml.model": "no_vocab"})
    # llama.cpp has no window in Mistral and Mixtral; the context that is written is as long as it.
    length = 5 if name in ("mistral-window", "mixtral-switch") else 30
    tokens = torch.randint(0, 61, (length,)).tolist()
    theirs = their_logits(file, tokens, swa_full=True, **FLOAT32_CACHE)
    # ggml looks GELU up in a table of float16.
    tolerance = 5e-3 if name.startswith(("gemma", "gpt2")) else 2e-5
    assert_close(logits(model, tokens), theirs, rtol=0, atol=tolerance)


def test_smollm2_is_read_whole(smollm2: Path) -> None:
    loaded = load_model(smollm2)
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    assert explicit(loaded.model.config) == explicit(smollm2_135m())


def test_requantising_gives_the_file_back(smollm2: Path, tmp_path: Path) -> None:
    """Every tensor of the original, byte for byte."""
    save_gguf(load_model(smollm2).model, tmp_path / "m.gguf", format="Q4_1")
    original, again = GGUFFile.open(smollm2), GGUFFile.open(tmp_path / "m.gguf")
    assert set(original.tensors) == set(again.tensors)
    for name, info in original.tensors.items():
        assert again.tensors[name].format == info.format
        assert torch.equal(again.raw(name), original.raw(name)), name


@pytest.mark.parametrize("format", ["original", "F16", "Q8_0", "Q4_0", "Q4_K"])
def test_smollm2_says_the_same_in_llama_cpp(format: str, smollm2: Path, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits where weights are quantised, to float16 in F16."""
    path = smollm2
    if format != "original":
        path = tmp_path / "m.gguf"
        original = GGUFFile.open(smollm2)
        tokenizer = {k: v for k, v in original.metadata.items() if k.startswith("tokenizer.")}
        types = {k: original.types[k] for k in tokenizer}
        model = load_model(smollm2).model
        save_gguf(model, path, format=format, metadata=tokenizer, types=types)
    tokens, start = greedy(path, count=16)
    theirs = their_logits(path, tokens)
    ours = logits(load_model(path).model, tokens)
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    error = (ours - theirs).norm() / theirs.norm()
    exact = format == "F16"
    assert divergence < (1e-4 if exact else 0.02)
    assert error < (5e-3 if exact else 0.08)
    said, next_tokens = ours[start - 1 : -1].argmax(-1).tolist(), tokens[start:]
    assert said[:8] == next_tokens[:8]
    for mine, his, row in zip(said, next_tokens, theirs[start - 1 : -1], strict=True):
        assert mine == his or row[his] - row[mine] < 0.5, "more than a near tie"


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe-summed"])
def test_llama_cpp_runs_our_quantised_mixtures(name: str, tmp_path: Path) -> None:
    """Experts in blocks, three dimensions; the router in float32, as llama.cpp keeps it."""
    wide = {"hidden_size": 96, "intermediate_size": 64, "moe_intermediate_size": 64}
    family, fields = ZOO[name]
    sizes = {k: v for k, v in wide.items() if k in fields or k == "hidden_size"}
    if "shared_expert_intermediate_size" in fields:
        sizes["shared_expert_intermediate_size"] = 96
    theirs = build_of(family, {**fields, **sizes})
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs").model
    file = tmp_path / "m.gguf"
    save_gguf(model, file, format="Q8_0", metadata={"tokenizer.ggml.model": "no_vocab"})
    stored = {n: i.format for n, i in GGUFFile.open(file).tensors.items() if "ffn_" in n}
    routers = {n: f for n, f in stored.items() if n.endswith("ffn_gate_inp.weight")}
    assert set(routers.values()) == {"F32"}
    assert {f for n, f in stored.items() if "exps" in n} == {"Q8_0"}
    tokens = torch.randint(0, 61, (30,)).tolist()
    ours = logits(load_model(file).model, tokens)
    found = their_logits(file, tokens, **FLOAT32_CACHE)
    assert float((ours - found).norm() / found.norm()) < 0.05


def windows(tokens: list[int], width: int, count: int) -> Iterator[Tensor]:
    for start in range(0, count * width, width):
        yield torch.tensor(tokens[start : start + width])


def test_smollm2_perplexity_on_wikitext2(smollm2: Path, shared_data: Path) -> None:
    """24.3 over the whole test set; its first four windows of 1024 are a little easier."""
    text = gzip.decompress((shared_data / "lm" / "wikitext2_test.txt.gz").read_bytes())
    llama = llama_cpp(smollm2)
    tokens = llama.tokenize(text[:24_000], add_bos=False)
    llama.close()
    model, losses = load_model(smollm2).model, []
    with torch.no_grad():
        for window in windows(tokens, 1024, 4):
            logits = model.logits(model(window))
            losses.append(F.cross_entropy(logits[:-1], window[1:]).item())
    perplexity = math.exp(sum(losses) / len(losses))
    assert 15 < perplexity < 30, perplexity
