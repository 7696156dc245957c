import pytest
import yaml

from modules.errors import SettingsError
from modules.model_settings import MAX_BYTES, ModelSettings, Saved


@pytest.fixture
def saved(tmp_path):
    return ModelSettings(tmp_path / "config-user.yaml")


def test_what_is_saved_comes_back_and_the_rest_is_kept(saved):
    saved.path.write_text("Other.gguf$:\n  n_gpu_layers: 7\nnote: kept\n", "utf-8")
    saved.save("my.gguf", "llama.cpp", {"ctx_size": 4096})
    saved.set_template("my.gguf", "ChatML")
    assert saved.get("my.gguf") == Saved("llama.cpp", {"ctx_size": 4096}, "ChatML")
    saved.save("my.gguf", "llama.cpp", {"ctx_size": 512})
    assert saved.get("my.gguf") == Saved("llama.cpp", {"ctx_size": 512}, "ChatML")
    assert yaml.safe_load(saved.path.read_text("utf-8")) == {
        "Other.gguf$": {"n_gpu_layers": 7},
        "note": "kept",
        "my.gguf": {"loader": "llama.cpp", "ctx_size": 512, "instruction_template": "ChatML"},
    }
    saved.forget("my.gguf")
    assert saved.get("my.gguf") == Saved()


def test_patterns_of_the_earlier_system_are_read_as_names(saved):
    saved.path.write_text("my\\.gguf$: {n_gpu_layers: 7, instruction_template: None}\nmy.gguf$: {loader: llama.cpp}\n.*: {ctx_size: 1}\n", "utf-8")
    assert saved.get("my.gguf") == Saved("llama.cpp", {"gpu_layers": 7})
    assert saved.get("myxgguf") == saved.get("my") == Saved()
    saved.save("my.gguf", "llama.cpp", {})
    assert set(yaml.safe_load(saved.path.read_text("utf-8"))) == {"my.gguf", ".*"}


@pytest.mark.parametrize("text", ["a: [", "- 1", "\x00", "&a a: *a", "x" * (MAX_BYTES + 1), "1: {}"])
def test_a_file_that_cannot_be_read_counts_as_empty_and_is_never_overwritten(saved, text, caplog):
    saved.path.write_text(text, "utf-8")
    assert saved.get("a") == Saved() and "config-user.yaml" in caplog.text
    with pytest.raises(SettingsError, match=r"config-user\.yaml"):
        saved.save("a", "llama.cpp", {})
    assert saved.path.read_text("utf-8") == text


def test_a_file_that_is_not_utf_8_is_told(saved):
    saved.path.write_bytes(b"\xff")
    with pytest.raises(SettingsError, match="UTF-8"):
        saved.forget("a")


def test_wrong_entries_are_no_settings(saved):
    saved.path.write_text("a: 3\nb: {loader: [1], instruction_template: 4}\n", "utf-8")
    assert saved.get("a") == saved.get("b") == Saved()
