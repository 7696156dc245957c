"""Images for llama.cpp: files that are opened or refused, prompts with images, and the real encoder on tiny random projectors."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import io
import json
import random
import re
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modules.errors import ModelError, PromptError

lib = pytest.importorskip("llama_cpp.llama_cpp")
pytest.importorskip("gguf")

from modules.backends.llama_cpp import vision as module  # noqa: E402
from modules.backends.llama_cpp.vision import ImageSegment, Prompt, Vision, explain_failure, open_image, pseudo_tokens  # noqa: E402
from tests.backends.tiny_mmproj import BOS, HIDDEN, STARTER_WIDTH, token_embeddings, write_mmproj, write_text_model  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

PINPOINTS = (112, 112, 112, 56)  # a picture of 300 x 200 comes in four pieces and an overview


def picture(seed: int = 1, size: tuple[int, int] = (80, 60), kind: str = "PNG", **options) -> bytes:
    """A file of random pixels, the same ones for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), kind, **options)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A small, well-formed PNG whose header claims so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)


def pixels(data: bytes) -> np.ndarray:
    opened = open_image(data, 1)
    return np.frombuffer(opened.data, np.uint8).reshape(opened.height, opened.width, 3)


# --- files --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("GIF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})])
def test_files_of_the_usual_kinds_are_opened(kind, options):
    data = saved(Image.new("RGB", (5, 3), (200, 10, 30)), kind, **options)
    opened = open_image(data, 1)
    assert (opened.width, opened.height, opened.digest) == (5, 3, hashlib.sha256(data).hexdigest())
    assert np.abs(pixels(data).astype(int) - [200, 10, 30]).max() <= 3


def test_transparent_pixels_are_white_and_opaque_ones_as_they_are():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (9, 8, 7, 255))
    assert pixels(saved(image)).tolist() == [[[255, 255, 255], [9, 8, 7]]]
    assert pixels(saved(image.convert("LA")))[0, 0].tolist() == [255, 255, 255]
    indexed = Image.new("P", (2, 1), 1)
    indexed.putpalette([0, 0, 0, 50, 60, 70])
    indexed.putpixel((0, 0), 0)
    assert pixels(saved(indexed, transparency=0)).tolist() == [[[255, 255, 255], [50, 60, 70]]]


def test_sixteen_bit_greys_are_scaled_not_cut():
    grey = Image.fromarray(np.array([[0, 256 * 100 + 7, 65535]], np.uint16))
    assert pixels(saved(grey))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB")])
@pytest.mark.parametrize("length", [32, 6000])
def test_a_photograph_is_turned_upright(kind, mode, length):
    image = Image.new("RGB", (length, 16), "black")
    image.paste("white", (0, 0, length // 2, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    upright = pixels(saved(image.convert(mode), kind, exif=exif))
    assert upright.shape[0] == min(length, 4096) > upright.shape[1]
    assert upright[:8].min() > 200
    assert upright[-8:].max() < 50


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("white", "black")]
    assert pixels(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])).min() == 255


