"""Settings, and `load`: the one place where configuration comes together. Pure: texts in, values out.

Later wins: declared defaults, the top-level settings.yaml, the user's settings.yaml, the top-level CMD_FLAGS.txt,
the user's CMD_FLAGS.txt, the command line. Classes of options of loaders and samplers are handed in.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import yaml
from pydantic import field_validator

from modules.errors import SettingsError
from modules.options import Options, add_arguments, knob, nearest
from modules.system import split_flags

BASIC, UI, API = "Basic", "Page", "API"
T = TypeVar("T", bound=Options)


class Settings(Options):
    """What concerns the whole server."""

    user_data_dir: str = knob("user_data", "Folder of models, conversations and settings.", group=BASIC, metavar="PATH")
    multi_user: bool = knob(False, "Nothing is kept: conversations end with the server, and only its start decides about the model.", group=BASIC)
    model: str = knob("", "Model to load at start: a name in the model folder, or a path.", group=BASIC, metavar="NAME")
    loader: str = knob("", "Loader to use; found from the file when not given.", group=BASIC, metavar="NAME")
    lora: tuple[str, ...] = knob(
        (),
        "LoRA adapters to use with the model: names in the LoRA folder or paths, each with :SCALE after it if that is not 1.",
        group=BASIC,
        metavar="NAME",
    )
    model_dir: str = knob("", "Folder of models, instead of models/ in the user data.", group=BASIC, metavar="PATH")
    more_model_dirs: tuple[str, ...] = knob((), "Further folders of models, which are listed too.", group=BASIC, metavar="PATH")
    only_own_models: bool = knob(False, "Do not list the models of LM Studio, Ollama and the Hugging Face cache.", group=BASIC)
    lora_dir: str = knob("", "Folder of LoRA adapters, instead of loras/ in the user data.", group=BASIC, metavar="PATH")
    model_menu: bool = knob(False, "Choose the model from a list on the terminal.", group=BASIC)
    settings: str = knob("", "Settings file to use instead of settings.yaml in the user data.", group=BASIC, metavar="PATH")
    extensions: tuple[str, ...] = knob((), "Extensions to load, in this order.", group=BASIC, metavar="NAME", later=True)
    verbose: bool = knob(False, "Print prompts and parameters to the terminal.", group=BASIC)
    idle_timeout: int = knob(0, "Unload the model after so many minutes without use. 0 is never.", bounds=(0, None), group=BASIC, metavar="MINUTES")
    max_loaded_models: int = knob(
        1, "Models in memory at once; the one used least recently goes first.", bounds=(1, 64), group=BASIC, metavar="NUMBER"
    )
    load_last_model: bool = knob(False, "Load the model that was used last at start, unless --model names one.", group=BASIC)
    no_prefill_ahead: bool = knob(False, "Do not compute the prompt while it is typed.", group=BASIC)

    listen: bool = knob(False, "Answer other machines too. Needs a login.", group=UI)
    listen_port: int = knob(0, "Port of the page; by default 7860, or the next free one.", bounds=(0, 65535), group=UI, metavar="PORT")
    allowed_hosts: tuple[str, ...] = knob((), "Further names under which the page may be opened, as behind a proxy.", group=UI, metavar="NAME")
    listen_host: str = knob("", "Address to listen on.", group=UI, metavar="HOST")
    share: bool = knob(False, "Publish the page through Gradio's tunnel. Needs a login.", group=UI)
    auto_launch: bool = knob(False, "Open the page in the browser.", group=UI)
    gradio_auth: str = knob("", 'Logins, as "user:password", separated by commas.', group=UI, metavar="USER:PASSWORD")
    gradio_auth_path: str = knob("", "File with logins, one user:password a line.", group=UI, metavar="PATH")
    ssl_keyfile: str = knob("", "Private key for HTTPS, in PEM form.", group=UI, metavar="PATH")
    ssl_certfile: str = knob("", "Certificate for HTTPS, in PEM form.", group=UI, metavar="PATH")
    subpath: str = knob("", "Path under which a proxy shows the page.", group=UI, metavar="PATH")
    dark_theme: Literal["auto", "on", "off"] = knob("auto", "Colours of the page: auto follows the system.", group=UI)

    api: bool = knob(False, "Serve the OpenAI- and Anthropic-compatible API.", group=API)
    api_port: int = knob(5000, "Port of the API.", bounds=(0, 65535), group=API, metavar="PORT")
    api_key: str = knob("", "Key that API requests must carry.", group=API, metavar="KEY")
    admin_key: str = knob("", "Key for loading and unloading models through the API.", group=API, metavar="KEY")
    cors_origin: tuple[str, ...] = knob((), "Web pages of other origins that may use the API; * for all.", group=API, metavar="ORIGIN")
    api_enable_ipv6: bool = knob(False, "Serve the API over IPv6.", group=API, later=True)
    api_disable_ipv4: bool = knob(False, "Do not serve the API over IPv4.", group=API, later=True)
    public_api: bool = knob(False, "Publish the API through a tunnel.", group=API, later=True)
    public_api_id: str = knob("", "Name of that tunnel.", group=API, metavar="ID", later=True)
    load_on_request: bool = knob(False, "Let a request to the API load the model that it names.", group=API)
    nowebui: bool = knob(False, "Serve the API without the page.", group=API)

    @field_validator("dark_theme", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


MODE, WORDS, WHO, FULL = "Mode", "Instructions", "Who speaks", "Context"


class ChatOptions(Options):
    """What shapes a chat's prompt, besides the sampling parameters. Each conversation keeps its own; a new one begins with this browser's."""

    mode: Literal["instruct", "chat-instruct", "chat"] = knob(
        "instruct",
        "instruct: the model as an assistant. chat: a character speaks. chat-instruct: the assistant is asked to speak as the character.",
        group=MODE,
    )
    preset: str = knob("", "The preset that was chosen last.", group=MODE, flag=False)
    instruction_template: str = knob("", "Chat template to use instead of the model's own.", group=MODE, flag=False)
    custom_system_message: str = knob("", "What the model is told before the conversation.", group=WORDS, flag=False, multiline=True)
    enable_thinking: bool = knob(True, "Let models that can think do so before they answer.", group=WORDS)
    reasoning_effort: Literal["low", "medium", "high"] = knob("medium", "How long such a model should think.", group=WORDS)
    preserve_thinking: bool = knob(False, "Show the model its earlier thinking too.", group=WORDS)
    start_with: str = knob("", "Every reply begins with this text.", group=WORDS, flag=False)
    character: str = knob("", "The character that was chosen last.", group=WHO, flag=False)
    name1: str = knob("You", "Your name.", group=WHO, flag=False)
    user_bio: str = knob("", "What the character knows about you.", group=WHO, flag=False, multiline=True)
    name2: str = knob("AI", "The character's name.", group=WHO, flag=False)
    context: str = knob("", "Who the character is; {{char}} and {{user}} stand for the names.", group=WHO, flag=False, multiline=True)
    greeting: str = knob("", "The character's first message.", group=WHO, flag=False, multiline=True)
    chat_instruct_command: str = knob(
        "This is a conversation between several people. Write what <|character|> says next, and nothing else.\n\n<|prompt|>",
        "What the assistant is asked in chat-instruct mode: <|character|> is the character's name, <|prompt|> the conversation.",
        group=WHO,
        flag=False,
        multiline=True,
    )
    context_full: Literal["drop", "summarise", "stop"] = knob(
        "drop", "When a chat outgrows the context: leave out the oldest messages, let the model summarise them, or say so and stop.", group=FULL
    )


class PageOptions(Options):
    """How the page looks and behaves in one browser."""

    chat_style: str = knob("modern", "Look of the conversation: a shipped style, or your own from the css folder.", group=UI, flag=False)
    language: Literal["auto", "en", "ru"] = knob("auto", "Language of the page; auto is the browser's. Seen when it is loaded again.", group=UI)
    title_by_model: bool = knob(False, "Let the model name a new conversation after its first reply.", group=UI)
    sound: bool = knob(True, "Play the notification file when a reply ends while the page is in the background.", group=UI)


@dataclass(frozen=True)
class Text:
    """The content of a configuration file, and the name to call it by in messages."""

    source: str
    content: str


@dataclass(frozen=True)
class Configuration:
    """Everything that was configured."""

    settings: Settings
    groups: Mapping[type[Options], Options]
    explicit: frozenset[str] = frozenset()
    """Names given by a flag (terminal or CMD_FLAGS.txt): they win over what is stored for a model."""
    unknown: tuple[tuple[str, Any], ...] = ()
    """Keys of the user's settings file that nobody here declares; kept when it is saved."""
    warnings: tuple[str, ...] = ()

    def group(self, options: type[T]) -> T:
        """The configured values of one class of options."""
        found = self.groups[options]
        assert isinstance(found, options)
        return found


