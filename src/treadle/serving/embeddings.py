"""`POST /v1/embeddings`: the mean of the decoder's final hidden states, of unit length.

    e = h / |h|,   h = 1/T sum_t h_t,   h_t the last block's normed output at token t

A decoder trained on the next token only; a model trained for embeddings is better at search.
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
from torch import Tensor

from treadle.inference.attach import applied
from treadle.inference.engine import Engine
from treadle.inference.native_runner import NativeRunner
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.serving.errors import ApiError, reply
from treadle.serving.pool import runner_of
from treadle.serving.protocol import EmbeddingBody
from treadle.serving.sampling import room_after
from treadle.serving.service import Service
from treadle.serving.stream import unless_gone
from treadle.serving.texts import Text, several


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
            tokens, vector = await worker.call(partial(_embed, text=text, adapter=adapter))
            if body.dimensions not in (None, len(vector)):
                message = f"`dimensions`: this model's embeddings have {len(vector)}"
                raise ApiError(400, message, param="dimensions")
            rows.append(_encoded(vector, body.encoding_format))
            read += tokens
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
    usage = {"prompt_tokens": read, "total_tokens": read}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


def _embed(engine: Engine, text: Text, adapter: str | None) -> tuple[int, Float[np.ndarray, " D"]]:
    tokens = engine.tokenizer.encode(text, add_special=True) if isinstance(text, str) else text
    room_after(tokens, engine)
    return len(tokens), mean_hidden(engine, tokens, adapter).numpy()


@torch.inference_mode()
def mean_hidden(
    engine: Engine, tokens: list[int], adapter: str | None = None
) -> Float[Tensor, " D"]:
    """The unit vector of a text."""
    if isinstance(engine.runner, NativeRunner):
        hidden = engine.runner.hidden(tokens)
    else:
        runner = runner_of(engine)
        device = runner.device
        context = Packed.of(Layout((len(tokens),)), device)
        with runner.autocast(), applied(engine, adapter, len(tokens)):
            hidden = runner.model(torch.tensor(tokens, device=device), context)
    return torch.nn.functional.normalize(hidden.float().mean(0), dim=0).cpu()


def _encoded(vector: Float[np.ndarray, " D"], encoding: str | None) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(x) for x in vector]
