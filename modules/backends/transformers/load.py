"""From a file or folder to a model: what is checked before, how it is placed, and what its errors mean. Imports torch when it loads."""

from __future__ import annotations

import gc
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.backends.base import CancelToken, Progress
from modules.backends.transformers.options import DEFAULT_CONTEXT, TransformersOptions
from modules.backends.transformers.progress import check_cancel, watched
from modules.errors import ModelError
from modules.gguf import model_file
from modules.gguf import read_header as read_gguf
from modules.log import logger
from modules.safetensors_header import read_header as read_safetensors

MAX_CONFIG = 4 << 20
MAX_INDEX = 64 << 20
MAX_SHARDS = 2000
MAX_SIZE = 1 << 40
"""Of any whole number in a config.json."""
MAX_LAYERS, MAX_PARTS = 4096, 500_000
"""Of a model: layers (block sizes among what looks like them), and layers times experts."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Source:
    """What is loaded: a folder, and in it the GGUF file where it is one."""

    folder: Path
    gguf: str = ""
    config: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """For people."""
        return Path(self.gguf).stem if self.gguf else self.folder.name


@dataclass(frozen=True)
class _Parts:
    """A model but for its weights, and where those are."""

    kind: Any
    """Has `from_pretrained`."""
    config: Any
    tokenizer: Any
    processor: Any
    dtype: Any
    weights: dict[str, Any]
    """Arguments of that."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, and its processor where it sees images."""

    model: Any
    tokenizer: Any
    processor: Any
    context_length: int


# --- what is there, without torch -----------------------------------------------------------------------------------------------------------


def is_model_folder(path: Path) -> bool:
    """Whether `path` is a Hugging Face folder with weights of a kind that this loader takes. Reads at most its config.json."""
    if not path.is_dir() or not (path / "config.json").is_file():
        return False
    if not any(True for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for _ in path.glob(pattern)):
        return False
    try:
        config = read_json(path / "config.json", MAX_CONFIG)
    except ModelError:
        return True  # whoever loads it is told what is wrong with it
    method = (config.get("quantization_config") or {}) if isinstance(config.get("quantization_config"), dict) else {}
    return str(method.get("quant_method", "")).lower() not in ("exl2", "exl3")


def read_json(path: Path, most: int) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes. Raises ModelError."""
    try:
        if path.stat().st_size > most:
            raise ModelError(f"{path.name} has more than {most >> 20} MiB: it is not what it should be. Download the model again.")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror or error}. Download the model again.") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is damaged: {str(error)[:120]}. Download it again.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} is damaged: it holds no object. Download it again.")
    return found


def find_source(path: Path, options: TransformersOptions) -> Source:
    """What to load at `path`, its headers checked. Raises ModelError with what is missing or wrong."""
    if path.is_file() or not (path / "config.json").is_file():
        file = model_file(path)
        read_gguf(file)
        return Source(file.parent, file.name)
    config = read_json(path / "config.json", MAX_CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"config.json of {path.name} names no model_type. Download the model again, or use another loader.")
    if ("auto_map" in config) and not options.trust_remote_code and config["model_type"] not in known_types():
        raise ModelError(
            f"{path.name} brings program code of its own, which is not run. If you trust where it comes from, start with --trust-remote-code."
        )
    _check_sizes(config, path.name)
    _check_weights(path, options)
    return Source(path, config=config)


def _check_sizes(config: dict[str, Any], name: str) -> None:
    """Raise ModelError for a model that would be built of more parts than any has: building them would take all memory before weights are read."""
    layers = experts = 1
    todo: list[Any] = [config]
    while todo:
        part = todo.pop()
        todo += [each for each in (part.values() if isinstance(part, dict) else part) if isinstance(each, dict | list)]
        for key, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, int) and not isinstance(value, bool):
                layers = max(layers, value if "layer" in key or "block" in key or "depth" in key else 1)
                experts = max(experts, value if "experts" in key else 1)
                if abs(value) > MAX_SIZE:
                    raise ModelError(f"config.json of {name} says {key[:60]} is {value}, which no model has. Download it again.")
    if layers * experts > MAX_PARTS or layers > MAX_LAYERS:
        raise ModelError(f"config.json of {name} names {layers} layers and {experts} experts, which no model has. Download it again.")


def known_types() -> frozenset[str]:
    """The kinds of models that the installed transformers knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return frozenset(CONFIG_MAPPING.keys())


