"""Broken model files through the reader: each gives a card or a named error, within seconds and little memory.

    python -m benchmarks.mutate_models [--files 10000] [--alone 200] [--seed 1] [--model FILE]

GGUF and safetensors files are cut and changed at random places (bits, bytes, lengths with the largest values, pieces moved, dropped and doubled),
configurations get values of other kinds, shards go missing, architectures are unknown. Most files go through children that read many each,
`--alone` of them through a child each, as `inspect` does. Printed: files tried, cards, errors, crashes, the slowest, the most memory of a child.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules import inspect_model
from modules.errors import ModelError
from modules.model_card import ModelCard

LARGEST = (0, 1, 7, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 2**31, 2**63, 10**300, 1e308, 0.5, "", "x", "../../x", [], [1], {}, {"a": 1}, [[]] * 5)
PER_CHILD = 2000


@dataclass
class Counts:
    """What became of the files."""

    files: int = 0
    cards: int = 0
    errors: int = 0
    crashes: list[str] = field(default_factory=list)
    """What the reader was asked when it ended, or gave no proper answer."""
    slowest: float = 0.0
    """Seconds."""
    memory: int = 0
    """Bytes, the most that a child had."""
    kinds: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, answer: ModelCard | str | ModelError, seconds: float) -> None:
        """One file's answer, or that there was none."""
        self.files += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        self.slowest = max(self.slowest, seconds)
        if isinstance(answer, ModelCard):
            self.cards += 1
        elif isinstance(answer, ModelError):
            self.crashes.append(f"{kind}: {answer}")
        else:
            self.errors += 1


class Reader:
    """A child that reads many files, started again after PER_CHILD of them or when it died."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._read = 0

    def ask(self, path: Path) -> bytes:
        """Its line; empty when it died or needed longer than a file may."""
        if self._child is None or self._read >= PER_CHILD:
            self.close()
            self._child, self._read = subprocess.Popen([*inspect_model._COMMAND, "--many"], stdin=subprocess.PIPE, stdout=subprocess.PIPE), 0
        child, self._read = self._child, self._read + 1
        assert child.stdin and child.stdout
        timer = threading.Timer(inspect_model.WALL_SECONDS, child.kill)
        timer.start()
        try:
            child.stdin.write(json.dumps(str(path)).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline(inspect_model.MAX_OUTPUT)
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if not line:
            self.close()
        return line

    def close(self) -> None:
        """End the child."""
        if self._child:
            self._child.kill()
            self._child.communicate()
            self._child = None


def run(folder: Path, chance: random.Random, files: int, alone: int, model: Path | None = None) -> Counts:
    """Make `files` broken models in `folder`, one after the other, and have them read, `alone` of them in a child each."""
    counts, reader = Counts(), Reader()
    every = max(files // alone, 1) if alone else files + 1
    try:
        for number, (kind, path) in zip(range(files), mutants(folder, chance, model), strict=False):
            began = time.monotonic()
            counts.add(kind, _answer(path, None if number % every == 0 else reader), time.monotonic() - began)
    finally:
        reader.close()
    counts.memory = _largest_child()
    return counts


def _largest_child() -> int:
    """Bytes that the largest child so far had at most; 0 on Windows, which does not keep that."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _answer(path: Path, reader: Reader | None) -> ModelCard | str | ModelError:
    """What a child says, `reader` or one of its own; the error when it says nothing."""
    try:
        return inspect_model.answer(path.name, reader.ask(path)) if reader else inspect_model.asked(path)
    except ModelError as error:
        return error


