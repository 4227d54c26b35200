"""What requests may hold: OpenAI's fields, and a few of treadle's own.

Types are strict and unknown fields are refused, so that a misspelt setting is not silently
ignored. Fields that OpenAI's clients send and that mean nothing here are named, and ignored.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Strings = list[str]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchemaSpec(Body):
    name: str = Field("answer", max_length=64)
    description: str | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchemaSpec


class RegexFormat(Body):
    """treadle's own: the answer matches a regular expression."""

    type: Literal["regex"]
    regex: str = Field(min_length=1, max_length=10_000)


class GrammarFormat(Body):
    """treadle's own: the answer is derived from a grammar in Lark's syntax."""

    type: Literal["grammar"]
    grammar: str = Field(min_length=1, max_length=100_000)


Format = TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat


class SamplingBody(Body):
    """What chat and plain completions share."""

    model: str = Field(max_length=200)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Strings | None = None
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Format | None = Field(None, discriminator="type")
    user: str | None = Field(None, max_length=512)

    top_k: int | None = Field(None, ge=0)
    """Own: the likeliest k tokens; 0 for all."""
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    """Own."""
    repetition_penalty: float | None = Field(None, gt=0.0, le=10.0)
    """Own."""
    min_tokens: int | None = Field(None, ge=0)
    """Own: tokens before the model may end the text."""
    ignore_eos: bool | None = None
    """Own: the model may not end the text at all; `max_tokens` does."""

    @property
    def with_usage(self) -> bool:
        """A stream ends with what it used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(s for s in given if s)


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str = Field(max_length=200)
    arguments: str


class CallOfTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """A turn; clients send back what they were given, so fields not known here are let pass."""

    model_config = ConfigDict(strict=True, extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[CallOfTool] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class FunctionSpec(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class Document(Body):
    """treadle's own: a text that the answer is to rest on."""

    title: str = Field(max_length=200)
    text: str


class ChatBody(SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    """Own: further names for the chat template, such as `enable_thinking`."""
    documents: list[Document] | None = Field(None, max_length=256)
    """Own: the answer rests on these, and is told with the passages it took."""

    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None


class CompletionBody(SamplingBody):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    """0 with `echo`: the prompt alone is read and given back."""
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)
    suffix: None = None


class EmbeddingBody(Body):
    """`POST /v1/embeddings`."""

    model: str = Field(max_length=200)
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=512)


class AttentionBody(Body):
    """`POST /v1/attention`: a conversation that ends with an answer."""

    model: str = Field(max_length=200)
    messages: list[ChatMessage] = Field(min_length=2, max_length=10_000)
    documents: list[Document] | None = Field(None, max_length=256)
    layer: int | None = Field(None, ge=0)
    """None: the mean over all layers."""
    head: int | None = Field(None, ge=0)
    """None: the mean over all heads."""


class TokenizeBody(Body):
    """`POST /tokenize`: a text, or a conversation as the model would see it."""

    model: str = Field(max_length=200)
    text: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool = False


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str = Field(max_length=200)
    tokens: list[int]


class VoteBody(Body):
    """`POST /v1/votes`: whether an answer of an A/B test was good."""

    id: str = Field(max_length=100)
    good: bool
