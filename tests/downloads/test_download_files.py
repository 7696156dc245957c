"""What is wanted of a repository: links, kinds, choices, hostile names."""

import pytest

from modules.downloads.files import Plan, RemoteFile, chosen, kind_of, note_of, usable, wanted
from modules.errors import NameError_, NotFound, SettingsError
from modules.paths import UserData


def files(*names):
    return [RemoteFile(name, 10, "0" * 64) for name in names]


def pick(*names, **values):
    listed = files(*names)
    return set(chosen(listed, kind_of(listed), **values))


@pytest.mark.parametrize(
    ("text", "branch", "found"),
    [
        ("user/model", "", ("user/model", "main", "")),
        ("  user/model:4bit ", "", ("user/model", "4bit", "")),
        ("user/model:4bit", "other", ("user/model", "other", "")),
        ("https://huggingface.co/user/model", "", ("user/model", "main", "")),
        ("https://huggingface.co/user/model/tree/4.0bpw", "", ("user/model", "4.0bpw", "")),
        ("huggingface.co/user/model/blob/main/sub/a.gguf", "", ("user/model", "main", "sub/a.gguf")),
        ("https://hf.co/user/model/resolve/main/a%20b.gguf?download=true", "", ("user/model", "main", "a b.gguf")),
        ("https://huggingface.co/user/model/tree/refs%2Fpr%2F1", "", ("user/model", "refs/pr/1", "")),
    ],
)
def test_names_and_links_are_read(text, branch, found):
    asked = wanted(text, branch)
    assert (asked.repo, asked.branch, asked.file) == found


@pytest.mark.parametrize(
    "text",
    ["", "model", "a/b/c", "../model", "user/..", "user/a..b", "user/mo del", "https://evil.example/user/model", "https://huggingface.co",
     "user/m:a/../b",
     "https://huggingface.co@evil.example/user/model", "user/model:" + "x" * 200, "file:///etc/passwd", "üser/model", "user/-model"],
)  # fmt: skip
def test_what_is_no_repository_is_refused(text):
    with pytest.raises(SettingsError):
        wanted(text)


def test_the_host_of_another_endpoint_is_taken_too():
    assert wanted("http://127.0.0.1:99/user/model", host="127.0.0.1:99").repo == "user/model"


def test_the_middle_size_is_taken_and_else_the_nearest():
    assert pick("m.Q8_0.gguf", "m.Q4_K_M.gguf", "m.Q4_K_S.gguf", "README.md") == {"m.Q4_K_M.gguf"}
    assert pick("m-Q2_K.gguf", "m-Q5_K_M.gguf", "m-Q4_K_S.gguf") == {"m-Q4_K_S.gguf"}
    assert pick("m-F16.gguf", "m-q8_0.gguf") == {"m-q8_0.gguf"}
    assert pick("strange.gguf", "m-f32.gguf", "mmproj-F16.gguf", "imatrix.gguf") == {"m-f32.gguf"}
    assert pick("strange.gguf") == {"strange.gguf"}
    assert files("UD-Q4_K_XL/m-UD-Q4_K_XL-00001-of-00002.gguf")[0].quant == "Q4_K_XL" and files("m.IQ4_XS.gguf")[0].quant == "IQ4_XS"
    assert files("m_Q2_K_L.gguf")[0].quant == "Q2_K_L" and files("m-q2_k.gguf")[0].quant == "Q2_K" and not files("m-Q4.gguf")[0].quant


def test_split_files_are_taken_whole():
    parts = [f"Q4_K_M/m-Q4_K_M-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert pick(*parts, "m-Q8_0.gguf") == set(parts)
    assert pick(*parts, "m-Q8_0.gguf", pattern="m-Q4_K_M-00002-of-00003.gguf") == set(parts)
    with pytest.raises(NotFound, match="3 files"):
        pick(*parts[:2])


def test_a_folder_model_without_what_it_does_not_need():
    listed = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
              "tokenizer.model",
              "pytorch_model.bin", "old.pt", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "original/consolidated.00.pth", "picture.png",
              "consolidated.safetensors", "m.Q4_K_M.gguf", "1_Pooling/config.json", "modeling_x.py"]  # fmt: skip
    assert pick(*listed) == {*listed[:5], "1_Pooling/config.json", "modeling_x.py"}
    assert pick(*listed, text_only=True) == {"config.json", "model.safetensors.index.json", "tokenizer.model", "1_Pooling/config.json"}
    assert pick(*listed, exclude=r"^1_|\.py$") == set(listed[:5])
    assert pick(*listed, pattern="m.Q4_K_M.gguf") == {"m.Q4_K_M.gguf"} and pick(*listed, pattern="*.pt") == {"old.pt"}
    assert pick("config.json", "pytorch_model.bin") == {"config.json", "pytorch_model.bin"}
    assert "pickle" in note_of(files("config.json", "pytorch_model.bin"), ["config.json", "pytorch_model.bin"])
    assert not note_of(files("a.safetensors"), ["a.safetensors"]) and "mmproj" in note_of(files("a.gguf", "mmproj-a.gguf"), ["a.gguf"])


def test_a_name_that_is_not_there_says_the_nearest():
    with pytest.raises(NotFound, match=r"m\.Q4_K_M\.gguf"):
        pick("m.Q4_K_M.gguf", pattern="m.Q4_KM.gguf")
    with pytest.raises(NotFound):
        pick("m.gguf", pattern="*.exe")
    with pytest.raises(SettingsError, match="pattern"):
        pick("m.gguf", exclude="(")


HOSTILE = [
    "../x.gguf",
    "/etc/passwd",
    "a/../../x",
    "C:\\x.gguf",
    "a\0b",
    "..",
    ".hidden",
    "a/.ssh/x",
    "NUL.gguf",
    "x" * 300,
    "/".join("a" * 40),
    "x\n.gguf",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_lead_elsewhere_are_refused(name, tmp_path):
    assert not usable(name)
    listed = tuple(files("ok.gguf", name))
    plan = Plan("user/model", "main", "0" * 40, "gguf", listed, ("ok.gguf",))
    with pytest.raises(NameError_):
        plan.destination(UserData(tmp_path), listed[1])
    with pytest.raises(NameError_):
        Plan("user/model", "main", "0" * 40, "gguf", listed[:1], ()).choose([name])
    with pytest.raises(NameError_):
        pick("ok.gguf", pattern=name)


def test_where_files_go(tmp_path):
    data = UserData(tmp_path)

    def place(kind, name, branch="main", output=None):
        plan = Plan("user/model", branch, "0" * 40, kind, tuple(files(name)), (name,))
        return plan.destination(data, plan.files[0], output).relative_to(tmp_path).as_posix()

    assert place("gguf", "Q4/m.gguf") == "models/m.gguf"
    assert place("gguf", "mmproj-F16.gguf") == "mmproj/model-mmproj-F16.gguf"
    assert place("transformers", "sub/config.json") == "models/user_model/sub/config.json"
    assert place("transformers", "config.json", "refs/pr/1") == "models/user_model_refs_pr_1/config.json"
    assert place("adapter", "adapter_config.json") == "loras/user_model/adapter_config.json" and place("adapter", "a.gguf") == "loras/a.gguf"
    assert place("gguf", "Q4/m.gguf", output=tmp_path / "out") == "out/Q4/m.gguf"
    assert kind_of(files("adapter_config.json", "adapter_model.safetensors")) == "adapter"
    assert kind_of(files("a.gguf", "b.safetensors")) == "transformers"
