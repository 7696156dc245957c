"""Conversions: one conversion of a model at a time, in a process of its own (`modules.convert`), with progress and cancel.

Nothing heavy is imported here, and a file that crashes what reads it costs a conversion, never the server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from modules.convert.output import partial, remove
from modules.errors import Busy, ModelError
from modules.log import logger
from modules.system import start_child, stop_tree

ROOT = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "-m", "modules.convert")
SILENCE_SECONDS = 1800.0
"""A conversion that says nothing for so long is ended. Each tensor is a line; only models that Transformers reads whole are silent for longer."""
WATCH_SECONDS = 1.0
GRACE_SECONDS = 5.0
MAX_LINE = 1 << 16
MAX_WARNINGS = 20
_LAST_WORDS = 2000


@dataclass(frozen=True)
class Conversion:
    """What is converted into what. Paths are the caller's to check (`paths.UserData`)."""

    kind: Literal["to-hf", "to-gguf", "lora"]
    source: Path
    target: Path
    numbers: str = ""
    """Format of the numbers: float32, float16 or bfloat16 in a folder, F32, F16 or Q8_0 in a GGUF file. Empty: the conversion's own."""
    base: Path | None = None
    """The model that an adapter was trained on."""
    force: bool = False
    """Write over what is there."""

    def arguments(self) -> list[str]:
        """For `python -m modules.convert`. Absolute paths, so that no name is read as an option."""
        words = [self.kind, str(self.source.absolute()), str(self.target.absolute())]
        if self.numbers:
            words += ["--dtype" if self.kind == "to-hf" else "--type", self.numbers]
        if self.base:
            words += ["--base", str(self.base.absolute())]
        return [*words, "--force"] if self.force else words


@dataclass(frozen=True)
class ConversionStatus:
    """What the page shows about the newest conversion."""

    state: Literal["none", "running", "done", "failed", "cancelled"] = "none"
    conversion: Conversion | None = None
    progress: float = 0.0
    text: str = ""
    """What is done now, or what is wrong and what to do about it."""
    warnings: tuple[str, ...] = ()
    """In what the result differs from its source."""


class Conversions:
    """Starts conversions. Every method may be called from any thread; `on_change` is called from any, and must be short."""

    def __init__(self, on_change: Callable[[], None] = lambda: None, command: Sequence[str] = COMMAND, silence: float = SILENCE_SECONDS) -> None:
        self._on_change = on_change
        self._command = command
        self._silence = silence
        self._changed = threading.Condition()
        self._status = ConversionStatus()
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = ""  # why we ended the child ourselves
        self._heard = 0.0

    @property
    def status(self) -> ConversionStatus:
        """Of the newest conversion."""
        with self._changed:
            return self._status

    def start(self, conversion: Conversion) -> None:
        """Begin. Raises Busy while another one runs, ModelError when the system refuses."""
        with self._changed:
            if self._status.state == "running":
                raise Busy("Another conversion is running. Wait until it has finished, or cancel it.", 10.0)
            said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by the thread that reads it
            try:
                options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": said}
                command = [*self._command, *conversion.arguments()]
                self._child = start_child(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options)
            except OSError as error:
                said.close()
                raise ModelError(f"The conversion could not be started: {error.strerror or error}. Free some memory and try again.") from error
            self._status, self._stopped, self._heard = ConversionStatus("running", conversion, text="Starting"), "", time.monotonic()
            threading.Thread(target=self._follow, args=(self._child, said, conversion), name="conversion", daemon=True).start()
            threading.Thread(target=self._watch, args=(self._child,), name="conversion-watch", daemon=True).start()
        self._on_change()

    def cancel(self) -> None:
        """End the running conversion, if there is one; nothing is left of what it wrote. `wait` tells when it has ended."""
        self._end("cancelled")

    def wait(self, seconds: float) -> bool:
        """Wait until no conversion runs, at most so long; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._status.state != "running", seconds)

    def close(self) -> None:
        """Cancel, and wait for the end."""
        self.cancel()
        self.wait(2 * GRACE_SECONDS)

    def _end(self, why: str) -> None:
        with self._changed:
            child = self._child
            if child is None or self._stopped:
                return
            self._stopped = why
        threading.Thread(target=stop_tree, args=(child, GRACE_SECONDS), name="conversion-end", daemon=True).start()

    # --- threads --------------------------------------------------------------------------------------------------------------------

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        with self._changed:
            while self._child is child:
                if time.monotonic() - self._heard > self._silence and not self._stopped:
                    self._end("silent")
                self._changed.wait(WATCH_SECONDS)

    def _follow(self, child: subprocess.Popen[bytes], said: IO[bytes], conversion: Conversion) -> None:
        """Read what the child says until it has ended; then say how."""
        assert child.stdout
        done, error = False, ""
        while line := child.stdout.readline(MAX_LINE):
            fields = _fields(line)
            done, error = done or "done" in fields, str(fields.get("error", error))
            self._hear(fields)
        child.stdout.close()
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)  # it has closed its output, so it ends
        stop_tree(child, 0.0)
        with said:
            said.seek(max(said.seek(0, os.SEEK_END) - _LAST_WORDS, 0))
            last_words = said.read().decode("utf-8", "replace").strip()
        with self._changed:
            stopped = self._stopped
        if not done:
            _clean(conversion.target)
        if done:
            found = ConversionStatus("done", conversion, 1.0, f"{conversion.target.name} is ready.")
        elif stopped == "cancelled":
            found = ConversionStatus("cancelled", conversion, text="The conversion was cancelled.")
        elif stopped:
            found = ConversionStatus(
                "failed", conversion, text=f"The conversion said nothing for {self._silence:.0f} seconds and was ended. Try again."
            )
        else:
            if not error:
                logger.error("A conversion ended with code %d. Its last lines:\n%s", child.returncode, last_words or "(none)")
                error = f"The conversion ended unexpectedly (code {child.returncode}). The terminal shows its last lines; perhaps memory ran out."
            found = ConversionStatus("failed", conversion, text=error)
        with self._changed:
            self._status, self._child = replace(found, warnings=self._status.warnings), None
            self._changed.notify_all()
        self._on_change()

    def _hear(self, fields: dict[str, Any]) -> None:
        with self._changed:
            self._heard = time.monotonic()
            now = self._status
            if isinstance(fields.get("progress"), float | int):
                self._status = replace(now, progress=float(fields["progress"]), text=str(fields.get("text", "")))
            elif "warning" in fields and len(now.warnings) < MAX_WARNINGS:
                self._status = replace(now, warnings=(*now.warnings, str(fields["warning"])))
        self._on_change()


def _fields(line: bytes) -> dict[str, Any]:
    """What a line says; nothing when it is not one of `output.Report`: libraries print too."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _clean(target: Path) -> None:
    """Delete what a child that was killed has left."""
    try:
        remove(partial(target.absolute()))
    except OSError as error:
        logger.warning("Cannot delete %s: %s", partial(target), error.strerror or error)
