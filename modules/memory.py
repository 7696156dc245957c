"""Whether a model fits: an estimate of the memory it takes, by purpose and device, before anything is loaded.

The numbers are derived from the model's card and the options; how, stands with each engine (`backends/<engine>/memory.py`). `machine` is what
`devices()` says, or `usable()` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.backends.llama_cpp import memory as llama_cpp
from modules.backends.llama_cpp.options import LlamaCppOptions
from modules.backends.transformers import memory as transformers
from modules.backends.transformers.options import TransformersOptions
from modules.devices import MAIN, MAPPED, Device, Part, devices, offloads
from modules.model_card import ModelCard
from modules.options import Options

__all__ = [
    "Device",
    "Estimate",
    "Part",
    "best_gpu_layers",
    "compared",
    "devices",
    "estimate",
    "fits",
    "largest_context",
    "refusal",
    "usable",
    "with_best_layers",
]

STEP = 256  # tokens: contexts are offered in such steps
_GIB = 1 << 30
_MIB = 1 << 20

_Parts = Callable[[ModelCard, Any, Sequence[Device]], Iterator[Part]]
_PARTS: Mapping[type[Options], _Parts] = {LlamaCppOptions: llama_cpp.parts, TransformersOptions: transformers.parts}
"""By the loader's options; of other loaders only the weights are known."""


@dataclass(frozen=True)
class Estimate:
    """What a model takes with these options, on this machine."""

    card: ModelCard
    options: Options
    parts: tuple[Part, ...]
    draft: ModelCard | None = None

    def on(self, device: str) -> int:
        """Bytes needed on one device."""
        return sum(self.purposes(device).values())

    def resident(self, device: str) -> int:
        """Bytes that will be in use there: with pages of the file that the system takes back when it is short."""
        return sum(part.size for part in self.parts if part.device == device)

    @property
    def total(self) -> int:
        """Bytes needed on all devices."""
        return sum(part.size for part in self.parts if part.purpose != MAPPED)

    def purposes(self, device: str) -> dict[str, int]:
        """Bytes needed on one device by purpose (weights, cache, compute, engine, vision): what a bar shows."""
        return {part.purpose: part.size for part in self.parts if part.device == device and part.purpose != MAPPED}


def usable(options: Options, machine: Iterable[Device]) -> tuple[Device, ...]:
    """The devices that the loader of `options` can use: GPUs only where the installed engine can."""
    without = isinstance(options, LlamaCppOptions) and not offloads()
    return tuple(device for device in machine if device.name == MAIN or not without)


def estimate(card: ModelCard, options: Options, machine: Sequence[Device], draft: ModelCard | None = None) -> Estimate:
    """What the model takes with the loader that `options` belong to. `draft`: the card of `options.model_draft`."""
    parts = _PARTS.get(type(options), _weights_only)
    found = list(parts(card, options, machine))
    if draft:
        found += [part for part in parts(draft, _for_draft(options), machine) if part.purpose != "engine"]
    vision = getattr(options, "mmproj", "")
    if vision and Path(vision).is_file():
        found.append(Part("vision", MAIN, Path(vision).stat().st_size))
    return Estimate(card, options, tuple(_added(found)), draft)


def _added(parts: Iterable[Part]) -> Iterator[Part]:
    """One part for each purpose and device, without empty ones."""
    sizes: dict[tuple[str, str], int] = {}
    for part in parts:
        sizes[part.purpose, part.device] = sizes.get((part.purpose, part.device), 0) + part.size
    return (Part(purpose, device, size) for (purpose, device), size in sizes.items() if size)


def _weights_only(card: ModelCard, options: Options, machine: Sequence[Device]) -> Iterator[Part]:
    yield Part("weights", MAIN, card.size)


def _for_draft(options: Options) -> Options:
    own = {"ctx_size": "ctx_size_draft", "gpu_layers": "gpu_layers_draft"}
    known = type(options).model_fields
    return options.replace({name: getattr(options, theirs) for name, theirs in own.items() if theirs in known})


