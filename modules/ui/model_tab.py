"""The Model tab: choose, load, watch, unload. Options come from each loader's declarations. Not built in multi-user mode."""

from __future__ import annotations

import json
import re

import gradio as gr
from gradio.components import Component

from modules import loaders
from modules.app import App
from modules.backends.base import Loader
from modules.ui.controls import QUIET, controls, groups, host
from modules.ui.i18n import Words

AUTOMATIC = "Automatic"
_NAMES = "async () => {{ const names = await window.tgw.models(); return {{ __type__: 'update', choices: names.map((name) => [name, name]){} }}; }}"
_READ = _NAMES.format("")
_READ_FIRST = _NAMES.format(", value: window.tgw.modelNow() ?? names[0] ?? null")


def build(app: App, tab: gr.Tab) -> dict[str, Component]:
    """Make the tab; none of its controls belongs to the session."""
    with gr.Column(elem_classes="tgw-page"):
        host("status", elem_id="tgw-status")
        with gr.Row(elem_classes="tgw-choose"):
            model = gr.Dropdown(
                [],
                label="Model",
                info=Words("Put .gguf files into {folder} and press Refresh.", {"folder": app.data.models}),
                interactive=True,
                scale=4,
                elem_classes="tgw-models",
            )
            loader = gr.Dropdown(
                [(AUTOMATIC, ""), *((each.name, each.name) for each in loaders.LOADERS)],
                value=app.settings.loader,
                label="Loader",
                info="Automatic: found from the file",
                interactive=True,
                scale=2,
            )
        _buttons(model, loader)
        tab.select(None, None, model, js=_READ_FIRST, **QUIET)
        for each in loaders.LOADERS:
            _options(app, each)
    return {}


def _buttons(model: gr.Dropdown, loader: gr.Dropdown) -> None:
    with gr.Row(elem_classes="tgw-toolbar"):
        load = gr.Button("Load", variant="primary", size="md", elem_classes="tgw-when-idle")
        cancel = gr.Button("Cancel", variant="stop", size="md", elem_classes="tgw-when-loading")
        unload = gr.Button("Unload", size="md", elem_classes="tgw-when-idle tgw-when-ready")
        refresh = gr.Button("Refresh", size="md")
    load.click(None, [model, loader], None, js="(model, loader) => { window.tgw.loadModel(model, loader); }", **QUIET)
    cancel.click(None, None, None, js="() => { window.tgw.cancelLoad(); }", **QUIET)
    unload.click(None, None, None, js="() => { window.tgw.unloadModel(); }", **QUIET)
    refresh.click(None, None, model, js=_READ, **QUIET)
    loader.change(None, loader, None, js="(loader) => { window.tgw.loader(loader); }", **QUIET)


def _options(app: App, loader: Loader) -> None:
    """The options of `loader`, as configured. The script keeps what is changed here until Load is pressed."""
    values = app.configuration.group(loader.options).model_dump()
    with gr.Column(elem_classes=["tgw-loader", f"loader-{re.sub('[^a-z0-9]+', '-', loader.name.lower())}"]):
        for group, knobs in groups(loader.options).items():
            names = {"loader": loader.name, "group": Words(group)}
            title = Words("Options of {loader}" if group.lower() in ("", loader.name.lower()) else "{loader}: {group}", names)
            with gr.Accordion(title, open=False, elem_classes="tgw-group"):
                controls(knobs, f"window.tgw.option({json.dumps(loader.name)}, ", values)
