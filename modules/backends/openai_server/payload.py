"""From a GenerationRequest to the JSON of a completion or a chat, in the words of each kind of server. Pure.

OpenAI's own parameters go to all. What a server of a known kind has besides goes to it with every request, neutral values too: defaults of
servers are not neutral (llama-server's are top_k 40, min_p 0.05). An unknown kind gets further ones only when they are not neutral.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Literal

from modules.backends.base import GenerationRequest
from modules.errors import PromptError
from modules.samplers import NEUTRAL, SamplingParams

Json = dict[str, Any]
Kind = Literal["llama.cpp", "vllm", "ours", "llama_cpp.server", "unknown"]

MARK = "<|chat|>"
CHAT_TEMPLATE = (
    "{# <tool_call> #}" + MARK + '{"tools": {{ (tools or [])|tojson }}, "messages": ['
    '{% for m in messages %}{% if not loop.first %}, {% endif %}{"role": {{ m.role|tojson }}'
    '{% if m.tool_calls %}, "tool_calls": {{ m.tool_calls|tojson }}{% endif %}'
    '{% if m.tool_call_id %}, "tool_call_id": {{ m.tool_call_id|tojson }}{% endif %}'
    ', "content": {{ m.content|tojson }}}{% endfor %}]}'
)
"""The chat template of servers that keep theirs to themselves: it writes the messages as JSON, from which `chat` makes a chat request. So the
prompt that is shown and stored is what is sent. A reply that goes on is JSON cut off within its last text, or text after the JSON."""
_CUT = '"}]}'


Field = Callable[[SamplingParams], Any]


def _same(*names: str) -> dict[str, Field]:
    """Parameters that have the same name there."""
    return {name: attrgetter(name) for name in names}


def _last(params: SamplingParams) -> int:
    """How many last tokens penalties look at; llama-server takes −1 for all."""
    return params.repetition_penalty_range or -1


def _half_range(params: SamplingParams) -> float:
    return max(0.0, (params.dynatemp_high - params.dynatemp_low) / 2) if params.dynamic_temperature else 0.0


_OF_KIND: Mapping[Kind, Mapping[str, Field]] = {
    "llama.cpp": {
        **_same("top_k", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold", "dynatemp_exponent"),
        **_same("dry_multiplier", "dry_base", "dry_allowed_length", "mirostat_tau", "mirostat_eta"),
        "mirostat": attrgetter("mirostat_mode"),
        "repeat_penalty": attrgetter("repetition_penalty"),
        "repeat_last_n": _last,
        "dry_penalty_last_n": _last,
        "dry_sequence_breakers": lambda params: list(params.breakers),
        "dynatemp_range": _half_range,
        "ignore_eos": attrgetter("ban_eos_token"),
    },
    "vllm": {**_same("top_k", "min_p", "repetition_penalty", "skip_special_tokens"), "ignore_eos": attrgetter("ban_eos_token")},
    "llama_cpp.server": {
        **_same("top_k", "min_p", "mirostat_mode", "mirostat_tau", "mirostat_eta"),
        "repeat_penalty": attrgetter("repetition_penalty"),
    },
    "unknown": {},
    "ours": {},
}
_WHEN_NOT_NEUTRAL = ("top_k", "min_p", "repetition_penalty")
_OURS_NOT = {"max_new_tokens", "auto_max_new_tokens", "truncation_length", "max_tokens_second", "custom_stopping_strings", "seed", "negative_prompt",
             "temperature", "top_p", "frequency_penalty", "presence_penalty", "custom_token_bans"}  # fmt: skip
"""Fields of SamplingParams that our own API is not told under their names: the caller applies them, or they go to all servers."""

SAMPLERS = frozenset(
    re.findall(
        r"\w+",
        """temperature top_p top_k min_p typical_p top_n_sigma xtc_threshold xtc_probability dry_multiplier dry_allowed_length dry_base
    dry_sequence_breakers repetition_penalty repetition_penalty_range frequency_penalty presence_penalty dynamic_temperature dynatemp_low
    dynatemp_high dynatemp_exponent mirostat_mode mirostat_tau mirostat_eta do_sample seed max_new_tokens auto_max_new_tokens truncation_length
    max_tokens_second custom_stopping_strings custom_token_bans ban_eos_token skip_special_tokens add_bos_token grammar_string""",
    )
)
"""SamplingParams that mean something with some server. Temperature, top_p, the two OpenAI penalties and the seed do with all of them."""


def _temperature(params: SamplingParams) -> float:
    if not params.do_sample:
        return 0.0
    return (params.dynatemp_low + params.dynatemp_high) / 2 if params.dynamic_temperature else params.temperature


def _bias(request: GenerationRequest) -> dict[str, float]:
    """OpenAI's range is −100 to 100."""
    bias = dict(request.logit_bias) | dict.fromkeys(request.sampling.banned_tokens, -100.0)
    return {str(token): min(max(value, -100.0), 100.0) for token, value in bias.items()}


