"""Tokenizers: from a Hugging Face folder into a GGUF file and back.

Two kinds: byte-level BPE ("gpt2"), and SentencePiece's BPE ("llama"). A GGUF file names the way in which text is split before BPE instead of
describing it; `PRE_TOKENIZERS` says what a name means (llama.cpp, `llm_tokenizer_bpe`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.convert.sources import read_json, understood
from modules.errors import ModelError
from modules.gguf import Header, whole_list

_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_OTHER = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"{_OTHER}{_UPPER}*{_LOWER}+|{_OTHER}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitting:
    """How text is split before byte-level BPE: by an expression; or as GPT-2 does it, perhaps with each digit alone."""

    expression: str = ""
    digits: bool = False
    whole_words: bool = False
    """A piece that is a token is not merged from its bytes (`ignore_merges`)."""


PRE_TOKENIZERS = {
    "gpt-2": Splitting(),
    "smollm": Splitting(digits=True),
    "llama-bpe": Splitting(rf"{_ENDINGS}|{_OTHER}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", whole_words=True),
    "qwen2": Splitting(rf"{_ENDINGS}|{_OTHER}\p{{L}}+|\p{{N}}|{_REST}"),
    "tekken": Splitting(_TEKKEN, whole_words=True),
}
_OTHER_NAMES = {
    **dict.fromkeys(("phi-2", "gigachat", "mellum"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3"), "llama-bpe"),
    "deepseek-r1-qwen": "qwen2",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # gguf.TokenType
MAX_TOKENS = 4_000_000
TOKENIZERS = ("gpt2", "llama")
"""GGUF's names of the two kinds."""


# --- into a GGUF file -----------------------------------------------------------------------------------------------------------------


