"""A model in llama.cpp: load, tokenise, compute. With `chain.py` and `vision.py` the only file that calls the native library. Engine process only.

`Model` holds the weights and one context with a unified cache for many sequences; the scheduler's `Decoder` and the cache's `Memory` are its faces.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import llama_cpp.llama_cpp as lib
import numpy as np
import psutil

from modules.backends.llama_cpp.chain import Chain, Vocabulary
from modules.backends.llama_cpp.scheduler import Computed, Row
from modules.backends.llama_cpp.shape import OUTPUTS, shape
from modules.backends.llama_cpp.threads import Threads
from modules.backends.llama_cpp.vision import Vision
from modules.errors import ModelError, NotANumber, PromptTooLong

_CACHE_TYPES = {"fp16": 1, "q8_0": 8, "q4_0": 2}  # ggml.h, enum ggml_type
_SPLIT_MODES = {"none": lib.LLAMA_SPLIT_MODE_NONE, "layer": lib.LLAMA_SPLIT_MODE_LAYER, "row": lib.LLAMA_SPLIT_MODE_ROW, "tensor": 3}
_FLASH = {"auto": -1, "off": 0, "on": 1}
_NUMA_DISTRIBUTE = 1
_LINES_KEPT = 50
_SMALLER = "Use a smaller --ctx-size, or other options."
_EMBEDDING_CONTEXT = 2048
"""Tokens of a text that can be embedded: a text is pooled over one computation, which needs memory for all of it at once."""
EMBEDDED_AT_ONCE = 16
"""Texts in one computation of embeddings."""
PART_BYTES = 1 << 14
"""Of a text that is tokenised in one go, where it can be cut."""
_WATCHED_FROM = 32
"""Tokens of a step in which the callback is asked and shows that the engine gets on."""
_EXPERTS = rb"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


class NativeLog:
    """The last lines of llama.cpp's log, to say why a load failed; with `verbose` all of it goes to stderr."""

    _in_use: ClassVar[Any] = None  # outlives the model: the library logs for the whole process and holds only an address
    lines: ClassVar[collections.deque[str]] = collections.deque(maxlen=_LINES_KEPT)

    def __init__(self, verbose: bool) -> None:
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


def explain_failure(lines: Sequence[str], advice: str = "Download the model again, or use another conversion of it.") -> str:
    """Why a load failed and what to do, from the log's last lines; `advice` where these do not tell."""
    text = "\n".join(lines)
    if "unknown model architecture" in text:
        name = text.split("unknown model architecture:", 1)[-1].strip().split("\n")[0].strip(" '")
        return f"this llama.cpp does not know the architecture {name!r}. Update llama-cpp-python, or use another model."
    if any(word in text.lower() for word in ("failed to allocate", "unable to allocate", "out of memory", "cannot allocate", "bad_alloc")):
        return "memory ran out. Use a smaller --ctx-size, --cache-type q8_0, fewer --gpu-layers, or a smaller model."
    if "requires flash_attn" in text:
        return "a quantised cache needs flash attention. Use --flash-attn auto, or --cache-type fp16."
    if "needs >= 1 devices" in text:
        return "splitting by tensor needs a GPU. Use --split-mode layer."
    telling = [line for line in lines if "error" in line.lower() or "fail" in line.lower()] or list(lines[-1:])
    reason = telling[0].split(": ", 1)[-1].removeprefix("error loading model: ") if telling else "llama.cpp gave no reason"
    return f"{reason.rstrip('.')}. {advice}"


def explain_adapter(lines: Sequence[str]) -> str:
    """Why an adapter could not be loaded and what to do, from the log's last lines."""
    text = "\n".join(lines)
    if "mismatch" in text or "not in base model" in text or "incorrect shape" in text or "does not exist in base model" in text:
        return "it was made for another base model. Load the model it belongs to."
    return explain_failure(lines, "Download it again, or use another conversion of it.")


