"""The requests of all routes as pydantic models; the extra fields come from the declarations of SamplingParams and ChatOptions.

A field that a model does not declare is let in and told in a header, never followed in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from modules.api.errors import BadRequest, what_is_wrong
from modules.options import Options
from modules.samplers import SamplingParams
from modules.settings import ChatOptions

MAX_REPLIES = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_TOP_LOGITS = 1000

CHAT_FIELDS = (
    "mode", "character", "name1", "name2", "user_bio", "context", "greeting", "chat_instruct_command", "enable_thinking", "preserve_thinking",
)  # fmt: skip


def _optional(options: type[Options], names: tuple[str, ...]) -> dict[str, Any]:
    """Fields with the types, bounds and texts of those declared, None by default: not given."""
    fields: dict[str, Any] = {}
    for name in names:
        knob, field = options.knobs()[name], options.model_fields[name]
        low, high = knob.bounds
        kind = str | list[str] if knob.type is list else field.annotation
        fields[name] = (kind | None, Field(None, description=knob.help, ge=low, le=high))  # type: ignore[operator]
    return fields


class _Nullable(BaseModel):
    """Null, for a field that may be left out, is the same as leaving it out: OpenAI's and Anthropic's clients may send it for any such field."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in given.items() if value is not None or name not in optional}


class _Request(_Nullable):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def unknown(self) -> list[str]:
        """Names of fields that nobody follows."""
        return sorted(self.model_extra or {})

    def given(self, options: type[Options]) -> dict[str, Any]:
        """The values for `options` in the request: those that were given."""
        return {name: value for name in options.model_fields if (value := getattr(self, name, None)) is not None}


_Sampling = create_model("_Sampling", __base__=_Request, **_optional(SamplingParams, tuple(SamplingParams.model_fields)))
_Speaking = create_model("_Speaking", __base__=_Sampling, **_optional(ChatOptions, CHAT_FIELDS))


class StreamOptions(_Nullable):
    """What a stream tells besides the text."""

    include_usage: bool = False


class _Local(_Request):
    """What local servers take besides sampling."""

    model: str = ""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    preset: str | None = Field(default=None, description="Sampling values of that preset, which go before those of the request.")
    seed: int | None = Field(default=None, ge=-1, lt=2**32, description="The same seed and request give the same reply. -1: another each time.")


class _Templated(_Speaking):  # type: ignore[valid-type, misc]
    """How the prompt of a chat is made."""

    instruction_template: str | None = Field(default=None, description="Name of a chat template to use instead of the model's own.")
    instruction_template_str: str | None = Field(default=None, description="Text of such a template.")
    chat_template_str: str | None = Field(default=None, description="The same.")
    continue_: bool = Field(default=False, description="The last message, an assistant's, is gone on with.")
    user_name: str | None = Field(default=None, description="The same as name1.")
    bot_name: str | None = Field(default=None, description="The same as name2.")


class _Common(_Local):
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_REPLIES)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or ()))

    @property
    def usage_in_stream(self) -> bool:
        """Whether the stream ends with the counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatMessage(BaseModel):
    """One message. `content` is text, a list of parts, or null where there are tool calls."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatRequest(_Common, _Templated):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=20_000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = Field(None, description='{"type": "text" | "json_object" | "json_schema" | "grammar", ...}')
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class CompletionRequest(_Common, _Sampling):  # type: ignore[valid-type, misc]
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_REPLIES)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=MAX_REPLIES)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_REPLIES)] | None = None


class EmbeddingRequest(_Request):
    """POST /v1/embeddings."""

    input: (
        str
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=2048)]
    )
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class Thinking(BaseModel):
    """Whether the model thinks before it answers."""

    model_config = ConfigDict(extra="allow")

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None


class AnthropicChoice(_Nullable):
    """Which tool must be called, if any."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class AnthropicMessage(BaseModel):
    """One message. `content` is text or a list of blocks."""

    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class AnthropicCountRequest(_Local, _Templated):
    """POST /v1/messages/count_tokens. `cache_control` is let in everywhere: prefixes are kept without being asked."""

    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=20_000)]
    system: str | list[dict[str, Any]] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    output_config: dict[str, Any] | None = Field(None, description='{"effort": ..., "format": {"type": "json_schema", "schema": ...}}')
    cache_control: Any = None


class AnthropicRequest(AnthropicCountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    metadata: dict[str, Any] | None = None


class Reasoning(BaseModel):
    """How long the model thinks."""

    model_config = ConfigDict(extra="allow")

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponseText(BaseModel):
    """What the answer must look like."""

    model_config = ConfigDict(extra="allow")

    format: dict[str, Any] | None = None


class ResponsesRequest(_Local, _Templated):
    """POST /v1/responses."""

    input: str | Annotated[list[dict[str, Any]], Field(max_length=20_000)] = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: ResponseText | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    user: str | None = None


def as_chat(body: AnthropicCountRequest | ResponsesRequest, fields: dict[str, Any]) -> ChatRequest:
    """The chat request with `fields` and what `body` has of what every route takes. Raises BadRequest."""
    common = (_Local.model_fields.keys() | _Templated.model_fields.keys()) & body.model_fields_set
    try:
        return ChatRequest.model_validate({name: getattr(body, name) for name in common} | fields)
    except ValidationError as error:
        raise BadRequest(*what_is_wrong(error.errors(), fields)) from None


class RerankDocument(BaseModel):
    """A document that is not given as text alone."""

    text: str


class RerankRequest(_Request):
    """POST /v1/rerank."""

    query: str
    documents: Annotated[list[str | RerankDocument], Field(min_length=1, max_length=2048)]
    model: str = ""
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False


# --- management -------------------------------------------------------------------------------------------------------------------------


class TextRequest(_Request):
    """POST /v1/internal/encode and token-count."""

    text: str
    add_bos_token: bool = Field(False, description="Put the token before it that prompts begin with.")


class TokensRequest(_Request):
    """POST /v1/internal/decode."""

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class LogitsRequest(_Sampling):  # type: ignore[valid-type, misc]
    """POST /v1/internal/logits."""

    prompt: Annotated[str, Field(min_length=1)]
    top_logits: Annotated[int, Field(ge=1, le=MAX_TOP_LOGITS)] = 50
    use_samplers: bool = False


class StopRequest(_Request):
    """POST /v1/internal/stop-generation."""

    id: str = Field("", description="Of the completion; without it all replies of this client are stopped.")


class LoadRequest(_Request):
    """POST /v1/internal/model/load."""

    model_name: str
    loader: str = Field("", description="Found from the file when not given.")
    args: dict[str, Any] = Field({}, description="Options of that loader, by name.")


class UnloadRequest(_Request):
    """POST /v1/internal/model/unload."""

    model_name: str | None = Field(None, description="The model to free; all when not given.")


class AdaptersRequest(_Request):
    """POST /v1/internal/lora/load."""

    lora_names: Annotated[list[str], Field(max_length=16)]
    lora_scales: list[float] | None = Field(None, description="One for each; 1 when not given.")
