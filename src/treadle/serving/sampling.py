"""From a request's fields to the engine's."""

from __future__ import annotations

import json
import secrets

from treadle.inference.constrained import JsonSchema, Language, LarkGrammar, Regex
from treadle.inference.engine import Engine
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.serving.config import Limits
from treadle.serving.errors import ApiError
from treadle.serving.protocol import (
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    SamplingBody,
    TextFormat,
)

STOPS = 16
"""Stop strings of a request."""


def request_of(
    body: SamplingBody,
    prompt: list[int],
    engine: Engine,
    limits: Limits,
    *,
    max_tokens: int | None,
    top_logprobs: int | None = None,
    language: Language | None = None,
) -> Request:
    """The engine's request; without `max_tokens` the answer may fill the context.

    Raises:
        ApiError: the prompt does not fit, or a field asks for more than the server allows.
    """
    n = body.n or 1
    check_count(n, engine, limits, "n")
    if len(body.stops) > STOPS:
        raise ApiError(400, f"at most {STOPS} stop strings are allowed", param="stop")
    room = room_after(prompt, engine)
    most = min(max_tokens or room, room)
    sampling = Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or None,
        # a set of no tokens is read as the smallest set there is: the likeliest token
        top_p=1.0 if body.top_p is None else max(body.top_p, 1e-6),
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        max_tokens=most,
        min_tokens=most if body.ignore_eos else min(body.min_tokens or 0, most),
        stop=body.stops,
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_bias(body, engine),
        top_logprobs=top_logprobs or 0,
    )
    language = language or _language(body)
    constraint = language.build(engine.tokenizer, engine.runner.vocab) if language else None
    return Request(tuple(prompt), sampling, n, constraint=constraint)


def check_count(count: int, engine: Engine, limits: Limits, param: str) -> None:
    """
    Raises:
        ApiError: that many completions of one prompt are more than are allowed.
    """
    allowed = min(limits.completions, engine.config.slots)
    if count > allowed:
        message = f"`{param}` is {count}, but at most {allowed} are allowed"
        raise ApiError(400, message, param=param)


def _language(body: SamplingBody) -> Language | None:
    match body.response_format:
        case None | TextFormat():
            return None
        case JsonObjectFormat():
            return JsonSchema(text='{"type": "object"}')
        case JsonSchemaFormat(json_schema=spec):
            return JsonSchema(text=json.dumps(spec.schema_))
        case RegexFormat(regex=pattern):
            return Regex(pattern=pattern)
        case GrammarFormat(grammar=text):
            return LarkGrammar(text=text)


def _bias(body: SamplingBody, engine: Engine) -> tuple[tuple[int, float], ...]:
    vocab, bias = engine.runner.vocab, []
    for key, value in (body.logit_bias or {}).items():
        if not key.isdecimal() or len(key) > 9 or int(key) >= vocab:
            message = f"`logit_bias`: `{key[:40]}` is no token id; they are 0 to {vocab - 1}"
            raise ApiError(400, message, param="logit_bias")
        if not -100.0 <= value <= 100.0:
            raise ApiError(400, "`logit_bias` is -100 to 100", param="logit_bias")
        bias.append((int(key), value))
    return tuple(bias)


def room_after(prompt: list[int], engine: Engine) -> int:
    """Tokens that the context has left.

    Raises:
        ApiError: the prompt is empty, leaves no room, or has ids that are no tokens.
    """
    context, vocab = engine.runner.context, engine.runner.vocab
    if not prompt:
        raise ApiError(400, "the prompt is empty: give at least one token", param="prompt")
    if len(prompt) >= context:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens, but the model's context is {context}: "
            "shorten the prompt",
            code="context_length_exceeded",
        )
    if min(prompt) < 0 or max(prompt) >= vocab:
        raise ApiError(400, f"token ids are 0 to {vocab - 1}", param="prompt")
    return context - len(prompt)
