from pathlib import Path

import pytest
import yaml

from modules import docs
from modules.app import option_groups
from modules.errors import DataError
from modules.settings import Settings

ROOT = Path(docs.__file__).parents[1]


def test_no_generated_text_is_stale():
    """Write them again with: python -m modules.docs"""
    assert docs.stale(ROOT) == []


def test_the_tracked_settings_file_names_every_setting_and_sets_none():
    text = (ROOT / "settings.yaml").read_text("utf-8")
    assert yaml.safe_load(text) is None
    assert all(line.startswith("#") or not line for line in text.splitlines())
    for cls in (Settings, *option_groups()):
        for name in cls.model_fields:
            assert f"\n# {name}: " in text


def test_uncommented_the_settings_file_is_the_defaults():
    names = {name for cls in (Settings, *option_groups()) for name in cls.model_fields}
    lines = [line[2:] for line in docs.settings_yaml().splitlines() if line[2:].split(":")[0] in names]
    values = yaml.safe_load("\n".join(lines))
    for cls in (Settings, *option_groups()):
        assert cls.build({name: values[name] for name in cls.model_fields}) == cls()


@pytest.mark.parametrize("cls", [Settings, *option_groups()], ids=lambda cls: cls.__name__)
def test_every_class_that_a_user_sets_has_its_table(cls):
    text = "".join(file.read_text("utf-8") for file in (ROOT / "docs").glob("*.md"))
    assert f"<!-- table: {cls.__name__} -->\n| Name" in text


def test_write_makes_stale_files_fresh_and_leaves_the_rest(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "a.md"
    page.write_text("before\n<!-- table: ChatOptions -->\nstale\n<!-- end -->\nafter <!-- end -->\n", "utf-8")
    (tmp_path / "docs" / "b.md").write_text("no table", "utf-8")
    assert docs.stale(tmp_path) == ["settings.yaml", "docs/a.md"]
    docs.write(tmp_path)
    assert docs.stale(tmp_path) == []
    text = page.read_text("utf-8")
    assert text.startswith("before\n<!-- table: ChatOptions -->\n| Name |") and text.endswith("\n<!-- end -->\nafter <!-- end -->\n")
    assert "stale" not in text and "`start_with`" in text


def test_a_table_of_nothing_known_is_told():
    with pytest.raises(DataError, match="no table 'Sampling'; there are: Settings"):
        docs.with_tables("<!-- table: Sampling -->\n<!-- end -->", {"Settings": "| Name |\n"})
