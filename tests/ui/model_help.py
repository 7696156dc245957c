"""For tests of the Model tab: real model files and llama.cpp's options, an engine that only says that it loads them, and a machine of known size."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from modules import app, auth, loaders, memory, settings
from modules.backends.llama_cpp.options import LlamaCppOptions
from modules.conversions import Conversions
from modules.devices import MAIN, Device
from modules.errors import ModelError
from modules.paths import UserData
from modules.store import Store
from modules.ui.views import BlockPresenter
from tests.backends import tiny_models
from tests.fakes import FakeBackend, FakeEngine

TINY, OTHER, BROKEN = "tiny-9.gguf", "tiny-10.gguf", "broken.gguf"
GPU = "Test GPU"
GIB = 2**30
CONVERTS = """
import json, pathlib, sys, time
print(json.dumps({"progress": 0.25, "text": "Writing"}), flush=True)
target = pathlib.Path(sys.argv[3])
go = target.with_name("go")
while not go.exists():
    time.sleep(0.02)
target.write_bytes(b"GGUF") if target.suffix == ".gguf" else target.mkdir()
print(json.dumps({"done": str(target)}), flush=True)
"""
"""Stands in for `python -m modules.convert`, which takes long: makes something of the target's name once a file "go" lies beside it."""


class AdaptingBackend(FakeBackend):
    """Takes every adapter but one called bad."""

    def __init__(self, **given) -> None:
        super().__init__(features=frozenset({"adapters", "stats"}), **given)
        self.adapters = ()

    def load_adapter(self, path) -> None:
        if path.name == "bad.gguf":
            raise ModelError("bad.gguf does not fit this model. Use one that was trained on it.")
        self.adapters = tuple(dict.fromkeys((*self.adapters, path.resolve())))

    def unload_adapter(self, path) -> None:
        self.adapters = tuple(each for each in self.adapters if each != path.resolve())


class Engine(FakeEngine):
    """Loads .gguf files with llama.cpp's options; `asked` are those of each load."""

    def __init__(self) -> None:
        super().__init__(AdaptingBackend)
        self.asked = []
        self.loader = replace(self.loader, options=LlamaCppOptions, detect=lambda path: path.suffix == ".gguf", load=self._recorded)

    def _recorded(self, path, options, progress, cancel):
        self.asked.append((path.name, options))
        return self._load(path, options, progress, cancel)


@contextmanager
def built(folder, *flags, empty=False):
    """An engine, an App with the models TINY (loaded), OTHER and BROKEN, and who asks it."""
    engine, data = Engine(), UserData(folder)
    data.create()
    if not empty:
        fill(data)
    with mock.patch.object(loaders, "LOADERS", (engine.loader,)):
        configuration = settings.load(flags, (), (), app.option_groups())
        made = app.build(configuration, data, Store.open(data.database), BlockPresenter)
        made = replace(made, conversions=Conversions(command=(sys.executable, "-c", CONVERTS)))
        if not empty:
            made.models.load(made.models.choose(TINY))
        yield engine, made, auth.Auth({}, data.sessions)
        engine.go.set()
        for backend in engine.loaded:
            backend.gate.release(10**6)
        made.close()


def fill(data) -> None:
    """Put models and adapters into the folders."""
    tiny_models.dense(data.models / TINY)
    tiny_models.sliding_window(data.models / OTHER)
    (data.models / BROKEN).write_bytes(b"no model")
    for name in ("one.gguf", "bad.gguf"):
        (data.loras / name).touch()


def machine(free: int = GIB, of_gpu: int = 0, gpu_free: int | None = None):
    """A patch: a machine of 4 GiB with so much free, and a GPU if it has any memory."""
    gpus = (Device(GPU, of_gpu, of_gpu if gpu_free is None else gpu_free),) if of_gpu else ()
    return mock.patch.multiple(memory, devices=lambda: (Device(MAIN, 4 * GIB, free), *gpus), offloads=lambda: bool(of_gpu))
