"""A knob is declared once; argparse, YAML, the page's controls, the API schema and the documentation read that declaration.

    class Example(Options):
        temperature: float = knob(1.0, "Divides the logits.", range=(0.01, 5, 0.01), bounds=(0, None), group="Curve shape")

This module knows the shape of a declaration and its readers, not a single name of a setting.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from typing_extensions import Self

from modules.errors import SettingsError

LONGEST_CELL = 40
"""Characters of a default in a table; longer ones stand below it."""


def knob(
    default: Any,
    help: str,
    *,
    range: tuple[float, float, float] | None = None,
    bounds: tuple[float | None, float | None] = (None, None),
    group: str = "",
    source: str = "",
    flags: tuple[str, ...] = (),
    flag: bool = True,
    metavar: str = "",
    multiline: bool = False,
    later: bool = False,
    file: str = "",
    start_only: bool = False,
) -> Any:
    """Declare one option, as the default value of a field of an Options class.

    `range` is (minimum, maximum, step) of the control in the page; `bounds` are the hard limits everywhere, None for none.
    `source` names a paper or specification. `flags` are further spellings of the command-line flag; `flag=False` gives it none.
    `later` marks a name kept from the earlier system whose capability is not here yet: it is accepted, with a warning. `file` marks the name of
    a file and says of which kind (see `UserData.file`); where the value comes from the page it is a name, never a path. `start_only` marks
    what only who starts the server may decide, because it weakens protection: neither the page nor the API offers or takes it.
    """
    low, high = bounds
    extra: Any = {
        "group": group,
        "range": range,
        "source": source,
        "flags": flags,
        "flag": flag,
        "metavar": metavar,
        "multiline": multiline,
        "later": later,
        "file": file,
        "start_only": start_only,
    }
    return Field(default, description=help, ge=low, le=high, json_schema_extra={"knob": extra})


@dataclass(frozen=True)
class Knob:
    """One declared option, as its readers see it."""

    name: str
    type: Any
    """`bool`, `int`, `float`, `str` or `list`."""
    default: Any
    help: str
    choices: tuple[Any, ...] = ()
    range: tuple[float, float, float] | None = None
    bounds: tuple[float | None, float | None] = (None, None)
    group: str = ""
    source: str = ""
    flags: tuple[str, ...] = ()
    flag: bool = True
    metavar: str = ""
    multiline: bool = False
    later: bool = False
    file: str = ""
    start_only: bool = False

    @property
    def label(self) -> str:
        """The name as a person reads it."""
        return self.name.replace("_", " ")


def _knob(name: str, field: FieldInfo) -> Knob:
    annotation = field.annotation
    choices = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()
    kind = type(choices[0]) if choices else typing.get_origin(annotation) or annotation
    extra = field.json_schema_extra["knob"] if isinstance(field.json_schema_extra, dict) else {}
    limits = {type(m).__name__: m for m in field.metadata}
    low, high = getattr(limits.get("Ge"), "ge", None), getattr(limits.get("Le"), "le", None)
    return Knob(
        name,
        list if kind in (list, tuple) else kind,
        field.get_default(call_default_factory=True),
        field.description or "",
        choices,
        bounds=(low, high),
        **typing.cast(dict[str, Any], extra),
    )


class Options(BaseModel):
    """Base of every class of options: frozen, no unknown names, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _no_switches(cls, values: Any) -> Any:
        # pydantic would read true as 1
        for name in cls.model_fields.keys() & dict(values).keys():
            if isinstance(values[name], bool) and cls.model_fields[name].annotation in (int, float):
                raise ValueError(f"{name} cannot be {str(values[name]).lower()}. {_allowed(cls.knobs()[name])}")
        return values

    @model_validator(mode="after")
    def _finite(self) -> Self:
        for name, value in self:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} cannot be {value}. {_allowed(self.knobs()[name])}")
        return self

    @classmethod
    def knobs(cls) -> dict[str, Knob]:
        """The declared options by name, in order of declaration."""
        return {name: _knob(name, field) for name, field in cls.model_fields.items()}

    @classmethod
    def build(cls, values: Mapping[str, Any], source: str = "") -> Self:
        """An instance from `values`; raises SettingsError naming the option, the value, what is allowed and the `source`."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise SettingsError("\n".join(cls._explain(e, source) for e in error.errors())) from None

    @classmethod
    def _explain(cls, error: Any, source: str) -> str:
        name = str(error["loc"][0]) if error["loc"] else ""
        where = f"{source}: " if source else ""
        knobs = cls.knobs()
        if error["type"] == "extra_forbidden":
            return f"{where}unknown option {name!r}.{nearest(name, knobs)}"
        if name not in knobs:
            return where + error["msg"].removeprefix("Value error, ")
        fix = _sentence(error["msg"]) if error["type"] == "value_error" else _allowed(knobs[name])
        return f"{where}{name} cannot be {_shown(error['input'])}. {fix}"

    def replace(self, values: Mapping[str, Any], source: str = "") -> Self:
        """A copy with `values` changed; same errors as `build`."""
        return self.build({**self.model_dump(), **values}, source)

    def differences(self) -> dict[str, Any]:
        """The values that differ from the declared defaults."""
        return {name: value for name, value in self.model_dump().items() if value != type(self).model_fields[name].get_default()}


def _sentence(message: str) -> str:
    text = message.removeprefix("Value error, ")
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _allowed(knob: Knob) -> str:
    if knob.choices:
        return f"Use one of: {', '.join(map(str, knob.choices))}."
    if knob.type is bool:
        return "Use true or false."
    if knob.type is list:
        return "Use a list of texts."
    words = {int: "a whole number", float: "a number", str: "a text"}.get(knob.type, "another value")
    low, high = knob.bounds
    limits = [f"of at least {low}"] if low is not None else []
    limits += [f"of at most {high}"] if high is not None else []
    return f"Use {words}{' ' if limits else ''}{' and '.join(limits)}."


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean …?' with the nearest of `names`, or ''."""
    found = difflib.get_close_matches(name.replace("-", "_"), [n.replace("-", "_") for n in names], n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""


# --- command line -------------------------------------------------------------------------------------------------------------------


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, options: type[Options], skip: Iterable[str] = ()) -> None:
    """Add a flag for each knob not in `skip`, in the knobs' groups. Only flags given appear in the parsed namespace, not validated."""
    groups: dict[str, argparse._ArgumentGroup] = {g.title or "": g for g in parser._action_groups}
    for knob in options.knobs().values():
        if not knob.flag or knob.name in skip:
            continue
        group = groups.get(knob.group) or groups.setdefault(knob.group, parser.add_argument_group(knob.group))
        names = [_flag(knob.name), *(_flag(spelling.lstrip("-")) for spelling in knob.flags)]
        text = (_meaning(knob) + _default_shown(knob)).replace("%", "%%")
        if knob.type is bool and not knob.name.startswith("no_"):
            group.add_argument(*names, action=argparse.BooleanOptionalAction, dest=knob.name, default=argparse.SUPPRESS, help=text)
        elif knob.type is bool:
            group.add_argument(*names, action="store_true", dest=knob.name, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(
                *names,
                dest=knob.name,
                default=argparse.SUPPRESS,
                help=text,
                nargs="+" if knob.type is list else None,
                metavar=knob.metavar or ("{" + ",".join(map(str, knob.choices)) + "}" if knob.choices else knob.type.__name__.upper()),
            )


def _default_shown(knob: Knob) -> str:
    if knob.type is bool or knob.default in ("", [], ()):
        return ""
    return f" (default: {' '.join(knob.default) if knob.type is list else knob.default})"


def _meaning(knob: Knob) -> str:
    return knob.help + (" [not in this version yet]" if knob.later else "")


# --- YAML and documentation ---------------------------------------------------------------------------------------------------------


def yaml_template(options: type[Options]) -> str:
    """Every key with its meaning, default and allowed values, commented out: the tracked settings.yaml."""
    lines: list[str] = []
    group = None
    for knob in options.knobs().values():
        if knob.group != group:
            group = knob.group
            lines += ["", f"# --- {group} ---"]
        allowed = " " + _allowed(knob) if knob.choices or knob.bounds != (None, None) else ""
        lines += [f"# {_meaning(knob)}{allowed}", f"# {knob.name}: {_yaml_value(knob.default)}"]
    return "\n".join(lines) + "\n"


def _yaml_value(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def markdown_table(options: type[Options]) -> str:
    """The documentation's table of a class of options."""
    rows = ["| Name | Default | Range | Meaning |", "| --- | --- | --- | --- |"]
    for knob in options.knobs().values():
        meaning = _meaning(knob) + (f" ({knob.source})" if knob.source else "")
        rows.append(f"| `{knob.name}` | {_cell(knob.default)} | {_range_cell(knob)} | {_escaped(meaning)} |")
    long = [knob for knob in options.knobs().values() if len(_yaml_value(knob.default)) > LONGEST_CELL]
    rows += [f"\nDefault of `{knob.name}`: `{_yaml_value(knob.default)}`" for knob in long]
    return "\n".join(rows) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _cell(value: Any) -> str:
    text = _yaml_value(value)
    return _escaped(f"`{text}`") if len(text) <= LONGEST_CELL else "see below"


def _range_cell(knob: Knob) -> str:
    if knob.choices:
        return ", ".join(f"`{c}`" for c in knob.choices)
    return f"{knob.range[0]} – {knob.range[1]}, step {knob.range[2]}" if knob.range else ""
