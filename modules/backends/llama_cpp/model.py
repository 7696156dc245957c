"""A model in llama.cpp: load, tokenise, compute. The only file, with `chain.py`, that calls the native library. Engine process only."""

from __future__ import annotations

import collections
import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar

import llama_cpp.llama_cpp as lib
import numpy as np

from modules.backends.llama_cpp.chain import Chain, Vocabulary
from modules.backends.llama_cpp.threads import usable_cores, writing_threads
from modules.errors import ModelError

_CACHE_TYPES = {"fp16": 1, "q8_0": 8, "q4_0": 2}  # ggml.h, enum ggml_type
_SPLIT_MODES = {"none": lib.LLAMA_SPLIT_MODE_NONE, "layer": lib.LLAMA_SPLIT_MODE_LAYER, "row": lib.LLAMA_SPLIT_MODE_ROW, "tensor": 3}
_FLASH = {"auto": -1, "off": 0, "on": 1}
_NUMA_DISTRIBUTE = 1
_SEQUENCE = 0  # the one sequence of this version
_LINES_KEPT = 50


class Computed(Enum):
    """How a piece of computing ended."""

    DONE = 0
    FULL = 1
    STOPPED = 2


class NativeLog:
    """The last lines of llama.cpp's log, to say why a load failed; with `verbose` all of it goes to stderr."""

    _in_use: ClassVar[Any] = None  # outlives the model: the library logs for the whole process and holds only an address

    def __init__(self, verbose: bool) -> None:
        self.lines: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
        self._verbose = verbose
        self._line = ""
        callback = lib.llama_log_callback(self._take)
        lib.llama_log_set(callback, None)
        NativeLog._in_use = callback

    def _take(self, level: int, text: bytes, _data: Any) -> None:
        piece = text.decode("utf-8", "replace")
        if self._verbose:
            sys.stderr.write(piece)
        self._line = (self._line + piece)[-2000:]
        if self._line.endswith("\n"):
            if level >= 3 or "error" in self._line:  # warnings and errors (ggml.h, enum ggml_log_level)
                self.lines.append(self._line.strip())
            self._line = ""


def explain_failure(lines: Sequence[str]) -> str:
    """Why a load failed and what to do, from the log's last lines."""
    text = "\n".join(lines)
    if "unknown model architecture" in text:
        name = text.split("unknown model architecture:", 1)[-1].strip().split("\n")[0].strip(" '")
        return f"this llama.cpp does not know the architecture {name!r}. Update llama-cpp-python, or use another model."
    if any(word in text.lower() for word in ("failed to allocate", "unable to allocate", "out of memory", "cannot allocate")):
        return "memory ran out. Use a smaller --ctx-size, --cache-type q8_0, fewer --gpu-layers, or a smaller model."
    reason = next((line.split(": ", 1)[-1] for line in lines if "error" in line.lower() or "fail" in line.lower()), "llama.cpp gave no reason")
    reason = reason.removeprefix("error loading model: ")
    return f"{reason.rstrip('.')}. Download the model again, or use another conversion of it."


