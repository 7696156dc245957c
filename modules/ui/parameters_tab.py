"""The Parameters tab: every chat option and sampling parameter of this browser's session, from their declarations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from modules.app import App
from modules.samplers import CURVE, CUTOFF, LENGTH, NEUTRAL, REPETITION, TOKENS, SamplingParams
from modules.settings import ChatOptions
from modules.ui.controls import QUIET, controls, groups, shown

_HOOK = "window.tgw.set"
_OPEN = {CURVE, CUTOFF, LENGTH, REPETITION}
"""Groups that most people use."""


def build(app: App, tab: gr.Tab) -> dict[str, Component]:
    """Make the tab; returns all its controls by name."""
    made: dict[str, Component] = {}
    with gr.Column(elem_classes="tgw-page"):
        buttons = _buttons()
        for options, extra in ((ChatOptions, ""), (SamplingParams, "tgw-sampler")):
            for group, knobs in groups(options).items():
                with gr.Accordion(group, open=options is ChatOptions or group in _OPEN, elem_classes="tgw-group"):
                    made |= controls(knobs, _HOOK, extra_class=extra)
    defaults = {**app.configuration.group(SamplingParams).model_dump(), **app.configuration.group(ChatOptions).model_dump()}
    for button, values in zip(buttons, (_neutral(), defaults), strict=True):
        _set_all(button, {name: value for name, value in values.items() if name in made}, made)
    return made


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