def mutants(folder: Path, chance: random.Random, model: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Broken models without end: the kind of each, and where it lies until the next is asked for."""
    gguf, tensors = _small_gguf() if model is None else model.read_bytes(), _safetensors()
    makers = (
        ("gguf", lambda: _file(folder / "m.gguf", _mutated(gguf, chance))),
        ("gguf cut", lambda: _file(folder / "m.gguf", gguf[: chance.randrange(len(gguf))])),
        ("gguf architecture", lambda: _file(folder / "m.gguf", gguf.replace(b"llama", bytes(chance.choices(range(256), k=5))))),
        ("safetensors", lambda: _folder(folder / "hf", CONFIG, _mutated(tensors, chance))),
        ("safetensors cut", lambda: _folder(folder / "hf", CONFIG, tensors[: chance.randrange(len(tensors))])),
        ("config values", lambda: _folder(folder / "hf", _changed(CONFIG, chance), tensors)),
        ("config text", lambda: _folder(folder / "hf", _mutated(json.dumps(CONFIG).encode(), chance), tensors)),
        ("shards", lambda: _shards(folder / "shards", chance, tensors)),
        ("parts", lambda: _parts(folder / "parts", chance, gguf)),
    )
    while True:
        for kind, make in makers:
            yield kind, make()


CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size": 10,
    "torch_dtype": "bfloat16",
    "text_config": {"hidden_size": 8},
    "quantization_config": {"quant_method": "gptq", "bits": 4},
}


def _small_gguf() -> bytes:
    """A small right file with lists, texts and tensors of several types."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def number(key: str, value: int) -> bytes:
        return text(key) + struct.pack("<II", 4, value)

    names = [f"blk.{layer}.{name}.weight" for layer in range(2) for name in ("attn_k", "attn_q", "ffn_up_exps")] + [
        "token_embd.weight",
        "output_norm.weight",
    ]
    keys = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("tokenizer.chat_template") + struct.pack("<I", 8) + text("{{ messages }}"),
        *(number(f"llama.{key}", 2) for key in ("block_count", "context_length", "embedding_length", "attention.head_count", "expert_count")),
        text("llama.attention.head_count_kv") + struct.pack("<IIQii", 9, 5, 2, 1, 0),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 20) + b"".join(text("token"[: n % 6]) for n in range(20)),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ20f", 9, 6, 20, *range(20)),
    ]
    tensors = [text(name) + struct.pack("<IQQIQ", 2, 32, 2, 0, 256 * place) for place, name in enumerate(names)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * 256 * len(tensors)


def _safetensors(
    names: tuple[str, ...] = ("model.embed_tokens.weight", "model.layers.0.mlp.experts.0.up.qweight", "model.layers.1.k.weight"),
) -> bytes:
    described = {name: {"dtype": "I32", "shape": [4, 8], "data_offsets": [128 * place, 128 * place + 128]} for place, name in enumerate(names)}
    text = json.dumps({"__metadata__": {"format": "pt"}, **described}).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 128 * len(names)


def _mutated(content: bytes, chance: random.Random) -> bytes:
    """One to six changes, most of them near the start, where the header is."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        end = max(len(changed), 1)
        at = chance.randrange(min(end, chance.choice((64, 1024, end))))
        kind = chance.randrange(6)
        if kind == 0 and changed:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and changed:
            changed[at] = chance.randrange(256)
        elif kind == 2:
            form = chance.choice(("<I", "<Q"))
            changed[at : at + struct.calcsize(form)] = struct.pack(form, chance.choice(LARGEST) & ((1 << 8 * struct.calcsize(form)) - 1))
        elif kind == 3:
            del changed[at : at + chance.randint(1, 40)]
        elif kind == 4:
            changed[at:at] = changed[chance.randrange(end) :][: chance.randint(1, 200)]
        else:
            changed[at:at] = bytes(chance.choices(b'{}[]",:0-e\\\xff\x00', k=chance.randint(1, 8)))
    return bytes(changed)


def _changed(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Some values of another kind, or gone."""
    changed = dict(config)
    for key in chance.sample(list(config), chance.randint(1, 5)):
        if chance.random() < 0.2:
            del changed[key]
        else:
            changed[key] = chance.choice(VALUES)
    return changed


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _folder(path: Path, config: dict[str, Any] | bytes, tensors: bytes) -> Path:
    path.mkdir(exist_ok=True)
    _file(path / "config.json", config if isinstance(config, bytes) else json.dumps(config).encode())
    _file(path / "model.safetensors", tensors)
    return path


def _shards(path: Path, chance: random.Random, tensors: bytes) -> Path:
    """A folder whose index, or one of whose shards, is wrong or missing."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.dumps({"weight_map": {f"t{place}": name for place, name in enumerate(names)}}).encode()
    _file(path / "config.json", json.dumps(CONFIG).encode())
    for place, name in enumerate(names):
        if chance.random() < 0.7:
            _file(path / name, _safetensors((f"t{place}",)) if chance.random() < 0.7 else tensors)
    if chance.random() < 0.7:
        _file(path / "model.safetensors.index.json", index if chance.random() < 0.4 else _mutated(index, chance))
    return path


def _parts(path: Path, chance: random.Random, gguf: bytes) -> Path:
    """A split model with wrong or missing parts."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    n_keys = struct.unpack_from("<Q", gguf, 16)[0]
    marks = b"".join(
        struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IH", 2, value) for key, value in (("split.no", 0), ("split.count", 3))
    )
    whole = gguf[:16] + struct.pack("<Q", n_keys + 2) + marks + gguf[24:]
    for number in (1, 2, 3):
        if number == 1 or chance.random() < 0.7:
            _file(path / f"m-0000{number}-of-00003.gguf", whole if chance.random() < 0.5 else _mutated(whole, chance))
    return path / "m-00001-of-00003.gguf"


def main() -> None:
    """Try them and print the counts; exit code 1 if the reader crashed or was too slow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--alone", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, help="a GGUF file to break instead of a small one made here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        counts = run(Path(folder), random.Random(given.seed), given.files, given.alone, given.model)
    print(
        f"{counts.files} files in {time.monotonic() - began:.0f} s: {counts.cards} cards, {counts.errors} named errors, {len(counts.crashes)} crashes"
    )
    print(f"slowest {counts.slowest:.2f} s, largest child {counts.memory / 2**20:.0f} MiB")
    print(", ".join(f"{kind}: {number}" for kind, number in sorted(counts.kinds.items())))
    for crash in counts.crashes[:10]:
        print("  ", crash)
    sys.exit(bool(counts.crashes) or counts.slowest > inspect_model.WALL_SECONDS)


if __name__ == "__main__":
    main()
