"""What a conversion writes and says: a file or folder that has its name only when it is whole, and lines of JSON about progress."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from modules.errors import DataError

SPARE_BYTES = 64 << 20
"""Stay free on the disk besides what a conversion writes: headers, tokenizers, other programs."""


class Report:
    """Says how a conversion goes on, a JSON object a line: {"progress": 0..1, "text"}, {"warning"}, at the end {"done": path} or {"error"}."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _say(self, **fields: Any) -> None:
        print(json.dumps(fields), file=self._stream, flush=True)

    def progress(self, fraction: float, text: str) -> None:
        """So much of the work is done; `text` is what is done now."""
        self._say(progress=round(min(max(fraction, 0.0), 1.0), 4), text=text)

    def warning(self, text: str) -> None:
        """The result can be used, but differs from its source."""
        self._say(warning=text)

    def done(self, path: Path) -> None:
        """The result lies at `path`."""
        self._say(done=str(path))

    def error(self, text: str) -> None:
        """There is no result."""
        self._say(error=text)


def partial(target: Path) -> Path:
    """Where the result is written until it is whole. Hidden, so that no list of models shows it."""
    return target.parent / f".{target.name}.part"


def remove(path: Path) -> None:
    """Delete a file, link or folder; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def written(target: Path, needed: int, force: bool, folder: bool = False) -> Iterator[Path]:
    """A place to write the result to. It gets the name `target` when the block ends well, and is deleted when it does not.

    Raises DataError when `target` exists and not `force`, when the disk has less than `needed` bytes, and when it refuses.
    """
    target = target.absolute()
    place, former = partial(target), target.parent / f".{target.name}.old"
    if os.path.lexists(target) and not force:
        raise DataError(f"{target} exists. Choose another name, or write over it with --force.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in (place, former):  # by a conversion that was killed
            remove(left)
        free = shutil.disk_usage(target.parent).free
        if free < needed + SPARE_BYTES:
            raise DataError(f"This needs {_size(needed)} and {target.parent} has {_size(free)} free. Free some space, or write to another disk.")
        try:
            if folder:
                place.mkdir()
            yield place
            if os.path.lexists(target):
                os.replace(target, former)
            os.replace(place, target)
            remove(former)
        finally:
            remove(place)
            if os.path.lexists(former):  # the new one did not get its name: the old one has it again
                os.replace(former, target)
    except OSError as error:
        raise DataError(f"Cannot write {target}: {error.strerror or error}. Free some space or make the folder writable, then try again.") from error


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
