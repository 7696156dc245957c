"""The Chat tab: one empty place. The list, the messages and the composer in it are made by `assets/main.js`."""

from __future__ import annotations

import gradio as gr
from gradio.components import Component

from modules.app import App
from modules.ui.controls import host


def build(app: App, tab: gr.Tab) -> dict[str, Component]:
    """Make the tab; it has no control of the session."""
    host("chat", elem_id="tgw-chat")
    return {}