# --- does it fit ------------------------------------------------------------------------------------------------------------------------


def fits(found: Estimate, machine: Sequence[Device]) -> bool:
    """Whether each device has that much free."""
    return not _short(found, machine)


def _short(found: Estimate, machine: Sequence[Device]) -> list[tuple[Device, int]]:
    """The devices that have too little free, with what is needed there."""
    return [(device, need) for device in machine if (need := found.on(device.name)) > device.free]


def largest_context(card: ModelCard, options: Options, machine: Sequence[Device], draft: ModelCard | None = None) -> int:
    """The largest context that fits, at most the one the model was trained for, in steps of STEP; 0 if none does, or the loader has no context."""
    if "ctx_size" not in type(options).model_fields:
        return 0
    most = max(card.context_length or getattr(options, "ctx_size", 0), STEP) // STEP

    def fit(steps: int) -> bool:
        return fits(estimate(card, options.replace({"ctx_size": steps * STEP}), machine, draft), machine)

    return STEP * _most(most, fit)


def best_gpu_layers(card: ModelCard, options: Options, machine: Sequence[Device], draft: ModelCard | None = None) -> int:
    """How many layers (the output counts as one) to put on GPUs so that all fits there; 0 without GPUs, or when not even one fits.

    Main memory is not asked: what does not fit a GPU must lie there anyway.
    """
    gpus = [device for device in machine if device.name != MAIN]
    if not gpus or "gpu_layers" not in type(options).model_fields:
        return 0
    return _most(card.layers + 1, lambda layers: fits(estimate(card, options.replace({"gpu_layers": layers}), machine, draft), gpus))


def with_best_layers(card: ModelCard, options: Options, machine: Sequence[Device], draft: ModelCard | None = None) -> Options:
    """`options` as a load uses them: gpu_layers −1 is as many as fit where there are GPUs."""
    if getattr(options, "gpu_layers", 0) != -1 or all(device.name == MAIN for device in machine):
        return options
    return options.replace({"gpu_layers": best_gpu_layers(card, options, machine, draft)})


def _most(most: int, fit: Callable[[int], bool]) -> int:
    """The largest number 0 < n ≤ most that fits, when smaller ones fit as well; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fit(middle) else (low, middle - 1)
    return low


def refusal(found: Estimate, machine: Sequence[Device]) -> str | None:
    """Why the model should not be loaded like this and what would help; None when it fits. The caller decides."""
    short = _short(found, machine)
    if not short:
        return None
    needs = "; ".join(f"it needs {_gib(need)} of {device.name}, and {_gib(device.free)} are free" for device, need in short)
    return f"{found.card.name} does not fit: {needs}. {_advice(found, machine, short)}"


def _advice(found: Estimate, machine: Sequence[Device], short: Sequence[tuple[Device, int]]) -> str:
    card, options, draft = found.card, found.options, found.draft
    ways = []
    if any(device.name != MAIN for device, _ in short) and (layers := best_gpu_layers(card, options, machine, draft)):
        ways.append(f"GPU layers ≤ {layers}")
    if context := largest_context(card, options, machine, draft):
        ways.append(f"a context ≤ {context}")
    elif getattr(options, "cache_type", "fp16") == "fp16" and "cache_type" in type(options).model_fields:
        smaller = options.replace({"cache_type": "q8_0"})
        if context := largest_context(card, smaller, machine, draft):
            ways.append(f"the cache type q8_0 with a context ≤ {context}")
    ways.append("a smaller quantisation of the model" if ways else "a smaller model or quantisation, or close other programs")
    return f"Choose {' or '.join(ways)}."


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / _MIB:.0f} MiB"


def compared(found: Estimate, measured: int, device: str = MAIN) -> str:
    """A line for the log after a load: what was expected on a device, what it is, and the error in percent of what it is."""
    expected = found.resident(device)
    error = 100 * (expected - measured) / measured if measured else 0.0
    return f"{found.card.name}: {_gib(measured)} of {device} in use, {_gib(expected)} were expected ({error:+.0f} %)"
