"""Instruction templates: the chat templates that come with the program, and the user's own in `user_data/instruction-templates/`.

They are for models whose files hold no template, or a wrong one. A user's file is Jinja text (`.jinja`, `.jinja2`), or YAML (`.yaml`,
`.yml`) holding Jinja text or the older `turn_template`, which is converted. Files are shared between users and are hostile: they are
bounded here, and what comes out of them is rendered in the sandbox of `templates.py` only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from modules.errors import TemplateError
from modules.library import Shelf
from modules.templates import FALLBACK, MAX_SOURCE, ChatTemplate, PromptMessage

MAX_BYTES = 4 * MAX_SOURCE
"""Size of a template file: the largest template there may be, in UTF-8."""
_MAX_EVENTS = 200
"""Parts of a YAML file; one with all fields has about 25."""
_JINJA, _YAML = (".jinja", ".jinja2"), (".yaml", ".yml")
_SUFFIXES = (*_JINJA, *_YAML)
"""Where several files have one name, the first of these wins."""

# --- what comes with the program --------------------------------------------------------------------------------------------------------
#
# Blocks are trimmed (see templates.py): a line with nothing but `{% ... %}` leaves nothing in the prompt, `-` eats the line break next to it.
# The end of a turn is the model's own token where the format says "the end-of-sequence token", else it is written out. Texts are trimmed
# where the models' own templates do that.

_ALPACA = """\
{% if messages[0].role != 'system' %}
Below is an instruction that describes a task. Write a response that appropriately completes the request.

{% endif %}
{% for message in messages %}
{% if message.role == 'system' %}
{{ message.content }}

{% elif message.role == 'user' %}
### Instruction:
{{ message.content }}

{% else %}
### Response:
{{ message.content }}

