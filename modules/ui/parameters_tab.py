"""The Parameters tab: presets, every sampling parameter of the conversation shown, and its instruction template.

What a person does here goes through the page's script (`window.tgw`, library.js) to library_routes.py and routes.py, never through Gradio.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component

from modules.app import App
from modules.presets import NAMES
from modules.samplers import CURVE, CUTOFF, LENGTH, NEUTRAL, REPETITION, TOKENS, SamplingParams
from modules.ui.controls import QUIET, controls, groups, shown
from modules.ui.library_routes import grammars

_HOOK = "window.tgw.set"
_OPEN = {CURVE, CUTOFF, LENGTH, REPETITION}
"""Groups that most people use."""
_EXAMPLE = "What the model is sent, with a short conversation; a changed text is in use once it is saved"


def build(app: App, tab: gr.Tab) -> dict[str, Component]:
    """Make the tab; returns all its controls that show a value in effect, by name."""
    made: dict[str, Component] = {}
    keeps = not app.settings.multi_user  # else nobody changes the files
    with gr.Column(elem_classes="tgw-page"):
        with _group("Preset", True):
            preset, keep = _presets(app, keeps)
        neutral, defaults = _buttons()
        for group, knobs in groups(SamplingParams).items():
            with _group(group, group in _OPEN):
                made |= controls(knobs, _HOOK, extra_class="tgw-sampler")
                if group == TOKENS:
                    grammar = _grammar(app, made["grammar_string"])
        with _group("Instruction template", False):
            template, text, example = _template(app, keeps)
    if keep:
        keep.saves([made[name] for name in NAMES], f"{{ values: Object.fromEntries({json.dumps(NAMES)}.map((name, i) => [name, given[i]])) }}")
    opened = [preset, grammar, template, text, example]
    tab.select(None, [template, text], opened, js=_call("name, text", "open(name, text)"), **QUIET)
    for button, values in ((neutral, _neutral()), (defaults, app.configuration.group(SamplingParams).model_dump())):
        _set_all(button, {name: value for name, value in values.items() if name in made}, made)
    return {**made, "preset": preset, "instruction_template": template}


def _group(title: str, open: bool) -> gr.Accordion:
    return gr.Accordion(title, open=open, elem_classes="tgw-group")


def _call(arguments: str, call: str) -> str:
    """JavaScript that calls the page's library.js and shows what it answers."""
    return f"({arguments}) => window.tgw.library.{call}"


def _menu(names: Sequence[str | tuple[str, str]], title: str, info: str) -> gr.Dropdown:
    """A menu of files. Any name can be written, because files come and go while the page is open; the server checks it."""
    return gr.Dropdown(list(names), value="", label=title, info=info, interactive=True, allow_custom_value=True, elem_classes="tgw-wide")


class _Keep:
    """The buttons to save and delete files of one kind: what is chosen in a menu, or a new name written there."""

    def __init__(self, kind: str, menu: gr.Dropdown) -> None:
        self.kind, self.menu = json.dumps(kind), menu
        with gr.Row(elem_classes="tgw-toolbar tgw-inset"):
            self.save = gr.Button("Save", size="md", elem_classes=f"tgw-save-{kind}")
            delete = gr.Button("Delete", size="md", elem_classes=f"tgw-delete-{kind}")
            sure = gr.Button("Delete for good", size="md", variant="stop", visible=False, elem_classes=f"tgw-sure-{kind}")
            keep = gr.Button("Keep it", size="md", visible=False, elem_classes=f"tgw-keep-{kind}")
        asked = [delete, sure, keep]
        menu.input(None, None, asked, js=_call("", "ask(false)"), **QUIET)  # who chooses another one was asked about the former
        delete.click(None, menu, asked, js=_call("name", "ask(Boolean(name))"), **QUIET)
        keep.click(None, None, asked, js=_call("", "ask(false)"), **QUIET)
        sure.click(None, menu, [menu, *asked], js=_call("name", f"remove({self.kind}, name)"), **QUIET)

    def saves(self, inputs: Sequence[Component], body: str) -> None:
        """Let Save send `body`: JavaScript in which `given` are the values of `inputs`."""
        self.save.click(None, [self.menu, *inputs], self.menu, js=_call("name, ...given", f"save({self.kind}, name, {body})"), **QUIET)


def _presets(app: App, keeps: bool) -> tuple[gr.Dropdown, _Keep | None]:
    hint = " Write a new name to save the values below under it." * keeps
    menu = _menu(app.presets.names(), "Preset", "Sets all samplers at once; what it does not name is off." + hint)
    menu.input(None, menu, None, js=_call("name", "preset(name)"), **QUIET)
    return menu, _Keep("presets", menu) if keeps else None


def _grammar(app: App, text: Component) -> gr.Dropdown:
    menu = _menu(grammars(app).names(), "Grammar file", "Copies a .gbnf file of the grammars folder into the grammar.")
    menu.input(None, menu, text, js=_call("name", "grammar(name)"), **QUIET)
    return menu


def _template(app: App, keeps: bool) -> tuple[gr.Dropdown, gr.Textbox, gr.Textbox]:
    """How messages become the text that the model continues: chosen, shown, tried on an example, saved."""
    hint = " Write a new name to save the text under it." * keeps
    menu = _menu([("The model’s own", ""), *app.templates.names()], "Template", "Turns messages into the model's prompt." + hint)
    keep = _Keep("templates", menu) if keeps else None
    with gr.Row(elem_classes="tgw-inset"):
        with gr.Column(min_width=300):
            text = gr.Textbox(label="Text", info="Jinja2", lines=16, max_lines=24, interactive=keeps, elem_classes="tgw-mono tgw-template-text")
        with gr.Column(min_width=300):
            example = gr.Textbox(
                label="Example", info=_EXAMPLE, lines=16, max_lines=24, interactive=False, elem_classes="tgw-mono tgw-template-example"
            )
    menu.input(None, menu, [text, example], js=_call("name", "choose(name)"), **QUIET)
    if keep:
        keep.saves([text], "{ text: given[0] ?? '' }")
        text.blur(None, text, example, js=_call("text", "tried(text)"), **QUIET)
    return menu, text, example


def _neutral() -> Mapping[str, Any]:
    """Values that switch every sampler off; length, seed, tokens and texts are left alone."""
    knobs = SamplingParams.knobs().values()
    samplers = {knob.name for knob in knobs if knob.type in (int, float, bool) and knob.group not in (LENGTH, TOKENS)}
    return {name: value for name, value in NEUTRAL.model_dump().items() if name in samplers}


def _buttons() -> tuple[gr.Button, gr.Button]:
    with gr.Row(elem_classes="tgw-toolbar"):
        neutral = gr.Button("Neutralise samplers", size="md")
        defaults = gr.Button("Restore defaults", size="md")
        save = gr.Button("Save as defaults", size="md")
        only = gr.Checkbox(False, label="Only what this model's loader uses", container=False, elem_classes="tgw-filter")
    save.click(None, None, None, js="() => { window.tgw.save(); }", **QUIET)
    only.input(None, only, None, js="(on) => { window.tgw.filter(on); }", **QUIET)
    return neutral, defaults


def _set_all(button: gr.Button, values: Mapping[str, Any], made: Mapping[str, Component]) -> None:
    """A click posts `values` and shows them, in the browser alone."""
    posted, seen = json.dumps(values), json.dumps([shown(value) for value in values.values()])
    button.click(None, None, [made[name] for name in values], js=f"() => {{ window.tgw.setMany({posted}); return {seen}; }}", **QUIET)
