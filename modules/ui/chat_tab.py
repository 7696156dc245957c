"""The Chat tab: an empty place, filled by `assets/main.js`, and beside it the settings of the conversation shown.

The settings are Gradio's controls of ChatOptions and PageOptions. What a person does there goes through the page's script (`panel.js`).
"""

from __future__ import annotations

import json

import gradio as gr
from gradio.components import Component

from modules.app import App
from modules.options import Knob
from modules.settings import WHO, ChatOptions, PageOptions
from modules.ui.controls import QUIET, Choices, controls, groups, host
from modules.ui.library_routes import styles

_HOOK = "window.tgw.set"
_ELSEWHERE = {"preset", "instruction_template", "character"}
"""Menus: the first two on the Parameters tab, a character's above its fields."""
_LANGUAGES: Choices = (("The browser's", "auto"), ("English", "en"), ("Русский", "ru"))


def build(app: App, tab: gr.Tab) -> dict[str, Component]:
    """Make the tab; returns the controls that show a value in effect, by name."""
    made: dict[str, Component] = {}
    choices: dict[str, Choices] = {"chat_style": [(name, name) for name in styles(app)], "language": _LANGUAGES}
    with gr.Row(elem_id="tgw-chat-row"):
        host("chat", elem_id="tgw-chat")
        with gr.Column(elem_id="tgw-panel", elem_classes="tgw-page"):
            with gr.Row(elem_classes="tgw-panel-head"):
                gr.HTML("Settings of this chat", elem_id="tgw-panel-name", padding=False)
                close = gr.Button("Close", size="md", elem_id="tgw-panel-close")
            for group, knobs in {**groups(ChatOptions), **groups(PageOptions)}.items():
                with gr.Accordion(group, open=True, elem_classes=["tgw-group", *(["tgw-people"] if group == WHO else [])]):
                    if group == WHO:
                        made |= _people(app, {knob.name: knob for knob in knobs})
                    else:
                        made |= controls([knob for knob in knobs if knob.name not in _ELSEWHERE], _HOOK, choices=choices)
    _fresh(made["chat_style"], "styles")
    close.click(None, None, None, js="() => { window.tgw.panel(); }", **QUIET)
    return made


def _people(app: App, knobs: dict[str, Knob]) -> dict[str, Component]:
    """Who speaks: the character's menu and fields, then the user's, then what concerns both."""
    user = [knobs[name] for name in ("name1", "user_bio")]
    character = [knobs[name] for name in ("name2", "context", "greeting")]
    rest = [knob for knob in knobs.values() if knob not in (*user, *character) and knob.name not in _ELSEWHERE]
    made: dict[str, Component] = {"character": _menu(app, "character", app.characters.names()), **controls(character, _HOOK)}
    _menu(app, "user", app.users.names())
    return {**made, **controls(user, _HOOK), **controls(rest, _HOOK)}


def _menu(app: App, kind: str, names: list[str]) -> gr.Dropdown:
    """The menu of the files of one `kind`, "character" or "user", and the buttons to keep what stands in the fields below as such a file."""
    title = kind.capitalize()
    with gr.Row(elem_classes="tgw-inset"):
        menu = gr.Dropdown(
            names,
            value="",
            label=title,
            info=f"Fills in the fields below from a file of the {kind}s folder.",
            interactive=True,
            allow_custom_value=True,  # files come and go while the page is open; the server checks the name
            elem_classes=["tgw-wide", f"tgw-{kind}"],
        )
    _fresh(menu, f"{kind}s")
    menu.select(None, menu, None, js=_call(kind, "choose"), **QUIET)
    if not app.settings.multi_user:  # else nobody changes the files
        with gr.Row(elem_classes="tgw-toolbar tgw-inset"):
            save = gr.Button("Save as…", size="md", elem_classes=f"tgw-save-{kind}")
            delete = gr.Button("Delete…", size="md", elem_classes=f"tgw-delete-{kind}")
        save.click(None, menu, menu, js=_call(kind, "save"), **QUIET)
        delete.click(None, menu, menu, js=_call(kind, "remove"), **QUIET)
    return menu


def _fresh(menu: Component, folder: str) -> None:
    """Let a menu offer the files that are there whenever the script presses a button: when the panel is opened.

    Not when the menu is opened: with a list that changes meanwhile, Gradio takes back what is chosen in it.
    """
    button = gr.Button("", visible="hidden", elem_classes="tgw-lists")
    button.click(None, None, menu, js=f"() => window.tgwPanel.menu({json.dumps(folder)})", **QUIET)


def _call(kind: str, function: str) -> str:
    """JavaScript that calls a function of the page's panel.js with the name in the menu, and shows what it answers."""
    return f"(name) => window.tgwPanel.{function}({json.dumps(kind)}, name)"
