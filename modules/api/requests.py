"""From an API request to what the engine is asked: the prompt of a chat, sampling, stop strings, what the reply must look like.

Everything here may block (templates, tokenizer): it runs on a thread, not on the event loop.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from modules import tool_calls
from modules.api.errors import BadRequest
from modules.api.json_schema import checked, only_objects
from modules.api.schemas import ChatMessage, ChatRequest, CompletionRequest
from modules.app import App
from modules.backends.base import Backend, CancelToken, GenerationRequest, Seeing, adapters_of
from modules.conversation import Message, Role, new_id
from modules.errors import PromptTooLong
from modules.prompting import Prompting
from modules.samplers import SamplingParams
from modules.settings import ChatOptions
from modules.templates import FALLBACK, ChatTemplate, stop_strings
from modules.turn_lock import MAX_WAITING

MAX_IMAGES = 16
LONGEST_TOKEN = 512
"""Characters that no vocabulary has in one token; the longest known are 128 spaces."""
COMPLETION_TOKENS = 512
"""Of a completion that does not say how long it may be, as in the earlier system."""
_ROLES = {"developer": "system"}
Json = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One reply to be written."""

    request: GenerationRequest
    prompt: str
    """The exact text before it."""
    tools: Mapping[str, Json] = field(default_factory=dict)
    """The schemas of the parameters of what it may call, by name; in the format of its template unless it is `forced`."""
    template: str = ""
    forced: bool = False
    """The reply is calls and nothing else, as JSON of `tool_calls.grammar_schema`."""
    one_call: bool = False
    """It ends with its first call."""
    raw: bool = False
    """Thinking is not told from the answer."""
    names: tuple[str, ...] = ()
    first: str = ""
    """The text of the prompt's first token, where that is told with probabilities."""
    ignored: tuple[str, ...] = field(default=(), compare=False)
    """What was asked for and is not followed, in words for a header."""


def chat_job(app: App, backend: Backend, body: ChatRequest, client: str, fitting: bool = True) -> Job:
    """The first reply of a chat request. Raises BadRequest, SettingsError, TemplateError; PromptTooLong unless it need not be `fitting`."""
    if body.functions is not None or body.function_call is not None or any(m.role == "function" for m in body.messages):
        raise BadRequest("functions and function_call are not taken any more. Use tools and tool_choice.", "functions")
    name = app.models.name_of(backend)
    chat = _chat_options(app, body)
    source = _template_text(app, backend, body)
    template = ChatTemplate(source, backend.bos_token, backend.eos_token) if source else FALLBACK
    tools, must, schema = _tools_of(body)
    sampling, ignored = _sampling(app, body, name)
    constraint, sampling = _format(body, schema, sampling)
    _need_grammar(backend, constraint or sampling.grammar_string)
    messages, images = _messages(backend, body.messages)
    _check_images(backend, images)
    prompt, stops, names = _prompted(backend, body, chat, template, messages, tools, thinking=not (constraint or sampling.grammar_string))
    tokens = () if images else _encoded(backend, prompt)
    if fitting:
        _check_length(backend, tokens, sampling)
    logprobs = max(1, body.top_logprobs if body.top_logprobs is not None else 0) if body.logprobs else 0
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
    _need(backend, "logprobs", logprobs, "logprobs")
    request = GenerationRequest(
        prompt if images else tokens,
        sampling,
        _most(body, body.max_completion_tokens or body.max_tokens, None),
        _seed(body.seed),
        stop=(*body.stops, *sampling.stopping_strings, *stops),
        images=tuple(images),
        adapters=adapters_of(backend, app.models.adapters),
        logit_bias=_bias(body.logit_bias),
        json_schema=constraint,
        logprobs=logprobs,
        model=name,
        client=client,
    )
    single = bool(tools) and body.parallel_tool_calls is False
    schemas = {tool: told["function"]["parameters"] for tool, told in tools.items()}
    return Job(request, prompt, schemas, template.source, must, single, names=names, ignored=(*ignored, *not_asked(body.model, name)))