def test_long_images_are_made_smaller():
    assert pixels(saved(Image.new("L", (9000, 30), 128))).shape == (14, 4096, 3)
    assert pixels(saved(Image.new("L", (1, 20_000), 128))).shape == (4096, 1, 3)
    assert pixels(saved(Image.new("RGB", (6000, 6000)), "JPEG")).shape == (4096, 4096, 3)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "Image 3 is empty"),
        (b"\0", "Image 3 cannot be read"),
        (b"hello, this is a text and no picture at all", "cannot be read"),
        (picture()[:-300], "cannot be read"),
        (picture().replace(b"IDAT", b"IDAX"), "cannot be read"),
        (picture()[:40], "cannot be read"),
        (picture(kind="JPEG")[:400], "cannot be read"),
        (saved(Image.new("RGB", (4, 4)), "TIFF"), "of another kind than PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read"),
        (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0" + bytes(40), "cannot be read"),
        (b"\0\0\0\x18ftypmp42" + bytes(60), "cannot be read"),
        (png_claiming(100_000, 100_000), "too large"),
        (png_claiming(8001, 8000), "too large"),
        (png_claiming(2**31 - 1, 1), "too large"),
        (png_claiming(0, 5), "cannot be read"),
        (png_claiming(1000, 1000), "cannot be read"),
        (picture() + bytes(33 << 20), "33 MiB; the most is 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_what_is_no_image_is_refused_by_its_number(data, words):
    with pytest.raises(PromptError, match=words) as caught:
        open_image(data, 3)
    assert str(caught.value).startswith("Image 3 ")


@pytest.mark.parametrize("data", [png_claiming(100_000, 100_000), png_claiming(9000, 9000)])
def test_nothing_is_decoded_before_its_size_is_known(monkeypatch, data):
    monkeypatch.setattr(module, "_rgb", lambda image: pytest.fail("decoded"))
    with pytest.raises(PromptError, match="too large"):
        open_image(data, 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_files_are_opened_or_refused_and_nothing_else(kind):
    whole = picture(3, (24, 16), kind)
    chance = random.Random(kind)
    ends: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(400):
            data = bytearray(whole[: chance.randrange(1, len(whole) + 1)] if chance.random() < 0.3 else whole)
            for _ in range(chance.randrange(1, 6)):
                data[min(int(chance.expovariate(1 / 40)), len(data) - 1)] = chance.randrange(256)
            try:
                opened = open_image(bytes(data), 1)
                assert len(opened.data) == 3 * opened.width * opened.height > 0
                ends["opened"] += 1
            except PromptError:
                ends["refused"] += 1
    assert ends["refused"] > 10


# --- pseudo-tokens ------------------------------------------------------------------------------------------------------------------


def test_pseudo_tokens_tell_images_and_places_apart():
    one = pseudo_tokens("ab", 0, 500)
    assert all(-(2**30) <= token <= -1 for token in one)
    assert len(set(one)) == 500
    assert pseudo_tokens("ab", 0, 20) == one[:20]
    assert pseudo_tokens("ab", 130, 20) == one[130:150]
    assert sum(a == b for a, b in zip(one, pseudo_tokens("ac", 0, 500), strict=True)) == 0


# --- with real encoders -------------------------------------------------------------------------------------------------------------


def load_model(path: Path) -> int:
    lib.llama_backend_init()
    lib.llama_log_set(SILENT, None)
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    assert model
    return model


SILENT = lib.llama_log_callback(lambda _level, _text, _data: None)


@pytest.fixture(scope="module")
def starter(starter_model: Path) -> Iterator[int]:
    model = load_model(starter_model)
    yield model
    lib.llama_model_free(model)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Iterator[Callable[[bool], int]]:
    """The tiny text models, by whether they have M-RoPE."""
    folder = tmp_path_factory.mktemp("models")
    loaded = {mrope: load_model(write_text_model(folder / f"text-{mrope}.gguf", mrope)) for mrope in (False, True)}
    yield loaded.__getitem__
    for model in loaded.values():
        lib.llama_model_free(model)


@pytest.fixture(scope="module")
def open_vision(tmp_path_factory) -> Iterator[Callable[..., Vision]]:
    """Makes a Vision over a tiny projector; the same one for the same arguments."""
    folder = tmp_path_factory.mktemp("mmproj")
    made: dict[tuple, Vision] = {}

    def open_one(model: int, kind: str = "janus_pro", width: int = STARTER_WIDTH, **options) -> Vision:
        key = (model, kind, width, *sorted(options.items()))
        if key not in made:
            path = write_mmproj(folder / f"{len(made)}.gguf", kind, width, **options)
            made[key] = Vision(str(path), model, 1, False, False)
        return made[key]

    yield open_one
    for vision in made.values():
        vision.close()


@pytest.fixture
def new_context() -> Iterator[Callable[..., int]]:
    made = []

    def new(model: int, n_ctx: int = 512, n_batch: int = 256, n_ubatch: int = 256) -> int:
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_ubatch
        params.n_seq_max, params.kv_unified = 4, True
        params.n_threads = params.n_threads_batch = 1
        made.append(lib.llama_init_from_model(model, params))
        assert made[-1]
        return made[-1]

    yield new
    for context in made:
        lib.llama_free(context)


def decode_text(context: int, tokens: list[int], positions: list[int], sequence: int) -> None:
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, (token, position) in enumerate(zip(tokens, positions, strict=True)):
        batch.token[index], batch.pos[index], batch.n_seq_id[index], batch.logits[index] = token, position, 1, index == len(tokens) - 1
        batch.seq_id[index][0] = sequence
    status = lib.llama_decode(context, batch)
    lib.llama_batch_free(batch)
    assert status == 0


def logits_after(vision: Vision, model: int, context: int, prompt: Prompt, sequence: int = 0, batch_size: int = 256) -> np.ndarray:
    """Compute a prompt that ends in text; the logits of what follows."""
    at = 0
    for segment in prompt.segments:
        if at < segment.start:
            decode_text(context, prompt.tokens[at : segment.start], prompt.positions[at : segment.start], sequence)
        vision.encode(segment)
        assert vision.decode(context, segment, prompt.positions[segment.start], sequence, batch_size) == 0
        at = segment.start + segment.length
    decode_text(context, prompt.tokens[at:], prompt.positions[at:], sequence)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (size,)).copy()


def question(vision: Vision, *images: bytes) -> Prompt:
    return vision.read(f"What is in {'and '.join([vision.marker] * len(images))}? A picture of".encode(), images, True)


@pytest.mark.engine
class TestWithTheStarter:
    @pytest.mark.parametrize(("kind", "options"), [("janus_pro", {}), ("janus_pro", {"pinpoints": PINPOINTS}), ("gemma3", {})])
    def test_an_image_in_a_prompt_decides_what_follows(self, starter, open_vision, new_context, kind, options):
        vision = open_vision(starter, kind, **options)
        results = []
        for data in (picture(1, (300, 200)), picture(2, (300, 200)), picture(1, (300, 200))):
            results.append(logits_after(vision, starter, new_context(starter), question(vision, data)))
        first, other, again = results
        assert np.isfinite(first).all()
        assert first.tobytes() == again.tobytes()
        assert np.abs(first - other).max() > 0.1

    def test_pseudo_tokens_agree_exactly_as_long_as_the_images_do(self, starter, open_vision):
        vision = open_vision(starter)
        a, b, c = picture(1), picture(2), picture(3)
        ab, ac, ab2 = question(vision, a, b), question(vision, a, c), question(vision, a, b)
        assert ab.tokens == ab2.tokens
        second = ab.segments[1]
        assert ab.tokens[: second.start] == ac.tokens[: second.start]
        assert ab.tokens[second.start] != ac.tokens[second.start]
        twice = question(vision, a, a)
        tokens = [twice.tokens[s.start : s.start + s.length] for s in twice.segments]
        assert tokens[0] == tokens[1] == pseudo_tokens(hashlib.sha256(a).hexdigest(), 0, 16)

    def test_the_pieces_of_an_image_are_one_image(self, starter, open_vision):
        vision = open_vision(starter, pinpoints=PINPOINTS)
        data = picture(4, (300, 200))
        prompt = question(vision, data, data)
        assert [segment.length for segment in prompt.segments] == [16] * 10
        assert {segment.digest for segment in prompt.segments} == {hashlib.sha256(data).hexdigest()}
        images = [prompt.tokens[half[0].start : half[-1].start + 16] for half in (prompt.segments[:5], prompt.segments[5:])]
        assert images[0] == images[1] == pseudo_tokens(hashlib.sha256(data).hexdigest(), 0, 80)

    @pytest.mark.parametrize(("kind", "length"), [("janus_pro", 16), ("gemma3", 4)])
    def test_tokens_positions_and_segments_add_up(self, starter, open_vision, kind, length):
        vision = open_vision(starter, kind)
        prompt = question(vision, picture(1), picture(2))
        assert prompt.positions == list(range(len(prompt.tokens)))
        assert prompt.next_position == len(prompt.tokens)
        places = {index for s in prompt.segments for index in range(s.start, s.start + s.length)}
        assert {index for index, token in enumerate(prompt.tokens) if token < 0} == places
        assert [(s.length, s.n_positions, s.non_causal) for s in prompt.segments] == [(length, length, kind == "gemma3")] * 2

    @pytest.mark.parametrize("text", ["", "Hi", "<|im_start|>user\nHi 🦊<|im_end|>\n", "a\0b", "<__media__> <__image__> <image>"])
    def test_text_alone_is_tokenised_as_without_vision(self, starter, open_vision, text):
        raw = text.encode()
        tokens = (ctypes.c_int32 * 64)()
        count = lib.llama_tokenize(lib.llama_model_get_vocab(starter), raw, len(raw), tokens, 64, False, True)
        prompt = open_vision(starter).read(raw, (), False)
        assert prompt.tokens == list(tokens[:count])
        assert prompt.segments == ()
        assert prompt.next_position == count

    def test_batches_and_other_sequences_change_nothing(self, starter, open_vision, new_context):
        vision = open_vision(starter)
        context = new_context(starter)
        prompt = question(vision, picture(1))
        alone = logits_after(vision, starter, new_context(starter), prompt)
        logits_after(vision, starter, context, question(vision, picture(2)), 0)
        assert np.abs(logits_after(vision, starter, context, prompt, 1) - alone).max() < 0.05
        assert np.abs(logits_after(vision, starter, context, prompt, 2, batch_size=3) - alone).max() < 0.05
        assert np.abs(logits_after(vision, starter, context, prompt, 3, batch_size=10**6) - alone).max() < 0.05

    def test_a_non_causal_image_goes_whole_or_not_at_all(self, starter, open_vision, new_context):
        vision = open_vision(starter, "gemma3")
        prompt = question(vision, picture(1))
        whole = logits_after(vision, starter, new_context(starter), prompt)
        pieces = logits_after(vision, starter, new_context(starter), prompt, batch_size=1)
        assert whole.tobytes() == pieces.tobytes()
        with pytest.raises(PromptError, match=r"4 tokens at once, and only 2 fit.*--ubatch-size of at least 4"):
            vision.decode(new_context(starter, n_ubatch=2), prompt.segments[0], 0, 0, 256)
        context = new_context(starter)
        assert logits_after(vision, starter, context, prompt).tobytes() == whole.tobytes()
        decode_text(context, [5, 6], [prompt.next_position, prompt.next_position + 1], 0)  # attention is causal again

    def test_no_room_is_a_status_and_not_an_error(self, starter, open_vision, new_context):
        vision = open_vision(starter)
        (segment,) = question(vision, picture(1)).segments
        vision.encode(segment)
        context = new_context(starter, n_ctx=256)
        decode_text(context, [5] * 250, list(range(250)), 0)
        assert vision.decode(context, segment, 0, 1, 256) == 1
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        assert vision.decode(context, segment, 0, 1, 256) == 0

    def test_embeddings_are_the_segments_own(self, starter, open_vision):
        vision = open_vision(starter)
        one, two = question(vision, picture(1), picture(2)).segments
        vision.encode(one)
        kept = one.embeddings.copy()
        vision.encode(two)
        assert one.embeddings.dtype == np.float32
        assert one.embeddings.shape == (16, STARTER_WIDTH)
        assert (one.embeddings == kept).all()
        assert not np.allclose(one.embeddings, two.embeddings)

    def test_an_encoded_segment_is_not_encoded_again(self, starter, open_vision):
        vision = open_vision(starter)
        (segment,) = question(vision, picture(1)).segments
        vision.encode(segment)
        first = segment.embeddings
        vision.encode(segment)
        assert segment.embeddings is first

    def test_what_is_not_encoded_or_closed_cannot_be_decoded(self, starter, open_vision, new_context):
        vision = open_vision(starter)
        prompt = question(vision, picture(1))
        (segment,) = prompt.segments
        with pytest.raises(ModelError, match="not encoded"):
            vision.decode(new_context(starter), segment, 0, 0, 256)
        prompt.close()
        prompt.close()
        vision.encode(segment)
        assert segment.closed
        assert segment.embeddings is None
        with pytest.raises(ModelError, match="not encoded"):
            vision.decode(new_context(starter), segment, 0, 0, 256)

    def test_numbers_that_are_not_finite_are_refused(self, starter, open_vision, monkeypatch):
        vision = open_vision(starter)
        (segment,) = question(vision, picture(1)).segments
        broken = np.full((16, STARTER_WIDTH), np.nan, np.float32)
        monkeypatch.setattr(module.mtmd, "mtmd_get_output_embd", lambda _context: broken.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))
        with pytest.raises(ModelError, match="not finite"):
            vision.encode(segment)
        assert segment.embeddings is None

    @pytest.mark.parametrize(("marks", "images"), [(0, 1), (1, 0), (2, 1), (1, 2)])
    def test_each_image_needs_its_place(self, starter, open_vision, marks, images):
        vision = open_vision(starter)
        with pytest.raises(PromptError, match=f"{marks} places for images, but {images} images"):
            vision.read(f"x {vision.marker * marks} y".encode(), [picture()] * images, False)

    def test_a_bad_image_is_named_by_its_number(self, starter, open_vision):
        with pytest.raises(PromptError, match="Image 2 cannot be read"):
            question(open_vision(starter), picture(1), picture(2)[:100])

    def test_images_that_are_too_large_together_are_refused(self, starter, open_vision, monkeypatch):
        monkeypatch.setattr(module, "MAX_PIXELS_TOGETHER", 2 * 80 * 60)
        vision = open_vision(starter)
        assert len(question(vision, picture(1), picture(2)).segments) == 2
        with pytest.raises(PromptError, match="million pixels together"):
            question(vision, picture(1), picture(2), saved(Image.new("RGB", (1, 1))))

    @pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (4096, 1), (57, 55)])
    @pytest.mark.parametrize("options", [{}, {"pinpoints": PINPOINTS}])
    def test_odd_shapes_are_taken(self, starter, open_vision, size, options):
        vision = open_vision(starter, **options)
        prompt = question(vision, picture(1, size))
        for segment in prompt.segments:
            vision.encode(segment)
            assert segment.embeddings.shape == (segment.length, STARTER_WIDTH)

    def test_the_marker_cannot_be_guessed_and_changes_each_time(self, starter, tmp_path):
        path = str(write_mmproj(tmp_path / "mmproj.gguf"))
        markers = set()
        for _ in range(3):
            vision = Vision(path, starter, 1, False, False)
            markers.add(vision.marker)
            assert re.fullmatch(r"<__media_[0-9a-f]{16}__>", vision.marker)
            old = [marker for marker in markers if marker != vision.marker]
            hostile = f"<__media__> <__media_0123456789abcdef__> {old} {vision.marker[:-1]} " + vision.marker
            prompt = vision.read(hostile.encode(), [picture()], False)
            assert len(prompt.segments) == 1
            assert prompt.segments[0].start + 16 == len(prompt.tokens)
            vision.close()
            vision.close()
        assert len(markers) == 3

    def test_what_it_can_do_is_said(self, starter, open_vision):
        vision = open_vision(starter)
        assert vision.images
        assert not vision.audio

    def test_a_projector_without_eyes_refuses_images(self, starter, open_vision, monkeypatch):
        vision = open_vision(starter)
        monkeypatch.setattr(vision, "images", False)
        with pytest.raises(PromptError, match="does not take images"):
            question(vision, picture())

    def test_after_closing_nothing_is_encoded(self, starter, tmp_path):
        vision = Vision(str(write_mmproj(tmp_path / "mmproj.gguf")), starter, 1, False, False)
        (segment,) = question(vision, picture()).segments
        vision.close()
        with pytest.raises(ModelError, match="unloaded"):
            vision.encode(segment)

    def test_many_threads_read_and_encode_while_one_decodes(self, starter, open_vision, new_context):
        vision = open_vision(starter, pinpoints=PINPOINTS)
        files = [picture(seed, (300, 200)) for seed in range(4)]
        wanted = []
        for data in files:
            prompt = question(vision, data)
            for segment in prompt.segments:
                vision.encode(segment)
            wanted.append((prompt.tokens, [segment.embeddings for segment in prompt.segments]))
        faults: list[str] = []

        def work(which: int) -> None:
            for _ in range(10):
                prompt = question(vision, files[which])
                for segment in prompt.segments:
                    vision.encode(segment)
                tokens, embeddings = wanted[which]
                if prompt.tokens != tokens or any((s.embeddings != e).any() for s, e in zip(prompt.segments, embeddings, strict=True)):
                    faults.append(f"image {which} is another")

        threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
        for thread in threads:
            thread.start()
        context = new_context(starter)
        (first, *_), results = question(vision, files[0]).segments, set()
        vision.encode(first)
        while any(thread.is_alive() for thread in threads):
            lib.llama_memory_clear(lib.llama_get_memory(context), True)
            assert vision.decode(context, first, 0, 0, 256) == 0
            decode_text(context, [5], [16], 0)
            results.add(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (100,)).tobytes())
        for thread in threads:
            thread.join()
        assert faults == []
        assert len(results) == 1

    def test_a_segment_may_be_closed_while_it_is_encoded(self, starter, open_vision, monkeypatch):
        vision = open_vision(starter)
        encode = module.mtmd.mtmd_encode_chunk
        closing: list[ImageSegment] = []

        def encode_and_close(context, chunk):
            closing[0].close()
            gc.collect()
            return encode(context, chunk)  # reads the chunk's pixels: they must still be there

        monkeypatch.setattr(module.mtmd, "mtmd_encode_chunk", encode_and_close)
        for seed in range(5):
            closing[:] = question(vision, picture(seed)).segments
            vision.encode(closing[0])
            assert closing[0].closed
            assert closing[0].embeddings is None

    def test_every_native_object_is_freed(self, starter, open_vision, monkeypatch):
        vision = open_vision(starter, pinpoints=PINPOINTS)
        counts: Counter[str] = Counter()

        def count(name: str, kind: str, step: int) -> None:
            real = getattr(module.mtmd, name)

            def counted(*arguments):
                counts[kind] += step
                counts[f"{kind} ever"] += 1
                return real(*arguments)

            monkeypatch.setattr(module.mtmd, name, counted)

        for name, kind, step in (
            ("mtmd_bitmap_init", "bitmaps", 1),
            ("mtmd_bitmap_free", "bitmaps", -1),
            ("mtmd_input_chunks_init", "lists", 1),
            ("mtmd_input_chunks_free", "lists", -1),
            ("mtmd_input_chunk_copy", "chunks", 1),
            ("mtmd_input_chunk_get_placeholder", "chunks", 1),
            ("mtmd_input_chunk_free", "chunks", -1),
        ):
            count(name, kind, step)

        prompt = question(vision, picture(1, (300, 200)), picture(2))
        vision.encode(prompt.segments[0])
        prompt.close()
        del prompt
        question(vision, picture(1))  # never closed
        monkeypatch.setattr(module, "pseudo_tokens", lambda *_: 1 // 0)  # in the middle of making a prompt
        with pytest.raises(ZeroDivisionError):
            question(vision, picture(1), picture(2))
        monkeypatch.setattr(module.mtmd, "mtmd_tokenize", lambda *_: 2)
        with pytest.raises(PromptError, match=r"could not be prepared: llama\.cpp gave no reason"):
            question(vision, picture(1), picture(2))
        gc.collect()
        assert {kind: counts[kind] for kind in ("bitmaps", "lists", "chunks")} == {"bitmaps": 0, "lists": 0, "chunks": 0}
        assert min(counts[f"{kind} ever"] for kind in ("bitmaps", "lists", "chunks")) >= 4

    def test_the_log_is_silent_unless_asked_for(self, starter, tmp_path, capfd):
        path = str(write_mmproj(tmp_path / "mmproj.gguf"))
        for verbose in (False, True):
            vision = Vision(path, starter, 1, False, verbose)
            vision.encode(question(vision, picture()).segments[0])
            vision.close()
            written = capfd.readouterr()
            assert written.out == ""
            assert ("projector" in written.err) == verbose
        module._log().verbose = False


# --- with tiny text models ----------------------------------------------------------------------------------------------------------


class TestWithTinyModels:
    def test_an_image_that_looks_like_text_is_computed_like_text(self, models, open_vision, new_context):
        """The embeddings of text tokens in place of an image's: the same logits, so position, sequence and values are right."""
        model = models(False)
        vision = open_vision(model, width=HIDDEN)
        before, middle, after = list(b"It was "), list(b"a dark and storm"), list(b"y night; the rai")
        context = new_context(model)
        decode_text(context, before + middle + after, list(range(len(before + middle + after))), 0)
        wanted = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (260,)).copy()
        prompt = vision.read(b"It was " + vision.marker.encode() + b"y night; the rai", [picture()], False)
        (segment,) = prompt.segments
        vision.encode(segment)
        assert segment.embeddings.shape == (len(middle), HIDDEN)
        segment.embeddings = token_embeddings()[middle]
        for sequence, batch_size in ((0, 256), (1, 5), (3, 1)):
            assert logits_after(vision, model, new_context(model), prompt, sequence, batch_size) == pytest.approx(wanted, abs=1e-3)
        segment.embeddings = token_embeddings()[middle[::-1]]
        assert np.abs(logits_after(vision, model, new_context(model), prompt) - wanted).max() > 0.01

    def test_bos_stands_in_front_once_and_eos_nowhere(self, models, open_vision):
        vision = open_vision(models(False), width=HIDDEN)
        mark, images = vision.marker, [picture()]
        assert vision.read(b"", (), True).tokens == [BOS]
        assert vision.read(b"", (), False).tokens == []
        assert vision.read(b"Hi", (), True).tokens == [BOS, *b"Hi"]
        assert vision.read(b"<|start|>Hi", (), True).tokens == [BOS, *b"Hi"]
        first = vision.read(f"{mark}Hi".encode(), images, True)
        assert first.tokens[0] == BOS
        assert first.tokens[1] < 0
        assert first.segments[0].start == 1
        assert first.positions == list(range(1 + 16 + 2))
        assert vision.read(f"<|start|>{mark}Hi".encode(), images, True).tokens == first.tokens
        assert vision.read(f"{mark}Hi".encode(), images, False).tokens == first.tokens[1:]

    def test_with_mrope_an_image_moves_positions_by_its_longer_side(self, models, open_vision):
        vision = open_vision(models(True), "qwen2vl_merger", HIDDEN)
        prompt = vision.read(f"Hi{vision.marker}there{vision.marker}".encode(), [picture(1, (224, 112)), picture(2, (112, 112))], False)
        wide, square = prompt.segments
        assert (wide.length, wide.n_positions) == (8 * 4, 8)  # 28 pixels a side for each token
        assert (square.length, square.n_positions) == (4 * 4, 4)
        assert prompt.tokens[:3] == [*b"Hi", 257]  # <|vision_start|>
        text = list(range(11, 18))  # <|vision_end|>, "there", <|vision_start|>
        assert prompt.positions == [0, 1, 2, *[3] * 32, *text, *[18] * 16, 22]
        assert prompt.next_position == 23

    def test_with_mrope_text_goes_on_after_an_image(self, models, open_vision, new_context):
        model = models(True)
        vision = open_vision(model, "qwen2vl_merger", HIDDEN)
        results = []
        for seed, batch_size in ((1, 256), (2, 256), (1, 7)):
            context = new_context(model)
            prompt = vision.read(f"Hi {vision.marker} there".encode(), [picture(seed, (224, 112))], False)
            results.append(logits_after(vision, model, context, prompt, 2, batch_size))
            assert lib.llama_memory_seq_pos_max(lib.llama_get_memory(context), 2) == prompt.next_position - 1
        assert np.isfinite(results).all()
        assert np.abs(results[0] - results[1]).max() > 1e-3
        assert results[2] == pytest.approx(results[0], abs=1e-3)


