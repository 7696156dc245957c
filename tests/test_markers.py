from modules.markers import MARKERS


def test_the_marks_of_well_known_families_are_there():
    for mark in ("<think>", "</think>", "<|channel|>final<|message|>", "<|end|>", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"):
        assert mark in MARKERS
    assert "" not in MARKERS and len(MARKERS) == len(set(MARKERS))
