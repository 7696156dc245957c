"""How much memory llama.cpp takes for a model, part by part and device by device, from what the model's card says.

Read off llama.cpp's own sizes: the cache is numbers times their size; the compute buffer is what a graph's largest step holds at once, for `tokens`
computed together. `tests/test_memory.py` holds these against sizes that llama.cpp logged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from modules.backends.llama_cpp.options import DEFAULT_CONTEXT, LlamaCppOptions
from modules.backends.llama_cpp.shape import Shape, shape
from modules.devices import MAIN, MAPPED, Device, Part
from modules.model_card import ModelCard

NUMBER_BYTES = {"fp16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Of the cache: blocks of 32 numbers and a scale of 2 bytes."""
CELLS = 256
"""A context is a multiple of so many tokens."""
ENGINE_BYTES = 58 << 20
"""Python, numpy and the library before a model is loaded: measured on Linux."""
TEXT_BYTES = 200
"""A token or merge of the vocabulary: its text in the file's header, in the list of pieces and in a hash table (three strings of 32 bytes, two
nodes and what else belongs to them). Measured: 18.7 MiB more than the weights after loading 98,052 of them."""
GPU_BYTES = 400 << 20
"""What a driver keeps on each GPU in use before anything is computed. A cautious figure, not measured here."""
_F32, _F16 = 4, 2


def context_shape(card: ModelCard, options: LlamaCppOptions) -> Shape:
    """The sizes of the context that the engine would ask for."""
    cuts = not any(card.windowed) and not card.state_bytes
    return shape(options.model_dump(), card.context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT, cuts)


def on_gpu(card: ModelCard, options: LlamaCppOptions, gpus: Sequence[Device]) -> int:
    """How many layers lie on GPUs; the output counts as one, the last."""
    whole = card.layers + 1
    return 0 if not gpus else whole if options.gpu_layers < 0 else min(options.gpu_layers, whole)


def parts(card: ModelCard, options: LlamaCppOptions, machine: Sequence[Device]) -> Iterator[Part]:
    """All that a loaded model takes while it computes. `machine`: main memory, and the GPUs that may be used.

    Not counted: chats kept in main memory (`cache_ram` limits them, and they give way), the files of `mmproj` and of a draft model.
    """
    gpus = [device for device in machine if device.name != MAIN]
    places = _places(card, options, gpus)
    sizes = context_shape(card, options)
    output = places[-1]
    yield Part("engine", MAIN, ENGINE_BYTES + card.texts * TEXT_BYTES)
    yield Part("weights", MAIN, card.input_bytes)
    yield Part("weights", output, card.output_bytes + (card.input_bytes if card.tied and output != MAIN else 0))
    state = card.state_bytes * sizes.sequences
    stateful = [layer for layer in range(card.layers) if not card.cache_width[layer]]
    for layer, place in enumerate(places[:-1]):
        yield Part("weights", place, card.layer_bytes[layer])
        yield Part("weights", MAIN if options.cpu_moe else place, card.expert_bytes[layer])
        cells = _cells(card, options, sizes, layer)
        cached = int(cells * card.cache_width[layer] * NUMBER_BYTES[options.cache_type])
        cached += state // len(stateful or range(card.layers)) if layer in stateful or not stateful else 0
        yield Part("cache", MAIN if options.no_kv_offload else place, cached)
    if not options.no_mmap:  # the file's own pages of what was laid out anew
        yield Part(MAPPED, MAIN, sum(size for size, place in zip(card.repacked_bytes, places, strict=False) if place == MAIN))
    yield Part("compute", MAIN, sizes.sequences * card.vocabulary * _F32)  # where the logits are read
    for place in dict.fromkeys([MAIN, *places]):
        yield Part("compute", place, _compute(card, options, sizes, place in places))
    for place in dict.fromkeys(place for place in places if place != MAIN):
        yield Part("engine", place, GPU_BYTES)


def _places(card: ModelCard, options: LlamaCppOptions, gpus: Sequence[Device]) -> list[str]:
    """The device of each layer and, last, of the output. The last layers go to the GPUs, in their order, by share or by free memory."""
    whole, offloaded = card.layers + 1, on_gpu(card, options, gpus)
    if not offloaded:
        return [MAIN] * whole
    if options.split_mode == "none":
        gpus = gpus[:1]
    shares = [*options.shares, *[0.0] * len(gpus)][: len(gpus)]
    if not any(shares):
        shares = [float(gpu.free) for gpu in gpus]
    ends = list(accumulate(shares))
    places = [MAIN] * (whole - offloaded)
    for number in range(offloaded):
        at = number / offloaded * ends[-1]
        places.append(next((gpu.name for gpu, end in zip(gpus, ends, strict=True) if at < end), gpus[-1].name))
    return places


def _cells(card: ModelCard, options: LlamaCppOptions, sizes: Shape, layer: int) -> int:
    """Places for tokens in a layer's cache: the context, or where it has a window, that for each sequence and a step."""
    whole = _padded(sizes.context)
    if options.streaming_llm or not (card.windowed and card.windowed[layer]):
        return whole
    return min(whole, _padded(card.sliding_window * sizes.sequences + sizes.ubatch))


def _padded(tokens: int) -> int:
    return -(-tokens // CELLS) * CELLS


def _compute(card: ModelCard, options: LlamaCppOptions, sizes: Shape, computes: bool) -> int:
    """What a device needs for a step: the graph and rows in another number format where layers are computed, else what is handed over."""
    tokens, width = _reserved(sizes), card.embedding_size
    if computes:
        return graph_bytes(card, options, sizes) + tokens * max(card.feed_forward, width) * 9 // 8  # blocks of q8_1: 36 bytes for 32 numbers
    return _mask(card, options, sizes) + tokens * width * _F32


def graph_bytes(card: ModelCard, options: LlamaCppOptions, sizes: Shape) -> int:
    """The compute buffer: what the largest of a graph's steps holds at once. Steps: attention, the inner layer, logits."""
    tokens, width, mask = _reserved(sizes), card.embedding_size, _mask(card, options, sizes)
    scores = 0 if _flash(options) else tokens * _padded(sizes.context) * card.heads * _F32
    attention = mask + scores + tokens * _F32 * 3 * (card.heads * card.head_size + width)  # queries, what comes out and its copy; the residual
    inner = mask + tokens * _F32 * (3 * card.feed_forward + 4 * width)  # up, gate, their product; residual, norm, in, out
    output = sizes.outputs * card.vocabulary * _F32 + tokens * width * _F32
    return max(attention, inner, output)


def _reserved(sizes: Shape) -> int:
    """Tokens of the graph that is reserved: the same number of each sequence."""
    return -(-sizes.ubatch // sizes.sequences) * sizes.sequences


def _flash(options: LlamaCppOptions) -> bool:
    return options.flash_attn != "off" or options.cache_type != "fp16"


def _mask(card: ModelCard, options: LlamaCppOptions, sizes: Shape) -> int:
    """Who sees whom: tokens by cells, once for layers with a window and once for the others."""
    cells = {_cells(card, options, sizes, layer) for layer in range(card.layers) if card.cache_width[layer]}
    return _reserved(sizes) * sum(cells) * (_F16 if _flash(options) else _F32)
