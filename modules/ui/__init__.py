"""The page: Gradio tabs, the chat pane's own script and style, and their routes."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
"""Script and style sheets, served as files so that a content security policy can name them."""
