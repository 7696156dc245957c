"""Images for a model in llama.cpp: read a prompt with images, encode them, decode them into a context. Engine process only.

`mtmd`, llama.cpp's library for media, prepares and encodes; files are opened with Pillow, because mtmd hands what it does not know to a
program of the machine (ffmpeg). An image stands in a prompt as pseudo-tokens, negative numbers made from the image's SHA-256 and the place:
prompts that share them share the image.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import io
import re
import secrets
import struct
import sys
import threading
import weakref
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp.llama_cpp as lib
import llama_cpp.mtmd_cpp as mtmd
import numpy as np

from modules.errors import ModelError, PromptError
from modules.gguf import Header, read_header

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 32 << 20
"""Of one image's file."""
MAX_PIXELS = 64_000_000
"""Of one image, as its header says; checked before anything is decoded."""
MAX_SIDE = 4096
"""Longer images are made smaller while they are opened: encoders look at far fewer pixels."""
MAX_PIXELS_TOGETHER = 128_000_000
"""Of one prompt's images, after that: they are all in memory at once, several times."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_BAD_FILE = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, ArithmeticError, MemoryError, struct.error, zlib.error)
_PSEUDO_BITS = 0x3FFFFFFF
_LOG_INFO, _LOG_ERROR = 2, 4  # ggml.h, enum ggml_log_level
_NO_CALLBACK = mtmd.mtmd_helper_post_decode_callback()
_NUMBERS = ("embedding_length", "attention.head_count", "feed_forward_length", "block_count", "projection_dim", "image_size", "patch_size")


class _Log:
    """What mtmd logs: errors are kept, each thread's own, to give a reason; with `verbose` all but debugging goes to stderr."""

    def __init__(self) -> None:
        self.verbose = False
        self._kept = threading.local()
        self._callback = lib.llama_log_callback(self._take)
        mtmd.mtmd_helper_log_set(self._callback, None)

    def _take(self, level: int, text: bytes, _data: Any) -> None:
        if self.verbose and level >= _LOG_INFO:
            sys.stderr.write(text.decode("utf-8", "replace"))
        if level == _LOG_ERROR:
            self._lines().append(text.decode("utf-8", "replace").strip())

    def _lines(self) -> list[str]:
        lines: list[str] = self._kept.__dict__.setdefault("lines", [])
        return lines

    def take(self) -> list[str]:
        """The errors on this thread since the last call."""
        lines, self._kept.lines = self._lines(), []
        return lines


@functools.cache
def _log() -> _Log:
    """The only one: the library has one callback for the whole process, and holds only its address."""
    return _Log()


def explain_failure(lines: Sequence[str]) -> str:
    """Why an mmproj file could not be loaded and what to do, from mtmd's errors."""
    text = "\n".join(lines)
    if widths := re.search(r"n_embd = (\d+)\) and \S*mmproj \(n_embd = (\d+)", text):
        return (
            f"it belongs to another model: its embeddings are {widths[2]} wide and this model's {widths[1]}. "
            "Choose the mmproj file that comes with this model."
        )
    if kind := re.search(r"unknown (?:vision )?projector type:? (\S+)", text):
        return f"this llama.cpp does not know the projector {kind[1]!r}. Update llama-cpp-python, or use another mmproj file."
    if any(word in text.lower() for word in ("failed to allocate", "unable to allocate", "out of memory", "bad_alloc")):
        return "memory ran out. Use a smaller --ctx-size, fewer --gpu-layers, or a smaller mmproj file (such as Q8_0)."
    return f"{_reason(lines)}. Download the mmproj file again, or use another conversion of it."


def _reason(lines: Sequence[str]) -> str:
    """The first error without the names of files and functions in front."""
    line = lines[0].split("': ", 1)[-1] if lines else ""
    return re.sub(r"^(?:[\w()]+: |error: )+", "", line).rstrip(".") or "llama.cpp gave no reason"


class _Chunk:
    """A native chunk, freed when the last who uses it lets go: an image may be given up while it is being encoded."""

    def __init__(self, pointer: Any) -> None:
        self.pointer = pointer
        weakref.finalize(self, mtmd.mtmd_input_chunk_free, pointer).atexit = False


