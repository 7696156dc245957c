"""How much memory Transformers takes for a model, part by part and device by device, from its card. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modules.backends.transformers.options import DEFAULT_CONTEXT, TransformersOptions
from modules.devices import MAIN, Device, Part
from modules.model_card import ModelCard

LIBRARY_BYTES = 335 << 20
"""torch and transformers in the server's process, once a model has computed: measured on Linux with the CPU build of torch."""
GPU_BYTES = 500 << 20
"""A CUDA context with torch's libraries, on each GPU in use. A cautious figure, not measured here."""
_WHOLE_FORMATS = ("F32", "F16", "BF16", "F64")
_NUMBER_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


def number_bytes(card: ModelCard, options: TransformersOptions, gpu: bool) -> float:
    """Bytes of a number that is computed with: as chosen, the model's own, or float32 on a CPU."""
    if options.compute_dtype != "auto":
        return _NUMBER_BYTES[options.compute_dtype]
    if not gpu:
        return 4.0
    return 4.0 if card.quantisation == "F32" and not options.bf16 else 2.0


def parts(card: ModelCard, options: TransformersOptions, machine: Sequence[Device]) -> Iterator[Part]:
    """All that a loaded model takes while it computes. The layers are spread over the GPUs by `gpu_split` or free memory, the rest to main memory.

    Not counted: the moment of loading, when a file of the model may lie in memory besides.
    """
    gpus = [] if options.cpu else [device for device in machine if device.name != MAIN]
    size = number_bytes(card, options, bool(gpus))
    layers, input_bytes, output_bytes = _weights(card, options, size)
    context = options.ctx_size or min(card.context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    kept = context if options.kept_tokens < 0 else options.kept_tokens
    places = _places(options, gpus, layers)
    first, last = places[0] if places else MAIN, places[-1] if places else MAIN
    yield Part("engine", MAIN, LIBRARY_BYTES)
    yield Part("weights", first, input_bytes)
    yield Part("weights", last, output_bytes)
    for layer, place in enumerate(places):
        yield Part("weights", place, layers[layer])
        yield Part("cache", place, int((_cells(card, layer, context) + kept) * card.cache_width[layer] * _cache_bytes(options, size)))
    for place in dict.fromkeys(places):
        yield Part("compute", place, _compute(card, options, context, size))
        if place != MAIN:
            yield Part("engine", place, GPU_BYTES)


def _weights(card: ModelCard, options: TransformersOptions, size: float) -> tuple[list[int], int, int]:
    """Bytes of each layer, of the input and of the output, as they lie in memory."""
    stored = [plain + experts for plain, experts in zip(card.layer_bytes, card.expert_bytes, strict=True)]
    if card.kind != "gguf" and card.quantisation not in _WHOLE_FORMATS:  # quantised in the file: stays as it is
        return stored, card.input_bytes, card.output_bytes
    whole = max(sum(stored) + card.input_bytes + card.output_bytes, 1)
    ratio = card.parameters * size / whole  # numbers to bytes, spread as the file's bytes are
    quantised = 4.5 / 8 if options.load_in_4bit else 1.0 if options.load_in_8bit else size  # 4 bits and a float32 for 64 numbers
    layer_ratio = card.parameters * quantised / whole
    return [int(layer * layer_ratio) for layer in stored], int(card.input_bytes * ratio), int(card.output_bytes * ratio)


def _places(options: TransformersOptions, gpus: Sequence[Device], layers: Sequence[int]) -> list[str]:
    """The device of each layer: GPUs are filled one after the other."""
    limits = [int(gib * (1 << 30)) for gib in options.gpu_sizes]
    room = [(gpu.name, limits[number] if number < len(limits) else gpu.free) for number, gpu in enumerate(gpus)]
    places: list[str] = []
    used = 0
    for size in layers:
        while room and used + size > room[0][1]:
            room, used = room[1:], 0
        places.append(room[0][0] if room else MAIN)
        used += size
    return places


def _cells(card: ModelCard, layer: int, context: int) -> int:
    return min(context, card.sliding_window) if card.windowed and card.windowed[layer] else context


def _cache_bytes(options: TransformersOptions, size: float) -> float:
    return 4.5 / 8 if options.cache_kind == "quantized" else size


def _compute(card: ModelCard, options: TransformersOptions, context: int, size: float) -> int:
    """What the largest step holds: the inner layer, scores where they are not computed piece by piece, logits in float32 for who writes."""
    tokens = options.batch_size
    inner = tokens * (3 * card.feed_forward + 4 * card.embedding_size) * size
    scores = tokens * context * card.heads * size if options.attn_implementation == "eager" else tokens * context * size
    return int(max(inner, scores) + max(options.parallel, 1) * card.vocabulary * 4)
