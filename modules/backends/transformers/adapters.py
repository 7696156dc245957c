"""LoRA adapters by PEFT: loaded beside each other into one model, put to work for one set of requests at a time. The engine's thread only."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from modules.backends.base import Adapter
from modules.backends.transformers.load import MAX_CONFIG, read_json
from modules.errors import ModelError, SettingsError
from modules.log import logger
from modules.safetensors_header import read_header

MAX_SCALE = 100
"""Of an adapter: far more than any makes sense with."""
_WEIGHT = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>A|B|embedding_A|embedding_B|magnitude_vector)(\.weight)?$")


def key_of(adapters: Sequence[Adapter]) -> tuple[tuple[str, float], ...] | None:
    """What numbers computed with `adapters` depend on; None without any. Raises SettingsError for a scale that makes no sense."""
    for adapter in adapters:
        if not abs(adapter.scale) <= MAX_SCALE:
            raise SettingsError(f"The scale of {adapter.path.name} cannot be {adapter.scale}. Use a number between −{MAX_SCALE} and {MAX_SCALE}.")
    return tuple(sorted((str(adapter.path.resolve()), float(adapter.scale)) for adapter in adapters if adapter.scale)) or None


class Adapters:
    """The adapters of one model."""

    def __init__(self, model: Any, allow_pickle: bool = False) -> None:
        self._model = model
        self._allow_pickle = allow_pickle
        self._peft: Any = None
        self._names: dict[str, str] = {}
        """PEFT's name of each path."""
        self._scaling: dict[str, dict[str, float]] = {}
        """Of each PEFT name: what each module multiplies with at scale 1."""
        self._now: Hashable = None
        self._count = 0

    @property
    def paths(self) -> tuple[Path, ...]:
        """Those loaded."""
        return tuple(Path(path) for path in list(self._names))

    def load(self, path: Path) -> None:
        """Load the adapter in the folder `path`. Raises ModelError when it does not fit. A second call does nothing."""
        if str(path) in self._names:
            return
        try:
            from peft import PeftModel
        except ImportError:
            raise ModelError("LoRA adapters need a package that is not installed: pip install peft") from None
        self._check(path)
        self._count += 1
        name = f"adapter{self._count}"
        try:
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._model, str(path), adapter_name=name, is_trainable=False)
            else:
                self._peft.load_adapter(str(path), adapter_name=name, is_trainable=False)
        except (RuntimeError, ValueError, TypeError, KeyError, OSError, AttributeError) as error:
            self._remove(name)
            first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise ModelError(f"The adapter {path.name} cannot be used with this model: {first}. It was made for another model.") from None
        self._scaling[name] = {at: module.scaling[name] for at, module in self._layers() if name in module.scaling}
        self._names[str(path)] = name
        self._now = ("unknown",)
        self.use(None)
        logger.info("Adapter %s: %d parts of the model", path.name, len(self._scaling[name]))

    def unload(self, path: Path) -> None:
        """Free it. One that is not loaded is no error."""
        name = self._names.pop(str(path), None)
        if name:
            self._scaling.pop(name, None)
            self._remove(name)

    def use(self, key: Hashable) -> None:
        """From now on compute with the adapters of `key` (see `key_of`). Raises ModelError for one that is not loaded."""
        if key == self._now or self._peft is None:
            if key and self._peft is None:
                raise ModelError("An adapter of this request is not loaded any more. Send it again.")
            return
        asked = key if isinstance(key, tuple) else ()
        if any(path not in self._names for path, _ in asked):
            raise ModelError("An adapter of this request is not loaded any more. Send it again.")
        wanted = [(self._names[path], scale) for path, scale in asked]
        names = [name for name, _ in wanted]
        for at, module in self._layers():
            module.enable_adapters(bool(names))
            if names:
                module.set_adapter(names, inference_mode=True)
                for name, scale in wanted:
                    if name in module.scaling:
                        module.scaling[name] = self._scaling[name][at] * scale
        self._now = key

    def _layers(self) -> list[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        return [(at, module) for at, module in self._model.named_modules() if isinstance(module, LoraLayer)]

    def _remove(self, name: str) -> None:
        if self._peft is None:
            return
        if self._names:
            self._peft.delete_adapter(name)
            self._now = ("unknown",)
            self.use(None)
        else:  # the model is again as it was
            self._peft.unload()
            self._peft, self._now = None, None

    def _check(self, path: Path) -> None:
        """Raise ModelError unless each weight of the adapter has a place of its shape in the model."""
        if not (path / "adapter_config.json").is_file():
            raise ModelError(f"{path.name} is not a LoRA adapter: it has no adapter_config.json. Choose the folder that PEFT saved.")
        config = read_json(path / "adapter_config.json", MAX_CONFIG)
        if config.get("peft_type") != "LORA":
            raise ModelError(f"{path.name} is an adapter of the kind {str(config.get('peft_type'))[:40]!r}; only LoRA can be used.")
        file = path / "adapter_model.safetensors"
        if not file.is_file():
            if self._allow_pickle and (path / "adapter_model.bin").is_file():
                return
            raise ModelError(f"{path.name} has no adapter_model.safetensors. Save the adapter in that form; .bin files can run programs when read.")
        found = 0
        for name, tensor in read_header(file).tensors.items():
            match = _WEIGHT.match(name)
            if not match:
                continue
            found += 1
            expected = self._width(match["module"], match["side"])
            actual = {"A": tensor.shape[-1:], "B": tensor.shape[:1]}.get(match["side"])
            if expected is None or (actual is not None and actual != (expected,)):
                raise ModelError(f"The adapter {path.name} was made for another model: this one has no {match['module'][:80]} of that size.")
        if not found:
            raise ModelError(f"{path.name} holds no LoRA weights that are known here.")

    def _width(self, module: str, side: str) -> int | None:
        try:
            layer = self._model.get_submodule(module)
        except AttributeError:
            return None
        layer = getattr(layer, "base_layer", layer)
        for name in ("in_features", "nf", "num_embeddings") if side == "A" else ("out_features", "nf", "num_embeddings"):
            if hasattr(layer, name) and not (name == "nf" and side == "A"):
                return int(getattr(layer, name))
        weight = getattr(layer, "weight", None)
        return None if weight is None else int(weight.shape[0])
