"""Estimates of memory against numbers that can be computed by hand, against sizes that llama.cpp logged, and against the engine itself."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import pytest

from modules import devices as hardware
from modules.backends.base import CancelToken
from modules.backends.echo import LOADER as ECHO
from modules.backends.llama_cpp import LOADER
from modules.backends.llama_cpp import memory as llama_cpp
from modules.backends.llama_cpp.options import LlamaCppOptions
from modules.backends.llama_cpp.shape import Shape
from modules.backends.transformers.options import TransformersOptions
from modules.devices import MAIN, Device, Part
from modules.memory import best_gpu_layers, compared, devices, estimate, fits, largest_context, refusal, usable
from modules.model_card import ModelCard, read_card

MIB, GIB = 1 << 20, 1 << 30
CARD = ModelCard(
    name="Tiny",
    kind="gguf",
    parameters=50 * MIB,
    quantisation="Q8_0",
    context_length=4096,
    layers=4,
    heads=4,
    kv_heads=2,
    head_size=32,
    embedding_size=128,
    feed_forward=256,
    vocabulary=1000,
    cache_width=(128,) * 4,
    layer_bytes=(10 * MIB,) * 4,
    expert_bytes=(2 * MIB,) * 4,
    input_bytes=8 * MIB,
    output_bytes=1 * MIB,
    tied=True,
    size=60 * MIB,
)
RAM = Device(MAIN, 16 * GIB, 8 * GIB)
ONE, TWO = Device("One", 8 * GIB, 6 * GIB), Device("Two", 8 * GIB, 2 * GIB)


def options(**changed) -> LlamaCppOptions:
    return LlamaCppOptions().replace({"ctx_size": 1024, **changed})


def sizes(found, purpose: str) -> dict[str, int]:
    return {part.device: part.size for part in found.parts if part.purpose == purpose}


# --- llama.cpp --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "numbers"),
    [
        ({}, 1024 * 2),
        ({"cache_type": "q8_0"}, 1024 * 34 / 32),
        ({"cache_type": "q4_0"}, 1024 * 18 / 32),
        ({"ctx_size": 1025}, 1280 * 2),
        ({"ctx_size": 0}, 4096 * 2),
    ],
)
def test_the_cache_is_layers_by_width_by_cells_by_size(changed, numbers):
    assert sizes(estimate(CARD, options(**changed), [RAM]), "cache") == {MAIN: int(4 * 128 * numbers)}


def test_layers_with_a_window_have_few_cells_unless_they_keep_all():
    card = replace(CARD, sliding_window=16, windowed=(True, True, True, False))
    small = -(-(16 * 12 + 512) // 256) * 256  # 12 sequences: 2 × 4 + 4
    assert sizes(estimate(card, options(), [RAM]), "cache")[MAIN] == (3 * small + 1024) * 128 * 2
    assert sizes(estimate(card, options(streaming_llm=True), [RAM]), "cache")[MAIN] == 4 * 1024 * 128 * 2


def test_states_count_for_each_sequence():
    card = replace(CARD, cache_width=(0, 128, 0, 128), state_bytes=1000)
    assert sizes(estimate(card, options(), [RAM]), "cache")[MAIN] == 2 * 1024 * 128 * 2 + 12 * 1000
    both = replace(CARD, state_bytes=1000)  # layers that have both
    assert sizes(estimate(both, options(), [RAM]), "cache")[MAIN] == 4 * 1024 * 128 * 2 + 12 * 1000


STARTER = replace(CARD, layers=30, heads=9, head_size=64, embedding_size=576, feed_forward=1536, vocabulary=49152, cache_width=(384,) * 30)


@pytest.mark.parametrize(
    ("context", "ubatch", "flash", "logged"),
    [
        (512, 512, "auto", 14.78),
        (2048, 512, "auto", 16.36),
        (8192, 1024, "auto", 43.86),
        (2048, 64, "auto", 12.88),
        (8192, 512, "off", 175.48),
    ],
)
def test_the_graph_is_as_large_as_llama_cpp_logged_for_the_starter(context, ubatch, flash, logged):
    shape = Shape(context, 4, 36, 1024, ubatch, 64)
    assert llama_cpp.graph_bytes(STARTER, options(flash_attn=flash), shape) / MIB == pytest.approx(logged, rel=0.06)


def test_layers_go_to_gpus_from_the_last_one_on():
    whole = estimate(CARD, options(), [RAM, ONE])
    assert sizes(whole, "weights") == {MAIN: 8 * MIB, "One": 4 * 12 * MIB + 9 * MIB}  # the tied embeddings are there twice
    assert set(sizes(whole, "cache")) == {"One"} and sizes(whole, "engine")["One"] == llama_cpp.GPU_BYTES
    two = estimate(CARD, options(gpu_layers=2), [RAM, ONE])
    assert sizes(two, "weights") == {MAIN: 8 * MIB + 3 * 12 * MIB, "One": 12 * MIB + 9 * MIB}
    assert sizes(two, "cache") == {MAIN: 3 * 1024 * 256, "One": 1024 * 256}
    none = estimate(CARD, options(gpu_layers=0), [RAM, ONE])
    assert {part.device for part in none.parts} == {MAIN}
    assert estimate(CARD, options(), [RAM]).total == none.total


def test_gpus_share_by_free_memory_or_as_asked():
    assert sizes(estimate(CARD, options(), [RAM, ONE, TWO]), "cache") == {"One": 4 * 1024 * 256}  # 3 : 1 of 5 layers, the output the last
    assert sizes(estimate(CARD, options(tensor_split="40,60"), [RAM, ONE, TWO]), "cache") == {"One": 2 * 1024 * 256, "Two": 2 * 1024 * 256}
    alone = estimate(CARD, options(split_mode="none"), [RAM, TWO, ONE])
    assert alone.on("One") == 0 and alone.on("Two") > 0


def test_experts_and_the_cache_may_stay_in_main_memory():
    found = estimate(CARD, options(cpu_moe=True, no_kv_offload=True), [RAM, ONE])
    assert sizes(found, "weights") == {MAIN: 8 * MIB + 4 * 2 * MIB, "One": 40 * MIB + 9 * MIB}
    assert sizes(found, "cache") == {MAIN: 4 * 1024 * 256}


def test_pages_of_the_file_that_are_laid_out_anew_are_in_use_but_not_needed():
    card = replace(CARD, repacked_bytes=(MIB,) * 4)
    plain, found = estimate(CARD, options(), [RAM]), estimate(card, options(), [RAM])
    assert found.on(MAIN) == plain.on(MAIN) and found.total == plain.total and found.purposes(MAIN) == plain.purposes(MAIN)
    assert found.resident(MAIN) == plain.resident(MAIN) + 4 * MIB
    assert estimate(card, options(no_mmap=True), [RAM]).resident(MAIN) == plain.resident(MAIN)
    assert estimate(card, options(gpu_layers=3), [RAM, ONE]).resident(MAIN) == estimate(CARD, options(gpu_layers=3), [RAM, ONE]).on(MAIN) + 2 * MIB


def test_a_draft_model_and_a_vision_part_count(tmp_path):
    alone = estimate(CARD, options(), [RAM])
    both = estimate(
        CARD, options(ctx_size_draft=512), [RAM], draft=replace(CARD, layers=1, cache_width=(128,), layer_bytes=(MIB,), expert_bytes=(0,))
    )
    assert sizes(both, "cache")[MAIN] - sizes(alone, "cache")[MAIN] == 512 * 256
    assert sizes(both, "weights")[MAIN] - sizes(alone, "weights")[MAIN] == (8 + 1 + 1) * MIB
    file = tmp_path / "mmproj.gguf"
    file.write_bytes(b"x" * 1000)
    assert sizes(estimate(CARD, options(mmproj=str(file)), [RAM]), "vision") == {MAIN: 1000}


@pytest.mark.engine
def test_the_engine_takes_what_was_estimated(starter_model):
    chosen = options(ctx_size=2048)
    expected = estimate(read_card(starter_model), chosen, [RAM]).resident(MAIN)
    backend = LOADER.load(starter_model, chosen, lambda *_: None, CancelToken())
    try:
        end = time.monotonic() + 30
        while not (error := abs(backend.memory() - expected) / expected) < 0.15 and time.monotonic() < end:
            time.sleep(0.1)  # the engine tells its memory each second
    finally:
        backend.unload()
    assert error < 0.15


# --- Transformers -----------------------------------------------------------------------------------------------------------------------

FOLDER = replace(CARD, kind="transformers", quantisation="BF16", parameters=int(57 * MIB / 2))


@pytest.mark.parametrize(
    ("card", "changed", "machine", "weights"),
    [
        (FOLDER, {}, [RAM], 57 * 2),  # float32 on a CPU
        (FOLDER, {"compute_dtype": "bfloat16"}, [RAM], 57),
        (FOLDER, {}, [RAM, ONE], 57),
        (FOLDER, {"cpu": True}, [RAM, ONE], 57 * 2),
        (FOLDER, {"load_in_8bit": True}, [RAM, ONE], 48 / 2 + 9),
        (FOLDER, {"load_in_4bit": True}, [RAM, ONE], 48 / 2 * 4.5 / 8 + 9),
        (replace(FOLDER, quantisation="GPTQ 4-bit"), {}, [RAM, ONE], 57),
        (replace(CARD, parameters=57 * MIB), {}, [RAM], 57 * 4),  # a GGUF file, dequantised
    ],
)
def test_weights_of_transformers(card, changed, machine, weights):
    found = estimate(card, TransformersOptions().replace({"ctx_size": 1024, **changed}), machine)
    assert sum(sizes(found, "weights").values()) / MIB == pytest.approx(weights, rel=0.01)


def test_cache_of_transformers():
    def cache(**changed) -> int:
        return sizes(estimate(FOLDER, TransformersOptions().replace({"ctx_size": 1024, **changed}), [RAM]), "cache")[MAIN]

    assert cache(kept_tokens=0) == 4 * 1024 * 128 * 4 and cache() == 2 * cache(kept_tokens=0)
    assert cache(kept_tokens=0, cache_kind="quantized") == 4 * 1024 * 128 * 4.5 / 8


def test_gpus_are_filled_one_after_the_other():
    chosen = TransformersOptions().replace({"gpu_split": "0.02,0.02"})  # GiB: one layer of 12 MiB each
    found = estimate(FOLDER, chosen, [RAM, ONE, TWO])
    assert set(sizes(found, "cache")) == {"One", "Two", MAIN}


def test_of_other_loaders_only_the_weights_are_known():
    found = estimate(CARD, ECHO.options(), [RAM])
    assert found.parts == (Part("weights", MAIN, 60 * MIB),) and largest_context(CARD, ECHO.options(), [RAM]) == 0


# --- does it fit ------------------------------------------------------------------------------------------------------------------------


def with_free(device: Device, free: int) -> Device:
    return replace(device, free=free)


def test_the_largest_context_is_the_last_that_fits():
    for context in (256, 1024, 2048):
        need = estimate(CARD, options(ctx_size=context), [RAM]).on(MAIN)
        assert largest_context(CARD, options(), [with_free(RAM, need)]) == context
        assert largest_context(CARD, options(), [with_free(RAM, need - 1)]) == context - 256
    assert largest_context(CARD, options(), [RAM]) == 4096  # what it was trained for


def test_the_best_number_of_layers_is_the_most_that_fit():
    for layers in (1, 3, 5):
        need = estimate(CARD, options(gpu_layers=layers), [RAM, ONE]).on("One")
        assert best_gpu_layers(CARD, options(), [RAM, with_free(ONE, need)]) == layers
        assert best_gpu_layers(CARD, options(), [RAM, with_free(ONE, need - 1)]) == layers - 1
    assert best_gpu_layers(CARD, options(), [RAM]) == 0 and best_gpu_layers(FOLDER, TransformersOptions(), [RAM, ONE]) == 0


def test_a_refusal_names_the_numbers_and_what_would_fit():
    assert refusal(estimate(CARD, options(), [RAM]), [RAM]) is None and fits(estimate(CARD, options(), [RAM]), [RAM])
    need = estimate(CARD, options(), [RAM]).on(MAIN)
    machine = [with_free(RAM, need - 1)]
    words = refusal(estimate(CARD, options(), machine), machine)
    assert words is not None and words.startswith(f"Tiny does not fit: it needs {need / MIB:.0f} MiB of main memory, and ")
    assert "a context ≤ 768 or a smaller quantisation" in words
    cramped = [with_free(RAM, MIB)]
    assert "a smaller model" in (refusal(estimate(CARD, options(), cramped), cramped) or "")


def test_a_refusal_for_a_gpu_names_the_layers():
    need = estimate(CARD, options(gpu_layers=3), [RAM, ONE]).on("One")
    machine = [RAM, with_free(ONE, need)]
    words = refusal(estimate(CARD, options(), machine), machine)
    assert words is not None and "of One, and" in words and "GPU layers ≤ 3" in words


def test_advice_is_true():
    """What a refusal offers fits, and one step more does not."""
    for free in range(90, 130, 7):
        machine = [with_free(RAM, free * MIB)]
        context = largest_context(CARD, options(), machine)
        if context:
            assert fits(estimate(CARD, options(ctx_size=context), machine), machine)
        if context < 4096:
            assert not fits(estimate(CARD, options(ctx_size=context + 256), machine), machine)


def test_the_comparison_after_a_load():
    found = replace(estimate(CARD, options(), [RAM]), parts=(Part("weights", MAIN, 110 * MIB),))
    assert compared(found, 100 * MIB) == "Tiny: 100 MiB of main memory in use, 110 MiB were expected (+10 %)"
    assert "(+0 %)" in compared(found, 0)


# --- devices ----------------------------------------------------------------------------------------------------------------------------


def test_main_memory_comes_first():
    first, *others = devices()
    assert first.name == MAIN and 0 < first.free <= first.total
    assert len({device.name for device in (first, *others)}) == 1 + len(others)


def test_nvidia_lines_are_read_and_others_left_out():
    text = "NVIDIA A, with comma, 8192, 8000\nNVIDIA GB10, [N/A], [N/A]\nfailed to talk\n\n, 1, 2\n"
    assert list(hardware.nvidia_lines(text)) == [Device("NVIDIA A, with comma", 8192 * MIB, 8000 * MIB)]
    assert len(list(hardware.nvidia_lines("A, 1, 1\n" * 1000))) == hardware.MAX_GPUS


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_nvidias_tool_is_asked_with_a_time_limit(tmp_path, monkeypatch):
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho 'Card, 10, 5'\necho 'Card, 10, 6'\n")
    tool.chmod(0o755)
    two = hardware._nvidia(str(tool))
    assert two == [Device("Card", 10 * MIB, 5 * MIB), Device("Card", 10 * MIB, 6 * MIB)]
    assert [device.name for device in hardware._numbered(two)] == ["Card #1", "Card #2"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert hardware._nvidia(str(tool)) == [] and hardware._nvidia(str(tmp_path / "none")) == []
    monkeypatch.setattr(hardware, "GPU_SECONDS", 0.2)
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    assert hardware._nvidia(str(tool)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="sysfs")
def test_amd_cards_are_read_from_the_driver(tmp_path):
    for number, (total, used) in enumerate([(8 * GIB, GIB), (512 * MIB, 0), ("x", 0)]):
        card = tmp_path / f"card{number}" / "device"
        card.mkdir(parents=True)
        (card / "mem_info_vram_total").write_text(f"{total}\n")
        (card / "mem_info_vram_used").write_text(f"{used}\n")
    assert hardware._amd(tmp_path) == [Device("AMD GPU", 8 * GIB, 7 * GIB)]
    (tmp_path / "card0" / "device" / "product_name").write_text("Radeon\n")
    assert hardware._amd(tmp_path) == [Device("Radeon", 8 * GIB, 7 * GIB)]


def test_gpus_count_only_where_the_engine_can_use_them(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(hardware, "find_spec", lambda name: type("Spec", (), {"submodule_search_locations": [str(tmp_path)]}))
    (tmp_path / "lib" / "libggml-cpu.so").touch()
    assert usable(options(), [RAM, ONE]) == (RAM,) and usable(TransformersOptions(), [RAM, ONE]) == (RAM, ONE)
    (tmp_path / "lib" / "libggml-cuda.so").touch()
    assert usable(options(), [RAM, ONE]) == (RAM, ONE)
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    assert not hardware.offloads()