# --- files that do not load ---------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_text_model_is_no_projector(starter, starter_model):
    with pytest.raises(ModelError, match=r"is a model \(llama\), not an image encoder. Choose the mmproj file"):
        Vision(str(starter_model), starter, 1, False, False)


def test_a_missing_file_is_named(tmp_path, models):
    with pytest.raises(ModelError, match=r"nothing\.gguf"):
        Vision(str(tmp_path / "nothing.gguf"), models(False), 1, False, False)


def test_a_file_cut_anywhere_is_refused_before_the_library_sees_it(tmp_path, models, monkeypatch):
    monkeypatch.setattr(module.mtmd, "mtmd_init_from_file", lambda *_: pytest.fail("the library saw it"))
    whole = write_mmproj(tmp_path / "whole.gguf", width=HIDDEN).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 23, 24, 500, 1500, 3000, len(whole) // 2, len(whole) - 64, *random.Random(1).sample(range(len(whole) - 64), 30)]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            Vision(str(path), models(False), 1, False, False)


CHILD = """
import json, sys
import llama_cpp.llama_cpp as lib
from modules.backends.llama_cpp.vision import Vision
from modules.errors import ModelError
silent = lib.llama_log_callback(lambda level, text, data: None)
lib.llama_log_set(silent, None)
lib.llama_backend_init()
model = lib.llama_model_load_from_file(sys.argv[1].encode(), lib.llama_model_default_params())
for path in sys.argv[2:]:
    try:
        Vision(path, model, 1, False, False).close()
        print(json.dumps("loaded"), flush=True)
    except ModelError as error:
        print(json.dumps(str(error)), flush=True)
"""


