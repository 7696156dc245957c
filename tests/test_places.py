import json
import sys

import pytest

from modules.errors import AccessDenied, NameError_, NotFound
from modules.places import MAX_MANIFEST, Places, other_programs


def put(path, content=b"GGUF"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_models_of_several_folders_in_natural_order(tmp_path):
    for name in ("a/x-10.gguf", "a/x-2.gguf", "b/x-2.gguf", "b/deep/y.gguf", "a/.downloads/z/half.gguf"):
        put(tmp_path / name)
    places = Places((tmp_path / "a", tmp_path / "b", tmp_path / "gone"), {})
    assert places.names() == ["deep/y.gguf", "x-2.gguf", "x-10.gguf"]
    assert places.path("x-2.gguf") == tmp_path / "a/x-2.gguf" and places.path("deep/y.gguf") == tmp_path / "b/deep/y.gguf"
    with pytest.raises(NotFound, match="no model"):
        places.path("z.gguf")
    for name in ("../a/x-2.gguf", "/etc/passwd", "a:b", ""):
        with pytest.raises(NameError_):
            places.path(name)


def test_deleting_takes_all_parts(tmp_path):
    parts = [put(tmp_path / f"big-0000{number}-of-00003.gguf") for number in (1, 2, 3)]
    put(tmp_path / "folder/config.json", b"{}")
    other = put(tmp_path / "other.gguf")
    places = Places((tmp_path,), {"ollama": tmp_path})
    places.delete("big-00001-of-00003.gguf")
    assert not any(path.exists() for path in parts) and other.exists()
    places.delete("folder")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(NotFound):
        places.delete("folder")
    with pytest.raises(AccessDenied, match="another program"):
        places.delete("ollama:x:y")


def ollama(folder, model, tag, digest="a" * 64, registry="registry.ollama.ai/library"):
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "c" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"},
    ]
    put(folder / "manifests" / registry / model / tag, json.dumps({"layers": layers}).encode())
    return put(folder / "blobs" / f"sha256-{digest}")


def test_ollamas_models(tmp_path):
    first = ollama(tmp_path, "llama3.2", "3b")
    second = ollama(tmp_path, "somebody/model", "latest", "b" * 64, "registry.ollama.ai")
    put(tmp_path / "manifests/registry.ollama.ai/library/broken/1b", b"{")
    put(tmp_path / "manifests/registry.ollama.ai/library/large/1b", b" " * (MAX_MANIFEST + 1))
    ollama(tmp_path, "evil", "1b", "../../../../etc/passwd")
    places = Places((), {"ollama": tmp_path})
    assert places.names() == ["ollama:llama3.2:3b", "ollama:somebody/model:latest"]
    assert places.path("ollama:llama3.2:3b") == first and places.path("ollama:somebody/model:latest") == second
    for name in ("ollama:evil:1b", "ollama:broken:1b", "ollama:large:1b", "ollama:none:1b"):
        with pytest.raises(NotFound):
            places.path(name)
    for name in ("ollama:../../x:1b", "ollama:x", "ollama:"):
        with pytest.raises((NameError_, NotFound)):
            places.path(name)


def test_lm_studios_models(tmp_path):
    path = put(tmp_path / "publisher/repository/model.Q4_K_M.gguf")
    places = Places((), {"lmstudio": tmp_path})
    assert places.names() == ["lmstudio:publisher/repository/model.Q4_K_M.gguf"]
    assert places.path(places.names()[0]) == path and not places.own(places.names()[0])


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a right on Windows")
def test_the_hubs_cache(tmp_path):
    folder = tmp_path / "models--owner--name"
    blob = put(folder / "blobs/1234")
    for revision in ("old", "new"):
        (folder / "snapshots" / revision).mkdir(parents=True)
        (folder / "snapshots" / revision / "model.gguf").symlink_to(blob)
    put(folder / "refs/main", b"new")
    put(tmp_path / "models--owner--empty/refs/main", b"../../..")
    whole = tmp_path / "models--owner--whole/snapshots/1"
    put(whole / "config.json", b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    put(whole / "model.safetensors", b"12345678{}")
    places = Places((), {"huggingface": tmp_path})
    assert places.names() == ["huggingface:owner/name/model.gguf", "huggingface:owner/whole"]
    assert places.path("huggingface:owner/name/model.gguf") == folder / "snapshots/new/model.gguf"
    assert places.path("huggingface:owner/whole") == whole
    for name in ("huggingface:owner/empty", "huggingface:owner/name/../x", "huggingface:..", "huggingface:owner/gone"):
        with pytest.raises((NameError_, NotFound)):
            places.path(name)


def test_other_programs_are_found_where_they_are(tmp_path):
    assert other_programs({}, tmp_path) == {} or set(other_programs({}, tmp_path)) == {"ollama"}  # a service of this machine
    for name in (".lmstudio/models", ".ollama/models", ".cache/huggingface/hub", "mine", "hf/hub"):
        (tmp_path / name).mkdir(parents=True)
    found = other_programs({"OLLAMA_MODELS": str(tmp_path / "mine"), "HF_HOME": str(tmp_path / "hf")}, tmp_path)
    assert found == {"lmstudio": tmp_path / ".lmstudio/models", "ollama": tmp_path / "mine", "huggingface": tmp_path / "hf/hub"}
    assert other_programs({"HF_HUB_CACHE": str(tmp_path / "mine")}, tmp_path)["huggingface"] == tmp_path / "mine"