{% endif %}
{% endfor %}
{% if add_generation_prompt %}
### Response:
{% endif %}
"""

_COMMAND_R = """\
{% set names = {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'} %}
{{ bos_token -}}
{% for message in messages %}
<|START_OF_TURN_TOKEN|>{{ names[message.role] }}{{ message.content | trim }}<|END_OF_TURN_TOKEN|>
{%- endfor %}
{% if add_generation_prompt %}
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>
{%- endif %}
"""

_DEEPSEEK = """\
{{ bos_token -}}
{% for message in messages %}
{% if message.role == 'system' %}
{{ message.content -}}
{% elif message.role == 'user' %}
<｜User｜>{{ message.content -}}
{% else %}
<｜Assistant｜>{{ message.content }}<｜end▁of▁sentence｜>
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
<｜Assistant｜>
{%- endif %}
"""

# The format has no system turn. Where a template refuses one, ChatTemplate puts its text before the first user's, as the format wants it.
_GEMMA = """\
{{ bos_token -}}
{% for message in messages %}
{% if message.role == 'system' %}
{{ raise_exception('Gemma has no system turn') }}
{% endif %}
<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}
<start_of_turn>model
{% endif %}
"""

_GPT_OSS = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: {{ strftime_now('%Y-%m-%d') }}

Reasoning: {{ reasoning_effort or 'medium' }}

# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>
{%- for message in messages %}
{% if message.role == 'system' %}
<|start|>developer<|message|># Instructions

{{ message.content }}

<|end|>
{%- elif message.role == 'user' %}
<|start|>user<|message|>{{ message.content }}<|end|>
{%- else %}
{% if message.thinking and (loop.last or preserve_thinking) %}
<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>
{%- endif %}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
<|start|>assistant
{%- endif %}
"""

# A system message is part of the first user turn; refusing an order without that turn makes ChatTemplate add an empty one.
_LLAMA_2 = """\
{% set state = namespace(system='') %}
{% for message in messages %}
{% if message.role == 'system' and loop.first %}
{% set state.system = '<<SYS>>\\n' ~ message.content ~ '\\n<</SYS>>\\n\\n' %}
{% elif message.role == 'user' %}
{{ bos_token }}[INST] {{ (state.system ~ message.content) | trim }} [/INST]
{%- set state.system = '' %}
{% elif message.role == 'assistant' and not state.system %}
{{ ' ' }}{{ message.content | trim }} {{ eos_token or '</s>' -}}
{% else %}
{{ raise_exception('a system message comes first, a user message after it') }}
{% endif %}
{% endfor %}
"""

_LLAMA_3 = """\
{{ bos_token -}}
{% for message in messages %}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endfor %}
{% if add_generation_prompt %}
<|start_header_id|>assistant<|end_header_id|>

{% endif %}
"""

_MISTRAL = """\
{{ bos_token -}}
{% for message in messages %}
{% if message.role == 'user' %}
[INST] {{ message.content }}[/INST]
{%- elif message.role == 'assistant' %}
{{ ' ' }}{{ message.content | trim }}{{ eos_token or '</s>' -}}
{% else %}
{{ raise_exception('Mistral has no system turn') }}
{% endif %}
{% endfor %}
"""

_MISTRAL_V7 = """\
{{ bos_token -}}
{% for message in messages %}
{% if message.role == 'system' %}
[SYSTEM_PROMPT]{{ message.content }}[/SYSTEM_PROMPT]
{%- elif message.role == 'user' %}
[INST]{{ message.content }}[/INST]
{%- else %}
{{ message.content }}{{ eos_token or '</s>' -}}
{% endif %}
{% endfor %}
"""

_OPENCHAT = """\
{{ bos_token -}}
{% for message in messages %}
{{ {'user': 'GPT4 Correct User: ', 'assistant': 'GPT4 Correct Assistant: '}[message.role] }}{{ message.content }}<|end_of_turn|>
{%- endfor %}
{% if add_generation_prompt %}
GPT4 Correct Assistant:
{%- endif %}
"""

_PHI_3 = """\
{% for message in messages %}
<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""

_PHI_4 = """\
{% for message in messages %}
<|im_start|>{{ message.role }}<|im_sep|>{{ message.content }}<|im_end|>
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant<|im_sep|>
{%- endif %}
"""

_VICUNA = """\
{{ bos_token -}}
{% if messages[0].role != 'system' %}
A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions.{{ ' ' -}}
{% endif %}
{% for message in messages %}
{% if message.role == 'system' %}
{{ message.content }}{{ ' ' -}}
{% elif message.role == 'user' %}
USER: {{ message.content }}{{ ' ' -}}
{% else %}
ASSISTANT: {{ message.content }}{{ eos_token or '</s>' -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
ASSISTANT:
{%- endif %}
"""

_ZEPHYR = """\
{% for message in messages %}
<|{{ message.role }}|>
{{ message.content }}{{ eos_token or '</s>' }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""

SHIPPED: Mapping[str, str] = MappingProxyType({
    "Alpaca": _ALPACA,
    "ChatML": FALLBACK.source,
    "Command-R": _COMMAND_R,
    "DeepSeek": _DEEPSEEK,
    "Gemma": _GEMMA,
    "GPT-OSS": _GPT_OSS,
    "Llama 2": _LLAMA_2,
    "Llama 3": _LLAMA_3,
    "Mistral": _MISTRAL,
    "Mistral V7 Tekken": _MISTRAL_V7,
    "OpenChat": _OPENCHAT,
    "Phi-3": _PHI_3,
    "Phi-4": _PHI_4,
    "Vicuna": _VICUNA,
    "Zephyr": _ZEPHYR,
})  # fmt: skip
"""Jinja texts by name, written from the models' documented prompt formats."""


# --- reading files ----------------------------------------------------------------------------------------------------------------------


def read_template(text: str, name: str) -> str:
    """The Jinja text in a template file's `text`; the ending of its `name` says how it is written. Raises TemplateError naming the file.

    The Jinja text itself is not looked at: `check` does that.
    """
    if len(text) > MAX_BYTES:
        raise _too_large(name)
    if not text.strip():
        raise TemplateError(f"{name} is empty. Write a chat template into it, or delete it.")
    suffix = Path(name).suffix
    if suffix in _JINJA:
        return text
    if suffix not in _YAML:
        raise TemplateError(f"{name} is no template file. Give it a name that ends with {', '.join(_SUFFIXES)}.")
    fields = _fields(text, name)
    for key in ("instruction_template", "chat_template"):
        if fields.get(key):
            return _field(fields, key, name)
    if fields.get("turn_template"):
        return _converted(fields, name)
    raise TemplateError(f"{name} has no instruction_template. Add that key with the Jinja text of the template, or delete the file.")


def check(source: str, name: str) -> None:
    """Raise TemplateError, naming the template, unless it shows a short conversation within the sandbox's limits."""
    asked, answered = "Which colour has snow?", "White as paper."
    template = ChatTemplate(source, "<s>", "</s>")
    try:
        prompt = template.render([PromptMessage("user", asked), PromptMessage("assistant", answered)], add_generation_prompt=False)
        template.render([PromptMessage("system", "Be brief."), PromptMessage("user", asked)])
    except TemplateError as error:
        raise TemplateError(f"{name}: {error}") from None
    if asked not in prompt or answered not in prompt:
        raise TemplateError(f"{name}: the chat template leaves messages out. Let it go through all messages and write their content.")


def _too_large(name: str) -> TemplateError:
    return TemplateError(f"{name} is larger than {MAX_BYTES:,} bytes, which no chat template is. Put another file there, or delete it.")


def _fields(text: str, name: str) -> dict[str, Any]:
    """The mapping in a YAML file, all its values text.

    PyYAML's plainest loader makes text, lists and mappings only: even less than safe_load, which also knows numbers, dates and merges.
    """
    try:
        for place, event in enumerate(yaml.parse(text, Loader=yaml.BaseLoader)):
            if isinstance(event, yaml.AliasEvent) or place > _MAX_EVENTS:
                raise TemplateError(f"{name} is more than a template file needs. Keep only instruction_template with its text, without & and *.")
        found = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it is not YAML"
        raise TemplateError(f"{name}{where}: {problem}. Correct that line; the text of a template stands indented after “|-”.") from None
    if not isinstance(found, dict):
        raise TemplateError(f"{name}: expected 'instruction_template: |-' and the template's text indented below. Correct the file.")
    return found


def _field(fields: Mapping[str, Any], key: str, name: str) -> str:
    value = fields.get(key, "")
    if not isinstance(value, str):
        raise TemplateError(f"{name}: {key} must be text. Put its value in quotes, or indent it after “|-”.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise TemplateError(f"{name}: {key} contains half a character (an escape such as \\ud800). Write the character itself.")
    return value


# --- the older form -----------------------------------------------------------------------------------------------------------------------

_MESSAGE, _REPLY, _SYSTEM = "<|user-message|>", "<|bot-message|>", "<|system-message|>"


def _converted(fields: Mapping[str, Any], name: str) -> str:
    """A Jinja text that makes the prompts which `turn_template` and the fields beside it describe.

    As in that form, the next reply begins after the bot's part up to its message, without spaces at its end. A `context` without a place
    for a system message is fixed; a system message is then refused, so that ChatTemplate puts it into the first user message.
    """
    turn, user, bot, context, default = (_field(fields, key, name) for key in ("turn_template", "user", "bot", "context", "system_message"))
    if turn.count(_MESSAGE) != 1 or turn.count(_REPLY) != 1 or turn.index(_MESSAGE) > turn.index(_REPLY):
        raise TemplateError(f"{name}: turn_template must contain {_MESSAGE} once and {_REPLY} once after it. Correct it.")
    split = turn.index(_MESSAGE) + len(_MESSAGE)
    if "<|bot|>" in turn[split:]:
        split = turn.index("<|bot|>", split)
    names = {"<|user|>": _quoted(user), "<|bot|>": _quoted(bot), _MESSAGE: "message.content", _REPLY: "message.content"}
    asked, answered = _expression(turn[:split], names), _expression(turn[split:], names)
    opening = _expression(turn[split : turn.index(_REPLY)], names)
    place = _SYSTEM in context
    system = "{% set system = messages[0].content if messages and messages[0].role == 'system' else " + _quoted(default) + " %}\n"
    allowed = "{% elif message.role != 'system' or not loop.first %}\n" if place else "{% else %}\n"
    return (
        (system if place else "")
        + ("{{ " + _expression(context, {_SYSTEM: "system"}) + " -}}\n")
        + ("{% for message in messages %}\n{% if message.role == 'user' %}\n{{ " + asked + " -}}\n")
        + ("{% elif message.role == 'assistant' %}\n{{ " + answered + " -}}\n")
        + (allowed + "{{ raise_exception('there is no place for this system message') }}\n{% endif %}\n{% endfor %}\n")
        + ("{% if add_generation_prompt %}\n{{ (" + opening + ").rstrip(' ') -}}\n{% endif %}\n")
    )


def _quoted(text: str) -> str:
    """A Jinja expression for `text`: within quotes no brace begins anything, and JSON's escapes are among Jinja's."""
    return json.dumps(text, ensure_ascii=False)


def _expression(text: str, values: Mapping[str, str]) -> str:
    """A Jinja expression for `text` in which each of `values` (an expression by its mark) stands where its mark is. One pass over it."""
    marks = "|".join(re.escape(mark) for mark in values)
    parts = [values.get(part) or _quoted(part) for part in re.split(f"({marks})", text) if part]
    return " ~ ".join(parts) or "''"


# --- the folder ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Templates:
    """The shipped templates and those in `folder`, where a file wins over a shipped one of its name. A name has no file ending."""

    folder: Path

    def names(self) -> list[str]:
        """All names, sorted without regard to case. Files are not read: a broken one is listed and fails when it is chosen."""
        return self._shelf.names()

    def own(self) -> set[str]:
        """The names of the files in the folder."""
        return self._shelf.own()

    def get(self, name: str) -> str:
        """The Jinja text of the template called `name`. Raises NotFound, NameError_, TemplateError or SettingsError for a wrong file, DataError."""
        found = self._shelf.text(name)
        if found is None:
            return SHIPPED[name]
        file, text = found
        source = read_template(text, file)
        check(source, file)
        return source

    def save(self, name: str, text: str) -> Path:
        """Write the Jinja text as the user's template `name`, replacing it; its path. Raises NameError_, TemplateError, SettingsError, DataError."""
        file = self._shelf.path(name).name
        source = read_template(text, file)
        check(source, file)
        return self._shelf.write(name, source)

    def delete(self, name: str) -> None:
        """Delete the user's files of that name; a shipped template of the name is there again. Raises NotFound, NameError_, DataError."""
        self._shelf.delete(name)

    @property
    def _shelf(self) -> Shelf:
        return Shelf(self.folder, "instruction template", _SUFFIXES, SHIPPED, MAX_BYTES)