def test_projectors_that_do_not_fit_are_refused_with_the_fix(tmp_path):
    """In a process of its own, because the library could end it."""
    model = write_text_model(tmp_path / "text.gguf", mrope=False)
    good = write_mmproj(tmp_path / "good.gguf", width=HIDDEN)

    def changed(name: str, old: bytes, new: bytes) -> Path:
        data = good.read_bytes()
        assert data.count(old) == 1
        path = tmp_path / name
        path.write_bytes(data.replace(old, new))
        return path

    cases = {
        good: "^loaded$",
        write_mmproj(tmp_path / "wide.gguf", width=64): r"wide\.gguf .* its embeddings are 64 wide and this model's 32\. Choose the mmproj",
        write_mmproj(tmp_path / "other.gguf", "idefics3", HIDDEN): "belongs to another model: it marks images with tokens",
        changed("kind.gguf", b"janus_pro", b"janus_xyz"): "does not know the projector 'janus_xyz'. Update llama-cpp-python",
        changed("tensor.gguf", b"v.blk.0.attn_out.weight", b"v.blk.0.attn_xxx.weight"): "unable to find tensor v.blk.0.attn_out.weight. Download",
        changed("key.gguf", b"clip.vision.patch_size", b"clip.vision.patch_xxxx"): "clip.vision.patch_size.*Download",
        changed("blind.gguf", b"clip.has_vision_encoder", b"clip.has_vision_xxxxxxx"): "has no encoder for images",
        changed("arch.gguf", b"\4\0\0\0\0\0\0\0clip", b"\4\0\0\0\0\0\0\0clop"): r"is a model \(clop\)",
        changed("negative.gguf", b"clip.vision.image_size\4\0\0\0", b"clip.vision.image_size\6\0\0\0"): r"damaged: its vision\.image_size is",
        changed("size.gguf", b"clip.vision.image_size\4\0\0\0\x38\0", b"clip.vision.image_size\4\0\0\0\x38\xff"): r"image_size \(\d+\) is too large",
    }
    command = [sys.executable, "-c", CHILD, str(model), *map(str, cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(messages) == len(cases)
    for message, words in zip(messages, cases.values(), strict=True):
        assert re.search(words, message), message
        assert str(tmp_path) not in message


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "llama.cpp gave no reason. Download the mmproj file again"),
        (["clip_init: failed to load model '/x/y: z.gguf': load: std::bad_alloc"], "memory ran out"),
        (
            ["mtmd_init_from_file: error: mismatch between text model (n_embd = 2048) and mmproj (n_embd = 4096)\nhint: wrong mmproj"],
            "its embeddings are 4096 wide and this model's 2048",
        ),
        (["clip_init: failed to load model '/x.gguf': load_hparams: unknown projector type: foo", "more"], "does not know the projector 'foo'"),
    ],
)
def test_reasons_are_read_from_the_log(lines, words):
    assert words in explain_failure(lines)
