"""GGUF files in the Transformers loader: the same tokens as llama.cpp, the weights and the configuration of the model they were made from."""

from __future__ import annotations

import logging

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402

from modules.backends.base import CancelToken  # noqa: E402
from modules.backends.transformers import LOADER  # noqa: E402
from modules.convert import gguf_model  # noqa: E402
from modules.convert.sources import GgufFile  # noqa: E402
from modules.errors import ModelError  # noqa: E402
from modules.gguf import read_header  # noqa: E402
from tests.backends import llama_cpp_help, tiny_models  # noqa: E402
from tests.backends import transformers_help as tiny  # noqa: E402
from tests.convert import convert_help as made  # noqa: E402

LLAMA_3_1 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3_1 |= {"original_max_position_embeddings": 8192}
KINDS = {
    "llama 2": ("llama", made.sentencepiece, {"head_dim": 16, "num_key_value_heads": 4}),
    "llama 3": ("llama", lambda: made.byte_level("llama-bpe", add_bos=True), {"rope_parameters": LLAMA_3_1}),
    "stretched": ("llama", lambda: made.byte_level("gpt-2"), {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2": ("qwen2", lambda: made.byte_level("qwen2"), {"head_dim": 16}),
    "qwen3": ("qwen3", lambda: made.byte_level("qwen2"), {"tie_word_embeddings": True}),
    "gemma": ("gemma", made.sentencepiece, {}),
}
TEXTS = (
    *made.ASKED,
    "In 1989 there were 1234567 of 3.14, 12 00 7; ٣٤٥ ½ x² 0x7F 1e-9",
    "def f(x):\n    if x >= 10:\n\t\treturn {'a': [1, 2], \"b\": None}  # why\r\n\r\n",
    "a" * 300 + "     " + "!?" * 40 + "\u00a0\u3000\u200b\ufeff",
    "e\u0301 é ﬁ ẞ İi 你好，世界。こんにちは 안녕 שלום مرحبا नमस्ते 👩‍👩‍👧 🇫🇷",
    "<|im_start|>user\n12 + 34?<|im_end|>\n<|im_start|>assistant\n<|im_start <|endoftext|> <|im_end|>",
    "https://example.org/a?b=c&d=%20 I'm, you're, THEY'LL, o'clock 'tis",
    "  leading\n\n \n\n\n trailing  \t ",
)


def load(path, progress=lambda _fraction, _words: None, cancel=None, **values):
    return LOADER.load(path, LOADER.options.build({"ctx_size": 256, "cpu": True, **values}), progress, cancel or CancelToken())


@pytest.fixture
def loaded():
    """`load`, unloaded at the end."""
    backends = []

    def get(*arguments, **values):
        backends.append(load(*arguments, **values))
        return backends[-1]

    yield get
    for backend in backends:
        backend.unload()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Architecture llama, which is read as conversions read it."""
    return tiny_models.dense(tmp_path_factory.mktemp("dense") / "dense.gguf")


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """Architecture gemma3, which the library reads."""
    return tiny_models.sliding_window(tmp_path_factory.mktemp("window") / "window.gguf")


# --- the same as elsewhere --------------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_the_starter_model_has_llama_cpps_tokens(starter_model, loaded):
    ours, theirs = loaded(starter_model), llama_cpp_help.load(starter_model)
    try:
        for text in TEXTS:
            for add_bos in (False, True):
                tokens = theirs.encode(text, add_bos)
                assert ours.encode(text, add_bos) == tokens, text
            assert ours.decode(tokens) == theirs.decode(tokens), text
        assert (ours.bos_token, ours.eos_token, ours.chat_template) == (theirs.bos_token, theirs.eos_token, theirs.chat_template)
    finally:
        theirs.unload()


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_model_computes_that_the_file_was_made_from(kind, tmp_path, loaded):
    model_type, tokenizer, values = KINDS[kind]
    folder = made.make_folder(tmp_path / "model", model_type, tokenizer(), **values)
    backend = loaded(made.to_file(folder))
    tokens = backend.encode(made.SAMPLE)
    assert tokens == loaded(folder).encode(made.SAMPLE)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(tiny.library_logprobs(backend._model, tokens), tiny.library_logprobs(wanted, tokens), atol=1e-3)
    assert tiny.tokens_of(tiny.run(backend, tuple(tokens[:40]), sampling=tiny.GREEDY, logit_bias=((2, -1000.0),))) == written(wanted, tokens[:40])


def written(model, prompt):
    """By transformers' own `generate`."""
    asked = torch.tensor([prompt])
    found = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=12, do_sample=False, suppress_tokens=[2], pad_token_id=2)
    return found[0, len(prompt) :].tolist()


def test_the_weights_are_those_that_the_library_reads(dense, loaded):
    ours = loaded(dense)._model.state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(dense.parent, gguf_file=dense.name).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_turns_end_that_the_file_names_ends_a_reply(dense, loaded):
    chunks = tiny.run(loaded(dense), "a", sampling=tiny.GREEDY, logit_bias=((tiny_models.IM_END, 1000.0),))
    assert chunks[-1].finish_reason == "stop" and chunks[-1].completion_tokens <= 1


# --- how it is read ---------------------------------------------------------------------------------------------------------------------


def test_tensors_are_rounded_piece_by_piece_to_the_numbers_computed_in(dense, loaded, monkeypatch):
    whole = loaded(dense)._model.state_dict()
    monkeypatch.setattr(gguf_model, "PIECE", 1000)  # numbers: a few rows
    half = loaded(dense, compute_dtype="bfloat16")._model.state_dict()
    assert half.keys() == whole.keys() and all(torch.equal(half[name], whole[name].to(torch.bfloat16)) for name in whole)


@pytest.mark.parametrize("name", ["dense", "window"])
def test_it_says_how_far_it_is_and_prints_nothing(name, request, loaded, capfd, caplog):
    told = []
    with caplog.at_level(logging.INFO):
        loaded(request.getfixturevalue(name), lambda fraction, words: told.append((fraction, words)))
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told) and told[-1] == (1.0, "Loaded")
    assert sum("Loading the model: " in words for _, words in told) > 5
    assert any("Reading the file: " in words for _, words in told) == (name == "window")
    assert ("transformers itself reads files of architecture gemma3" in caplog.text) == (name == "window")
    printed = capfd.readouterr()
    assert "%|" not in printed.out + printed.err


