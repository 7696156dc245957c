"""Models of a few hundred kilobytes with random weights, one for each kind of memory that llama.cpp has, made by the tests that need them.

They write nonsense, but always the same nonsense, in printable ASCII: the rows of all other tokens in the output matrix are zero, so that greedy
decoding never ends by itself (ask for the end with a logit bias on `EOS`). What comes next depends on everything within reach, so a cache that lost
a cell, or shows one sequence another's, changes the text. All share one vocabulary: byte-level pieces, so any UTF-8 text survives tokenising.

Each function writes a GGUF file to `path` and returns it; the same arguments give the same bytes.
"""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np

from modules.gguf import read_header

CONTEXT = 2048
"""Tokens; what the files say they were trained with. (`bert`: 512.)"""
WINDOW = 16
"""Tokens that the windowed layers of `sliding_window` see, the current one included."""
UNK, BOS, EOS, IM_START, IM_END = range(5)
"""The control tokens: <unk>, <s>, </s>, <|im_start|>, <|im_end|>. Texts start with BOS; EOS and IM_END end a reply."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CONTROLS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
_WORDS = ("the", "and", "you", "is", "to", "of", "in", "user", "assistant", "system", "hello", "one", "two", "three", "why", "water", "name")
_WIDTH = 64
_HEADS, _KV_HEADS, _HEAD = 4, 2, 32  # a head of 32, so that the cache can also be q8_0
_INNER, _STATE, _CONV, _RANK = 2 * _WIDTH, 16, 4, 4  # of the recurrent layers
_EPSILON = 1e-5
_SPREAD = 4.0  # standard deviation of the logits: the best one then leads by 1 or more most of the time
_FOCUS = 1.2  # deviation of queries and keys: attention then prefers some tokens; in a mean over all one token would hardly count


# --- the models -----------------------------------------------------------------------------------------------------------------------


def dense(path: Path, seed: int = 1) -> Path:
    """Architecture llama, 3 layers: an ordinary cache that can be cut anywhere. Another `seed` gives another model with the same vocabulary."""
    file = _File(path, "llama", seed, layers=3)
    file.attention()
    file.writer.add_layer_norm_rms_eps(_EPSILON)
    file.embeddings()
    for layer in range(file.layers):
        file.attention_layer(layer)
        file.norm(f"blk.{layer}.ffn_norm")
        file.feed_forward(layer)
    return file.close()


def sliding_window(path: Path, seed: int = 2) -> Path:
    """Architecture gemma3, 4 layers: layers 0 and 2 see the last WINDOW tokens, layers 1 and 3 see all."""
    file = _File(path, "gemma3", seed, layers=4)
    file.attention()
    file.writer.add_layer_norm_rms_eps(_EPSILON)
    file.writer.add_sliding_window(WINDOW)
    file.writer.add_sliding_window_pattern([layer % 2 == 0 for layer in range(file.layers)])
    file.writer.add_rope_freq_base_swa(10_000.0)
    file.embeddings(scale=1 / math.sqrt(_WIDTH))  # the architecture multiplies them by the root of the width
    for layer in range(file.layers):
        file.attention_layer(layer)
        file.head_norms(layer)
        file.norm(f"blk.{layer}.post_attention_norm")
        file.norm(f"blk.{layer}.ffn_norm")
        file.norm(f"blk.{layer}.post_ffw_norm")
        file.feed_forward(layer)
    return file.close()


def recurrent(path: Path, seed: int = 3) -> Path:
    """Architecture mamba, 3 layers: one state a sequence instead of cells."""
    file = _File(path, "mamba", seed, layers=3)
    file.state_space()
    file.writer.add_layer_norm_rms_eps(_EPSILON)
    file.embeddings()
    for layer in range(file.layers):
        file.mamba_layer(layer)
    return file.close()


def hybrid(path: Path, seed: int = 4) -> Path:
    """Architecture jamba, 4 layers: layers 0 and 2 have a state, layers 1 and 3 have cells."""
    file = _File(path, "jamba", seed, layers=4)
    file.attention(heads=2, kv_heads=[0, 2, 0, 2])
    file.state_space()
    file.writer.add_layer_norm_rms_eps(_EPSILON)
    file.embeddings()
    for layer in range(file.layers):
        if layer % 2 == 0:
            file.mamba_layer(layer, norms=True)
        else:
            file.attention_layer(layer, heads=2, kv_heads=2)
        file.norm(f"blk.{layer}.ffn_norm")
        file.feed_forward(layer)
    return file.close()


def short_convolution(path: Path, seed: int = 5) -> Path:
    """Architecture lfm2, 4 layers: a hybrid whose state llama.cpp can take back by a few tokens (`n_rs_seq`). Layers 0 and 2 have the state."""
    file = _File(path, "lfm2", seed, layers=4)
    file.attention(heads=2, kv_heads=[0, 2, 0, 2])
    file.writer.add_shortconv_l_cache(_CONV)
    file.writer.add_layer_norm_rms_eps(_EPSILON)
    file.embeddings(norm="token_embd_norm")
    for layer in range(file.layers):
        if layer % 2 == 0:
            file.norm(f"blk.{layer}.attn_norm")
            file.random(f"blk.{layer}.shortconv.conv.weight", (_WIDTH, _CONV), 0.7)
            file.matrix(f"blk.{layer}.shortconv.in_proj.weight", 3 * _WIDTH, _WIDTH, 1.3)
            file.matrix(f"blk.{layer}.shortconv.out_proj.weight", _WIDTH, _WIDTH, 1.3)
        else:
            file.attention_layer(layer, heads=2, kv_heads=2)
            file.head_norms(layer)
        file.norm(f"blk.{layer}.ffn_norm")
        file.feed_forward(layer)
    return file.close()


def bert(path: Path, seed: int = 6) -> Path:
    """Architecture bert, 2 layers: an encoder; each text gives one embedding of 64 numbers, the mean over its tokens. At most 512 tokens."""
    file = _File(path, "bert", seed, layers=2, context=512)
    file.attention(heads=2, kv_heads=2)
    file.writer.add_layer_norm_eps(_EPSILON)
    file.writer.add_causal_attention(False)
    file.writer.add_pooling_type(gguf.PoolingType.MEAN)
    file.writer.add_token_type_count(2)
    size = len(_pieces())
    file.random("token_embd.weight", (size, _WIDTH), 1.0)
    file.random("token_types.weight", (2, _WIDTH), 0.1)
    file.random("position_embd.weight", (512, _WIDTH), 0.3)
    file.norm("token_embd_norm", bias=True)
    for layer in range(file.layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            file.matrix(f"blk.{layer}.{name}.weight", _WIDTH, _WIDTH, 1.3)
            file.random(f"blk.{layer}.{name}.bias", (_WIDTH,), 0.1)
        for name, rows, columns in (("ffn_up", 2 * _WIDTH, _WIDTH), ("ffn_down", _WIDTH, 2 * _WIDTH)):
            file.matrix(f"blk.{layer}.{name}.weight", rows, columns, 1.3)
            file.random(f"blk.{layer}.{name}.bias", (rows,), 0.1)
        file.norm(f"blk.{layer}.attn_output_norm", bias=True)
        file.norm(f"blk.{layer}.layer_output_norm", bias=True)
    return file.close()


def lora(path: Path, base: Path, seed: int = 7, strength: float = 2.0) -> Path:
    """An adapter of rank 4 on the query and value matrices of all layers of `base`, a model of architecture llama.

    With the default `strength` greedy output is clearly another one, at scale 0.5 too, also of the starter model; with 0 it is the same.
    Strength and scale multiply.
    """
    header = read_header(base)
    if header.architecture != "llama":
        raise ValueError(f"{base.name} is of architecture {header.architecture}; this makes adapters for llama only.")

    def number(key: str, otherwise: int = 0) -> int:
        value = header.of_architecture(key)
        return value if isinstance(value, int) else otherwise

    width, heads = number("embedding_length"), number("attention.head_count")
    kv_heads, head = number("attention.head_count_kv", heads), number("attention.key_length", width // heads)
    rank = 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    random = np.random.default_rng(seed)
    for layer in range(header.block_count):
        for name, size in (("attn_q", heads * head), ("attn_v", kv_heads * head)):
            a = random.standard_normal((rank, width)) / math.sqrt(width)
            b = random.standard_normal((size, rank)) * strength / math.sqrt(rank)
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", a.astype(np.float32))
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", b.astype(np.float32))
    _write(writer)
    return path


# --- their parts ----------------------------------------------------------------------------------------------------------------------


class _File:
    """A model file in the making. Matrices are (outputs, inputs), as numpy sees them; GGUF counts the other way round."""

    def __init__(self, path: Path, architecture: str, seed: int, layers: int, context: int = CONTEXT) -> None:
        self.path = path
        self.layers = layers
        self.writer = gguf.GGUFWriter(path, architecture)
        self._random = np.random.default_rng(seed)
        self.writer.add_name(f"tiny {architecture} {seed}")
        self.writer.add_context_length(context)
        self.writer.add_embedding_length(_WIDTH)
        self.writer.add_feed_forward_length(2 * _WIDTH)
        self.writer.add_block_count(layers)
        self.writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        _add_vocabulary(self.writer)

    def close(self) -> Path:
        """Write it all."""
        _write(self.writer)
        return self.path

    # --- what the header says

    def attention(self, heads: int = _HEADS, kv_heads: int | list[int] = _KV_HEADS) -> None:
        self.writer.add_head_count(heads)
        self.writer.add_head_count_kv(kv_heads)
        self.writer.add_key_length(_HEAD)
        self.writer.add_value_length(_HEAD)
        self.writer.add_rope_dimension_count(_HEAD)
        self.writer.add_rope_freq_base(10_000.0)

    def state_space(self) -> None:
        self.writer.add_ssm_conv_kernel(_CONV)
        self.writer.add_ssm_inner_size(_INNER)
        self.writer.add_ssm_state_size(_STATE)
        self.writer.add_ssm_time_step_rank(_RANK)

    # --- tensors

    def tensor(self, name: str, values: np.ndarray) -> None:
        self.writer.add_tensor(name, np.ascontiguousarray(values, np.float32))

    def random(self, name: str, shape: tuple[int, ...], deviation: float) -> None:
        """Normally distributed around 0."""
        self.tensor(name, self._random.standard_normal(shape) * deviation)

    def matrix(self, name: str, outputs: int, inputs: int, gain: float) -> None:
        """A matrix that makes numbers of deviation `gain` from inputs of deviation 1."""
        self.random(name, (outputs, inputs), gain / math.sqrt(inputs))

    def norm(self, name: str, size: int = _WIDTH, factor: float = 1.0, bias: bool = False) -> None:
        self.tensor(f"{name}.weight", np.full(size, factor))
        if bias:
            self.tensor(f"{name}.bias", np.zeros(size))

    def embeddings(self, scale: float = 1.0, norm: str = "output_norm") -> None:
        """Embeddings, the last norm, and an output matrix that speaks printable ASCII only."""
        pieces = _pieces()
        self.random("token_embd.weight", (len(pieces), _WIDTH), scale)
        self.norm(norm)
        output = self._random.standard_normal((len(pieces), _WIDTH)) * _SPREAD / math.sqrt(_WIDTH)
        output[[not _is_printable(piece) for piece in pieces]] = 0
        self.tensor("output.weight", output)

    def head_norms(self, layer: int) -> None:
        self.norm(f"blk.{layer}.attn_q_norm", _HEAD, _FOCUS)
        self.norm(f"blk.{layer}.attn_k_norm", _HEAD, _FOCUS)

    def attention_layer(self, layer: int, heads: int = _HEADS, kv_heads: int = _KV_HEADS) -> None:
        self.norm(f"blk.{layer}.attn_norm")
        self.matrix(f"blk.{layer}.attn_q.weight", heads * _HEAD, _WIDTH, _FOCUS)
        self.matrix(f"blk.{layer}.attn_k.weight", kv_heads * _HEAD, _WIDTH, _FOCUS)
        self.matrix(f"blk.{layer}.attn_v.weight", kv_heads * _HEAD, _WIDTH, 1.0)
        self.matrix(f"blk.{layer}.attn_output.weight", _WIDTH, heads * _HEAD, 1.3)

    def feed_forward(self, layer: int) -> None:
        self.matrix(f"blk.{layer}.ffn_gate.weight", 2 * _WIDTH, _WIDTH, 1.0)
        self.matrix(f"blk.{layer}.ffn_up.weight", 2 * _WIDTH, _WIDTH, 1.0)
        self.matrix(f"blk.{layer}.ffn_down.weight", _WIDTH, 2 * _WIDTH, 1.5)

    def mamba_layer(self, layer: int, norms: bool = False) -> None:
        """Steps of 0.01 to 0.2 and decays of 0.02 to 4: memories from one token to thousands."""
        self.norm(f"blk.{layer}.attn_norm")
        self.matrix(f"blk.{layer}.ssm_in.weight", 2 * _INNER, _WIDTH, 1.5)
        self.random(f"blk.{layer}.ssm_conv1d.weight", (_INNER, _CONV), 0.7)
        self.random(f"blk.{layer}.ssm_conv1d.bias", (_INNER,), 0.1)
        self.matrix(f"blk.{layer}.ssm_x.weight", _RANK + 2 * _STATE, _INNER, 3.0)
        self.matrix(f"blk.{layer}.ssm_dt.weight", _INNER, _RANK, 0.3)
        steps = np.exp(self._random.uniform(math.log(0.01), math.log(0.2), _INNER))
        self.tensor(f"blk.{layer}.ssm_dt.bias", np.log(np.expm1(steps)))  # the architecture takes softplus of it
        decays = np.exp(np.linspace(math.log(0.02), math.log(4), _STATE))
        self.tensor(f"blk.{layer}.ssm_a", np.tile(-decays, (_INNER, 1)))
        self.tensor(f"blk.{layer}.ssm_d", np.ones(_INNER))
        self.matrix(f"blk.{layer}.ssm_out.weight", _WIDTH, _INNER, 1.5)
        if norms:
            self.norm(f"blk.{layer}.ssm_dt_norm", _RANK)
            self.norm(f"blk.{layer}.ssm_b_norm", _STATE)
            self.norm(f"blk.{layer}.ssm_c_norm", _STATE)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    pieces, merges = _pieces(), _merges()
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([control] * len(_CONTROLS) + [normal] * (len(pieces) - len(_CONTROLS)))
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(IM_END)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte 0..255 in byte-level vocabularies: itself where it is printable, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + number) for number in range(256))
    return [chr(byte) if byte in visible else next(others) for byte in range(256)]


def _merges() -> list[tuple[str, str]]:
    """Each word grows letter by letter, with and without a space before it; pairs that make a piece twice are left out."""
    space = _byte_characters()[0x20]
    merges: dict[str, tuple[str, str]] = {}
    for form in (form for word in _WORDS for form in (word, space + word)):
        for end in range(2, len(form) + 1):
            merges.setdefault(form[:end], (form[: end - 1], form[end - 1]))
    return list(merges.values())


def _pieces() -> list[str]:
    """The vocabulary: control tokens, then bytes, then beginnings of words."""
    return [*_CONTROLS, *_byte_characters(), *(left + right for left, right in _merges())]


def _is_printable(piece: str) -> bool:
    """Whether a piece is printable ASCII (spaces and line feeds too)."""
    characters = _byte_characters()
    return piece not in _CONTROLS and all(characters.index(character) in {0x0A, *range(0x20, 0x7F)} for character in piece)
