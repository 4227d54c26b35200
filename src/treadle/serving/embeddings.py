"""`POST /v1/embeddings`: the vector of a text, of unit length.

    e = h / |h|,   h the output of the model's embedding head, cut to `dimensions` numbers;
                   of a decoder without one, h = 1/T sum_t h_t over its final hidden states

A decoder trained on the next token only is worse at search than a model trained for embeddings.
"""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from typing import Any

import numpy as np
import torch
from fastapi import APIRouter
from jaxtyping import Float
from starlette.requests import Request as Http
from starlette.responses import Response
from torch import Tensor, nn

from treadle.core.errors import TreadleError
from treadle.data.framing import Framer
from treadle.inference.attach import applied
from treadle.inference.engine import Engine
from treadle.inference.native_runner import NativeRunner
from treadle.inference.reader import unit
from treadle.models.heads import TaskHead, VectorReadout
from treadle.models.pooling import MeanPooling
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.serving.errors import ApiError, reply
from treadle.serving.pool import runner_of
from treadle.serving.protocol import EmbeddingBody
from treadle.serving.sampling import room_after
from treadle.serving.service import Service
from treadle.serving.stream import unless_gone
from treadle.serving.texts import Text, several

UNCUT = 1 << 30
"""A text that is too long is refused, not cut."""


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, http: Http) -> Response:
        return reply(await unless_gone(http, _embeddings(service, body)))

    return router


async def _embeddings(service: Service, body: EmbeddingBody) -> dict[str, Any]:
    texts = several(body.input, service.config.limits.inputs, "input")
    rows: list[Any] = []
    read = 0
    async with (
        asyncio.timeout(service.config.limits.seconds),
        service.pool.use(body.model) as worker,
    ):
        for text in texts:  # one at a time: chats in the same engine go on between them
            adapter = service.pool.adapter(body.model)
            tokens, whole = await worker.call(partial(_embed, text=text, adapter=adapter))
            try:
                vector = unit(whole, body.dimensions).numpy()
            except TreadleError as error:
                raise ApiError(400, f"`dimensions`: {error}", param="dimensions") from None
            rows.append(_encoded(vector, body.encoding_format))
            read += tokens
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
    usage = {"prompt_tokens": read, "total_tokens": read}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


def _embed(engine: Engine, text: Text, adapter: str | None) -> tuple[int, Float[Tensor, " D"]]:
    head = None if isinstance(engine.runner, NativeRunner) else runner_of(engine).model.head
    if isinstance(head, TaskHead) and not isinstance(head, VectorReadout):
        raise ApiError(400, "this model was trained for another task than embedding texts")
    if not isinstance(text, str):
        tokens = text
    elif isinstance(head, VectorReadout) and text.strip():
        tokens = list(Framer(engine.tokenizer, UNCUT).text(text).ids)
    else:
        tokens = engine.tokenizer.encode(text, add_special=True)
    room_after(tokens, engine)
    return len(tokens), pooled(engine, tokens, adapter)


@torch.inference_mode()
def pooled(engine: Engine, tokens: list[int], adapter: str | None = None) -> Float[Tensor, " D"]:
    """The vector of a text, not yet of unit length."""
    if isinstance(engine.runner, NativeRunner):
        return engine.runner.hidden(tokens).mean(0)
    runner, layout = runner_of(engine), Layout((len(tokens),))
    head: nn.Module = runner.model.head
    pool = head.pool if isinstance(head, VectorReadout) else MeanPooling()
    with runner.autocast(), applied(engine, adapter, len(tokens)):
        flat = torch.tensor(tokens, device=runner.device)
        hidden = runner.model(flat, Packed.of(layout, runner.device))
    return pool(hidden, layout)[0].cpu()


def _encoded(vector: Float[np.ndarray, " D"], encoding: str | None) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(x) for x in vector]