def sampling(request: GenerationRequest, kind: Kind) -> Json:
    """The parameters of `request` as a server of that `kind` knows them."""
    params = request.sampling
    body: Json = {
        "temperature": _temperature(params),
        "top_p": params.top_p,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "seed": request.seed % 2**31,  # some take no more bits
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if bias := _bias(request):
        body["logit_bias"] = bias
    if kind == "ours":
        named = params.model_dump(exclude=_OURS_NOT)
        return {**named, **body, "temperature": params.temperature, "sampler_priority": list(params.sampler_priority)}
    if kind == "unknown":
        body |= {name: getattr(params, name) for name in _WHEN_NOT_NEUTRAL if getattr(params, name) != getattr(NEUTRAL, name)}
    return {**body, **{name: value(params) for name, value in _OF_KIND[kind].items()}, **_shape(request, kind)}


def _shape(request: GenerationRequest, kind: Kind) -> Json:
    """Grammar or schema, for the kinds that enforce them."""
    grammar, schema = request.sampling.grammar_string, request.json_schema
    if kind == "vllm":
        wanted: Json = {"json": json.loads(schema)} if schema else {"grammar": grammar} if grammar else {}
        return {"structured_outputs": wanted} if wanted else {}
    if kind == "llama.cpp":
        return {"json_schema": json.loads(schema)} if schema else {"grammar": grammar} if grammar else {}
    return {"grammar": grammar} if kind == "llama_cpp.server" and grammar else {}


def chat(prompt: str, kind: Kind) -> Json | None:
    """Fields of a chat request from a prompt that CHAT_TEMPLATE wrote; None for any other prompt. Raises PromptError."""
    if not prompt.startswith(MARK):
        return None
    found, begun = _parsed(prompt.removeprefix(MARK))
    messages, tools = found.get("messages"), found.get("tools")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise PromptError("This prompt begins like a chat but holds no messages. Send the conversation again.")
    messages = [_on_wire(message) for message in messages]
    if begun:
        messages.append({"role": "assistant", "content": begun})
    body: Json = {"messages": messages, **({"tools": tools} if tools else {})}
    if messages[-1].get("role") == "assistant":
        body |= {"vllm": {"continue_final_message": True, "add_generation_prompt": False}, "ours": {"continue_": True}}.get(kind, {})
    return body


def _parsed(text: str) -> tuple[Json, str]:
    """The JSON at the beginning, put right where it was cut off in its last text, and what stands behind it."""
    for rest in (text, text + _CUT):
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value, rest[end:]
    raise PromptError("This prompt begins like a chat but cannot be read. Send the conversation again.")


def _on_wire(message: Json) -> Json:
    """A message as OpenAI's API has it: arguments of calls are texts there."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call(place, call) for place, call in enumerate(calls) if isinstance(call, dict)]}


def _call(place: int, call: Json) -> Json:
    function = call.get("function")
    function = function if isinstance(function, dict) else call
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call.get("id") or f"call_{place}", "type": "function", "function": {"name": function.get("name", ""), "arguments": text}}