def load(argv: Sequence[str], flags_texts: Sequence[Text], yaml_texts: Sequence[Text], groups: Iterable[type[Options]]) -> Configuration:
    """The configuration from the command line, CMD_FLAGS files and settings files (each in rising precedence).

    Raises SettingsError naming the file, the key and the fix. `-h` prints the help and ends the program.
    """
    classes: tuple[type[Options], ...] = (Settings, *groups)
    warnings: list[str] = []
    stored: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for text in yaml_texts:
        known, unknown = _split_known(parse_yaml(text), classes, text.source, warnings)
        _check(known, classes, text.source)
        stored.update(known)
    given: dict[str, Any] = {}
    for text in flags_texts:
        found = parse_flags(split_flags(text.content, text.source), classes, text.source)
        _check(found, classes, text.source)
        given.update(found)
    terminal = parse_flags(argv, classes, "command line")
    _check(terminal, classes, "command line")
    given.update(terminal)
    for name in ("api_key", "admin_key"):
        if given.get(name) == "":  # as of a shell variable that is not set: what was to be locked would be open
            raise SettingsError(f"{_spelling(name)} is empty. Give a key, or leave the flag out.")
    warnings += [
        f"--{name.replace('_', '-')} is not in this version yet and has no effect." for name in {**stored, **given} if _declared(name, classes).later
    ]
    built = _build({**stored, **given}, classes)
    server = built[Settings]
    assert isinstance(server, Settings)
    return Configuration(server, built, frozenset(given), tuple(unknown.items()), tuple(warnings))