class ImageSegment:
    """An image of a prompt, or one of the pieces that an encoder wants it in. It stands at `tokens[start : start + length]`."""

    def __init__(self, chunk: _Chunk, start: int, length: int, n_positions: int, non_causal: bool, digest: str) -> None:
        self._lock = threading.Lock()  # held for assignments only, never while something is computed
        self._chunk: _Chunk | None = chunk
        self.start = start
        self.length = length
        self.n_positions = n_positions
        """How far it moves the positions of what follows: fewer than `length` with M-RoPE."""
        self.non_causal = non_causal
        """Its tokens look at each other both ways, so it must be computed whole, in one micro-batch."""
        self.digest = digest
        """SHA-256 of the image's file, in hex."""
        self.embeddings: np.ndarray | None = None
        """float32 (length, width of the model's embeddings), once encoded."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._chunk is None

    def close(self) -> None:
        """Let go of the image, from any thread, at once, also while it is being encoded. A second call does nothing."""
        with self._lock:
            self._chunk = None
            self.embeddings = None

    def _finish(self, embeddings: np.ndarray, chunk: _Chunk) -> None:
        with self._lock:
            if self._chunk is not None:
                self.embeddings, self._chunk = embeddings, chunk


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model takes it."""

    tokens: list[int]
    """Text tokens; an image's places hold negative pseudo-tokens."""
    positions: list[int]
    """The position of each token; all tokens of an M-RoPE image have the image's first one."""
    next_position: int
    """The position of what follows."""
    segments: tuple[ImageSegment, ...]
    """In order of `start`."""

    def close(self) -> None:
        """Let go of the images."""
        for segment in self.segments:
            segment.close()


