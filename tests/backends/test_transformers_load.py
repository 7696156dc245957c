"""Loading with Transformers: what is found, what is refused and with which words, progress, cancelling, options."""

from __future__ import annotations

import shutil

import pytest

from modules.backends.base import CancelToken
from modules.backends.transformers import LOADER
from modules.backends.transformers.kept import KeptSequences, common
from modules.backends.transformers.load import find_source
from modules.errors import ModelError, SettingsError
from modules.loaders import detect, list_models
from modules.samplers import SamplingParams

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from modules.backends.transformers import load as loading  # noqa: E402
from modules.backends.transformers.speculation import looked_up  # noqa: E402
from modules.backends.transformers.text import Text, TextStream  # noqa: E402
from tests.backends import transformers_help as tiny  # noqa: E402


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(good, tmp_path):
    """A copy that may be spoilt."""
    shutil.copytree(good, tmp_path / "models" / "tiny")
    return tmp_path / "models" / "tiny"


def options(**values):
    return LOADER.options.build({"ctx_size": 128, **values})


def load(path, progress=lambda _fraction, _words: None, cancel=None, **values):
    return LOADER.load(path, options(**values), progress, cancel or CancelToken())


def shards(folder):
    """The same model with its weights in several files."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    return sorted(folder.glob("*.safetensors"))


# --- found ------------------------------------------------------------------------------------------------------------------------------


def test_what_is_found(folder, tmp_path):
    assert detect(folder).name == "Transformers" and list_models(folder.parent) == ["tiny"]
    assert not LOADER.detect(folder / "config.json") and not LOADER.detect(tmp_path / "absent")
    for method in ("exl2", "exl3"):
        tiny.change_json(folder / "config.json", quantization_config={"quant_method": method})
        assert not LOADER.detect(folder)
    tiny.change_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    assert LOADER.detect(folder)
    (folder / "config.json").write_text("[" * 100_000)
    assert LOADER.detect(folder)
    (folder / "config.json").unlink()
    assert not LOADER.detect(folder)
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert detect(folder).name == "llama.cpp"


def test_a_folder_without_weights_is_none(folder):
    (folder / "model.safetensors").unlink()
    assert not LOADER.detect(folder)
    with pytest.raises(ModelError, match="no weights"):
        find_source(folder, options())


def test_it_says_how_far_it_is(good):
    told = []
    backend = load(good, lambda fraction, words: told.append((fraction, words)))
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told) and told[-1] == (1.0, "Loaded")
    assert sum("%" in words for _, words in told) > 5
    assert backend.context_length == 128 and backend.chat_template == tiny.TEMPLATE and (backend.bos_token, backend.eos_token) == ("<s>", "</s>")
    backend.unload()


@pytest.mark.parametrize("when", ["before", "among the weights"])
def test_cancelling(good, when):
    cancel = CancelToken()
    if when == "before":
        cancel.cancel()
    with pytest.raises(ModelError, match="cancelled"):
        load(good, lambda _fraction, words: cancel.cancel() if "%" in words else None, cancel)
    load(good).unload()


def test_several_files_of_weights(folder):
    files = shards(folder)
    assert len(files) > 2
    load(folder).unload()
    files[1].unlink()
    with pytest.raises(ModelError, match=rf"Of {len(files)} files of weights 1 are missing: {files[1].name}"):
        load(folder)


# --- refused ----------------------------------------------------------------------------------------------------------------------------


def spoil(name, change):
    def spoilt(folder):
        file = folder / name
        file.write_bytes(change(file.read_bytes()) if file.exists() else change(b""))

    return spoilt


WRONG = {
    "no object": (spoil("config.json", lambda _: b"[]"), "config.json is damaged"),
    "no JSON": (spoil("config.json", lambda data: data[:-9]), "config.json is damaged"),
    "deep": (spoil("config.json", lambda _: b"[" * 200_000), "config.json is damaged"),
    "huge": (spoil("config.json", lambda data: data + b" " * (5 << 20)), "more than 4 MiB"),
    "no kind": (spoil("config.json", lambda _: b"{}"), "model_type"),
    "unknown kind": (lambda folder: tiny.change_json(folder / "config.json", model_type="zebra9"), "does not know the architecture 'zebra9'"),
    "own code": (
        lambda folder: tiny.change_json(folder / "config.json", model_type="zebra9", auto_map={"AutoConfig": "code.Config"}), "--trust-remote-code",
    ),
    "other shapes": (lambda folder: tiny.change_json(folder / "config.json", hidden_size=64, head_dim=16), "could not be loaded"),
    "nonsense values": (lambda folder: tiny.change_json(folder / "config.json", num_hidden_layers=-3, num_attention_heads=0), "could not be loaded"),
    "endless layers": (lambda folder: tiny.change_json(folder / "config.json", num_hidden_layers=10**7), "10000000 layers"),
    "endless experts": (lambda folder: tiny.change_json(folder / "config.json", text_config={"num_experts": 10**7}), "10000000 experts"),
    "an endless number": (lambda folder: tiny.change_json(folder / "config.json", vocab_size=10**15), "vocab_size is 1000000000000000"),
    "more vocabulary than memory": (lambda folder: tiny.change_json(folder / "config.json", vocab_size=10**11), "tiny"),
    "more layers than weights": (lambda folder: tiny.change_json(folder / "config.json", num_hidden_layers=5), "lack 27 of its weights"),
    "cut weights": (spoil("model.safetensors", lambda data: data[:-100]), "model.safetensors"),
    "a long header": (spoil("model.safetensors", lambda data: b"\xff" * 8 + data[8:]), "model.safetensors"),
    "no weights": (spoil("model.safetensors", lambda _: b""), "model.safetensors"),
    "an index out of the folder": (
        spoil("model.safetensors.index.json", lambda _: b'{"weight_map": {"a": "../../secret.safetensors"}}'), "names '../../secret",
    ),
    "an empty index": (spoil("model.safetensors.index.json", lambda _: b"{}"), "names 0 files"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "could not be loaded"),
    "a wrong tokenizer": (spoil("tokenizer.json", lambda _: b'{"model": {"type": "BPE"}}'), "could not be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said_with_the_fix(folder, kind):
    change, words = WRONG[kind]
    change(folder)
    with pytest.raises(ModelError) as refused:
        load(folder)
    assert words in str(refused.value) and len(str(refused.value)) < 500 and str(refused.value).endswith(".")


class _Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_pickled_weights_are_refused_and_run_nothing_even_when_allowed(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(dict(weights), folder / "pytorch_model.bin")
    assert LOADER.detect(folder)
    with pytest.raises(ModelError, match="--allow-pickle"):
        load(folder)
    load(folder, allow_pickle=True).unload()
    mark = tmp_path / "ran"
    torch.save({**weights, "evil": _Evil(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load(folder, allow_pickle=True)
    assert not mark.exists()


def test_code_of_a_model_is_run_by_start_flag_only(folder, tmp_path):
    mark = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    tiny.change_json(folder / "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    load(folder).unload()  # the library has this kind itself
    assert not mark.exists()


def test_what_only_the_start_decides_is_not_taken_later(folder, tmp_path):
    from modules.models import ModelSlot
    from modules.paths import UserData
    from modules.ui.controls import groups

    data = UserData(tmp_path / "user_data", model_dir=folder.parent)
    shown = {knob.name for knobs in groups(LOADER.options).values() for knob in knobs}
    for name, value in (("trust_remote_code", True), ("allow_pickle", True), ("disk_cache_dir", "/")):
        with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')}"):
            ModelSlot(data, {}).choose("tiny", "", {name: value})
        assert name not in shown
    started = ModelSlot(data, {LOADER.options: options(trust_remote_code=True)}).choose("tiny", "", {"ctx_size": 64})
    assert started.options.trust_remote_code and started.options.ctx_size == 64


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"load_in_4bit": True}, "pip install bitsandbytes"),
        ({"load_in_8bit": True}, "pip install bitsandbytes"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "not both"),
        ({"attn_implementation": "flash_attention_2"}, "pip install flash-attn"),
        ({"cache_kind": "quantized"}, "optimum-quanto"),
    ],
)
def test_a_missing_package_is_named(good, values, words, monkeypatch):
    real = loading.importlib.util.find_spec
    gone = ("bitsandbytes", "flash_attn", "optimum")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name, *rest: None if name.split(".")[0] in gone else real(name, *rest))
    with pytest.raises(ModelError, match=words):
        load(good, **values)


def test_too_little_memory_is_said(good, monkeypatch):
    import transformers

    def scarce(*_args, **_values):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 99999999999 bytes")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", scarce)
    with pytest.raises(ModelError, match="not enough memory for tiny"):
        load(good)


@pytest.mark.parametrize("values", [{"gpu_split": "a"}, {"gpu_split": "-1"}, {"compute_dtype": "int3"}, {"parallel": -1}, {"prefill_share": 1}])
def test_options_that_make_no_sense(values):
    with pytest.raises(SettingsError):
        options(**values)


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_number_format(good, name, dtype):
    backend = load(good, compute_dtype=name)
    assert backend._model.dtype == dtype
    assert tiny.run(backend)[-1].completion_tokens == 12
    backend.unload()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention(good, attention):
    backend = load(good, attn_implementation=attention)
    reference = load(good)
    assert tiny.tokens_of(tiny.run(backend)) == tiny.tokens_of(tiny.run(reference))
    backend.unload()
    reference.unload()


def test_the_samplers_exist():
    assert LOADER.samplers <= SamplingParams.model_fields.keys()


# --- small parts ------------------------------------------------------------------------------------------------------------------------


class Cutter:
    """States are lists of tokens."""

    def __init__(self, croppable=True):
        self.croppable = croppable

    def copy(self, state, length):
        return List(state[:length])

    def crop(self, state, length):
        del state[length:]


class List(list):
    nbytes = 0


def test_kept_sequences():
    kept = KeptSequences(Cutter(), 300)
    kept.add(None, list(range(100)), List(range(100)))
    assert kept.take("other", list(range(50))) is None
    assert kept.take(None, [0, 1, 2, 99]) is None, "too little is shared"
    assert kept.take(None, [*range(20), 99]) == list(range(20)) and len(kept) == 1, "copied: the chat stays"
    assert kept.take(None, list(range(100))) == list(range(99)) and len(kept) == 0, "taken over; its last token is computed again"
    for start in range(4):
        kept.add(None, [start, *range(99)], List())
    assert kept.tokens == 300 and kept.evictions == 1
    kept.add(None, [3, *range(120)], List())
    assert [len(each.tokens) for each in kept._kept] == [100, 121], "the beginning of another is let go"
    kept.add(None, list(range(301)), List())
    assert kept.tokens == 221
    kept.drop(lambda key: key == "x")
    assert len(kept) == 2
    kept.drop()
    assert len(kept) == kept.tokens == 0


def test_what_cannot_be_cut():
    kept = KeptSequences(Cutter(False), 300)
    kept.add(None, list(range(50)), List(range(50)))
    assert kept.take(None, list(range(50))) is None and kept.take(None, [*range(40), 99]) is None
    assert kept.take(None, [*range(50), 99]) == list(range(50)) and len(kept) == 0


def test_common():
    assert [common([1, 2, 3], other, 9) for other in ([1, 2, 3, 4], [1, 9], [], [7])] == [3, 1, 0, 0] and common([1, 2, 3], [1, 2, 3], 2) == 2


def test_looking_up():
    assert looked_up([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert looked_up([1, 2, 9, 1, 2, 8, 1, 2], 5) == [8, 1, 2]
    assert looked_up([1, 2, 3], 4) == [] and looked_up([7], 4) == []


def test_a_stream_holds_back_what_is_no_whole_character():
    text = Text(tiny.byte_tokenizer(), tiny.VOCABULARY)
    stream = TextStream(text.decode, text.encode("before"))
    tokens = text.encode("é🦊x")
    assert [stream.feed([token]) for token in tokens] == ["", "é", "", "", "", "🦊", "x"]
    assert stream.feed(text.encode("🦊")[:2]) == "" and stream.finish() == "\ufffd"
    broken = TextStream(text.decode, [])
    assert "".join(broken.feed([tokens[1]]) for _ in range(20)) + broken.finish() == "\ufffd" * 20


def test_bos_is_added_where_the_model_is_used_to_one_and_never_twice():
    plain = Text(tiny.byte_tokenizer(), tiny.VOCABULARY)
    assert plain.encode("a", add_bos=True) == plain.encode("a")
    tokenizer = tiny.byte_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    with_bos = Text(tokenizer, tiny.VOCABULARY)
    assert with_bos.encode("a", add_bos=True) == [0, *plain.encode("a")] == with_bos.encode("<s>a", add_bos=True)
    assert with_bos.encode("a") == plain.encode("a") and with_bos.encode("", add_bos=True) == [0]


def test_texts_that_break_dry():
    text = Text(tiny.byte_tokenizer(), tiny.VOCABULARY)
    assert text.containing(("\n", ":")) == frozenset(text.encode("\n:"))