def _build(values: Mapping[str, Any], classes: Sequence[type[Options]], source: str = "") -> dict[type[Options], Options]:
    return {cls: cls.build({k: v for k, v in values.items() if k in cls.model_fields}, source) for cls in classes}


_check = _build  # the same reading, for its errors: they name the source at fault


def _declared(name: str, classes: Sequence[type[Options]]) -> Any:
    return next(cls.knobs()[name] for cls in classes if name in cls.model_fields)


def _names(classes: Iterable[type[Options]]) -> set[str]:
    return {name for cls in classes for name in cls.model_fields}


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A name with a hyphen that the earlier system wrote."""
    return {{"chat-instruct_command": "chat_instruct_command"}.get(name, name): value for name, value in values.items()}


def _split_known(
    values: Mapping[str, Any], classes: Sequence[type[Options]], source: str, warnings: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    names = _names(classes)
    unknown = {key: value for key, value in values.items() if key not in names}
    for key in unknown:
        if "-" not in key or key.replace("-", "_") in names:  # else `<extension>-<key>`, which belongs to that extension
            warnings.append(f"{source}: {key!r} is not a setting of this version; it is kept but has no effect.{nearest(key, names)}")
    return {key: value for key, value in values.items() if key in names}, unknown


def parse_yaml(text: Text) -> dict[str, Any]:
    """The mapping in a settings file; empty for an empty one."""
    try:
        found = yaml.safe_load(text.content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that cannot be
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it is not YAML"
        raise SettingsError(f"{text.source}{where}: {problem}. Correct that line, or delete the file to go back to the defaults.") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise SettingsError(f"{text.source}: expected lines of the form 'name: value'. Correct the file, or delete it to go back to the defaults.")
    return _renamed(found)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message[:1].upper()}{message[1:]}. See --help.")


def parser(classes: Iterable[type[Options]]) -> argparse.ArgumentParser:
    """The command line of all `classes`; a flag that several loaders share is added once."""
    result = _Parser(
        prog="server.py",
        usage="python server.py [flags]",
        allow_abbrev=False,
        description="Text Generation Web UI: run and talk to language models on your own machine.",
        epilog="Flags may also stand in CMD_FLAGS.txt and user_data/CMD_FLAGS.txt; hyphens and underscores are the same.",
    )
    seen: set[str] = set()
    for cls in classes:
        add_arguments(result, cls, skip=seen)
        seen |= set(cls.model_fields)
    return result


def parse_flags(words: Sequence[str], classes: Sequence[type[Options]], source: str) -> dict[str, Any]:
    """Values of the flags given, by knob name, not yet validated."""
    normal = [_hyphens(word) for word in words]
    try:
        found, rest = parser(classes).parse_known_args(normal)
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from None
    if rest:
        flags = [_spelling(name) for name in _names(classes)]
        close = nearest(rest[0].split("=")[0].lstrip("-"), [f.lstrip("-") for f in flags]) if rest[0].startswith("-") else ""
        hint = close.replace("'", "--", 1).replace("'", "", 1).replace("_", "-") if close else " See --help."
        raise SettingsError(f"{source}: unknown flag or value {rest[0]!r}.{hint}")
    return vars(found)


def _spelling(name: str) -> str:
    return "--" + name.replace("_", "-")


def _hyphens(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def saved(values: Mapping[str, Any], unknown: Iterable[tuple[str, Any]]) -> str:
    """Text of a settings.yaml with `values` and, after them, the `unknown` keys it had."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return yaml.safe_dump({**plain, **dict(unknown)}, allow_unicode=True, sort_keys=False) if plain or unknown else "{}\n"
