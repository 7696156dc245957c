"""Documentation that is output: the tracked settings.yaml, the tables of options and that of metrics, written from the declarations.

`python -m modules.docs` writes them again; a test fails while one of them is stale. A table stands in a Markdown file between
`<!-- table: Settings -->`, with the name of a class of options or `Metrics`, and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from modules import metrics
from modules.app import option_groups
from modules.errors import DataError
from modules.options import Options, markdown_table, yaml_template
from modules.paths import write_atomically
from modules.settings import Settings

_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_HEADER = """\
# All settings with their meaning and default, written by `python -m modules.docs`: edit the declarations, not this file.
#
# To change a setting for yourself, copy its line without "# " into user_data/settings.yaml, where the page saves too. Uncommented
# here it holds for everybody who uses this copy, below what user_data/settings.yaml, CMD_FLAGS.txt and the command line say.
"""


def stale(root: Path) -> list[str]:
    """Names of the generated files in `root` that are not as the declarations say."""
    return [file.relative_to(root).as_posix() for file, text in _files(root) if not file.is_file() or file.read_text("utf-8") != text]


def write(root: Path) -> None:
    """Write them. Raises DataError."""
    for file, text in _files(root):
        write_atomically(file, text)


def settings_yaml() -> str:
    """The text of the top-level settings.yaml."""
    return _HEADER + "".join(yaml_template(options) for options in _classes().values())


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """`text` with its tables, by name, written again. Raises DataError for one that is not in `tables`."""

    def table(found: re.Match[str]) -> str:
        if found[2] not in tables:
            raise DataError(f"There is no table {found[2]!r}; there are: {', '.join(tables)}.")
        return found[1] + tables[found[2]] + found[3]

    return _TABLE.sub(table, text)


def _tables() -> dict[str, str]:
    return {"Metrics": metrics.markdown_table(), **{name: markdown_table(options) for name, options in _classes().items()}}


def _classes() -> dict[str, type[Options]]:
    classes: tuple[type[Options], ...] = (Settings, *option_groups())
    return {cls.__name__: cls for cls in classes}


def _files(root: Path) -> Iterator[tuple[Path, str]]:
    yield root / "settings.yaml", settings_yaml()
    tables = _tables()
    for file in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if file.is_file():
            yield file, with_tables(file.read_text("utf-8"), tables)


if __name__ == "__main__":
    write(Path(__file__).resolve().parents[1])
