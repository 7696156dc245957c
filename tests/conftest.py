"""What all tests share: the starter model, the browser, and one worker for each kind of heavy test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modules import system

ROOT = Path(__file__).resolve().parent.parent
STARTER = ROOT / "user_data" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engine tests run on one worker and browser tests on one, so that they do not slow each other down."""
    for item in items:
        for kind in ("engine", "browser"):
            if item.get_closest_marker(kind) and not item.get_closest_marker("xdist_group"):
                item.add_marker(pytest.mark.xdist_group(kind))


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """The starter model's file."""
    path = Path(os.environ.get("TGW_TEST_MODEL") or STARTER)
    if not path.is_file():
        pytest.skip("The starter model is not there; `python start.py setup` fetches it.")
    return path


@pytest.fixture(scope="session")
def browser_path() -> Path:
    """The browser of this machine."""
    path = system.find_browser()
    if path is None:
        pytest.skip("There is no Chromium here; `python start.py test --with-browser` installs it where it can.")
    return path
