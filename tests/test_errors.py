import ast
import re
from pathlib import Path

import pytest

from modules import errors
from modules.errors import Busy, NameError_, UserError

LEAVES = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, UserError)]


def in_the_program():
    """Names of all user errors in modules/, wherever they are, with their base."""
    found = {"UserError": "Exception"}
    trees = [ast.parse(file.read_text("utf-8")) for file in sorted(Path(errors.__file__).parent.rglob("*.py"))]
    classes = {node.name: node.bases for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    before = -1
    while before < len(found):
        before = len(found)
        found |= {name: base.id for name, bases in classes.items() for base in bases if isinstance(base, ast.Name) and base.id in found}
    return found


def test_the_drawn_tree_is_the_real_one():
    drawn = {}
    above = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([│├└─ ]*)(\w+)  ", line)
        if found and (found[1] or found[2] == "UserError"):
            depth = len(found[1]) // 4
            above[depth:] = [found[2]]
            drawn[found[2]] = above[depth - 1] if depth else "Exception"
    assert drawn == in_the_program()


@pytest.mark.parametrize("leaf", LEAVES)
def test_each_error_has_a_meaning_for_http_and_keeps_its_message(leaf):
    error = leaf("Do this.")
    assert str(error) == "Do this."
    assert 400 <= error.status < 600
    assert error.code == leaf.__name__.rstrip("_")


def test_code_has_no_underscore_and_busy_says_when():
    assert NameError_("x").code == "NameError"
    assert Busy("later").retry_after == 1.0
    assert Busy("later", retry_after=5).retry_after == 5