def completion_jobs(app: App, backend: Backend, body: CompletionRequest, client: str) -> list[Job]:
    """The first reply to each prompt of a completion request. Raises as `chat_job` does."""
    if body.suffix:
        raise BadRequest("suffix needs a model that fills in the middle; no loader here offers that. Leave it out.", "suffix")
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise BadRequest("best_of must be at least n.", "best_of")
    if body.stream and (body.best_of or 1) > (body.n or 1):
        raise BadRequest("best_of cannot be streamed: which is best is known at the end. Leave stream out.", "best_of")
    prompts, each = _prompts(body), max(body.n or 1, body.best_of or 1)
    if len(prompts) * each > MAX_WAITING:
        raise BadRequest(f"At most {MAX_WAITING} replies at once: the prompts times n or best_of are {len(prompts) * each}.", "n")
    name = app.models.name_of(backend)
    sampling, ignored = _sampling(app, body, name)
    _need_grammar(backend, sampling.grammar_string)
    _need(backend, "logprobs", body.logprobs is not None or (body.best_of or 1) > (body.n or 1), "logprobs")
    ignored = (*ignored, *not_asked(body.model, name))
    if body.max_tokens == 0 and not body.echo:
        raise BadRequest("max_tokens 0 asks for the prompt alone: set echo, and logprobs for its log-probabilities.", "max_tokens")
    jobs = []
    for prompt in prompts:
        tokens = _encoded(backend, prompt, sampling.add_bos_token) if isinstance(prompt, str) else tuple(prompt)
        _check_length(backend, tokens, sampling)
        request = GenerationRequest(
            tokens,
            sampling,
            1 if body.max_tokens == 0 else _most(body, body.max_tokens, COMPLETION_TOKENS),
            _seed(body.seed),
            stop=(*body.stops, *sampling.stopping_strings),
            adapters=adapters_of(backend, app.models.adapters),
            logit_bias=_bias(body.logit_bias),
            logprobs=max(1, body.logprobs) if body.logprobs is not None else 0,
            chosen_logprob=(body.best_of or 1) > (body.n or 1),
            prompt_logprobs=max(1, body.logprobs) if body.echo and body.logprobs is not None else None,
            model=name,
            client=client,
        )
        text = prompt if isinstance(prompt, str) else backend.decode(tokens)
        first = backend.decode(tokens[:1]) if request.prompt_logprobs is not None else ""
        jobs.append(Job(request, text, raw=True, first=first, ignored=ignored))
    return jobs


def copies(job: Job, count: int) -> list[Job]:
    """`job` and further ones with seeds of their own."""
    return [replace(job, request=replace(job.request, seed=(job.request.seed + i) % 2**32, cancel=CancelToken())) for i in range(count)]


def prompt_length(backend: Backend, job: Job) -> int:
    """Tokens of a job's prompt; those of images are not counted."""
    prompt = job.request.prompt
    return len(backend.encode(prompt) if isinstance(prompt, str) else prompt)


# --- parts ------------------------------------------------------------------------------------------------------------------------------


def _sampling(app: App, body: Any, model: str) -> tuple[SamplingParams, tuple[str, ...]]:
    given = body.given(SamplingParams)
    given.pop("seed", None)
    for name, value in given.items():
        if isinstance(value, str) and SamplingParams.knobs()[name].type is list:
            given[name] = [value]
    if body.preset:
        given |= app.presets.get(body.preset)
    asked = [name for name in ("max_completion_tokens", "max_tokens", "max_new_tokens") if getattr(body, name, None) is not None]
    twice = [f"{name} is not followed: {asked[0]} goes before it" for name in asked[1:]]
    sampling = SamplingParams().replace(given, "the request")
    neutral, honoured = SamplingParams(), app.models.status_of(model).samplers
    idle = [name for name in given if name not in honoured and getattr(sampling, name) != getattr(neutral, name)]
    without = [f"{name} has no effect with this loader" for name in sorted(idle)]
    return sampling, (*twice, *without, *(f"{name} is unknown" for name in body.unknown()))


def not_asked(wanted: str, name: str) -> tuple[str, ...]:
    """Says that a request for the model `wanted` is answered by the one called `name`, where that is another one."""
    return (f"model {wanted[:200]!r} is not loaded; answered by {name!r}",) if wanted and wanted != name else ()


