"""`POST /v1/votes`: whether an answer of a trial was good."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from treadle.serving.errors import ApiError, reply
from treadle.serving.protocol import VoteBody
from treadle.serving.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/votes")
    async def vote(body: VoteBody) -> Response:
        if not service.trials.vote(body.id, body.good):
            message = "no answer of a trial with this id waits for a vote"
            raise ApiError(404, message, code="answer_not_found", param="id")
        return reply({"id": body.id, "good": body.good})

    return router
