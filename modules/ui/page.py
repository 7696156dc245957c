"""The page: header, one tab a row of TABS, appearance. Building it needs no model and starts nothing.

    page = build_page(app)
    server.add_middleware(Speaking, values=session_values)
    gr.mount_gradio_app(server, page, path="/", **appearance(), ssr_mode=False, run_history=False, …)

The server serves the files of ASSETS as `assets/<fingerprint>/<name>`, before Gradio's own `assets/`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from modules.app import App
from modules.ui import ASSETS, chat_tab, gradio_api, model_tab, parameters_tab
from modules.ui.controls import QUIET, host, span
from modules.ui.i18n import translate

TITLE = "Text Generation Web UI"


@dataclass(frozen=True)
class Tab:
    """One tab. `build` makes its contents in it and returns the controls that show this browser's session, by name."""

    label: str
    build: Callable[[App, gr.Tab], dict[str, Component]]
    administration: bool = False
    """Concerns the whole server: not built in multi-user mode."""


TABS = (
    Tab("Chat", chat_tab.build),
    Tab("Parameters", parameters_tab.build),
    Tab("Model", model_tab.build, administration=True),
)


def build_page(app: App, who: gradio_api.Who | None = None) -> gr.Blocks:
    """The page of `app`, in English for a server without `i18n.Speaking`. With `who`, also the endpoints of Gradio's API."""
    with gr.Blocks(title=TITLE, fill_width=True, analytics_enabled=False) as page:
        host("header", f'<div data-theme="{app.settings.dark_theme}"></div>', elem_id="tgw-header")
        made: dict[str, Component] = {}
        with gr.Tabs(elem_id="tgw-tabs"):
            for tab in TABS:
                if not (tab.administration and app.settings.multi_user):
                    with gr.Tab(tab.label, id=tab.label.lower(), elem_id=f"tgw-tab-{tab.label.lower()}") as place:
                        made |= tab.build(app, place)
        _repaint(page, made)
        if who:
            gradio_api.add_endpoints(app, who)
    translate(page)
    page.queue(max_size=gradio_api.MAX_QUEUE)
    return page


def _repaint(page: gr.Blocks, made: Mapping[str, Component]) -> None:
    """Let the controls show the values in effect, which the page's script knows, whenever it presses the button."""
    again = gr.Button("", visible="hidden", elem_id="tgw-repaint")
    spans = {name: span(control) for name, control in made.items()}
    again.click(None, None, list(made.values()), js=f"() => window.tgwPanel.show({json.dumps(spans)})", **QUIET)
    page.load(None, None, None, js="() => { window.tgwControls = true; window.tgw?.controls(); }", **QUIET)


def appearance() -> dict[str, Any]:
    """Theme, script and stylesheet, and no footer, as keyword arguments of `gr.mount_gradio_app`."""
    base = f"assets/{_fingerprint()}"
    styles = "".join(f'<link rel="stylesheet" href="{base}/{name}.css">' for name in ("style", "list", "messages", "composer", "models"))
    return {
        "theme": Theme(),
        "footer_links": [],
        "head": f'{styles}<script type="module" src="{base}/main.js"></script><meta name="color-scheme" content="light dark">',
    }


def _fingerprint() -> str:
    """Part of every asset's address. Changes with any of them, so that browsers may keep them for good and never mix two versions."""
    files = sorted(path for path in ASSETS.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


_TEAL = gr.themes.Color(
    "#eefaf8", "#d3f2ed", "#a8e4db", "#71cfc4", "#3fb3a8", "#1f978d", "#0f7a72", "#0f625d", "#124f4c", "#12413f", "#062725", "teal"
)
_STONE = gr.themes.Color(
    "#f8f8f6", "#f1f1ee", "#e5e5e1", "#d3d3ce", "#a3a39d", "#6d6d68", "#575753", "#3c3c39", "#2a2a28", "#1c1c1b", "#141413", "stone"
)


class Theme(gr.themes.Base):
    """Our colours, light and dark, with fonts of the reader's system: nothing is fetched from elsewhere. style.css uses the same variables."""

    def __init__(self) -> None:
        super().__init__(
            primary_hue=_TEAL,
            secondary_hue=_TEAL,
            neutral_hue=_STONE,
            radius_size=gr.themes.sizes.radius_md,
            font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"),
            font_mono=("ui-monospace", "SFMono-Regular", "Cascadia Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"),
        )
        self.name = "tgw"
        self.set(
            body_background_fill="#ffffff",
            body_background_fill_dark="#1c1c1b",
            body_text_color="#1f1f1d",
            body_text_color_dark="#e9e9e5",
            body_text_color_subdued="*neutral_500",
            body_text_color_subdued_dark="*neutral_400",
            background_fill_primary="#ffffff",
            background_fill_primary_dark="*neutral_900",
            background_fill_secondary="*neutral_50",
            background_fill_secondary_dark="*neutral_950",
            border_color_primary="*neutral_200",
            border_color_primary_dark="*neutral_700",
            border_color_accent="*primary_600",
            border_color_accent_dark="*primary_400",
            color_accent="*primary_600",
            color_accent_soft="*primary_50",
            color_accent_soft_dark="*primary_900",
            link_text_color="*primary_700",
            link_text_color_dark="*primary_300",
            block_background_fill="transparent",
            block_background_fill_dark="transparent",
            block_border_width="0px",
            block_border_width_dark="0px",
            block_shadow="none",
            block_label_text_color="*body_text_color",
            block_title_text_color="*body_text_color",
            block_title_text_color_dark="*body_text_color",
            block_title_text_weight="500",
            block_info_text_color="*body_text_color_subdued",
            block_info_text_color_dark="*body_text_color_subdued",
            input_background_fill="#ffffff",
            input_background_fill_dark="*neutral_800",
            input_border_color="*neutral_300",
            input_border_color_dark="*neutral_700",
            input_border_color_focus="*primary_600",
            input_border_color_focus_dark="*primary_400",
            input_border_width="1px",
            input_border_width_dark="1px",
            input_shadow="none",
            input_shadow_focus="none",
            checkbox_border_color="*neutral_400",
            checkbox_border_color_dark="*neutral_500",
            checkbox_background_color_selected="*primary_600",
            checkbox_background_color_selected_dark="*primary_600",
            checkbox_border_color_selected="*primary_600",
            checkbox_border_color_selected_dark="*primary_600",
            slider_color="*primary_600",
            slider_color_dark="*primary_400",
            button_primary_background_fill="*primary_600",
            button_primary_background_fill_dark="*primary_600",
            button_primary_background_fill_hover="*primary_700",
            button_primary_background_fill_hover_dark="*primary_500",
            button_primary_text_color="#ffffff",
            button_primary_text_color_dark="#ffffff",
            button_secondary_background_fill="*neutral_100",
            button_secondary_background_fill_dark="*neutral_800",
            button_secondary_background_fill_hover="*neutral_200",
            button_secondary_background_fill_hover_dark="*neutral_700",
            button_secondary_text_color="*body_text_color",
            button_secondary_text_color_dark="*body_text_color",
            button_border_width="0px",
            button_medium_radius="*radius_lg",
            button_large_radius="*radius_lg",
            button_large_text_size="*text_md",
            button_large_text_weight="500",
            button_large_padding="10px 16px",
        )
