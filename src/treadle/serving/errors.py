"""Every mistake gets an answer in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from treadle.core.errors import TreadleError, did_you_mean

log = logging.getLogger("treadle.serving")
INVALID, SERVER = "invalid_request_error", "server_error"


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What the OpenAPI page promises."""

    error: ErrorFields


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.code, self.param = code, param
        self.headers = {} if retry_after is None else {"retry-after": str(retry_after)}

    def content(self) -> dict[str, Any]:
        fields = {"message": self.message, "type": self.kind}
        return {"error": {**fields, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return reply(self.content(), self.status, self.headers)


def overloaded(message: str) -> ApiError:
    return ApiError(429, message, kind="rate_limit_error", code="overloaded", retry_after=1)


def unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, kind=SERVER, code=code, retry_after=5)


def unknown_model(name: str, known: list[str]) -> ApiError:
    message = f"no model `{name[:100]}`{did_you_mean(name[:100], known)}"
    return ApiError(404, message, code="model_not_found", param="model")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told; the server's own failures are logged, not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TreadleError):
        return ApiError(400, str(error))
    if isinstance(error, TimeoutError):
        message = "the answer took longer than the server allows; ask for fewer tokens"
        return ApiError(504, message, kind="timeout_error", code="timeout")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why", kind=SERVER)


def encode(content: Any) -> bytes:
    """JSON in UTF-8; lone surrogates that a client smuggled in become question marks."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(content), status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Give the application these answers in place of the framework's own."""

    def handle(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).response()

    def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (ApiError, TreadleError, TimeoutError, Exception):
        app.add_exception_handler(kind, handle)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a body, and where it is."""
    first, more = error.errors()[0], len(error.errors()) - 1
    path = [
        str(part) for part in first["loc"][1:] if not str(part).startswith(("function-", "tagged-"))
    ]
    where = ".".join(path)
    message = str(first["msg"]).removeprefix("Value error, ")
    match first["type"]:
        case "json_invalid":
            return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}")
        case "extra_forbidden":
            message = f"unknown field `{where[:100]}`"
        case "missing":
            message = f"`{where}` is missing" if where else "the body is missing"
        case "model_attributes_type" if not where:
            message = "the body must be a JSON object, sent as `content-type: application/json`"
        case _:
            message = f"`{where}`: {message}" if where else message
    rest = f" (and {more} more)" if more else ""
    return ApiError(400, message + rest, param=where or None)
