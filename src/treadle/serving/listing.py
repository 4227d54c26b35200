"""`/v1/models`, `/tokenize`, `/detokenize`: what is served and how it reads text."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from treadle.serving.errors import ApiError, reply, unknown_model
from treadle.serving.pool import Adapted
from treadle.serving.prompt import chat_prompt
from treadle.serving.protocol import ChatBody, DetokenizeBody, TokenizeBody
from treadle.serving.service import Service
from treadle.tokenizers.tokenizer import Tokenizer


def routes(service: Service) -> APIRouter:
    router, began = APIRouter(), int(time.time())

    def described(name: str) -> dict[str, Any]:
        row: dict[str, Any] = {"id": name, "object": "model", "created": began}
        row["owned_by"] = "treadle"
        if name in service.routes.names:
            return {**row, "parent": service.routes.base}
        if name not in service.pool.names:
            return {**row, "trial": True}
        offer = service.pool.offer(name)
        if isinstance(offer, Adapted):
            row |= {"parent": offer.base}
        worker = service.pool.workers().get(name)
        if worker is not None:
            row["max_model_len"] = worker.engine.runner.context
        return {**row, "loaded": worker is not None}

    @router.get("/v1/models")
    async def models() -> Response:
        return reply({"object": "list", "data": [described(name) for name in service.names]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in service.names:
            raise unknown_model(name, service.names)
        return reply(described(name))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        async with service.pool.use(body.model) as worker:
            tokenizer = worker.engine.tokenizer
            context = worker.engine.runner.context
            tokens = await asyncio.to_thread(_tokens, tokenizer, body, context)
            return reply({"tokens": tokens, "count": len(tokens), "max_model_len": context})

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        async with service.pool.use(body.model) as worker:
            tokenizer = worker.engine.tokenizer
            if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) < tokenizer.vocab_size:
                message = f"token ids are 0 to {tokenizer.vocab_size - 1}"
                raise ApiError(400, message, param="tokens")
            return reply({"text": tokenizer.decode(body.tokens, skip_special=False)})

    return router


def _tokens(tokenizer: Tokenizer, body: TokenizeBody, context: int) -> list[int]:
    if (body.text is None) == (body.messages is None):
        raise ApiError(400, "give either `text` or `messages`")
    if body.messages is not None:
        chat = ChatBody(model=body.model, messages=body.messages)
        return tokenizer.encode(chat_prompt(tokenizer, chat, context).text)
    return tokenizer.encode(body.text or "", add_special=body.add_special_tokens)