def _seed(seed: int | None) -> int:
    return secrets.randbelow(2**31) if seed is None or seed == -1 else seed


def _most(body: Any, given: int | None, default: int | None) -> int | None:
    """How long the reply may be; None: as long as the context."""
    if given is not None or body.max_new_tokens is not None:
        return given if given is not None else body.max_new_tokens
    return None if body.auto_max_new_tokens else default


def _bias(bias: Mapping[str, float] | None) -> tuple[tuple[int, float], ...]:
    result = []
    for token, value in (bias or {}).items():
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise BadRequest(f"logit_bias names tokens by their ids, not by {token[:40]!r}. Ask /v1/internal/encode for them.", "logit_bias")
        result.append((int(token), float("-inf") if value <= -100 else value))
    return tuple(result)


def _need(backend: Backend, feature: str, wanted: Any, param: str) -> None:
    if wanted and feature not in backend.features:
        raise BadRequest(f"The loader of this model has no {feature}. Leave {param} out, or load the model with another loader.", param)


def _need_grammar(backend: Backend, wanted: Any) -> None:
    _need(backend, "grammar", wanted, "response_format, grammar_string and a required tool_choice")


def _encoded(backend: Backend, text: str, add_bos: bool = False) -> tuple[int, ...]:
    """Tokens of a prompt. One that no context could hold is not even counted: that would take the engine's time from others."""
    if len(text) > backend.context_length * LONGEST_TOKEN:
        raise PromptTooLong(f"The prompt has {len(text):,} characters; a context of {backend.context_length:,} tokens cannot hold them. Shorten it.")
    return tuple(backend.encode(text, add_bos))


def _check_length(backend: Backend, tokens: Sequence[int], sampling: SamplingParams) -> None:
    room = min(backend.context_length, sampling.truncation_length or backend.context_length)
    if len(tokens) >= room:
        raise PromptTooLong(
            f"The prompt has {len(tokens)} tokens and {room} are allowed, the reply included. Shorten it, or load the model with a larger context"
            f"{', or raise truncation_length' if room < backend.context_length else ''}."
        )


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    return [cast(Any, prompt)] if isinstance(prompt[0], int) else cast(list[str | list[int]], list(prompt))


# --- the prompt of a chat ---------------------------------------------------------------------------------------------------------------


def _chat_options(app: App, body: ChatRequest) -> ChatOptions:
    given = {name: value for name, value in body.given(ChatOptions).items() if name not in ("reasoning_effort", "instruction_template", "preset")}
    given |= {key: value for key, value in (("name1", body.user_name), ("name2", body.bot_name)) if value is not None}
    if body.character:
        found = app.characters.get(body.character)
        given = {"name2": found.name, "context": found.context, "greeting": found.greeting} | given
    effort = {"none": None, "minimal": "low", "xhigh": "high"}.get(body.reasoning_effort or "", body.reasoning_effort)
    if body.reasoning_effort == "none":
        given["enable_thinking"] = False
    return ChatOptions().replace(given | ({"reasoning_effort": effort} if effort else {}), "the request")


def _template_text(app: App, backend: Backend, body: ChatRequest) -> str:
    if body.instruction_template:
        return app.templates.get(body.instruction_template)
    return body.instruction_template_str or body.chat_template_str or backend.chat_template or ""


