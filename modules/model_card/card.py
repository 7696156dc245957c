"""ModelCard: what is known of a model without loading it, and what its readers share. Standard library only: the reader's process must start fast."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from modules.errors import ModelError

Kind = Literal["gguf", "transformers", "exl2", "exl3", "adapter", "vision"]

MAX_LAYERS = 1024
MAX_COUNT = 1 << 48  # parameters, bytes, tokens: what is larger is not said
MAX_DEPTH = 32  # of JSON
MAX_TEMPLATE = 1 << 20
MAX_WORDS = 200  # characters of a name, a licence
FAMILIES = Path(__file__).resolve().parents[1] / "families.json"


@dataclass(frozen=True)
class ModelCard:
    """What a model's files say. Numbers are 0 and texts empty where they do not tell; sizes are bytes. Texts come from outside and are hostile."""

    name: str
    kind: Kind
    architecture: str = ""
    """As the format calls it: `llama`, `qwen3_moe`."""
    family: str = ""
    """The same for people."""
    parameters: int = 0
    quantisation: str = ""
    """As people call it: Q4_K_M, BF16, EXL3 4.0 bpw, GPTQ 4-bit."""
    context_length: int = 0
    """Tokens it was trained for."""
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    """The most in a layer."""
    head_size: int = 0
    embedding_size: int = 0
    feed_forward: int = 0
    """Width computed at once in a layer: all experts in use together."""
    vocabulary: int = 0
    experts: int = 0
    experts_used: int = 0
    sliding_window: int = 0
    """Tokens that layers with a window see."""
    windowed: tuple[bool, ...] = ()
    """For each layer, whether it has the window; empty: none."""
    cache_width: tuple[int, ...] = ()
    """Numbers that the context's cache holds for a token, for each layer: keys and values."""
    state_bytes: int = 0
    """State of recurrent layers, for each sequence."""
    layer_bytes: tuple[int, ...] = ()
    """Weights of each layer, without experts."""
    expert_bytes: tuple[int, ...] = ()
    """Of each layer, those that `--cpu-moe` keeps in main memory."""
    repacked_bytes: tuple[int, ...] = ()
    """Of each layer, those that llama.cpp lays out anew for CPUs, beside the mapped file."""
    input_bytes: int = 0
    """Embeddings of tokens."""
    output_bytes: int = 0
    """Everything that belongs to no layer and is no input."""
    tied: bool = False
    """The output matrix is the embeddings."""
    texts: int = 0
    """Tokens and merges of the vocabulary, which an engine keeps in memory."""
    embeds: bool = False
    """Makes embeddings, writes no text."""
    vision: bool = False
    licence: str = ""
    base_model: str = ""
    chat_template: str | None = None
    template: str = ""
    """Name of the shipped instruction template that is usual for the family."""
    remote_code: bool = False
    """Its folder wants to run code of its own."""
    size: int = 0
    files: tuple[str, ...] = ()
    """All files with weights, in order, beside each other."""

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelCard:
        """Raises ValueError for anything that `to_json` does not write."""
        found = json.loads(text)
        if not isinstance(found, dict) or found.keys() != {field.name for field in fields(cls)}:
            raise ValueError("not a model card")
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        if not all(_is_of(values[field.name], str(field.type)) for field in fields(cls)):
            raise ValueError("not a model card")
        return cls(**values)


def _is_of(value: object, kind: str) -> bool:
    """Whether a value has the type that a field of ModelCard is declared with."""
    if kind.startswith("tuple["):
        return isinstance(value, tuple) and all(_is_of(item, kind[6:].partition(",")[0]) for item in value)
    if kind == "Kind":
        return value in get_args(Kind)
    if kind == "str | None":
        return value is None or type(value) is str
    return type(value).__name__ == kind


def words(value: object) -> str:
    """A short text from outside on one line; "" for what is none."""
    return " ".join(value.split())[:MAX_WORDS] if isinstance(value, str) else ""


def count(value: object) -> int:
    """A number from outside; 0 for what cannot be one."""
    return value if type(value) is int and 0 < value < MAX_COUNT else 0


def checked_layers(name: str, number: int) -> int:
    """Raises ModelError for more layers than any model has."""
    if number > MAX_LAYERS:
        raise ModelError(f"{name} is damaged: it claims {number} layers, and at most {MAX_LAYERS} can be read. Use another file of this model.")
    return number


def template_text(value: object) -> str | None:
    """A chat template that is not larger than one may be."""
    return value if isinstance(value, str) and value.strip() and len(value) <= MAX_TEMPLATE else None


def file_size(path: Path) -> int:
    """Raises ModelError."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}. Check the file and its permissions.") from error


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises ModelError; FileNotFoundError when there is none."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}. Check the file and its permissions.") from error
    if len(raw) > limit:
        raise ModelError(f"{path.name} is larger than the {limit} bytes that such a file may have. Download it again, or use another model.")
    try:
        found = json.loads(raw.decode("utf-8-sig"))
        fits = isinstance(found, dict) and _depth(found) <= MAX_DEPTH
    except (ValueError, RecursionError):
        fits = False
    if not fits:
        raise ModelError(f"{path.name} is damaged: it holds no proper JSON object. Download it again.")
    return found


def _depth(value: object) -> int:
    """How deep lists and objects lie in each other; stops beyond MAX_DEPTH."""
    depth, level = 0, [value]
    while depth <= MAX_DEPTH:
        level = [item for outer in level if isinstance(outer, dict | list) for item in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            break
        depth += 1
    return depth


@dataclass(frozen=True)
class Family:
    """What files of an architecture do not say. `window_pattern`: the last of so many layers sees all, the others have the window."""

    name: str
    template: str = ""
    window_pattern: int = 0


@cache
def families() -> Mapping[str, Family]:
    """The shipped table, by architecture in either format's spelling."""
    rows = json.loads(FAMILIES.read_text("utf-8"))
    return {
        architecture: Family(row["name"], row.get("template", ""), row.get("window_pattern", 0))
        for row in rows
        for architecture in row["architectures"]
    }


def family_of(architecture: str) -> Family:
    """The row of `architecture`, or one that knows only its name."""
    return families().get(architecture) or Family(architecture)


def windowed_layers(layers: int, window: int, pattern: int) -> tuple[bool, ...]:
    """For each layer whether it has the window; empty when none has, or when that is not known."""
    if not window or pattern < 2:
        return ()
    return tuple(layer % pattern < pattern - 1 for layer in range(layers))


def sums(layers: int, parts: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Sizes added up by layer, from pairs of layer and size."""
    totals = [0] * layers
    for layer, size in parts:
        totals[layer] += size
    return tuple(totals)
