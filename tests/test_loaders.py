import subprocess
import sys
from pathlib import Path

import pytest

from modules import loaders
from modules.errors import ModelError
from modules.loaders import LOADERS, detect, list_models, named


@pytest.mark.parametrize("name", ["llama.cpp", "llamacpp", "llama-cpp", "Llama.CPP", "llama_cpp"])
def test_a_loader_has_many_spellings(name):
    assert named(name).name == "llama.cpp"


def test_an_unknown_loader_is_told_with_what_there_is():
    with pytest.raises(ModelError) as refused:
        named("lama.cpp")
    assert "Did you mean 'llama.cpp'?" in str(refused.value)
    with pytest.raises(ModelError) as refused:
        named("x" * 5000)
    assert all(loader.name in str(refused.value) for loader in LOADERS) and len(str(refused.value)) < 500


def test_every_loader_declares_samplers_that_exist():
    from modules.samplers import SamplingParams

    for loader in LOADERS:
        assert loader.samplers <= SamplingParams.model_fields.keys(), loader.name
    assert len({loader.name for loader in LOADERS}) == len({loader.options for loader in LOADERS}) == len(LOADERS)


def test_detect(tmp_path):
    model = tmp_path / "a.gguf"
    model.write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    assert detect(model).name == "llama.cpp"
    other = tmp_path / "a.txt"
    other.write_text("x")
    with pytest.raises(ModelError, match=r"No loader takes 'a\.txt'. Use a \.gguf file"):
        detect(other)


def test_the_list_of_models(tmp_path):
    for name in [
        "m10.gguf", "m9.gguf", "B.gguf", "a.gguf", "folder/deep/x.gguf", "big-00001-of-00003.gguf", "big-00002-of-00003.gguf",
        "big-00003-of-00003.gguf", "mmproj-model.gguf", ".hidden.gguf", "notes.txt", "1²2.gguf", "x.gguf.part",
    ]:  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    found = list_models(tmp_path)
    assert found == ["1²2.gguf", "a.gguf", "B.gguf", "big-00001-of-00003.gguf", "folder/deep/x.gguf", "m9.gguf", "m10.gguf"]


def test_no_folder_no_models(tmp_path):
    assert list_models(tmp_path / "absent") == []
    assert list_models(tmp_path) == []


def test_listing_the_loaders_imports_no_engine():
    code = "import modules.loaders, sys; print([m for m in ('llama_cpp', 'torch', 'transformers', 'numpy') if m in sys.modules])"
    root = Path(loaders.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