def add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Write the tokenizer in `folder` with `size` tokens (rows of the embeddings) to a GGUFWriter. Raises ModelError."""
    tokenizer = _load(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise ModelError(f"The tokenizer of {folder.name} is of type {model.get('type')!r}; this conversion knows BPE only.")
    pieces, types = _pieces(state, size)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, state, pieces, types, merges, tokenizer.unk_token)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(state, folder))
        writer.add_token_list(pieces)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    _add_special(writer, tokenizer)
    ends = read_json(folder / "generation_config.json").get("eos_token_id") if (folder / "generation_config.json").is_file() else None
    others = [end for end in ends if isinstance(end, int) and end != tokenizer.eos_token_id] if isinstance(ends, list) else []
    if others:
        writer.add_eot_token_id(others[0])


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with understood(f"The tokenizer of {folder.name} cannot be loaded", "Add tokenizer.json and tokenizer_config.json."):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"The tokenizer of {folder.name} has no tokenizer.json. Save it as a fast tokenizer first.")
    return tokenizer


def _pieces(state: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens by id; ids that nobody has are filled up."""
    known = {number: (text, _NORMAL) for text, number in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        known[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    if max(known, default=0) >= size or size > MAX_TOKENS:
        raise ModelError(
            f"The tokenizer has token {max(known, default=0)}, and the model's embeddings have {size} rows: they do not belong together."
        )
    found = [known.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(size)]
    return [text for text, _ in found], [kind for _, kind in found]


def _pre_tokenizer(state: dict[str, Any], folder: Path) -> str:
    steps = list(_flat(state.get("pre_tokenizer")))
    kinds = [step["type"] for step in steps]
    whole_words = bool(state["model"].get("ignore_merges"))
    splitting = None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        splitting = Splitting(whole_words=whole_words)
    elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        splitting = Splitting(digits=True, whole_words=whole_words)
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        splitting = Splitting(steps[0]["pattern"].get("Regex", ""), whole_words=whole_words)
    for name, known in PRE_TOKENIZERS.items():
        if known == splitting:
            return name
    raise ModelError(f"The tokenizer of {folder.name} splits text in a way that is not known here. Known: {', '.join(PRE_TOKENIZERS)}.")


def _flat(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if step and step["type"] == "Sequence":
        for part in step["pretokenizers"]:
            yield from _flat(part)
    elif step:
        yield step


def _add_sentencepiece(
    writer: Any, state: dict[str, Any], pieces: list[str], types: list[int], merges: list[tuple[str, ...]], unknown: str | None
) -> None:
    """SentencePiece's scores say in which order pieces are merged; a folder has the merges themselves, in that order."""
    rank: dict[str, int] = {}
    for merge in merges:
        rank.setdefault("".join(merge), len(rank) + 1)
    for number, piece in enumerate(pieces):
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            types[number] = _BYTE
        elif piece == unknown:
            types[number] = _UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(rank.get(piece, 0)) for piece in pieces])
    writer.add_token_types(types)
    writer.add_add_space_prefix(_space_before(state))


def _space_before(state: dict[str, Any]) -> bool:
    """Whether a text is tokenised as if a space stood before it."""
    normalizer = state.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    schemes = [step.get("prepend_scheme", "always") for step in _flat(state.get("pre_tokenizer")) if step["type"] == "Metaspace"]
    return any(part.get("type") == "Prepend" for part in parts) or any(scheme != "never" for scheme in schemes)


def _add_special(writer: Any, tokenizer: Any) -> None:
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            add(number)
    plain = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and plain[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and plain[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    elif isinstance(tokenizer.chat_template, dict) and "default" in tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template["default"])


# --- out of one -----------------------------------------------------------------------------------------------------------------------


def read_tokenizer(header: Header, warn: Callable[[str], None]) -> Any:
    """The tokenizer of the GGUF file, as Transformers has it; `warn` is told where it differs from llama.cpp's. Raises ModelError."""
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer would read the file once more, slowly, for what is not needed

    file = header.path
    with understood(f"The tokenizer of {file.name} cannot be read", "Use another conversion of this model."):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        tokenizer = _own_tokens(tokenizer, header)
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        _split_as(tokenizer, str(header.metadata.get("tokenizer.ggml.pre", "default")), warn)
    elif kind == "llama":
        _spaces_as(tokenizer, bool(header.metadata.get("tokenizer.ggml.add_space_prefix", True)))
    tokenizer.chat_template = header.chat_template
    return tokenizer


def _own_tokens(tokenizer: Any, header: Header) -> Any:
    """`tokenizer` with the tokens of the file, no more and no fewer.

    Transformers adds some that it expects in every vocabulary of a kind, and a model has no embeddings for them. Of those that are matched as a
    whole it forgets, in byte-level vocabularies, the ones with characters that stand for no byte, such as a space or U+FF5C.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    pieces, types = (whole_list(header, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [added for added in state["added_tokens"] if added["id"] < len(pieces)]
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        added = {each["id"] for each in state["added_tokens"]}
        whole = {n: kind for n, kind in enumerate(types[: len(pieces)]) if kind in (_CONTROL, _USER_DEFINED) and n not in added}
        _add_whole(state, {n: (str(pieces[n]), kind == _CONTROL) for n, kind in whole.items()})
    named = {key: value for key, value in tokenizer.init_kwargs.items() if key.endswith("_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **named)


def _add_whole(state: dict[str, Any], tokens: dict[int, tuple[str, bool]]) -> None:
    """Let tokens, by id: (text, whether special), be matched as a whole."""
    vocabulary = state["model"]["vocab"]
    spelled = {number: text for text, number in vocabulary.items() if number in tokens}
    merged = {"".join(merge) for merge in state["model"]["merges"]} if tokens else set()
    for number, (text, special) in tokens.items():
        if text in vocabulary or spelled.get(number) in merged:
            continue
        vocabulary.pop(spelled.get(number), None)
        vocabulary[text] = number
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
        state["added_tokens"].append({"id": number, "content": text, **flags})


def _split_as(tokenizer: Any, name: str, warn: Callable[[str], None]) -> None:
    """Transformers splits as GPT-2 does where it does not know the name, and that is another tokenizer, for digits at least."""
    from tokenizers import Regex, pre_tokenizers

    splitting = PRE_TOKENIZERS.get(_OTHER_NAMES.get(name, name))
    if splitting is None:
        warn(f"Text may be split into other tokens than llama.cpp splits it: the way {name[:40]!r} is not known here.")
        return
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splitting.expression)]
    if splitting.expression:
        steps.insert(0, pre_tokenizers.Split(Regex(splitting.expression), behavior="isolated"))
    elif splitting.digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.model.ignore_merges = splitting.whole_words


def _spaces_as(tokenizer: Any, space_before: bool) -> None:
    """SentencePiece merges over the whole text. Transformers' tokenizer adds no space to a text that begins with one; llama.cpp does."""
    from tokenizers import decoders, normalizers

    spaces, first = normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")
    reading = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([first, spaces]) if space_before else spaces
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence([*reading, decoders.Strip(" ", 1, 0)] if space_before else reading)
