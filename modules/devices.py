"""Where a model can lie: main memory and GPUs, with what is free now; and the parts of memory that it takes there. Loads no engine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

MAIN = "main memory"
MAPPED = "mapped file"
"""Purpose of memory that the system takes back when it is short: it is in use, but nobody needs it."""
GPU_SECONDS = 3.0
MAX_GPUS = 32
_MIB = 1 << 20
_DRM = Path("/sys/class/drm")
_NVIDIA = ("--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
_LIBRARIES = ("cuda", "hip", "vulkan", "metal", "sycl", "musa", "cann", "opencl")
"""Of llama.cpp's backends, those that compute on GPUs: each is a library beside the binding's own."""


@dataclass(frozen=True)
class Device:
    """A memory: `MAIN` or one GPU's. Bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Part:
    """What one purpose takes of one device, in bytes."""

    purpose: str
    device: str
    size: int


def devices() -> tuple[Device, ...]:
    """Main memory, then the GPUs with memory of their own, in the system's order, with different names.

    Asks the system, which takes up to GPU_SECONDS where there is an NVIDIA driver. A GPU that shares main memory (Apple, integrated ones) is none of
    its own here: what lies there is counted in main memory.
    """
    main = psutil.virtual_memory()
    return (Device(MAIN, main.total, main.available), *_numbered([*_nvidia(), *_amd()][:MAX_GPUS]))


def offloads() -> bool:
    """Whether the installed llama.cpp can use a GPU: whether such a library lies beside it. Imports nothing."""
    found = find_spec("llama_cpp")
    folders = found.submodule_search_locations if found else None
    names = {file.name for folder in folders or () for file in Path(folder, "lib").glob("*ggml-*")}
    return any(f"ggml-{library}" in name for name in names for library in _LIBRARIES)


def _numbered(gpus: list[Device]) -> Iterator[Device]:
    """GPUs of one name get numbers."""
    names = [gpu.name for gpu in gpus]
    for place, gpu in enumerate(gpus):
        several = names.count(gpu.name) > 1 or gpu.name == MAIN
        yield Device(f"{gpu.name} #{names[: place + 1].count(gpu.name)}" if several else gpu.name, gpu.total, gpu.free)


def _nvidia(command: str = "nvidia-smi") -> list[Device]:
    """What NVIDIA's own tool tells; nothing without it, or when it does not answer."""
    path = shutil.which(command)
    if not path:
        return []
    try:
        done = subprocess.run([path, *_NVIDIA], capture_output=True, text=True, errors="replace", timeout=GPU_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return list(nvidia_lines(done.stdout)) if done.returncode == 0 else []


def nvidia_lines(text: str) -> Iterator[Device]:
    """GPUs from lines "name, MiB in all, MiB free". Those that do not tell (Grace: "[N/A]") share main memory."""
    for line in text.splitlines()[:MAX_GPUS]:
        name, *sizes = (part.strip() for part in line.rsplit(",", 2))
        if name and len(sizes) == 2 and all(size.isdecimal() for size in sizes):
            yield Device(name, int(sizes[0]) * _MIB, int(sizes[1]) * _MIB)


def _amd(folder: Path = _DRM) -> list[Device]:
    """Cards that the amdgpu driver shows; integrated ones have a window of main memory only, under 2 GiB as a rule, and are left out."""
    if sys.platform != "linux":
        return []
    found = []
    for card in sorted(folder.glob("card[0-9]*/device/mem_info_vram_total"))[:MAX_GPUS]:
        try:
            total, used = int(card.read_text()), int(card.with_name("mem_info_vram_used").read_text())
            name = card.with_name("product_name").read_text().strip() if card.with_name("product_name").exists() else ""
        except (OSError, ValueError):
            continue
        if total >= 2 << 30:
            found.append(Device(name or "AMD GPU", total, max(total - used, 0)))
    return found