def _prompted(
    backend: Backend,
    body: ChatRequest,
    chat: ChatOptions,
    template: ChatTemplate,
    messages: list[Json],
    tools: Mapping[str, Json],
    thinking: bool,
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The prompt, the stop strings that follow from how it was made, and names that are no part of the reply."""
    if body.continue_ and messages[-1]["role"] != "assistant":
        raise BadRequest("continue_ goes on with an assistant's message: make one the last.", "continue_")
    if chat.mode != "instruct":
        return _in_character(backend, body, chat, template, messages)
    variables = {**Prompting(template, chat).variables, "enable_thinking": chat.enable_thinking and thinking}
    known = dict(variables)
    if tools:
        if "tools" in template.source:
            variables["tools"] = list(tools.values())
        else:
            messages = [_described(tools), *messages]
    if "tools" not in template.source:
        messages = [_told(message) for message in messages]
    leading = [m for m in messages if m["role"] == "system"]
    if len(leading) > 1 and messages[1]["role"] == "system":
        messages = _joined_system(messages)
    prompt = template.render(messages, add_generation_prompt=not body.continue_, continue_last=body.continue_, **variables)
    return prompt, stop_strings(template, **known), ()


def _joined_system(messages: list[Json]) -> list[Json]:
    """The leading system messages as one; later ones keep their place."""
    count = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    return [{"role": "system", "content": "\n\n".join(str(m["content"]) for m in messages[:count])}, *messages[count:]]


def _in_character(
    backend: Backend, body: ChatRequest, chat: ChatOptions, template: ChatTemplate, messages: list[Json]
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    prompting = Prompting(template, chat, chat.mode == "chat" and bool(backend.encode("", True)))
    path: list[Message] = []
    for message in messages:
        role: Role = message["role"] if message["role"] in ("system", "user", "assistant") else "user"
        path.append(Message(new_id(), path[-1].id if path else None, role, str(message["content"] or "")))
    if chat.greeting and not any(m.role == "assistant" for m in path):
        first = next((i for i, m in enumerate(path) if m.role != "system"), len(path))
        path.insert(first, Message(new_id(), None, "assistant", chat.greeting))
    prompt = prompting.render(path, 0, open_end=body.continue_)
    return prompt, prompting.stops_of("assistant"), prompting.names("assistant")


def _messages(backend: Backend, messages: Sequence[ChatMessage]) -> tuple[list[Json], list[bytes]]:
    """The messages as a template sees them, and their images in order."""
    images: list[bytes] = []
    made = []
    for place, message in enumerate(messages):
        if message.content is None and not message.tool_calls:
            raise BadRequest(f"messages[{place}].content is null. Only a message with tool_calls may have no content.", "messages")
        content = "" if message.content is None else _content(backend, message.content, images, place)
        fields: Json = {"role": _ROLES.get(message.role, message.role), "content": content}
        if message.name:
            fields["name"] = message.name
        if message.reasoning_content:
            fields |= {"reasoning_content": message.reasoning_content, "thinking": message.reasoning_content}
        if message.tool_calls:
            fields["tool_calls"] = [_call(call, place) for call in message.tool_calls]
        if message.tool_call_id:
            fields["tool_call_id"] = message.tool_call_id
        made.append(fields)
    return _named_results(made), images


def _named_results(messages: list[Json]) -> list[Json]:
    """Results with the name of the function that was called, which some templates need."""
    names = {call["id"]: call["function"]["name"] for m in messages for call in m.get("tool_calls", ()) if call.get("id")}
    return [{"name": names[m["tool_call_id"]], **m} if m["role"] == "tool" and m.get("tool_call_id") in names else m for m in messages]


def _call(call: Mapping[str, Any], place: int) -> Json:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest(f"messages[{place}].tool_calls: each needs function.name and function.arguments.", "messages")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise BadRequest(f"messages[{place}].tool_calls: the arguments of {function['name']!r} are not JSON.", "messages") from None
    return {"id": str(call.get("id") or ""), "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _content(backend: Backend, content: str | list[Json], images: list[bytes], place: int) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        kind = part.get("type")
        if kind in ("text", "input_text", "output_text", "refusal"):
            texts.append(str(part.get("text") or part.get("refusal") or ""))
        elif kind in ("image_url", "input_image"):
            _need(backend, "images", True, "image parts")
            if len(images) >= MAX_IMAGES:
                raise BadRequest(f"A request takes at most {MAX_IMAGES} images.", "messages")
            url = part.get("image_url")
            images.append(_picture(url.get("url") if isinstance(url, dict) else url, place))
            texts.append(cast(Seeing, backend).image_marker)
        else:
            raise BadRequest(f"messages[{place}].content: parts of type {str(kind)[:40]!r} cannot be read here. Send text and image_url.", "messages")
    return "\n".join(texts) if "input_text" in {p.get("type") for p in content} else "".join(texts)


def _picture(url: Any, place: int) -> bytes:
    header, comma, data = str(url or "").partition(",")
    if not header.startswith("data:image/") or not header.endswith(";base64") or not comma:
        raise BadRequest(f"messages[{place}]: an image must be a data: URL (data:image/png;base64,...). Addresses are not fetched.", "messages")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"messages[{place}]: the image is not valid base64.", "messages") from None


def _check_images(backend: Backend, images: Sequence[bytes]) -> None:
    if images and "images" not in backend.features:
        raise BadRequest("This model cannot see images. Load it with its --mmproj file, or send no images.", "messages")


# --- tools and formats ------------------------------------------------------------------------------------------------------------------


def _tools_of(body: ChatRequest) -> tuple[dict[str, Json], bool, Json | None]:
    """The functions by name, whether one must be called, and the schema that enforces it."""
    tools: dict[str, Json] = {}
    for place, tool in enumerate(body.tools or ()):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRequest(f'tools[{place}] must be {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}.', "tools")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise BadRequest(f'tools[{place}]: parameters must be the schema of an object, {{"type": "object", "properties": ...}}.', "tools")
        whole = {"description": "", **function, "parameters": parameters}
        tools[function["name"]] = {"type": "function", "function": whole}
    choice = body.tool_choice
    if choice in (None, "auto"):
        return tools, False, None
    if choice == "none":
        return {}, False, None
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    named = function.get("name") if isinstance(function, dict) else None
    if choice != "required" and (not isinstance(named, str) or named not in tools):
        raise BadRequest("tool_choice must be auto, none, required, or name one of the tools.", "tool_choice")
    if not tools:
        raise BadRequest("tool_choice requires a tool and there are none.", "tool_choice")
    for tool in tools.values():
        if named in (None, tool["function"]["name"]):
            where, parameters = f"tools: {tool['function']['name']}", tool["function"]["parameters"]
            checked(parameters, where)
            if not only_objects(parameters):
                raise BadRequest(f'{where}: parameters must be the schema of an object, {{"type": "object", "properties": ...}}.', "tools")
    schema = tool_calls.grammar_schema(list(tools.values()), named, parallel=body.parallel_tool_calls is not False and named is None)
    return tools, True, schema


def _format(body: ChatRequest, forced: Json | None, sampling: SamplingParams) -> tuple[str, SamplingParams]:
    """The JSON schema that the reply must follow, or ""; and the sampling, with the grammar that it must."""
    wanted = body.response_format or {"type": "text"}
    kind = wanted.get("type")
    if forced is not None and kind != "text":
        raise BadRequest("A required tool_choice and a response_format cannot both be followed. Leave one out.", "response_format")
    if forced is not None:
        return json.dumps(forced), sampling
    if kind == "text":
        return "", sampling
    if sampling.grammar_string:
        raise BadRequest("grammar_string and response_format cannot both be followed. Leave one out.", "response_format")
    if kind == "json_object":
        return json.dumps({"type": "object"}), sampling
    if kind == "json_schema":
        outer = wanted.get("json_schema")
        schema = outer.get("schema") if isinstance(outer, dict) else wanted.get("schema")
        if not isinstance(schema, dict):
            raise BadRequest("response_format.json_schema.schema must be an object.", "response_format")
        checked(schema, "response_format")
        return json.dumps(schema), sampling
    if kind == "grammar" and isinstance(wanted.get("grammar"), str):
        return "", sampling.replace({"grammar_string": wanted["grammar"]}, "response_format")
    kinds = '"text", "json_object", "json_schema" or "grammar" (with the text in "grammar")'
    raise BadRequest(f"response_format.type must be {kinds}.", "response_format")


def _described(tools: Mapping[str, Json]) -> Json:
    """The tools in words, for a template that knows none: in the form that Hermes models were taught."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools.values())
    text = (
        f"You can call these functions:\n<tools>\n{lines}\n</tools>\nTo call one, answer with its name and arguments as JSON, like this:\n"
        '<tool_call>\n{"name": "function", "arguments": {"parameter": "value"}}\n</tool_call>'
    )
    return {"role": "system", "content": text}


def _told(message: Json) -> Json:
    """A message with tool calls, or with the result of one, as text: for a template that knows neither."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" in message:
        calls = "\n".join(f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in message["tool_calls"])
        return {"role": "assistant", "content": "\n".join(filter(None, [message["content"], calls]))}
    return message
