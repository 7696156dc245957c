"""The order of the rooms: a module imports only what stands above it. A new module takes its place here in the commit that adds it."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = [
    "modules",
    "modules.errors",
    "modules.log",
    "modules.paths",
    "modules.system",
    "start",
    "modules.options",
    "modules.settings",
    "modules.samplers",
    "modules.sessions",
    "modules.conversation",
    "modules.store.words",
    "modules.store.schema",
    "modules.store.database",
    "modules.store.rows",
    "modules.store.lists",
    "modules.store.trash",
    "modules.store.responses",
    "modules.store",
    "modules.library",
    "modules.presets",
    "modules.characters",
    "modules.prompts",
    "modules.sandbox",
    "modules.streams",
    "modules.tool_calls.json_text",
    "modules.tool_calls.reader",
    "modules.tool_calls.objects",
    "modules.tool_calls.parameters",
    "modules.tool_calls.literals",
    "modules.tool_calls.deepseek",
    "modules.tool_calls.kimi",
    "modules.tool_calls.gpt_oss",
    "modules.tool_calls.gemma",
    "modules.tool_calls.minimax",
    "modules.tool_calls.glm",
    "modules.tool_calls.qwen_coder",
    "modules.tool_calls.hermes",
    "modules.tool_calls.mistral",
    "modules.tool_calls.llama",
    "modules.tool_calls.pythonic",
    "modules.tool_calls.generic",
    "modules.tool_calls.schema",
    "modules.tool_calls",
    "modules.markers",
    "modules.templates",
    "modules.prompting",
    "modules.instruction_templates",
    "modules.gguf",
    "modules.safetensors_header",
    "modules.model_card.card",
    "modules.model_card.gguf_file",
    "modules.model_card.hf_folder",
    "modules.model_card",
    "modules.inspect_model",
    "modules.devices",
    "modules.hashes",
    "modules.convert",
    "modules.convert.output",
    "modules.convert.architectures",
    "modules.convert.sources",
    "modules.convert.vocabulary",
    "modules.convert.hf_to_gguf",
    "modules.convert.gguf_model",
    "modules.convert.gguf_to_hf",
    "modules.convert.lora_to_gguf",
    "modules.convert.__main__",
    "modules.conversions",
    "modules.connections",
    "modules.downloads.files",
    "modules.downloads.hub",
    "modules.downloads.job",
    "modules.downloads",
    "modules.backends",
    "modules.backends.base",
    "modules.backends.shared_options",
    "modules.explain",
    "modules.backends.echo",
    "modules.backends.llama_cpp.protocol",
    "modules.backends.llama_cpp.samplers",
    "modules.backends.llama_cpp.options",
    "modules.backends.llama_cpp.shape",
    "modules.backends.llama_cpp.memory",
    "modules.backends.llama_cpp.connection",
    "modules.backends.llama_cpp.client",
    "modules.backends.llama_cpp",
    "modules.backends.llama_cpp.threads",
    "modules.backends.llama_cpp.cache",
    "modules.backends.llama_cpp.scheduler",
    "modules.backends.llama_cpp.chain",
    "modules.backends.llama_cpp.vision",
    "modules.backends.llama_cpp.model",
    "modules.backends.llama_cpp.json_schema",
    "modules.backends.llama_cpp.speculation",
    "modules.backends.llama_cpp.jobs",
    "modules.backends.llama_cpp.engine",
    "modules.backends.torch_samplers",
    "modules.backends.transformers.options",
    "modules.backends.transformers.memory",
    "modules.backends.transformers.progress",
    "modules.backends.transformers.gguf_source",
    "modules.backends.transformers.load",
    "modules.backends.transformers.decoders",
    "modules.backends.transformers.kept",
    "modules.backends.transformers.text",
    "modules.backends.transformers.grammar",
    "modules.backends.transformers.jobs",
    "modules.backends.transformers.speculation",
    "modules.backends.transformers.adapters",
    "modules.backends.transformers.vision",
    "modules.backends.transformers.engine",
    "modules.backends.transformers.backend",
    "modules.backends.transformers",
    "modules.backends.openai_server.options",
    "modules.backends.openai_server.payload",
    "modules.backends.openai_server.wire",
    "modules.backends.openai_server.probe",
    "modules.backends.openai_server.client",
    "modules.backends.openai_server",
    "modules.memory",
    "modules.loaders",
    "modules.places",
    "modules.model_settings",
    "modules.choices",
    "modules.turn_lock",
    "modules.models",
    "modules.metrics",
    "modules.auth",
    "modules.guard",
    "modules.listening",
    "modules.replies",
    "modules.transfer",
    "modules.old_data",
    "modules.ahead",
    "modules.app",
    "modules.adapters",
    "modules.launch",
    "modules.docs",
    "modules.text_generation",
    "modules.turns",
    "modules.revisit",
    "modules.archive",
    "modules.titles",
    "modules.chat",
    "modules.api",
    "modules.api.errors",
    "modules.api.limits",
    "modules.api.schemas",
    "modules.api.json_schema",
    "modules.api.requests",
    "modules.api.running",
    "modules.api.keys",
    "modules.api.openai",
    "modules.api.management",
    "modules.api.anthropic",
    "modules.api.responses",
    "modules.api.server",
    "modules.ui",
    "modules.ui.i18n",
    "modules.ui.formulas",
    "modules.ui.markdown",
    "modules.ui.render",
    "modules.ui.views",
    "modules.ui.branches",
    "modules.ui.events",
    "modules.ui.login",
    "modules.ui.library_routes",
    "modules.ui.download_routes",
    "modules.ui.model_routes",
    "modules.ui.routes",
    "modules.ui.controls",
    "modules.ui.chat_tab",
    "modules.ui.parameters_tab",
    "modules.ui.model_tab",
    "modules.ui.gradio_api",
    "modules.ui.page",
    "modules.ui.serve",
    "server",
]

ENGINE_PROCESS = ("json_schema", "chain", "vision", "model", "speculation", "jobs", "engine")
"""Of modules.backends.llama_cpp: what runs in the engine's own process, where a native crash is not the server's."""

ONLY_UNDER = {
    "gradio": ("modules.ui",),
    "fastapi": ("modules.api", "modules.ui"),
    "starlette": ("modules.api", "modules.ui"),
    "uvicorn": ("modules.api", "modules.ui"),
    "llama_cpp": tuple(f"modules.backends.llama_cpp.{name}" for name in ENGINE_PROCESS),
    "torch": ("modules.backends", "modules.convert", "modules.training"),
    "transformers": ("modules.backends", "modules.convert", "modules.training"),
}
NEVER_AT_TOP = {"torch", "transformers"}
WITH_TORCH = {f"modules.backends.transformers.{name}" for name in ("decoders", "grammar", "jobs", "engine", "backend")}
"""Imported by no module's top level but each other's, and by a loader when it loads: torch may stand at their top."""
WITH_TORCH |= {"modules.backends.torch_samplers", "modules.backends.transformers.gguf_source", "modules.convert.gguf_model"}
"""Those last for their type hints only, under TYPE_CHECKING."""
STANDARD_LIBRARY_ONLY = {"start", "modules.errors", "modules.log", "modules.paths", "modules.system"}
READER_PROCESS = {"modules.gguf", "modules.safetensors_header", "modules.inspect_model", "modules.model_card"}
"""Starts for each file, and without the installed packages."""
STANDARD_LIBRARY_ONLY |= READER_PROCESS | {f"modules.model_card.{name}" for name in ("card", "gguf_file", "hf_folder")}


def imports(source: str, names: set[str]) -> Iterator[tuple[str, int, bool]]:
    """What is imported anywhere in `source`: (module, line, at the top level). `names` tells modules from what is in them."""
    tree = ast.parse(source)
    inside = {id(node) for top in ast.walk(tree) if isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(top)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found = ["." * node.level + (node.module or "")]
        elif isinstance(node, ast.ImportFrom):
            found = [full if (full := f"{node.module}.{alias.name}") in names else str(node.module) for alias in node.names]
        else:
            continue
        for name in found:
            yield name, node.lineno, id(node) not in inside


def faults(module: str, source: str, order: list[str] = ORDER) -> list[str]:
    """What `module` with this `source` imports and may not."""
    if module not in order:
        return [f"{module} has no place in the order"]
    above = set(order[: order.index(module)])
    found = []
    for name, line, top in imports(source, set(order)):
        package = name.split(".")[0]
        where = f"{module} line {line}: "
        if name.startswith("."):
            found.append(f"{where}{name} is relative; write the full name")
        elif package in {"modules", "server", "start"}:
            if name not in above:
                found.append(f"{where}{name} does not stand above it")
        elif module in STANDARD_LIBRARY_ONLY and package not in sys.stdlib_module_names:
            found.append(f"{where}{package} is not in the standard library")
        elif package in ONLY_UNDER and not any(module == place or module.startswith(place + ".") for place in ONLY_UNDER[package]):
            found.append(f"{where}{package} belongs under {', '.join(ONLY_UNDER[package])}")
        elif package in NEVER_AT_TOP and top and module not in WITH_TORCH:
            found.append(f"{where}{package} is imported at the top level")
    return found


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(file): file for file in [ROOT / "server.py", ROOT / "start.py", *sorted((ROOT / "modules").rglob("*.py"))]}


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_what_stands_above_it(module):
    assert faults(module, FILES[module].read_text("utf-8")) == []


def test_the_order_names_no_module_that_is_gone():
    assert [name for name in ORDER if name not in FILES] == []
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("modules.models", "from modules.chat import reply", "modules.chat does not stand above it"),
        ("modules.models", "from modules import app", "modules.app does not stand above it"),
        ("modules.models", "import modules.ui.page", "modules.ui.page does not stand above it"),
        ("modules.models", "from modules import models", "modules.models does not stand above it"),
        ("modules.models", "def f():\n    from modules.replies import Ring", "line 2: modules.replies does not stand above it"),
        ("modules.models", "if TYPE_CHECKING:\n    from modules.app import App", "modules.app does not stand above it"),
        ("modules.models", "import server", "server does not stand above it"),
        ("modules.models", "from modules.news import x", "modules.news does not stand above it"),
        ("modules.models", "from . import app", "relative"),
        ("modules.news", "", "has no place in the order"),
        ("modules.app", "import gradio as gr", "gradio belongs under modules.ui"),
        ("modules.chat", "async def f():\n    import gradio", "gradio belongs under modules.ui"),
        ("modules.auth", "from fastapi import Request", "fastapi belongs under"),
        ("modules.auth", "from starlette.requests import Request", "starlette belongs under"),
        ("modules.backends.llama_cpp.client", "import llama_cpp", "llama_cpp belongs under"),
        ("modules.backends.llama_cpp", "import llama_cpp.llama_cpp as lib", "llama_cpp belongs under"),
        ("modules.backends.echo", "import torch", "torch is imported at the top level"),
        ("modules.backends.echo", "class A:\n    from transformers import x", "transformers is imported at the top level"),
        ("modules.samplers", "def f():\n    import torch.nn", "torch belongs under"),
        ("start", "import yaml", "yaml is not in the standard library"),
        ("start", "from modules.settings import load", "modules.settings does not stand above it"),
        ("modules.system", "def f():\n    import psutil", "psutil is not in the standard library"),
    ],
)
def test_the_check_itself_finds_what_is_forbidden(module, source, fault):
    assert [fault in found for found in faults(module, source)] == [True]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("modules.models", "from modules import loaders\nfrom modules.errors import Busy\nimport threading"),
        ("modules.ui.page", "import gradio as gr\nfrom modules.ui import chat_tab\nfrom modules.ui.controls import host"),
        ("modules.ui.routes", "from fastapi import Request\nfrom modules.ui import ASSETS"),
        ("modules.backends.llama_cpp.model", "import llama_cpp.llama_cpp as lib"),
        ("modules.backends.echo", "def load():\n    import torch"),
        ("start", "import json\nfrom modules import system"),
        ("modules.options", "import pydantic"),
    ],
)
def test_the_check_allows_what_is_allowed(module, source):
    assert faults(module, source) == []


def python(code: str, **options) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code, "--nonsense"], capture_output=True, text=True, timeout=120, env=environment, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_app_loads_neither_torch_nor_an_engine_nor_gradio():
    code = "import sys, modules.app; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(ast.literal_eval(python(code)))
    assert "modules" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "llama_cpp", "gradio", "fastapi", "starlette", "uvicorn", "numpy", "huggingface_hub"})


WATCH = """
import logging, os, sys, threading
did = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        did.append(f"{event} {arguments[0]}")
    elif event.split(".")[0] in ("subprocess", "socket") or event in ("os.mkdir", "os.remove", "os.rename", "os.putenv", "os.unsetenv", "os.chdir"):
        did.append(event)
before = dict(os.environ), list(sys.argv), threading.active_count(), list(logging.getLogger().handlers)
import importlib
import numpy, pydantic, yaml, jinja2  # what these do when they are imported is theirs
try:
    import cryptography, starlette
except ImportError:
    pass
sys.addaudithook(watch)
for name in NAMES:
    importlib.import_module(name)
after = dict(os.environ), list(sys.argv), threading.active_count(), list(logging.getLogger().handlers)
print([] if before == after else "the process changed", did)
"""


def test_importing_does_nothing(tmp_path):
    """No argv, no environment, no file, no thread, no socket."""
    plain = [
        n for n in FILES if not n.startswith("modules.ui.") and n != "server" and n.rpartition(".")[2] not in ENGINE_PROCESS and n not in WITH_TORCH
    ]
    assert python(f"NAMES = {plain!r}\n{WATCH}", cwd=tmp_path) == "[] []"
    assert list(tmp_path.iterdir()) == []
