"""What a request for `/v1/responses` may hold, and the conversation that it stands for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from treadle.serving.errors import ApiError
from treadle.serving.protocol import (
    Body,
    CalledFunction,
    CallOfTool,
    ChatBody,
    ChatMessage,
    FunctionSpec,
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    JsonSchemaSpec,
    NamedFunction,
    NamedTool,
    RegexFormat,
    TextFormat,
    Tool,
)


class Item(BaseModel):
    """A turn, or a part of one; clients send back what they were given, `status` and all."""

    model_config = ConfigDict(strict=True, extra="ignore")


class InputText(Item):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]


class InputCall(Item):
    type: Literal["function_call"]
    call_id: str
    name: str = Field(max_length=200)
    arguments: str


class InputResult(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]


class InputReasoning(Item):
    """Templates show no earlier thoughts, so it is left out."""

    type: Literal["reasoning"]


InputItem = InputMessage | InputCall | InputResult | InputReasoning


class SchemaFormat(JsonSchemaSpec):
    """OpenAI's flat spelling of a `json_schema` format."""

    type: Literal["json_schema"]


ResponseFormat = TextFormat | JsonObjectFormat | SchemaFormat | RegexFormat | GrammarFormat


class TextSettings(Body):
    format: ResponseFormat | None = Field(None, discriminator="type")
    verbosity: str | None = None


class FlatTool(FunctionSpec):
    type: Literal["function"]


class FlatNamedTool(NamedFunction):
    type: Literal["function"]


class ReasoningSettings(Body):
    effort: str | None = None
    summary: str | None = None


class ResponsesBody(Body):
    """`POST /v1/responses`."""

    model: str = Field(max_length=200)
    input: str | list[InputItem] = Field(max_length=10_000_000)
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=100)
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    tools: list[FlatTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    text: TextSettings | None = None
    stream: bool | None = None
    store: bool | None = None
    user: str | None = Field(None, max_length=512)
    metadata: dict[str, Any] | None = None
    reasoning: ReasoningSettings | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    include: list[str] | None = Field(None, max_length=0)
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None

    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """Own, as what follows."""
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    chat_template_kwargs: dict[str, JsonValue] | None = None

    def turns(self) -> list[ChatMessage]:
        """The input as messages; calls belong to the assistant's turn before them.

        Raises:
            ApiError: there is none.
        """
        if isinstance(self.input, str):
            return [ChatMessage(role="user", content=self.input)]
        turns: list[ChatMessage] = []
        for item in self.input:
            match item:
                case InputMessage():
                    turns.append(ChatMessage(role=item.role, content=_text(item.content)))
                case InputResult():
                    text = _text(item.output)
                    turns.append(ChatMessage(role="tool", content=text, tool_call_id=item.call_id))
                case InputCall():
                    function = CalledFunction(name=item.name, arguments=item.arguments)
                    add_call(turns, CallOfTool(id=item.call_id, function=function))
                case InputReasoning():
                    continue
        if not turns:
            raise ApiError(400, "`input` has no message", param="input")
        return turns

    def chat(self, earlier: list[ChatMessage]) -> ChatBody:
        """The same request as a chat, after what was said earlier."""
        told = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        return ChatBody(
            model=self.model,
            messages=[*told, *earlier, *self.turns()],
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            user=self.user,
            tools=[_tool(tool) for tool in self.tools] if self.tools else None,
            tool_choice=_choice(self.tool_choice),
            response_format=_format(self.text.format) if self.text else None,
            chat_template_kwargs=self.chat_template_kwargs,
        )


def add_call(turns: list[ChatMessage], call: CallOfTool) -> None:
    """Put a call into the assistant's last turn, or into a new one if others have spoken since."""
    if turns and turns[-1].role == "assistant":
        last = turns.pop()
        calls = [*(last.tool_calls or ()), call]
        turns.append(last.model_copy(update={"tool_calls": calls}))
    else:
        turns.append(ChatMessage(role="assistant", tool_calls=[call]))


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _tool(tool: FlatTool) -> Tool:
    return Tool(type="function", function=FunctionSpec(**tool.model_dump(exclude={"type"})))


def _choice(
    choice: Literal["none", "auto", "required"] | FlatNamedTool | None,
) -> Literal["none", "auto", "required"] | NamedTool | None:
    if isinstance(choice, FlatNamedTool):
        return NamedTool(type="function", function=NamedFunction(name=choice.name))
    return choice


def _format(
    format: ResponseFormat | None,
) -> TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat | None:
    if isinstance(format, SchemaFormat):
        spec = JsonSchemaSpec(**format.model_dump(exclude={"type"}, by_alias=True))
        return JsonSchemaFormat(type="json_schema", json_schema=spec)
    return format
