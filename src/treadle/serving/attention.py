"""`POST /v1/attention`: what an answer's tokens looked at, in a chosen layer and head.

    A_h = softmax(scale * q_h K_g(h)^T + bias)      [N N], a row for each token
    row i of the answer: A_h at the position before token i, whose pass wrote token i

The conversation is read once more by the plain torch model, without its cache.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from fastapi import APIRouter
from jaxtyping import Float
from starlette.requests import Request as Http
from starlette.responses import Response
from torch import Tensor

from treadle.core.cards import Card
from treadle.inference.attach import applied
from treadle.inference.engine import Engine
from treadle.kernels.attention import AttentionRule, attention_mask, attention_weights
from treadle.nn.context import Context, Packed
from treadle.nn.layout import Layout
from treadle.peft.prefix import prefix_of
from treadle.serving.errors import ApiError, reply
from treadle.serving.pool import runner_of
from treadle.serving.prompt import chat_prompt
from treadle.serving.protocol import AttentionBody, ChatBody
from treadle.serving.service import Service
from treadle.serving.stream import unless_gone
from treadle.tokenizers.tokenizer import Tokenizer

CARD = Card(
    id="deploy.ui.attention",
    paper="Vig 2019, A Multiscale Visualization of Attention, arXiv:1906.05714",
    summary="Shows which tokens the model looked at when it wrote a token of an answer.",
    recipe="treadle serve smollm2-135m-instruct --device cpu",
    oracle="tests/serving/test_serving_attention.py::test_every_kind_of_attention",
)
MOST = 2048
"""Tokens of conversation and answer together: a matrix has their square."""
DIGITS = 5


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/attention")
    async def attention(body: AttentionBody, http: Http) -> Response:
        return reply(await unless_gone(http, _attention(service, body)))

    return router


async def _attention(service: Service, body: AttentionBody) -> dict[str, Any]:
    if body.messages[-1].role != "assistant" or not body.messages[-1].text:
        raise ApiError(400, "the last message must be the assistant's answer", param="messages")
    seconds = service.config.limits.seconds
    async with asyncio.timeout(seconds), service.pool.use(body.model) as worker:
        adapter = service.pool.adapter(body.model)
        return await worker.call(partial(_looked, body=body, adapter=adapter))


@dataclass(eq=False)
class Watched(Context):
    """Attends as the context in it does, and keeps what some rows look at."""

    inner: Packed
    layer: int | None
    head: int | None
    rows: slice
    seen: list[Float[Tensor, "R N"]] = field(default_factory=list)
    heads: int = 0

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "N H D"],
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rule: AttentionRule,
    ) -> Float[Tensor, "N H E"]:
        self.heads = max(self.heads, q.shape[1])
        if self.layer in (None, layer) and (self.head is None or self.head < q.shape[1]):
            places = self.positions[None]
            mask = attention_mask(places[:, self.rows], places, rule, q.dtype)
            queries, keys = (t.transpose(0, 1)[None] for t in (q[self.rows], k))
            weights = attention_weights(queries, keys, mask, rule)[0]
            self.seen.append(weights.mean(0) if self.head is None else weights[self.head])
        return self.inner.attend(layer, q, k, v, rule)


@torch.inference_mode()
def attended(
    engine: Engine,
    tokens: list[int],
    rows: slice,
    *,
    layer: int | None,
    head: int | None,
    adapter: str | None = None,
) -> tuple[Float[Tensor, "R N"], int]:
    """How much each of the rows looks at each token, and how many heads there are.

    Raises:
        ApiError: the model does not run in plain torch, or nothing attends there.
    """
    runner = runner_of(engine, "shows no attention")
    if prefix_of(runner.model) is not None:
        raise ApiError(400, "attention to a learned prefix is not shown: ask for the base model")
    packed = Packed.of(Layout((len(tokens),)), runner.device)
    watched = Watched(packed.positions, packed.length, packed, layer, head, rows)
    with runner.autocast(), applied(engine, adapter, len(tokens)):
        runner.model(torch.tensor(tokens, device=runner.device), watched)
    if not watched.seen:
        where = "no layer" if layer is None else f"layer {layer}"
        what = "attends" if head is None else f"has a head {head}"
        layers, heads = len(runner.model.blocks), watched.heads
        message = f"{where} {what}: there are {layers} layers and {heads} heads, counted from 0"
        raise ApiError(400, message, param="layer" if head is None else "head")
    return torch.stack(watched.seen).mean(0).float().cpu(), watched.heads


def _looked(engine: Engine, body: AttentionBody, adapter: str | None) -> dict[str, Any]:
    tokenizer, context = engine.tokenizer, engine.runner.context
    *before, answer = body.messages
    chat = ChatBody(model=body.model, messages=before, documents=body.documents)
    prompt = tokenizer.encode(chat_prompt(tokenizer, chat, context).text)
    tokens = [*prompt, *tokenizer.encode(answer.text, parse_special=False)]
    if len(tokens) > min(MOST, context):
        message = f"{len(tokens)} tokens; attention is shown of {min(MOST, context)} at most"
        raise ApiError(400, message, param="messages")
    rows = slice(len(prompt) - 1, len(tokens) - 1)
    weights, heads = attended(
        engine, tokens, rows, layer=body.layer, head=body.head, adapter=adapter
    )
    return {
        "object": "attention",
        "model": body.model,
        "layers": len(runner_of(engine).model.blocks),
        "heads": heads,
        "prompt": [_token(tokenizer, token) for token in prompt],
        "answer": [_token(tokenizer, token) for token in tokens[len(prompt) :]],
        "weights": [
            [round(weight, DIGITS) for weight in row[: rows.start + 1 + i]]
            for i, row in enumerate(weights.tolist())
        ],
    }


def _token(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"text": data.decode("utf-8", "replace"), "bytes": list(data)}
