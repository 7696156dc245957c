"""From options to the sizes of a context: what the engine asks llama.cpp for, and what an estimate of its memory goes by. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CACHED_SEQUENCES = 32
"""Numbers for finished sequences besides those that run: they cost nothing where cells are shared by reference."""
OUTPUTS = 64
"""Tokens of a prompt whose probabilities are computed at once: each takes a row of the whole vocabulary."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a context."""

    context: int
    """Tokens of all sequences together."""
    parallel: int
    sequences: int
    batch: int
    """Tokens in a step."""
    ubatch: int
    """Of these, computed at the same time."""
    outputs: int
    """Rows of logits in a step."""


def shape(options: Mapping[str, Any], trained: int, default_context: int, cuts: bool) -> Shape:
    """`options`: the values of LlamaCppOptions. `trained`: the model's own context. `cuts`: see `Memory.cuts`."""
    context = options["ctx_size"] or min(trained, default_context)
    parallel = options["parallel"] or max(1, min(16, context // 2048))
    # A state, or a window, of its own belongs to each number; there, numbers are not free.
    sequences = min(256, parallel + CACHED_SEQUENCES) if cuts else min(256, 2 * parallel + 4)
    guesses = options["draft_max"] if options["spec_type"] != "none" or options["model_draft"] else 0
    outputs = max(OUTPUTS, sequences, parallel * (1 + guesses))
    batch = min(max(options["batch_size"], outputs), context)
    return Shape(context, parallel, sequences, batch, min(options["ubatch_size"], batch), max(sequences, min(outputs, batch)))
