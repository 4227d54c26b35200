"""`POST /v1/attention` against naive loops over the model's own weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("fastapi")
from serving.tiny_server import CONTEXT, Running, running, tiny_engine
from tiny_generation import tiny_model, variants
from torch import Tensor

from treadle.inference.engine import Engine
from treadle.models.decoder import DecoderModel
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.peft.files import save_adapter
from treadle.peft.lora import LoRA
from treadle.serving.attention import attended
from treadle.serving.errors import ApiError
from treadle.serving.pool import Adapted, Base

TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Löw"}]
PROMPT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("attention") / "adapter"
    write_adapter(folder)
    with running([Base("tiny", tiny_engine), Adapted("tuned", "tiny", str(folder))]) as it:
        yield it


def write_adapter(folder: Path) -> DecoderModel:
    adapted = LoRA(rank=2)(tiny_model(context=CONTEXT))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name.lower() or parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_adapter(adapted, folder)
    return adapted


@torch.no_grad()
def naive(model: DecoderModel, tokens: list[int], layer: int, head: int) -> Tensor:
    """Softmax of scaled products, one query and one key at a time."""
    mixer = model.blocks[layer].mixer
    seen: dict[str, Tensor] = {}
    hook = mixer.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    context = Packed.of(Layout((len(tokens),)))
    model(torch.tensor(tokens), context)
    hook.remove()
    q = mixer.q(seen["x"]).unflatten(-1, (mixer.heads, -1))
    k = mixer.k(seen["x"]).unflatten(-1, (mixer.kv_heads, -1))
    q, k = mixer.config.positions.rotate(q, k, context)
    group = head * mixer.kv_heads // mixer.heads
    rule, n = mixer.rule, len(tokens)
    weights = torch.zeros(n, n)
    for i in range(n):
        for j in range(i + 1):
            if rule.window is None or i - j < rule.window:
                score = float(q[i, head] @ k[j, group]) * rule.scale
                if rule.softcap is not None:
                    score = rule.softcap * math.tanh(score / rule.softcap)
                if rule.slopes is not None:
                    score -= rule.slopes[head] * (i - j)
                weights[i, j] = math.exp(score)
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", ["dense", "window", "alibi", "learned", "softcap"])
def test_every_kind_of_attention(name: str) -> None:
    model = dict(variants())[name]
    engine, tokens = Engine(model, tiny_engine().tokenizer), [5, 6, 7, 8, 9, 10, 11, 12, 13]
    both = [naive(model, tokens, 0, h) for h in range(4)]
    rows = slice(3, 8)
    found, heads = attended(engine, tokens, rows, layer=0, head=2)
    torch.testing.assert_close(found, both[2][rows], atol=1e-5, rtol=1e-4)
    assert heads == 4
    mean, _ = attended(engine, tokens, rows, layer=0, head=None)
    torch.testing.assert_close(mean, torch.stack(both).mean(0)[rows], atol=1e-5, rtol=1e-4)
    other = naive(model, tokens, 1, 2)
    over, _ = attended(engine, tokens, rows, layer=None, head=2)
    if len(model.blocks) == 2:
        torch.testing.assert_close(over, (both[2] + other)[rows] / 2, atol=1e-5, rtol=1e-4)


def ask(server: Running, **asked: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": TALK, **asked}
    return httpx.post(f"{server.url}/v1/attention", json=body, timeout=60)


def test_what_each_token_looked_at(server: Running) -> None:
    said = ask(server, layer=1, head=3).json()
    tokenizer = tiny_engine().tokenizer
    prompt, answer = tokenizer.encode(PROMPT), tokenizer.encode("Löw")
    assert "".join(token["text"] for token in said["prompt"]) == PROMPT
    assert b"".join(bytes(token["bytes"]) for token in said["answer"]).decode() == "Löw"
    assert (said["layers"], said["heads"]) == (2, 4)
    wanted = naive(tiny_model(context=CONTEXT), [*prompt, *answer], 1, 3)
    assert len(said["weights"]) == len(answer)
    for i, row in enumerate(said["weights"]):
        place = len(prompt) - 1 + i  # the pass that wrote token i
        assert row == pytest.approx(wanted[place, : place + 1].tolist(), abs=2e-5)
    shown = ask(server, documents=[{"title": "a", "text": "cloth"}]).json()
    assert "[1] a\ncloth" in "".join(token["text"] for token in shown["prompt"])


def test_an_adapters_attention_is_its_own(server: Running, tmp_path: Path) -> None:
    adapted = write_adapter(tmp_path)
    tokens = tiny_engine().tokenizer.encode(PROMPT + "Löw")
    wanted = naive(adapted, tokens, 1, 0)
    base = ask(server, layer=1, head=0).json()["weights"]
    said = ask(server, model="tuned", layer=1, head=0).json()["weights"]
    place = len(tokens) - 2
    assert said[-1] == pytest.approx(wanted[place, : place + 1].tolist(), abs=2e-5)
    assert said != base


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layer": 2}, "layer 2 attends: there are 2 layers and 4 heads"),
        ({"layer": 1, "head": 4}, "layer 1 has a head 4"),
        ({"head": 99}, "no layer has a head 99"),
        ({"head": -1}, "`head`"),
        ({"messages": TALK[:1] * 2}, "must be the assistant's answer"),
        ({"messages": TALK[1:]}, "`messages`"),
        ({"messages": [TALK[0], {"role": "assistant", "content": ""}]}, "the assistant's answer"),
        ({"messages": [TALK[0], {**TALK[1], "content": "x" * 2000}]}, "1024 at most"),
        ({"model": "tyny"}, "no model `tyny`"),
    ],
)
def test_what_cannot_be_shown(server: Running, asked: dict[str, Any], message: str) -> None:
    answer = ask(server, **asked)
    assert answer.status_code in (400, 404)
    assert message in answer.json()["error"]["message"]


def test_native_kernels_show_none() -> None:
    from treadle.inference.native_runner import NativeRunner

    engine = tiny_engine()
    engine.runner = NativeRunner.__new__(NativeRunner)
    with pytest.raises(ApiError, match=r"NativeRunner.*`--device cpu`"):
        attended(engine, [1, 2, 3], slice(1, 2), layer=0, head=0)