class Vision:
    """An image encoder beside a loaded model.

    `read` may run on many threads, `encode` runs one at a time, and `decode` belongs to the thread of its context; all of them may run at
    the same time. `close` comes after all of them.
    """

    def __init__(self, path: str, model: Any, threads: int, gpu: bool, verbose: bool) -> None:
        """`path`: an mmproj file; `model`: llama_model_p, which must outlive this; `threads`: for encoding.

        Raises ModelError with the reason and the fix. The weights' shapes are checked only by the library, which ends the process
        when a damaged file's do not fit together.
        """
        name = Path(path).name
        _check_header(read_header(Path(path)))
        _log().verbose = verbose
        _log().take()
        self.marker = f"<__media_{secrets.token_hex(8)}__>"
        """Stands in a text where an image belongs. Nobody outside can know it."""
        self._encoding = threading.Lock()
        self._vocab = lib.llama_model_get_vocab(model)
        self._vocabulary = int(lib.llama_vocab_n_tokens(self._vocab))
        self._width = int(lib.llama_model_n_embd_inp(model))
        self._context = mtmd.mtmd_init_from_file(path.encode(), model, self._params(threads, gpu, verbose))
        if not self._context:
            raise ModelError(f"{name} could not be loaded: {explain_failure(_log().take())}")
        self.images = bool(mtmd.mtmd_support_vision(self._context))
        """Whether it takes images."""
        self.audio = bool(mtmd.mtmd_support_audio(self._context))
        """Whether it could take sounds, which `read` does not."""
        try:
            self._try_tokens(name)
        except BaseException:
            self.close()
            raise

    def _params(self, threads: int, gpu: bool, verbose: bool) -> Any:
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = gpu
        params.n_threads = threads
        params.print_timings = verbose
        params.media_marker = self.marker.encode()
        return params

    def _try_tokens(self, name: str) -> None:
        """Some encoders put tokens of their own model around an image; a model of the same width may not have them."""
        if not self.images:
            return
        try:
            self._read(self.marker.encode(), [Pixels(64, 64, bytes(64 * 64 * 3), "")], False).close()
        except PromptError as error:
            raise ModelError(f"{name} cannot be used with this model. {error}") from error

    # --- reading --------------------------------------------------------------------------------------------------------------------

    def read(self, text: bytes, images: Sequence[bytes], add_bos: bool) -> Prompt:
        """Tokens of UTF-8 text that holds `marker` once for each of `images` (encoded files), special tokens recognised.

        BOS in front only where the model wants one and none stands there. Raises PromptError naming the image (the first is number 1).
        """
        marks = text.count(self.marker.encode())
        if marks != len(images):
            raise PromptError(f"The prompt has {marks} places for images, but {len(images)} images came with it. Send the message again.")
        if images and not self.images:
            raise PromptError("The mmproj file of this model does not take images. Load the model with one that does, or send text only.")
        return self._read(text, _open_all(images), add_bos)

    def _read(self, text: bytes, images: Sequence[Pixels], add_bos: bool) -> Prompt:
        with ExitStack() as owned:
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * len(images))()
            for number, image in enumerate(images):
                bitmaps[number] = bitmap = image.bitmap()
                owned.callback(mtmd.mtmd_bitmap_free, bitmap)
                mtmd.mtmd_bitmap_set_id(bitmap, str(number).encode())
            chunks = mtmd.mtmd_input_chunks_init()
            owned.callback(mtmd.mtmd_input_chunks_free, chunks)
            _log().take()
            # add_special would put BOS in front of one that is there, and EOS at the end
            asked = mtmd.mtmd_input_text(text, len(text), False, True)
            if mtmd.mtmd_tokenize(self._context, chunks, ctypes.byref(asked), bitmaps, len(images)) != 0:
                raise PromptError(f"An image could not be prepared: {_reason(_log().take())}. Send another one, or one of a more usual shape.")
            pointers = [mtmd.mtmd_input_chunks_get(chunks, index) for index in range(mtmd.mtmd_input_chunks_size(chunks))]
            return self._prompt(pointers, [image.digest for image in images], add_bos)

    def _prompt(self, chunks: Sequence[Any], digests: Sequence[str], add_bos: bool) -> Prompt:
        tokens = self._missing_bos(_text_tokens(chunks[0]) if chunks else []) if add_bos else []
        position = len(tokens)
        positions = list(range(position))
        segments: list[ImageSegment] = []
        seen = [0] * len(digests)  # tokens so far of each image, which may come in several chunks
        for chunk in chunks:
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                new = self._known(_text_tokens(chunk))
                positions += range(position, position + len(new))
                position += len(new)
            else:
                image = int(mtmd.mtmd_input_chunk_get_id(chunk))
                segment = self._segment(chunk, len(tokens), digests[image])
                segments.append(segment)
                new = pseudo_tokens(segment.digest, seen[image], segment.length)
                seen[image] += segment.length
                positions += _image_positions(chunk, position, segment.length)
                position += segment.n_positions
            tokens += new
        return Prompt(tokens, positions, position, tuple(segments))

    def _missing_bos(self, tokens: Sequence[int]) -> list[int]:
        bos = int(lib.llama_vocab_bos(self._vocab))
        wanted = bos >= 0 and lib.llama_vocab_get_add_bos(self._vocab) and tokens[:1] != [bos]
        return [bos] if wanted else []

    def _known(self, tokens: list[int]) -> list[int]:
        if any(not 0 <= token < self._vocabulary for token in tokens):
            raise ModelError(
                "The mmproj file belongs to another model: it marks images with tokens that this one does not have. "
                "Choose the mmproj file that comes with this model."
            )
        return tokens

    def _segment(self, chunk: Any, start: int, digest: str) -> ImageSegment:
        length = int(mtmd.mtmd_input_chunk_get_n_tokens(chunk))
        if length < 1:
            raise PromptError("An image gave no tokens. Send a larger one.")
        return ImageSegment(
            _Chunk(mtmd.mtmd_input_chunk_copy(chunk)),
            start,
            length,
            int(mtmd.mtmd_input_chunk_get_n_pos(chunk)),
            bool(mtmd.mtmd_decode_use_non_causal(self._context, chunk)),
            digest,
        )

    # --- computing ------------------------------------------------------------------------------------------------------------------

    def encode(self, segment: ImageSegment) -> None:
        """Run the encoder and keep its embeddings in `segment`; may take seconds. One that is encoded or closed is left alone.

        Raises ModelError.
        """
        with self._encoding:
            chunk = segment._chunk
            if chunk is None or segment.embeddings is not None:
                return
            if not self._context:
                raise ModelError("The model was unloaded while an image was being read. Send again.")
            _log().take()
            if mtmd.mtmd_encode_chunk(self._context, chunk.pointer) != 0:
                raise ModelError(f"An image could not be encoded: {_reason(_log().take())}. Send a smaller one, or load the model again.")
            shape = (segment.length, self._width)
            embeddings = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self._context), shape).astype(np.float32)  # a copy
        if not np.isfinite(embeddings).all():
            raise ModelError("The image encoder gave numbers that are not finite: its mmproj file is damaged. Download it again.")
        placeholder = mtmd.mtmd_input_chunk_get_placeholder(chunk.pointer)  # the sizes without the pixels, which nobody needs again
        segment._finish(embeddings, _Chunk(placeholder) if placeholder else chunk)

    def decode(self, context: Any, segment: ImageSegment, position: int, sequence: int, batch_size: int) -> int:
        """Compute an encoded segment into `context` (llama_context_p) for `sequence`, its first token at `position`.

        Returns the status of llama_decode: 0 done, 1 no room, 2 aborted, negative: error. After any but 0 some of the tokens may be in the
        cache: remove the sequence's from `position` on. No logits are asked for. At most `batch_size` tokens at once, but a non-causal
        segment goes whole. Raises PromptError when it is too large for that, ModelError when it is not encoded.
        """
        chunk, embeddings = segment._chunk, segment.embeddings
        if chunk is None or embeddings is None:
            raise ModelError("An image of this prompt is not encoded. Send again.")
        at_once = max(1, min(batch_size, int(lib.llama_n_batch(context))))
        if segment.non_causal:
            at_once = segment.length
            room = min(int(lib.llama_n_batch(context)), int(lib.llama_n_ubatch(context)))
            if segment.length > room:
                raise PromptError(
                    f"This model computes an image's {segment.length} tokens at once, and only {room} fit. "
                    f"Load it with --batch-size and --ubatch-size of at least {segment.length}."
                )
        numbers = embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        after = lib.llama_pos(position)
        return int(
            mtmd.mtmd_helper_decode_image_chunk(
                self._context, context, chunk.pointer, numbers, position, sequence, at_once, ctypes.byref(after), _NO_CALLBACK, None
            )
        )

    def close(self) -> None:
        """Free the encoder, after an encoding that runs. A second call does nothing."""
        with self._encoding:
            context, self._context = self._context, None
            if context:
                mtmd.mtmd_free(context)