class Model:
    """A loaded model with one context and one sequence of tokens in its cache.

    Compute from one thread; `tokenize`, `detokenize` and `piece` may be called from any.
    """

    def __init__(self, path: str, options: Mapping[str, Any], on_progress: Callable[[float], None], verbose: bool = False) -> None:
        """`options`: the values of LlamaCppOptions. Raises ModelError with the reason and the fix."""
        self._log = NativeLog(verbose)
        self.nodes = 0
        """Graph nodes of prompt pieces computed so far: grows while the engine lives, even inside a long piece."""
        self.should_stop: Callable[[], bool] = lambda: False
        """Asked inside a prompt piece; True ends it."""
        self._abort = lib.ggml_abort_callback(self._beat)
        self._no_abort = lib.ggml_abort_callback()
        self._cached: list[int] = []
        lib.llama_backend_init()
        if options["numa"]:
            lib.llama_numa_init(_NUMA_DISTRIBUTE)
        self._model = self._load(path, options, on_progress)
        self._context = self._make_context(options)
        self._memory = lib.llama_get_memory(self._context)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.context_length = int(lib.llama_n_ctx(self._context))
        self.batch_size = int(lib.llama_n_batch(self._context))
        self._piece_buffer = ctypes.create_string_buffer(256)
        size = int(lib.llama_vocab_n_tokens(self._vocab))
        ends = tuple(token for token in range(size) if lib.llama_vocab_is_eog(self._vocab, token))
        self.vocabulary = Vocabulary(self._vocab, size, ends, self.context_length)
        self._one = (ctypes.c_int32 * 1)()

    def _load(self, path: str, options: Mapping[str, Any], on_progress: Callable[[float], None]) -> Any:
        params = lib.llama_model_default_params()
        params.n_gpu_layers = options["gpu_layers"]
        params.split_mode = _SPLIT_MODES[options["split_mode"]]
        mapped, locked = not options["no_mmap"], options["mlock"]
        params.load_mode = {(True, False): lib.LLAMA_LOAD_MODE_AUTO, (True, True): lib.LLAMA_LOAD_MODE_MMAP_MLOCK}.get(
            (mapped, locked), lib.LLAMA_LOAD_MODE_MLOCK if locked else lib.LLAMA_LOAD_MODE_NONE
        )
        shares = options["tensor_split"]
        devices = int(lib.llama_max_devices())
        split = (ctypes.c_float * max(devices, 1))(*shares[:devices])
        if shares:
            params.tensor_split = split

        def progress(fraction: float, _data: Any) -> bool:
            on_progress(fraction)
            return True

        params.progress_callback = callback = lib.llama_progress_callback(progress)
        model = lib.llama_model_load_from_file(path.encode(), params)
        del callback, split  # lived until here for the library's sake
        if not model:
            raise ModelError(f"The model could not be loaded: {explain_failure(self._log.lines)}")
        if not lib.llama_model_has_decoder(model) or lib.llama_model_has_encoder(model) or lib.llama_model_is_diffusion(model):
            raise ModelError("This model does not write text from left to right (it is an encoder or a diffusion model). Choose another model.")
        return model

    def _make_context(self, options: Mapping[str, Any]) -> Any:
        trained = int(lib.llama_model_n_ctx_train(self._model))
        params = lib.llama_context_default_params()
        params.n_ctx = options["ctx_size"] or min(trained, options["default_context"])
        params.n_batch = min(options["batch_size"], params.n_ctx)
        params.n_ubatch = min(options["ubatch_size"], params.n_batch)
        params.n_threads = options["threads"] or writing_threads()
        params.n_threads_batch = options["threads_batch"] or usable_cores()
        params.type_k = params.type_v = _CACHE_TYPES[options["cache_type"]]
        params.flash_attn_type = _FLASH[options["flash_attn"]]
        params.offload_kqv = not options["no_kv_offload"]
        params.rope_freq_base = options["rope_freq_base"]
        params.rope_freq_scale = 1 / options["compress_pos_emb"] if options["compress_pos_emb"] != 1 else 0
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise ModelError(f"A context of {params.n_ctx} tokens could not be made: {explain_failure(self._log.lines)}")
        return context

    # --- what it is -----------------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What the server wants to know, fit for JSON."""
        description = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self._model, description, len(description))
        template = lib.llama_model_chat_template(self._model, None)
        return {
            "context_length": self.context_length,
            "trained_context": int(lib.llama_model_n_ctx_train(self._model)),
            "vocabulary": self.vocabulary.size,
            "bos_token": self._special(lib.llama_vocab_bos(self._vocab)),
            "eos_token": self._special(lib.llama_vocab_eos(self._vocab)),
            "chat_template": template.decode("utf-8", "replace") if template else None,
            "description": description.value.decode("utf-8", "replace"),
            "parameters": int(lib.llama_model_n_params(self._model)),
            "model_bytes": int(lib.llama_model_size(self._model)),
            "threads": int(lib.llama_n_threads(self._context)),
        }

    def _special(self, token: int) -> str:
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    # --- text -----------------------------------------------------------------------------------------------------------------------

    def tokenize(self, text: bytes, add_bos: bool) -> list[int]:
        """Token ids of UTF-8 text, special tokens recognised. BOS in front only where the model wants one and none stands there."""
        room = len(text) + 16
        buffer = (ctypes.c_int32 * room)()
        count = int(lib.llama_tokenize(self._vocab, text, len(text), buffer, room, False, True))
        tokens = list(buffer[: max(count, 0)])
        bos = int(lib.llama_vocab_bos(self._vocab))
        if add_bos and bos >= 0 and lib.llama_vocab_get_add_bos(self._vocab) and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """UTF-8 of `tokens`, special tokens included. Tokens must be in the vocabulary."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        room = 16 * len(tokens) + 16
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = int(lib.llama_detokenize(self._vocab, array, len(tokens), buffer, room, False, True))
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def piece(self, token: int, special: bool) -> bytes:
        """Bytes of one token in the middle of a text (its leading space is kept); empty for special tokens unless `special`."""
        buffer = self._piece_buffer
        count = int(lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special))
        if count < 0:
            self._piece_buffer = buffer = ctypes.create_string_buffer(-count)
            count = int(lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special))
        return buffer.raw[: max(count, 0)]

    def first_unknown(self, tokens: Sequence[int]) -> int | None:
        """The first of `tokens` that is not in the vocabulary."""
        size = self.vocabulary.size
        return next((token for token in tokens if not 0 <= token < size), None)

    # --- computing ------------------------------------------------------------------------------------------------------------------

    def keep_prefix(self, tokens: Sequence[int]) -> int:
        """Trim the cache to what it shares with the start of `tokens`; how many tokens that is, at most all but the last.

        A cache that cannot be trimmed (recurrent, hybrid, sliding window) is cleared.
        """
        shared = _common_prefix(self._cached, tokens[:-1])
        if shared < len(self._cached) and not lib.llama_memory_seq_rm(self._memory, _SEQUENCE, shared, -1):
            shared = 0
        window = int(lib.llama_model_n_swa(self._model))
        if window and lib.llama_memory_seq_pos_min(self._memory, _SEQUENCE) > max(0, shared - window):
            shared = 0  # the window slid on: what the next token looks at is no longer there
        if shared == 0:
            lib.llama_memory_clear(self._memory, True)
        del self._cached[shared:]
        return shared

    def compute(self, tokens: Sequence[int]) -> Computed:
        """Compute the next prompt tokens, at most `batch_size`. Stopped or full: the cache is as before. Raises ModelError."""
        lib.llama_set_abort_callback(self._context, self._abort, None)
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        status = int(lib.llama_decode(self._context, lib.llama_batch_get_one(array, len(tokens))))
        lib.llama_set_abort_callback(self._context, self._no_abort, None)
        return self._computed(status, tokens)

    def compute_one(self, token: int) -> Computed:
        """Compute one generated token. Without the stop callback, which costs 1 to 2 % of so short a step."""
        self._one[0] = token
        return self._computed(int(lib.llama_decode(self._context, lib.llama_batch_get_one(self._one, 1))), (token,))

    def _computed(self, status: int, tokens: Sequence[int]) -> Computed:
        if status == 0:
            self._cached += tokens
            return Computed.DONE
        if not lib.llama_memory_seq_rm(self._memory, _SEQUENCE, len(self._cached), -1):
            self.forget()
        if status in (1, 2):
            return Computed(status)
        self.forget()
        raise ModelError(f"llama.cpp could not compute this (error {status}). Send again; if it repeats, load the model again.")

    def forget(self) -> None:
        """Empty the cache."""
        lib.llama_memory_clear(self._memory, True)
        self._cached.clear()

    def _beat(self, _data: Any) -> bool:
        self.nodes += 1
        return self.should_stop()

    def chain(self, plan: Sequence[tuple[str, Mapping[str, Any]]]) -> Chain:
        """Native samplers for a request."""
        return Chain(plan, self.vocabulary)

    def sample(self, chain: Chain) -> int | None:
        """The next token by `chain`; None when its grammar allows nothing more."""
        return chain.sample(self._context)

    def logprobs(self) -> np.ndarray:
        """Natural log-probabilities of all tokens for the next place, before samplers. float64 (vocabulary,)."""
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, -1), (self.vocabulary.size,)).astype(np.float64)
        logits -= logits.max()
        logits -= np.log(np.exp(logits).sum())
        return logits

    @property
    def cached(self) -> int:
        """Tokens in the cache."""
        return len(self._cached)

    def close(self) -> None:
        """Free everything; use no other method after it. (The engine process just ends instead.)"""
        lib.llama_free(self._context)
        lib.llama_model_free(self._model)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b)):  # noqa: B905  # the shorter one decides
        if x != y:
            return index
    return min(len(a), len(b))