def _check_weights(folder: Path, options: TransformersOptions) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({str(name) for name in (read_json(index, MAX_INDEX).get("weight_map") or {}).values()})
        if not files or len(files) > MAX_SHARDS:
            raise ModelError(f"{index.name} names {len(files)} files of weights. Download it again.")
        strange = [name for name in files if Path(name).name != name or not name.endswith(".safetensors")]
        if strange:
            raise ModelError(f"{index.name} names {strange[0][:60]!r}, which is no file of weights here. Download it again.")
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
            raise ModelError(f"Of {len(files)} files of weights {len(missing)} are missing: {shown}. Download them too.")
        for name in files:
            read_safetensors(folder / name)
    elif any(folder.glob("*.safetensors")):
        for file in sorted(folder.glob("*.safetensors")):
            read_safetensors(file)
    elif any(file.suffix in PICKLES for file in folder.iterdir()):
        if not options.allow_pickle:
            raise ModelError(
                f"The weights of {folder.name} are in a form that can run programs when it is read (.bin, .pt). Get the model as .safetensors; "
                "or, if you trust where it comes from, start with --allow-pickle."
            )
    else:
        raise ModelError(f"There are no weights in {folder.name}. Download its .safetensors files.")


# --- loading ----------------------------------------------------------------------------------------------------------------------------------


def load_model(source: Source, options: TransformersOptions, progress: Progress, cancel: CancelToken) -> LoadedModel:
    """Load. Raises ModelError with the fix; promptly once cancelled."""
    progress(0.0, "Starting torch")
    import torch
    import transformers

    _no_bars(transformers)
    check_cancel(cancel)
    with explained(source, options):
        device = _device(torch, options)
        progress(0.02, "Reading the tokenizer")
        parts = _parts_of_file(source, options, device) if source.gguf else _parts_of_folder(source, options, device)
        check_cancel(cancel)
        with watched(progress, cancel):
            model, info = parts.kind.from_pretrained(
                config=parts.config,
                output_loading_info=True,
                dtype=parts.dtype,
                attn_implementation=_attention(options),
                **parts.weights,
                **_placing(torch, options, device),
                **_quantised(torch, transformers, options),
            )
        _check_complete(source, info)
        model.eval()
        model.requires_grad_(False)
    check_cancel(cancel)
    return LoadedModel(model, parts.tokenizer, parts.processor, _context(model.config, options))


def _parts_of_folder(source: Source, options: TransformersOptions, device: str) -> _Parts:
    import transformers

    given: dict[str, Any] = {"pretrained_model_name_or_path": source.folder, "local_files_only": True, "trust_remote_code": options.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(**given)
    processor = None
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        processor = transformers.AutoProcessor.from_pretrained(**given)
    tokenizer = getattr(processor, "tokenizer", None) or transformers.AutoTokenizer.from_pretrained(use_fast=not options.no_use_fast, **given)
    kind = transformers.AutoModelForImageTextToText if processor is not None else _kind(config)
    weights = {"use_safetensors": None if options.allow_pickle else True, "weights_only": True, **given}
    return _Parts(kind, config, tokenizer, processor, _dtype(options, config, device), weights)


def _parts_of_file(source: Source, options: TransformersOptions, device: str) -> _Parts:
    import transformers

    from modules.backends.transformers.gguf_source import read_model, tokenizer_of, weights
    from modules.convert.sources import GgufFile

    file = GgufFile(source.folder / source.gguf)
    model = read_model(file)
    if model is not None:
        dtype = _dtype(options, model.config, device)
        kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
        given: dict[str, Any] = {
            "pretrained_model_name_or_path": None,
            "state_dict": weights(model, dtype),
            "generation_config": model.generation_config,
        }
        return _Parts(kind, model.config, model.tokenizer, None, dtype, given)
    given = file.for_library()
    config = transformers.AutoConfig.from_pretrained(**given)
    tokenizer = tokenizer_of(file) or transformers.AutoTokenizer.from_pretrained(**given)
    return _Parts(_kind(config), config, tokenizer, None, _dtype(options, config, device), given)


def _check_complete(source: Source, info: dict[str, Any]) -> None:
    """Raise ModelError when weights were missing: the library would have made them up."""
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"The files of {source.name} lack {len(missing)} of its weights, {missing[0][:80]} for one. They are incomplete, or not this model's: "
            "download it again."
        )


def _no_bars(transformers: Any) -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _kind(config: Any) -> Any:
    import transformers

    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def _device(torch: Any, options: TransformersOptions) -> str:
    if options.cpu:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    mps = getattr(torch.backends, "mps", None)
    xpu = getattr(torch, "xpu", None)
    return "mps" if mps and mps.is_available() else "xpu" if xpu and xpu.is_available() else "cpu"