def pseudo_tokens(digest: str, first: int, count: int) -> list[int]:
    """Numbers from −2³⁰ to −1 for the places `first` to `first + count` of the image with that digest; always the same ones."""
    stream = hashlib.shake_128(digest.encode()).digest(4 * (first + count))  # a longer stream begins like a shorter one
    words = np.frombuffer(stream, "<u4")[first:] & _PSEUDO_BITS
    return [-1 - word for word in words.tolist()]


def _text_tokens(chunk: Any) -> list[int]:
    count = ctypes.c_size_t()
    tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
    return tokens[: count.value] if count.value else []


def _image_positions(chunk: Any, first: int, count: int) -> list[int]:
    """The position under which each token of an image stands in the cache."""
    positions = (mtmd.mtmd_decoder_pos * count)()
    mtmd.mtmd_helper_image_get_decoder_pos(mtmd.mtmd_input_chunk_get_tokens_image(chunk), first, positions)
    return [int(position.t) for position in positions]


def _check_header(header: Header) -> None:
    """What the library would not survive, or say less clearly. Raises ModelError."""
    name = header.path.name
    if header.architecture != "clip":
        raise ModelError(f"{name} is a model ({header.architecture}), not an image encoder. Choose the mmproj file that comes with the model.")
    parts = [part for part in ("vision", "audio") if header.of_architecture(f"has_{part}_encoder") is True]
    if not parts:
        raise ModelError(f"{name} has no encoder for images. Choose the mmproj file that comes with the model.")
    for key in (f"{part}.{number}" for part in parts for number in _NUMBERS):
        value = header.of_architecture(key)
        if value is not None and (type(value) is not int or not 0 <= value < 1 << 31):
            raise ModelError(f"{name} is damaged: its {key} is {value!r}. Download it again, or use another conversion of it.")


# --- files --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """An opened image: RGB, a byte each, row by row."""

    width: int
    height: int
    data: bytes
    digest: str

    def bitmap(self) -> Any:
        """A native copy, to be freed."""
        return mtmd.mtmd_bitmap_init(self.width, self.height, ctypes.cast(ctypes.c_char_p(self.data), ctypes.POINTER(ctypes.c_uint8)))


def _open_all(images: Sequence[bytes]) -> list[Pixels]:
    opened: list[Pixels] = []
    room = MAX_PIXELS_TOGETHER
    for number, data in enumerate(images, 1):
        image = open_image(data, number)
        room -= image.width * image.height
        if room < 0:
            most = MAX_PIXELS_TOGETHER // 1_000_000
            raise PromptError(f"The images of this prompt have more than {most} million pixels together. Send fewer or smaller ones.")
        opened.append(image)
    return opened


def open_image(data: bytes, number: int) -> Pixels:
    """Open an image file. Raises PromptError naming it by its `number`."""
    from PIL import Image

    if not data:
        raise PromptError(f"Image {number} is empty. Attach it again.")
    if len(data) > MAX_BYTES:
        raise PromptError(f"Image {number} has {len(data) / 2**20:.0f} MiB; the most is {MAX_BYTES >> 20}. Make it smaller.")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            rgb = _rgb(image)
    except Image.DecompressionBombError:
        raise PromptError(f"Image {number} is too large: the most is {MAX_PIXELS // 1_000_000} million pixels. Make it smaller.") from None
    except _BAD_FILE as error:
        kinds = ", ".join(_FORMATS)
        raise PromptError(f"Image {number} cannot be read: it is damaged or of another kind than {kinds}. Save it anew as PNG or JPEG.") from error
    return Pixels(rgb.width, rgb.height, rgb.tobytes(), hashlib.sha256(data).hexdigest())


def _rgb(image: Image.Image) -> Image.Image:
    """Decoded: upright, at most MAX_SIDE, on white where it is transparent."""
    from PIL import Image, ImageOps

    mode = "RGBA" if image.has_transparency_data else "RGB"
    image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # large JPEGs are decoded smaller at once
    if image.mode.startswith("I;16"):  # Pillow would cut 16-bit greys off at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode != mode:
        image = image.convert(mode)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image = ImageOps.exif_transpose(image)
    if mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image
