"""The table of docs/chat.md: each action names the browser test that shows it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (?P<what>[^|]+) \| `(?P<file>test_\w+)::(?P<test>test_\w+)` \|$", re.MULTILINE)


def test_each_action_has_a_test_that_drives_the_page():
    rows = ROW.findall((ROOT / "docs" / "chat.md").read_text("utf-8"))
    assert len(rows) > 50 and len({what for what, _, _ in rows}) == len(rows)
    for what, file, test in rows:
        path = ROOT / "tests" / "ui" / f"{file}.py"
        source = path.read_text("utf-8") if path.exists() else ""
        tests = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        assert test in tests, f"{what}: there is no {file}::{test}"
        assert "pytest.mark.browser" in source, f"{what}: {file} drives no browser"
        assert any(isinstance(node, ast.Assert | ast.Call) for node in ast.walk(tests[test])), f"{what}: {test} shows nothing"
