"""The Model tab: choose, look at, load, watch, unload; adapters, downloads, conversions. Not built in multi-user mode.

Options come from each loader's declarations. What a person does here goes through the page's script (`window.tgwModel`, models.js) to
model_routes.py and download_routes.py, never through Gradio.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import gradio as gr
from gradio.components import Component

from modules import loaders
from modules.app import App
from modules.backends.base import Loader
from modules.ui.controls import QUIET, controls, groups, host, span
from modules.ui.i18n import Words

AUTOMATIC = "Automatic"
OWN_TEMPLATE = "The model’s own"
_SECTIONS = {
    "adapters": "LoRA adapters",
    "downloads": "Download a model",
    "conversions": "Convert a model",
}
"""Places that the page's script fills, with their headings."""


def build(app: App, tab: gr.Tab) -> dict[str, Component]:
    """Make the tab; none of its controls belongs to the session."""
    with gr.Column(elem_classes="tgw-page"):
        host("status", elem_id="tgw-status")
        model, loader, template = _menus(app)
        buttons = _buttons()
        host("card", elem_id="tgw-model-card")
        host("memory", elem_id="tgw-model-memory")
        made = {each.name: _options(app, each) for each in loaders.LOADERS}
        for kind, title in _SECTIONS.items():
            with gr.Accordion(title, open=kind == "downloads" and not app.models.names(), elem_classes="tgw-group"):
                host(kind, elem_classes="tgw-inset")
    for event in (tab.select, buttons["Refresh"].click):
        event(None, loader, [model, template], js=_call("open(loader)", "loader"), **QUIET)
    _repaint(model, loader, template, made)
    return {}


def _call(call: str, argument: str = "") -> str:
    """JavaScript that calls the page's models.js and shows what it answers."""
    return f"({argument}) => window.tgwModel.{call}"


def _menus(app: App) -> tuple[gr.Dropdown, gr.Dropdown, gr.Dropdown]:
    found = [(AUTOMATIC, ""), *((each.name, each.name) for each in loaders.LOADERS)]
    own = [(OWN_TEMPLATE, ""), *((name, name) for name in app.templates.names())]
    with gr.Row(elem_classes="tgw-choose"):
        hint = Words("Put .gguf files, or folders of models, into {folder} and press Refresh.", {"folder": app.data.models})
        model = gr.Dropdown([], label="Model", info=hint, interactive=True, scale=4, elem_classes="tgw-models")
        loader = gr.Dropdown(
            found,
            value=app.settings.loader,
            label="Loader",
            info="Automatic: found from the file",
            interactive=True,
            scale=2,
            elem_classes="tgw-loaders",
        )
        template = gr.Dropdown(
            own, value="", label="Template", info="Where a chat has none of its own", interactive=True, scale=2, elem_classes="tgw-templates"
        )
    model.input(None, model, None, js=_call("choose(name)", "name"), **QUIET)
    loader.input(None, loader, None, js=_call("useLoader(name)", "name"), **QUIET)
    template.input(None, template, None, js=_call("useTemplate(name)", "name"), **QUIET)
    return model, loader, template


def _buttons() -> dict[str, gr.Button]:
    """The buttons below the menus, by their text."""
    made = {}
    with gr.Row(elem_classes="tgw-toolbar"):
        for text, call, classes, variant in (
            ("Load", "load()", "tgw-when-idle tgw-when-chosen", "primary"),
            ("Cancel", "cancel()", "tgw-when-loading", "stop"),
            ("Unload", "unload()", "tgw-when-idle tgw-when-ready", "secondary"),
            ("Reload", "reload()", "tgw-when-idle tgw-when-ready", "secondary"),
            ("Save settings", "save()", "tgw-when-chosen", "secondary"),
            ("Forget settings", "restore()", "tgw-when-chosen", "secondary"),
            ("Refresh", "", "", "secondary"),
            ("Delete…", "remove()", "tgw-when-own", "secondary"),
        ):
            made[text] = gr.Button(text, variant=variant, size="md", elem_classes=classes.split())
            if call:
                made[text].click(None, None, None, js=f"() => {{ window.tgwModel.{call}; }}", **QUIET)
    return made


def _options(app: App, loader: Loader) -> dict[str, Component]:
    """The options of `loader`, as configured. The script keeps what is changed here until Load is pressed."""
    values = app.configuration.group(loader.options).model_dump()
    made: dict[str, Component] = {}
    with gr.Column(elem_classes=["tgw-loader", f"loader-{re.sub('[^a-z0-9]+', '-', loader.name.lower())}"]):
        for group, knobs in groups(loader.options).items():
            names = {"loader": loader.name, "group": Words(group)}
            title = Words("Options of {loader}" if group.lower() in ("", loader.name.lower()) else "{loader}: {group}", names)
            with gr.Accordion(title, open=False, elem_classes="tgw-group"):
                made |= controls(knobs, f"window.tgw.option({json.dumps(loader.name)}, ", values)
    return made


def _repaint(model: gr.Dropdown, loader: gr.Dropdown, template: gr.Dropdown, made: Mapping[str, Mapping[str, Component]]) -> None:
    """Let the controls show what models.js knows of the chosen model, whenever it presses the button."""
    again = gr.Button("", visible="hidden", elem_id="tgw-model-repaint")
    shown = [control for of_loader in made.values() for control in of_loader.values()]
    spans = {each: {name: span(control) for name, control in of_loader.items()} for each, of_loader in made.items()}
    again.click(None, None, [model, loader, template, *shown], js=_call(f"show({json.dumps(spans)})"), **QUIET)
