"""The marks in a reply's text that its readers need: around thinking and around calls of tools.

In many models they are special tokens, which engines leave out of a text: of these not.
"""

from __future__ import annotations

from modules import streams, tool_calls

MARKERS = tuple(
    dict.fromkeys(
        [
            *(mark for row in streams.FORMATS for mark in (row.start, row.end, row.content) if mark),
            *(mark for row in tool_calls.FORMATS for mark in (*row.starts, *row.marks)),
        ]
    )
)
"""Texts of one token or more; those of their tokens that are special belong to a reply's text."""
