"""Coloured, levelled log on the terminal. Standard `logging`, one format, no files.

Colours only where the stream is a terminal and NO_COLOR (https://no-color.org) is unset.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

logger = logging.getLogger("tgw")

_COLOURS = {"DEBUG": "\033[2m", "INFO": "\033[36m", "WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[1;31m"}


class _Formatter(logging.Formatter):
    def __init__(self, colour: bool) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if not self._colour:
            return line
        return line.replace(record.levelname, f"{_COLOURS.get(record.levelname, '')}{record.levelname}\033[0m", 1)


def setup(verbose: bool = False, stream: TextIO | None = None) -> None:
    """Send the program's log to `stream` (default: stderr). Calling it again replaces the handler."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter(stream.isatty() and "NO_COLOR" not in os.environ))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
