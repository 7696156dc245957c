"""docs/api.md: its examples run, its tables name what is there."""

import io
import math
import re
import subprocess
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import httpx
import pytest

from modules import app, auth, guard, loaders, settings
from modules.api import json_schema
from modules.api.schemas import ChatRequest, CompletionRequest
from modules.backends import llama_cpp
from modules.backends.base import Chunk, Embeddings, TokenLogprob
from modules.paths import UserData
from modules.samplers import SamplingParams
from modules.store import Store
from modules.ui.serve import build_server
from modules.ui.views import BlockPresenter
from tests.api.conftest import serving
from tests.fakes import FakeBackend, FakeEngine
from tests.ui import live

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKEN = TokenLogprob(5, "Paris", math.log(0.5), ((5, "Paris", math.log(0.5)), (6, "Oslo", math.log(0.25))))


class Scripted(FakeBackend):
    """Says what the examples wait for."""

    def __init__(self):
        super().__init__(features=frozenset({"parallel", "logprobs", "grammar", "embeddings"}))

    def generate(self, request):
        prompt = self.decode(request.prompt)
        if request.logprobs:
            yield Chunk("Paris", (5,), logprobs=(TOKEN,), completion_tokens=1)
            yield Chunk(finish_reason="length", prompt_tokens=len(prompt), completion_tokens=1)
            return
        called = "weather" in prompt and "Snow" not in prompt
        call = '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>'
        self.script = ['{"name": "Ann", ', '"age": 30}'] if request.json_schema else [call] if called else ["Hello", " world"]
        yield from super().generate(request)

    def embed(self, texts, cancel):
        return Embeddings(tuple((float("cat" in text or "pet" in text), 1.0) for text in texts), len(texts))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The addresses of the API, with the examples' keys, and of the page."""
    engine, data = FakeEngine(Scripted), UserData(tmp_path_factory.mktemp("docs"))
    data.create()
    (data.models / MODEL).touch()
    loader = replace(engine.loader, name="llama.cpp", options=llama_cpp.LOADER.options, detect=lambda path: path.suffix == ".gguf")
    with mock.patch.object(loaders, "LOADERS", (loader,)):
        configuration = settings.load(("--api", "--api-key", "my-key", "--admin-key", "my-admin-key"), (), (), app.option_groups())
        built = app.build(configuration, data, Store.open(data.database), BlockPresenter)
        built.models.load(built.models.choose(MODEL))
        page = build_server(built, auth.Auth({}, data.sessions), guard.Hosts.build(False))
        with serving(built) as api, live._serving(page) as url:
            yield SimpleNamespace(api=api, page=url)
        built.close()


def output_of(language, code, both):
    text = code.replace("http://127.0.0.1:5000", both.api).replace("http://127.0.0.1:7860", both.page)
    if language == "bash":
        return subprocess.run(["bash", "-ec", text], capture_output=True, text=True, timeout=60, check=True).stdout
    with redirect_stdout(io.StringIO()) as said:
        exec(compile(text, "docs/api.md", "exec"), {})
    return said.getvalue()


SAYS = [
    ("chat/completions", '"content":"Hello world"'),
    ("v1/completions", "data: [DONE]"),
    ("model/load", '"status":"ok"'),
    ("logits", '"logits":{"Paris":0.5'),
    ("rerank", '"document":{"text":"the cat"}'),
    ("metrics", "tgw_uptime_seconds"),
    ("delta.content", "Hello world"),
    ("json_schema", "Ann 30\n"),
    ("tool_calls", "Hello world\n"),
    ("responses", "Hello world\n2\n"),
    ("anthropic", "Hello world"),
    ("gradio_client", f"{{'models': ['{MODEL}'], 'loaded': '{MODEL}'}}\n"),
]
"""What stands in each example, and what it prints."""


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=[word for word, _ in SAYS])
def test_an_example_runs(number, both):
    word, says = SAYS[number]
    assert word in EXAMPLES[number][1]
    assert says in output_of(*EXAMPLES[number], both)


def section(title):
    return re.search(rf"^## {title}\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)[1]


def test_every_route_is_in_the_table(both):
    listed = re.findall(r"^\| `([A-Z]+) (/\S+)` \| (API|admin|–) \|", section("Routes"), re.MULTILINE)
    paths = httpx.get(f"{both.api}/openapi.json", headers={"x-api-key": "my-key"}).json()["paths"]
    served = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    absent = {("POST", path) for path in re.findall(r"`(/v1/[\w/]+)`", section("Routes").rpartition("Routes of")[2])}
    assert {(method, path) for method, path, _ in listed} | absent == served
    for method, path, key in listed:
        answer = httpx.request(method, both.api + path, json={}, headers={"x-api-key": "my-key"} if key != "–" else {})
        assert (answer.status_code == 401) == (key == "admin"), path
    assert all(httpx.post(both.api + path, headers={"x-api-key": "my-key"}).status_code == 501 for _, path in absent)


def test_every_field_is_in_the_table():
    named = set(re.findall(r"`(\w+)`", section("Fields")))
    fields = (ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()) - SamplingParams.model_fields.keys()
    assert fields - named - {"functions", "function_call"} == set()


def test_the_subset_of_json_schemas_is_told():
    text = section("JSON schemas")
    enforced = text.partition(" are enforced: ")[2].partition(" Titles,")[0]
    assert set(re.findall(r"`([$\w]+)`", enforced)) == json_schema._FOLLOWED | json_schema.TYPES
    assert f"{json_schema.MAX_DEPTH} levels and {json_schema.MAX_PARTS} parts" in text


def test_its_links_lead_somewhere():
    folder = Path(__file__).parents[2] / "docs"
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (folder / link).is_file(), link
