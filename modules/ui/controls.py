"""Options -> Gradio controls. A control tells the page's script its own change and nothing else; no value travels through Gradio."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component

from modules.options import Knob, Options

MAX_STEPS = 200_000  # a slider with more has no usable positions: a number field then
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""For events that a person does not wait for."""
UNPAINTED = "tgw-unpainted"

_NAMES = ["XTC", "DRY", "TFS", "BOS", "EOS", "GPU", "CPU", "RAM", "KV", "MoE", "LLM", "RoPE", "LoRA", "NUMA", "GBNF", "API"]
_SPELLING = {word.lower(): word for word in _NAMES} | {
    "ctx": "context",
    "dynatemp": "dynamic temperature",
    "attn": "attention",
    "freq": "frequency",
    "pos": "positional",
    "emb": "embeddings",
    "spec": "speculation",
    "ngram": "n-gram",
    "mmproj": "vision part (mmproj)",
    "name1": "your name",
    "name2": "character's name",
}


def host(kind: str, inner: str = "", **properties: Any) -> gr.HTML:
    """An empty place that the page's script fills, at each mount: window.tgw.mount(kind, element)."""
    mount = f"(window.tgwHosts ??= []).push([{json.dumps(kind)}, element]); window.tgw?.mount({json.dumps(kind)}, element);"
    return gr.HTML(inner, js_on_load=mount, apply_default_css=False, **properties)


def span(control: Component) -> dict[str, Any]:
    """What the page's script must know to let `control` show a value (shownAs in core.js), and from now on it is not seen before it shows one.

    Gradio draws a tab or an accordion when it is first opened, and writes into its controls a moment later what it drew: whatever somebody
    chose in that moment would be lost. The value and the class that lets the control be seen are written after it (whenDrawn in core.js).
    """
    classes = list(control.elem_classes or ())
    control.elem_classes = [*classes, UNPAINTED]
    if isinstance(control, gr.Slider):
        return {"classes": classes, "range": [control.minimum, control.maximum]}
    return {"classes": classes}


def label(knob: Knob) -> str:
    """The knob's name as a heading: abbreviations in their usual spelling, the first letter large."""
    text = " ".join(_SPELLING.get(word, word) for word in knob.label.split())
    return text[:1].upper() + text[1:]


def groups(options: type[Options]) -> dict[str, list[Knob]]:
    """The knobs that have an effect in this version and may be set in the page, by group, in order of declaration."""
    found: dict[str, list[Knob]] = {}
    for knob in options.knobs().values():
        if not knob.later and not knob.start_only:
            found.setdefault(knob.group, []).append(knob)
    return found


Choices = Sequence[tuple[str, Any]]
"""What a menu offers: a text and the value that it stands for."""


def controls(
    knobs: Iterable[Knob],
    hook: str,
    values: Mapping[str, Any] | None = None,
    extra_class: str = "",
    choices: Mapping[str, Choices] | None = None,
) -> dict[str, Component]:
    """A control for each of `knobs`, by name. `choices`: what those offer whose declaration does not say it, or does not say it in words."""
    given = values or {}
    return {knob.name: control(knob, hook, given.get(knob.name, knob.default), extra_class, (choices or {}).get(knob.name, ())) for knob in knobs}


def control(knob: Knob, hook: str, value: Any, extra_class: str = "", choices: Choices = ()) -> Component:
    """The control of `knob`, showing `value`. Its CSS class is knob-<name>.

    At each change by a person it calls the JavaScript `hook(name, value)`; `hook` may be a call that lacks its last two arguments: `f("a", `.
    """
    built = _component(knob, shown(value), [f"knob-{knob.name}", *extra_class.split()], choices or [(str(each), each) for each in knob.choices])
    opened = hook if "(" in hook else f"{hook}("
    call = f"(value) => {{ {opened}{json.dumps(knob.name)}, {_reading(knob, built)}); }}"
    # A text is told when it is complete: half a quoted string is not a valid value.
    for event in (built.blur, built.submit) if isinstance(built, gr.Textbox) else (built.input,):
        event(None, built, None, js=call, **QUIET)
    return built


def shown(value: Any) -> Any:
    """`value` as a control shows it: a list is one item a line."""
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else value


def _reading(knob: Knob, built: Component) -> str:
    """JavaScript from what a control tells to what is posted."""
    if isinstance(built, gr.Slider):  # it tells what was typed and then shows that within its range, which the page's script may have stretched
        return f"window.tgwPanel.within({json.dumps(knob.name)}, value, {built.minimum}, {built.maximum})"
    if knob.type is list:
        return 'value.split("\\n").map((line) => line.trim()).filter(Boolean)'
    return "value"


def _component(knob: Knob, value: Any, classes: list[str], choices: Choices) -> Component:
    lines = 3 if knob.multiline or knob.type is list else 1
    classes = [*classes, "tgw-wide"] if lines > 1 else classes
    common: dict[str, Any] = {"label": label(knob), "info": knob.help, "elem_classes": classes, "interactive": True}
    if knob.choices:
        return (gr.Radio if len(choices) <= 4 else gr.Dropdown)(list(choices), value=value, **common)
    if choices:  # files, which come and go: one that is chosen and gone is shown all the same
        return gr.Dropdown(list(choices), value=value, allow_custom_value=True, **common)
    if knob.type is bool:
        return gr.Checkbox(value, **common)
    if knob.type in (int, float):
        return _number(knob, value, common)
    return gr.Textbox(value, lines=lines, max_lines=12 if lines > 1 else 1, **common)


def _number(knob: Knob, value: Any, common: dict[str, Any]) -> Component:
    low, high, step = knob.range or (*knob.bounds, 1 if knob.type is int else 0.01)
    if knob.range and (knob.range[1] - knob.range[0]) / knob.range[2] <= MAX_STEPS:
        return gr.Slider(low, high, value, step=step, buttons=[], **common)
    return gr.Number(value, minimum=low, maximum=high, step=step, precision=0 if knob.type is int else None, **common)
