"""Options that several loaders have, declared once. A class of options names those that it takes, where they belong in its order."""

from __future__ import annotations

from typing import Any

from modules.options import knob

MANY, AHEAD = "Several at once", "Guessing ahead"
DEFAULT_CONTEXT = 8192
"""Tokens of context at most, where nobody says how many."""

PARALLEL: Any = knob(
    4, "Replies computed at the same time; more wait. 0 is one for each 2,048 tokens of context.", range=(0, 64, 1), bounds=(0, 128), group=MANY
)
MAX_QUEUE: Any = knob(64, "Requests that may wait; further ones are told to come back.", range=(1, 1024, 1), bounds=(1, 100_000), group=MANY)
PREFILL_SHARE: Any = knob(
    0.65,
    "Share of the time that reading a new prompt may take from replies being written. More: prompts are read sooner, replies slow down more.",
    range=(0.1, 0.95, 0.05),
    bounds=(0.01, 0.99),
    group=MANY,
)
MODEL_DRAFT: Any = knob("", "A small model of the same family that writes ahead; its guesses are checked.", group=AHEAD, metavar="NAME", file="model")
DRAFT_MAX: Any = knob(3, "Tokens the draft model writes ahead at most.", range=(1, 64, 1), bounds=(1, 256), group=AHEAD)
