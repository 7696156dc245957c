"""The smallest image encoders that llama.cpp loads, with random weights of a fixed seed, and a tiny text model, with M-RoPE or without.

They see nothing sensible, but everything a real one does happens: preprocessing, encoding, splitting, positions, attention both ways.
Kinds of encoder: `janus_pro` (causal; with `pinpoints` an image comes in several pieces), `gemma3` (non-causal), `idefics3` (wants tokens
that the starter model lacks), `qwen2vl_merger` (for the text model with M-RoPE).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

STARTER_WIDTH = 576
IMAGE, PATCH = 56, 14
PATCHES = (IMAGE // PATCH) ** 2
HIDDEN, HEADS, FEED = 32, 2, 64


class _Weights:
    """Tensors of normal random numbers, the same ones at each run."""

    def __init__(self, writer: gguf.GGUFWriter) -> None:
        self._writer = writer
        self._random = np.random.default_rng(7)

    def add(self, name: str, *shape: int, scale: float = 0.2) -> None:
        """A tensor; `shape` as numpy has it, the reverse of ggml's."""
        self._writer.add_tensor(name, (self._random.standard_normal(shape) * scale).astype(np.float32))

    def linear(self, name: str, rows: int, columns: int) -> None:
        """A matrix (rows, columns) and its bias."""
        self.add(f"{name}.weight", rows, columns)
        self.add(f"{name}.bias", rows)

    def norm(self, name: str, bias: bool = True) -> None:
        self._writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
        if bias:
            self._writer.add_tensor(f"{name}.bias", np.zeros(HIDDEN, np.float32))


def write_mmproj(path: Path, kind: str = "janus_pro", width: int = STARTER_WIDTH, pinpoints: tuple[int, ...] = (), layers: int = 1) -> Path:
    """Write an encoder whose embeddings are `width` wide; return `path`."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(kind)
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(IMAGE)
    writer.add_vision_patch_size(PATCH)
    writer.add_vision_embedding_length(HIDDEN)
    writer.add_vision_feed_forward_length(FEED)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(HEADS)
    writer.add_vision_projection_dim(width)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    if pinpoints:
        writer.add_array("clip.vision.image_grid_pinpoints", list(pinpoints))
    if kind in ("gemma3", "idefics3"):
        writer.add_vision_projector_scale_factor(2)
    weights = _Weights(writer)
    _encoder(weights, kind, layers)
    _projector(weights, kind, width)
    return _write(writer, path)


def _encoder(weights: _Weights, kind: str, layers: int) -> None:
    weights.add("v.patch_embd.weight", HIDDEN, 3, PATCH, PATCH, scale=0.05)
    if kind == "qwen2vl_merger":
        weights.add("v.patch_embd.weight.1", HIDDEN, 3, PATCH, PATCH, scale=0.05)
    else:
        weights.add("v.patch_embd.bias", HIDDEN)
        weights.add("v.position_embd.weight", PATCHES, HIDDEN)
    for layer in range(layers):
        block = f"v.blk.{layer}"
        weights.norm(f"{block}.ln1")
        weights.norm(f"{block}.ln2")
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            weights.linear(f"{block}.{name}", HIDDEN, HIDDEN)
        weights.linear(f"{block}.ffn_up", FEED, HIDDEN)
        weights.linear(f"{block}.ffn_down", HIDDEN, FEED)
    weights.norm("v.post_ln")


def _projector(weights: _Weights, kind: str, width: int) -> None:
    if kind == "janus_pro":
        weights.linear("mm.0", FEED, HIDDEN)
        weights.linear("mm.1", width, FEED)
    elif kind == "gemma3":
        weights.norm("mm.soft_emb_norm", bias=False)
        weights.add("mm.input_projection.weight", HIDDEN, width)
    elif kind == "idefics3":
        weights.add("mm.model.fc.weight", width, 4 * HIDDEN)
    elif kind == "qwen2vl_merger":
        weights.linear("mm.0", 4 * HIDDEN, 4 * HIDDEN)
        weights.linear("mm.2", width, 4 * HIDDEN)


TEXT_TOKENS = 260
"""A token for each byte, then `<|endoftext|>` (EOS), `<|vision_start|>`, `<|vision_end|>`, `<|start|>` (BOS)."""
BOS = 259


def write_text_model(path: Path, mrope: bool) -> Path:
    """Write a text model of one layer, HIDDEN wide, like Qwen2-VL's with `mrope`, else like Llama's; return `path`.

    It asks for BOS in front and EOS at the end of a text.
    """
    writer = gguf.GGUFWriter(path, "qwen2vl" if mrope else "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    if mrope:
        writer.add_rope_dimension_sections([2, 3, 3, 0])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*_byte_texts(), "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|start|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 4)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(BOS)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_tensor("token_embd.weight", token_embeddings())
    weights = _Weights(writer)
    weights.norm("output_norm", bias=False)
    weights.norm("blk.0.attn_norm", bias=False)
    weights.norm("blk.0.ffn_norm", bias=False)
    for name in ("attn_q", "attn_k", "attn_v"):
        weights.add(f"blk.0.{name}.weight", HIDDEN, HIDDEN)
        if mrope:
            weights.add(f"blk.0.{name}.bias", HIDDEN)
    weights.add("blk.0.attn_output.weight", HIDDEN, HIDDEN)
    weights.add("blk.0.ffn_gate.weight", FEED, HIDDEN)
    weights.add("blk.0.ffn_up.weight", FEED, HIDDEN)
    weights.add("blk.0.ffn_down.weight", HIDDEN, FEED)
    return _write(writer, path)


def token_embeddings() -> np.ndarray:
    """The text model's: float32 (TEXT_TOKENS, HIDDEN)."""
    return (np.random.default_rng(8).standard_normal((TEXT_TOKENS, HIDDEN)) * 0.2).astype(np.float32)


def _byte_texts() -> list[str]:
    """How byte-level BPE writes the 256 bytes: visible Latin-1 characters as they are, the others from U+0100 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


def _write(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