@pytest.mark.parametrize(("name", "where"), [("dense", "Loading the model: "), ("window", "Reading the file: "), ("window", "Loading the model: ")])
def test_cancelling_between_tensors(name, where, request):
    cancel, told = CancelToken(), []

    def progress(_fraction, words):
        told.append(words)
        if words.startswith(where):
            cancel.cancel()

    with pytest.raises(ModelError, match="cancelled"):
        load(request.getfixturevalue(name), progress, cancel)
    assert told[-1].startswith(where) and sum(words.startswith(where) for words in told) == 1


def test_numbers_too_large_for_float16_are_said(tmp_path):
    folder = made.make_folder(tmp_path / "model", "llama", made.byte_level("gpt-2"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"ffn_up.*too large for float16"):
        load(made.to_file(folder), compute_dtype="float16")


def test_bfloat16_in_the_file_is_the_models_own(tmp_path):
    file = made.to_file(made.make_folder(tmp_path / "model", "llama", made.byte_level("gpt-2")), "F16")
    data, name = bytearray(file.read_bytes()), b"blk.0.ffn_up.weight"
    kind = data.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions and these
    assert own_numbers(file) is None and data[kind] == 1
    data[kind] = 30
    file.write_bytes(data)
    assert own_numbers(file) == torch.bfloat16


def own_numbers(path):
    file = GgufFile(path)
    return gguf_model.GgufModel(file, file.architecture, print).config.dtype


def test_what_is_wrong_is_said_with_the_fix(dense, tmp_path):
    data = dense.read_bytes()
    spoilt = tmp_path / "spoilt.gguf"
    key = b"llama.block_count"
    assert data.count(key) == 1 and read_header(dense).block_count < 9
    at = data.index(key) + len(key) + 4
    spoilt.write_bytes(data[:at] + b"\x09\x00\x00\x00" + data[at + 4 :])
    with pytest.raises(ModelError, match=r"spoilt.gguf has no tensor 'blk\..*Use another conversion"):
        load(spoilt)