class Model:
    """A loaded model and its context. Compute from one thread; `tokenize`, `detokenize`, `piece` and `chain` may be called from any."""

    def __init__(self, path: str, options: Mapping[str, Any], on_progress: Callable[[float], None], verbose: bool = False) -> None:
        """`options`: the values of LlamaCppOptions, `default_context`, and the texts of `markers`. Raises ModelError with the reason and the fix."""
        self._log = NativeLog(verbose)
        NativeLog.lines.clear()
        self._verbose = verbose
        self.nodes = 0
        """Graph nodes of long steps computed so far: grows while the engine lives, even inside a step."""
        self._stop: Callable[[], bool] | None = None
        self._abort = lib.ggml_abort_callback(self._beat)
        self._no_abort = lib.ggml_abort_callback()
        lib.llama_backend_init()
        if options["numa"]:
            lib.llama_numa_init(_NUMA_DISTRIBUTE)
        self.threads = Threads(options["threads"], options["threads_batch"])
        self._options = options
        self.max_queue: int = options["max_queue"]
        self._model = self._load(path, options, on_progress)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self._window = int(lib.llama_model_n_swa(self._model))
        self._stateful = bool(lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))
        self.cuts = not self._window and not self._stateful
        """See `Memory.cuts`. With a window the library cuts without a word even where that leaves too little to go on from."""
        self.writes = _writes(self._metadata("general.architecture"))
        self._adapters: dict[str, Any] = {}
        self._threads_set: dict[int, int] = {}
        self._key: Hashable = None
        self._embedder: Any = None
        self._context = self._make_context(options) if self.writes else self._embedding_context()
        self._memory = lib.llama_get_memory(self._context)
        self.context_length = int(lib.llama_n_ctx(self._context))
        self.batch_size = int(lib.llama_n_batch(self._context))
        self.outputs_size = min(self.batch_size, max(OUTPUTS, self.sequences))
        self._piece_buffers = threading.local()
        size = int(lib.llama_vocab_n_tokens(self._vocab))
        ends = tuple(token for token in range(size) if lib.llama_vocab_is_eog(self._vocab, token))
        self.ends = frozenset(ends)
        """Tokens that end a text."""
        self.vocabulary = Vocabulary(self._vocab, size, ends, self.context_length)
        self._markers = frozenset(
            token
            for text in options["markers"]
            for token in self._tokens(text.encode())
            if lib.llama_vocab_get_attr(self._vocab, token) & lib.LLAMA_TOKEN_ATTR_CONTROL
        )
        self._scratch = np.empty(size, np.float32)
        self._batch = _Batch(max(self.batch_size, 1))
        mmproj = options["mmproj"]
        self.vision = Vision(mmproj, self._model, self.threads.reading, options["gpu_layers"] != 0, verbose) if mmproj else None
        self.seconds_per_token = 0.0
        if self.writes:
            self._warm_up()

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
        on_cpu = _on_cpu(_EXPERTS) if options["cpu_moe"] else None
        if on_cpu is not None:
            params.tensor_buft_overrides = ctypes.cast(on_cpu, ctypes.c_void_p)

        def progress(fraction: float, _data: Any) -> bool:
            on_progress(fraction)
            return True

        params.progress_callback = callback = lib.llama_progress_callback(progress)
        model = lib.llama_model_load_from_file(path.encode(), params)
        del callback, split, on_cpu  # lived until here for the library's sake
        if not model:
            raise ModelError(f"The model could not be loaded: {explain_failure(NativeLog.lines)}")
        if not lib.llama_model_has_decoder(model) or lib.llama_model_has_encoder(model) or lib.llama_model_is_diffusion(model):
            raise ModelError("This model does not write text from left to right (it is an encoder or a diffusion model). Choose another model.")
        return model

    def _make_context(self, options: Mapping[str, Any]) -> Any:
        trained = int(lib.llama_model_n_ctx_train(self._model))
        sizes = shape(options, trained, options["default_context"], self.cuts)
        self.parallel, self.sequences = sizes.parallel, sizes.sequences
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = sizes.context, sizes.batch, sizes.ubatch
        params.n_outputs_max, params.n_seq_max = sizes.outputs, sizes.sequences
        params.kv_unified = True
        params.swa_full = options["streaming_llm"]
        self._common(params, options)
        self._check_size(params.n_ctx)
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise ModelError(f"A context of {params.n_ctx} tokens could not be made: {explain_failure(NativeLog.lines, _SMALLER)}")
        return context

    def _check_size(self, cells: int) -> None:
        """Refuse what cannot fit at once: the library would first prepare so many cells for a minute. Raises ModelError."""
        smallest = cells * int(lib.llama_model_n_layer(self._model)) * 64  # bytes; every cache needs more
        total = psutil.virtual_memory().total
        if smallest > total and not lib.llama_supports_gpu_offload():
            raise ModelError(f"A context of {cells} tokens needs over {smallest >> 30} GiB, and this machine has {total >> 30}. {_SMALLER}")

    def _common(self, params: Any, options: Mapping[str, Any]) -> None:
        params.n_threads, params.n_threads_batch = self.threads.writing, self.threads.reading
        params.type_k = params.type_v = _CACHE_TYPES[options["cache_type"]]
        params.flash_attn_type = _FLASH[options["flash_attn"]]
        params.offload_kqv = not options["no_kv_offload"]
        params.rope_freq_base = options["rope_freq_base"]
        params.rope_freq_scale = 1 / options["compress_pos_emb"] if options["compress_pos_emb"] != 1 else 0
        params.no_perf = True

    def _warm_up(self) -> None:
        """Compute a token twice: the first step touches all weights, and would be the first user's to wait for; the second tells how fast it is."""
        token = np.array([max(0, int(lib.llama_vocab_bos(self._vocab)))], np.int32)
        for position in (0, 1):
            began = time.monotonic()
            self.decode([Row(0, token, np.array([position], np.int32), 1)], None, None)
            self.seconds_per_token = time.monotonic() - began
        lib.llama_memory_clear(self._memory, True)

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
            "threads": self.threads.writing,
            "threads_batch": self.threads.reading,
            "parallel": self.parallel,
            "cuts": self.cuts,
            "writes": self.writes,
            "image_marker": self.vision.marker if self.vision else "",
        }

    def _special(self, token: int) -> str:
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def _metadata(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    # --- text -----------------------------------------------------------------------------------------------------------------------

    def tokenize(self, text: bytes, add_bos: bool) -> list[int]:
        """Token ids of UTF-8 text, special tokens recognised. BOS in front only where the model wants one and none stands there."""
        tokens = [token for part in self._parts(text) for token in self._tokens(part)]
        bos = int(lib.llama_vocab_bos(self._vocab))
        if add_bos and bos >= 0 and lib.llama_vocab_get_add_bos(self._vocab) and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def _tokens(self, text: bytes) -> list[int]:
        room = len(text) + 16
        buffer = (ctypes.c_int32 * room)()
        count = int(lib.llama_tokenize(self._vocab, text, len(text), buffer, room, False, True))
        return list(buffer[: max(count, 0)])

    def _parts(self, text: bytes) -> Iterator[bytes]:
        """`text` cut before special tokens, because llama.cpp takes time with the square of their number: 19 s for 100,000 of them, uncut.

        Tokens are the same: a special token is one wherever it stands. Not behind white space, which some of them swallow.
        """
        begun = 0
        for found in self._special_texts.finditer(text) if len(text) > PART_BYTES else ():
            if found.start() - begun >= PART_BYTES and not text[found.start() - 1 : found.start()].isspace():
                yield text[begun : found.start()]
                begun = found.start()
        yield text[begun:]

    @functools.cached_property
    def _special_texts(self) -> re.Pattern[bytes]:
        marked = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
        texts = {
            lib.llama_vocab_get_text(self._vocab, token)
            for token in range(int(lib.llama_vocab_n_tokens(self._vocab)))
            if lib.llama_vocab_get_attr(self._vocab, token) & marked
        }
        return re.compile(b"|".join(re.escape(each) for each in sorted(texts - {b""}, key=len, reverse=True)) or rb"(?!)")

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
        """Bytes of one token in the middle of a text (its leading space is kept); empty for special tokens but markers unless `special`."""
        special = special or token in self._markers
        buffer = getattr(self._piece_buffers, "buffer", None) or ctypes.create_string_buffer(256)
        count = int(lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special))
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = int(lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special))
        self._piece_buffers.buffer = buffer
        return buffer.raw[: max(count, 0)]

    def first_unknown(self, tokens: Sequence[int]) -> int | None:
        """The first of `tokens` that is not in the vocabulary."""
        size = self.vocabulary.size
        return next((token for token in tokens if not 0 <= token < size), None)

    def chain(self, plan: Sequence[tuple[str, Mapping[str, Any]]]) -> Chain:
        """Native samplers for a request."""
        return Chain(plan, self.vocabulary)

    # --- computing (the scheduler's Decoder) ------------------------------------------------------------------------------------------

    def decode(self, rows: Sequence[Row], key: Hashable, stop: Callable[[], bool] | None) -> Computed:
        """Compute `rows` with the adapters `key`. See `Decoder.decode`."""
        self._use(key)
        count = self._batch.fill(rows)
        self._apply_threads(self._context, count)
        # The callback costs 1 to 2 % of a short step, which is over soon; what cannot be cut back must not be stopped half-way.
        watched = count > _WATCHED_FROM
        self._stop = stop if self.cuts else None
        if watched:
            lib.llama_set_abort_callback(self._context, self._abort, None)
        status = int(lib.llama_decode(self._context, self._batch.struct))
        if watched:
            lib.llama_set_abort_callback(self._context, self._no_abort, None)
        if status == 0:
            return Computed.DONE
        for row in rows:
            lib.llama_memory_seq_rm(self._memory, row.sequence, int(row.positions[0]), -1)
        return self._computed(status)

    def _apply_threads(self, context: Any, tokens: int) -> None:
        count = self.threads.now(tokens)
        if self._threads_set.get(id(context)) != count:
            self._threads_set[id(context)] = count
            lib.llama_set_n_threads(context, count, count)

    def _computed(self, status: int) -> Computed:
        if status in (0, 1, 2):
            return Computed(status)
        raise ModelError(f"llama.cpp could not compute this (error {status}). Send again; if it repeats, load the model again.")

    def decode_image(self, image: Any, position: int, sequence: int, key: Hashable) -> Computed:
        """Compute an image's entries. See `Decoder.decode_image`."""
        assert self.vision
        self._use(key)
        self._apply_threads(self._context, image.length)
        status = self.vision.decode(self._context, image, position, sequence, self.batch_size)
        if status:
            lib.llama_memory_seq_rm(self._memory, sequence, position, -1)
        return self._computed(status)

    def _beat(self, _data: Any) -> bool:
        self.nodes += 1
        return self._stop is not None and self.nodes % 8 == 0 and self._stop()

    def logprobs(self, output: int) -> np.ndarray:
        """Natural log-probabilities of all tokens after output `output`, before samplers. float64 (vocabulary,)."""
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, output), (self.vocabulary.size,)).astype(np.float64)
        logits -= logits.max()
        logits -= np.log(np.exp(logits).sum())
        return logits

    def logprob(self, output: int, token: int) -> float:
        """That of one token alone, in single precision and without new arrays: 1 to 2 % of a decoding of the starter, at 49,000 tokens."""
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, output), (self.vocabulary.size,))
        largest = logits.max()
        np.subtract(logits, largest, out=self._scratch)
        np.exp(self._scratch, out=self._scratch)
        return float(logits[token] - largest) - math.log(self._scratch.sum())

    def likeliest(self, output: int) -> int:
        """The token with the largest logit after output `output`."""
        return int(np.argmax(np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, output), (self.vocabulary.size,))))

    def sample(self, chain: Chain, output: int) -> int | None:
        """The token to follow output `output` by `chain`; None when its grammar allows nothing more."""
        token = chain.sample(self._context, output)
        if token is not None and math.isnan(lib.llama_get_logits_ith(self._context, output)[token]):
            raise NotANumber(
                "The model, or an adapter in use, computed something that is no number. Check the adapters' scales, or use another file."
            )
        return token

    # --- the cache's Memory -----------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """See `Memory.clear`."""
        lib.llama_memory_clear(self._memory, True)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """See `Memory.copy`."""
        if start >= end:
            return
        whole = self._stateful  # a state exists only as a whole
        lib.llama_memory_seq_cp(self._memory, source, target, -1 if whole else start, -1 if whole else end)
        if self._window and not self._options["streaming_llm"]:
            self._own_window(target)

    def _own_window(self, sequence: int) -> None:
        """Give `sequence` cells of its own in the window's small cache: shared ones are not used again there when both have moved on."""
        flags = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        size = int(lib.llama_state_seq_get_size_ext(self._context, sequence, flags))
        state = (ctypes.c_uint8 * size)()
        lib.llama_state_seq_get_data_ext(self._context, state, size, sequence, flags)
        lib.llama_state_seq_set_data_ext(self._context, state, size, sequence, flags)

    def cut(self, sequence: int, start: int) -> bool:
        """See `Memory.cut`."""
        return bool(lib.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def can_end_at(self, sequence: int, end: int) -> bool:
        """See `Memory.can_end_at`."""
        first, last = (int(f(self._memory, sequence)) for f in (lib.llama_memory_seq_pos_min, lib.llama_memory_seq_pos_max))
        if self.cuts or end in (0, last + 1):
            return True
        return not self._stateful and 0 <= first <= max(0, end - self._window + 1)

    def save(self, sequence: int) -> np.ndarray:
        """See `Memory.save`. uint8 (bytes,)."""
        state = np.empty(int(lib.llama_state_seq_get_size(self._context, sequence)), np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = int(lib.llama_state_seq_get_data(self._context, pointer, len(state), sequence))
        return state[:written]

    def restore(self, sequence: int, state: np.ndarray) -> bool:
        """See `Memory.restore`."""
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return int(lib.llama_state_seq_set_data(self._context, pointer, len(state), sequence)) > 0

    # --- adapters -------------------------------------------------------------------------------------------------------------------

    def load_adapter(self, path: str) -> None:
        """Load a LoRA adapter; one that is there already is no error. Raises ModelError."""
        if path in self._adapters:
            return
        NativeLog.lines.clear()
        adapter = lib.llama_adapter_lora_init(self._model, path.encode())
        if not adapter:
            raise ModelError(f"The adapter {Path(path).name} could not be loaded: {explain_adapter(NativeLog.lines)}")
        self._adapters[path] = adapter

    def has_adapters(self, key: Hashable) -> bool:
        """Whether all adapters of a cache key are loaded."""
        return all(path in self._adapters for path, _ in (key or ()))  # type: ignore[attr-defined]

    def unload_adapter(self, path: str) -> None:
        """Free an adapter that nobody uses."""
        adapter = self._adapters.pop(path, None)
        if adapter:
            self._use(None)
            lib.llama_adapter_lora_free(adapter)

    def _use(self, key: Hashable) -> None:
        """Compute with these adapters from now on: None, or pairs of path and scale."""
        if key == self._key:
            return
        pairs = [(self._adapters[path], scale) for path, scale in (key or ())]  # type: ignore[attr-defined]
        pointers = (lib.llama_adapter_lora_p_ctypes * len(pairs))(*(pointer for pointer, _ in pairs))
        lib.llama_set_adapters_lora(self._context, pointers, len(pairs), (ctypes.c_float * len(pairs))(*(scale for _, scale in pairs)))
        self._key = key

    # --- embeddings -----------------------------------------------------------------------------------------------------------------

    @property
    def longest_image(self) -> int:
        """Tokens of an image that must be computed at once."""
        return min(self.batch_size, int(lib.llama_n_ubatch(self._context)))

    @property
    def longest_embedding(self) -> int:
        """Tokens of a text that can be embedded at most."""
        self._embedder = self._embedder or (self._embedding_context() if self.writes else self._context)
        return int(lib.llama_n_ubatch(self._embedder))

    def _embedding_context(self) -> Any:
        """A context of its own: embeddings are pooled over whole texts, which a cache of conversations does not hold."""
        trained = int(lib.llama_model_n_ctx_train(self._model))
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = min(trained, _EMBEDDING_CONTEXT)
        params.n_seq_max = EMBEDDED_AT_ONCE
        params.kv_unified = True
        params.embeddings = True
        self._common(params, self._options)
        if self.writes:
            params.pooling_type = lib.LLAMA_POOLING_TYPE_MEAN
        else:
            self.parallel, self.sequences = 1, EMBEDDED_AT_ONCE
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise ModelError(f"A context for embeddings could not be made: {explain_failure(NativeLog.lines, _SMALLER)}")
        if int(lib.llama_pooling_type(context)) in (lib.LLAMA_POOLING_TYPE_NONE, lib.LLAMA_POOLING_TYPE_RANK):
            lib.llama_free(context)
            params.pooling_type = lib.LLAMA_POOLING_TYPE_MEAN
            context = lib.llama_init_from_model(self._model, params)
        return context

    def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Pooled embeddings of at most EMBEDDED_AT_ONCE token lists that fit `longest_embedding` together. float32 (texts, width), of length 1."""
        if sum(map(len, texts)) > self.longest_embedding:
            raise PromptTooLong(f"These texts have more tokens together than the {self.longest_embedding} that can be embedded at once.")
        context = self._embedder
        memory = lib.llama_get_memory(context)
        if memory:
            lib.llama_memory_clear(memory, True)
        rows = [Row(n, np.array(text, np.int32), np.arange(len(text), dtype=np.int32), len(text)) for n, text in enumerate(texts)]
        batch = _Batch(sum(map(len, texts)))
        count = batch.fill(rows)
        self._apply_threads(context, count)
        status = int((lib.llama_decode if memory else lib.llama_encode)(context, batch.struct))
        if status:
            raise ModelError(f"llama.cpp could not embed this (error {status}). Send it again in smaller pieces.")
        width = int(lib.llama_model_n_embd_out(self._model))
        found = np.stack([np.ctypeslib.as_array(lib.llama_get_embeddings_seq(context, n), (width,)).copy() for n in range(len(texts))])
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

    def close(self) -> None:
        """Free everything; use no other method after it. (The engine process just ends instead.)"""
        if self.vision:
            self.vision.close()
        if self._embedder and self._embedder is not self._context:
            lib.llama_free(self._embedder)
        lib.llama_free(self._context)
        lib.llama_model_free(self._model)


class _Batch:
    """A llama_batch over arrays of our own, filled without a loop over tokens."""

    def __init__(self, size: int) -> None:
        self._tokens, self._positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._counts, self._sequences = np.ones(size, np.int32), np.zeros(size, np.int32)
        self._outputs = np.zeros(size, np.int8)
        address, step = self._sequences.ctypes.data, self._sequences.itemsize
        self._pointers = (ctypes.POINTER(ctypes.c_int32) * size)(
            *(ctypes.cast(address + n * step, ctypes.POINTER(ctypes.c_int32)) for n in range(size))
        )
        self.struct = lib.llama_batch()
        self.struct.token = self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.struct.pos = self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.struct.n_seq_id = self._counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.struct.seq_id = self._pointers
        self.struct.logits = self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def fill(self, rows: Sequence[Row]) -> int:
        """Put `rows` in; how many tokens that is."""
        end = 0
        for row in rows:
            if len(row.tokens) == 1:
                self._tokens[end], self._positions[end], self._sequences[end] = row.tokens[0], row.positions[0], row.sequence
                self._outputs[end] = row.outputs
                end += 1
                continue
            start, end = end, end + len(row.tokens)
            self._tokens[start:end], self._positions[start:end] = row.tokens, row.positions
            self._sequences[start:end] = row.sequence
            self._outputs[start:end] = 0
            if row.outputs:
                self._outputs[end - row.outputs : end] = 1
        self.struct.n_tokens = end
        return end


def _writes(architecture: str) -> bool:
    """Whether a model of this architecture writes text; the others, of which llama.cpp gives no sign, only embed it."""
    return "bert" not in architecture and not architecture.endswith(("-embedding", "-embed"))


def _on_cpu(pattern: bytes) -> Any:
    """An override that keeps tensors whose names match `pattern` in main memory, and the end mark."""
    from llama_cpp._ggml import libggml

    libggml.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    overrides = (_Override * 2)()
    overrides[0].pattern, overrides[0].kind = pattern, libggml.ggml_backend_cpu_buffer_type()
    return overrides


class _Override(ctypes.Structure):
    _fields_: ClassVar = [("pattern", ctypes.c_char_p), ("kind", ctypes.c_void_p)]