def _dtype(options: TransformersOptions, config: Any, device: str) -> Any:
    import torch

    if options.compute_dtype != "auto":
        return getattr(torch, options.compute_dtype)
    if device == "cpu":
        return torch.float32  # half numbers are slow there, or not to be had
    own = getattr(config, "dtype", None)
    if options.bf16 or own == torch.bfloat16:
        return torch.bfloat16
    return torch.float16


def _attention(options: TransformersOptions) -> str | None:
    if options.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ModelError("flash_attention_2 needs a package that is not installed: pip install flash-attn. Or choose sdpa.")
    return None if options.attn_implementation == "sdpa" else options.attn_implementation


def _placing(torch: Any, options: TransformersOptions, device: str) -> dict[str, Any]:
    """Where the weights go: one device, or spread over GPUs, main memory and disk as far as they are allowed."""
    spread = bool(options.gpu_split or options.cpu_memory or options.disk) or (device == "cuda" and torch.cuda.device_count() > 1)
    if device != "cuda" or not spread:
        return {"device_map": {"": device}}
    most: dict[Any, str] = {number: f"{size}GiB" for number, size in enumerate(options.gpu_sizes)}
    if options.cpu_memory:
        most["cpu"] = f"{options.cpu_memory}GiB"
    found: dict[str, Any] = {"device_map": "auto"}
    if most:
        if not options.gpu_sizes:
            most |= {number: f"{torch.cuda.mem_get_info(number)[0] * 0.9 / 2**30:.1f}GiB" for number in range(torch.cuda.device_count())}
        most.setdefault("cpu", f"{_free_memory() / 2**30:.1f}GiB")
        found["max_memory"] = most
    if options.disk:
        if not options.disk_cache_dir:
            raise ModelError("--disk needs a folder: give one with --disk-cache-dir.")
        found["offload_folder"] = options.disk_cache_dir
    return found


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _quantised(torch: Any, transformers: Any, options: TransformersOptions) -> dict[str, Any]:
    if not (options.load_in_4bit or options.load_in_8bit):
        return {}
    if options.load_in_4bit and options.load_in_8bit:
        raise ModelError("The weights can be loaded in 4 bits or in 8 bits, not both. Switch one off.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("Loading in 4 or 8 bits needs a package that is not installed: pip install bitsandbytes")
    if options.load_in_8bit:
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=getattr(torch, options.compute_dtype) if options.compute_dtype != "auto" else torch.bfloat16,
            bnb_4bit_quant_type=options.quant_type,
            bnb_4bit_use_double_quant=options.use_double_quant,
        )
    return {"quantization_config": config}


def _context(config: Any, options: TransformersOptions) -> int:
    """As asked for; without that the model's own, at most 8,192. More than its own only where positions are computed, not learnt."""
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")
    known = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0]
    if not known:
        return options.ctx_size or DEFAULT_CONTEXT
    learnt = not getattr(text, "rope_parameters", None) and not getattr(text, "relative_attention_num_buckets", None)
    if options.ctx_size > known[0]:
        logger.warning("The model was trained on %d tokens of context; --ctx-size asks for %d.", known[0], options.ctx_size)
    return min(options.ctx_size or DEFAULT_CONTEXT, known[0]) if learnt or not options.ctx_size else options.ctx_size


# --- errors -----------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def explained(source: Source, options: TransformersOptions) -> Iterator[None]:
    """Turn what transformers raises into a ModelError that says what to do."""
    try:
        yield
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(f"{source.name} needs a package that is not installed: {_first(error)}. Install it with pip.") from None
    except MemoryError:
        raise ModelError(_NO_MEMORY.format(source.name)) from None
    except RecursionError:
        raise ModelError(f"{source.name} has a file that is nested too deep. Download it again.") from None
    except Exception as error:  # whatever a library of others makes of files that nobody checked
        if out_of_memory(error):
            free_memory()
            raise ModelError(_NO_MEMORY.format(source.name)) from None
        kind = (source.config or {}).get("model_type", "")
        if kind and kind not in known_types():
            raise ModelError(
                f"The installed transformers does not know the architecture {kind[:60]!r}. Update it, or start with --trust-remote-code if "
                "the model brings its own code and you trust where it comes from."
            ) from None
        raise ModelError(f"{source.name} could not be loaded: {_first(error)}. Its files may be damaged or incomplete: download it again.") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there is no memory left, on a GPU or in main memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def free_memory() -> None:
    """Give back what nobody holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_NO_MEMORY = "There is not enough memory for {}. Load it with --load-in-4bit or --cpu-memory, with a smaller --ctx-size, or choose a smaller model."


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0][:200] if lines else type(error).__name__).rstrip(".")
