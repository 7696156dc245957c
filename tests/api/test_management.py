"""Health, metrics, tokens, probabilities, prompts, stopping, models, adapters, ranking."""

import math
import threading
from dataclasses import replace

import pytest

from modules import loaders
from modules.backends.base import Chunk, Embeddings, TokenLogprob
from modules.errors import Busy, ModelError
from tests.api.conftest import served
from tests.fakes import WAIT, FakeBackend, until

HELLO = [{"role": "user", "content": "Hello"}]
BEARER = {"Authorization": "Bearer secret"}


class Able(FakeBackend):
    """One with probabilities, embeddings (of how often a, b and c stand in the text) and LoRA adapters (any file but "bad.gguf")."""

    def __init__(self):
        super().__init__(features=frozenset({"parallel", "logprobs", "embeddings", "adapters"}))
        self.adapters, self.busy = (), False

    def generate(self, request):
        if request.logprobs and request.max_new_tokens == 1:
            self.requests.append(request)
            top = tuple((10 + n, "dup" if n < 2 else f"t{n}", math.log(0.5 ** (n + 1))) for n in range(request.logprobs))
            yield Chunk("dup", (10,), logprobs=(TokenLogprob(*top[0], top),), completion_tokens=1)
            yield Chunk(finish_reason="length", prompt_tokens=len(request.prompt), completion_tokens=1)
        else:
            yield from super().generate(request)

    def embed(self, texts, cancel):
        return Embeddings(tuple(tuple(float(text.count(letter)) for letter in "abc") for text in texts), sum(map(len, texts)))

    def load_adapter(self, path):
        if path.name == "bad.gguf":
            raise ModelError("bad.gguf does not fit this model.")
        self.adapters = (*(each for each in self.adapters if each != path.resolve()), path.resolve())

    def unload_adapter(self, path):
        if self.busy:
            raise Busy("in use")
        self.adapters = tuple(each for each in self.adapters if each != path.resolve())


@pytest.fixture
def able(tmp_path):
    with served(tmp_path, make=Able) as made:
        for name in ("one.gguf", "bad.gguf", "deep/two.gguf"):
            path = made.app.data.loras / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """For tests that change nothing."""
    with served(tmp_path_factory.mktemp("shared"), make=Able) as made:
        yield made


def test_health_and_metrics(shared):
    for path in ("/health", "/v1/health", "/v1/internal/health"):
        assert shared.get(path) == {"status": "ok"}
    with shared.client() as client:
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain") and 'tgw_model_info{loader="fake",model="model.fake"}' in response.text
        assert client.get("/metrics", headers={"Accept": "application/openmetrics-text"}).text.endswith("# EOF\n")


# --- tokens -----------------------------------------------------------------------------------------------------------------------------


def test_tokens_there_and_back(shared):
    assert shared.post("/v1/internal/encode", {"text": "Hi"}) == {"tokens": [72, 105], "length": 2}
    assert shared.post("/v1/internal/decode", {"tokens": [72, 105]}) == {"text": "Hi"}
    assert shared.post("/v1/internal/token-count", {"text": "Hi!"}) == {"length": 3}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("encode", {}),
        ("encode", {"text": 5}),
        ("decode", {"tokens": "Hi"}),
        ("decode", {"tokens": [-1]}),
        ("decode", {"tokens": [2**31]}),
        ("token-count", []),
    ],
)
def test_what_is_no_text_and_no_token_is_refused(shared, path, body):
    assert shared.post(f"/v1/internal/{path}", body, 400)["error"]["type"] == "invalid_request_error"


def test_an_unknown_field_is_told(shared):
    with shared.client() as client:
        assert client.post("/v1/internal/encode", json={"text": "a", "colour": 1}).headers["x-ignored"] == "colour is unknown"


def test_the_likeliest_next_tokens(shared):
    found = shared.post("/v1/internal/logits", {"prompt": "The", "top_logits": 3})
    assert found["tokens"] == [
        {"id": 10, "text": "dup", "probability": pytest.approx(0.5)},
        {"id": 11, "text": "dup", "probability": pytest.approx(0.25)},
        {"id": 12, "text": "t2", "probability": pytest.approx(0.125)},
    ]
    assert found["logits"] == {"dup": pytest.approx(0.5), "t2": pytest.approx(0.125)}
    request = shared.backend.requests[-1]
    assert (request.max_new_tokens, request.logprobs, request.sampling.temperature) == (1, 3, 0)
    assert len(shared.post("/v1/internal/logits", {"prompt": "The"})["tokens"]) == 50


def test_probabilities_after_samplers_are_refused_with_the_reason(shared):
    error = shared.post("/v1/internal/logits", {"prompt": "The", "use_samplers": True}, 400)["error"]
    assert error["param"] == "use_samplers" and "before samplers" in error["message"]
    with shared.client() as client:
        assert "temperature has no effect" in client.post("/v1/internal/logits", json={"prompt": "The", "temperature": 2}).headers["x-ignored"]


def test_an_engine_without_probabilities_says_so(api):
    assert "logprobs" in api.post("/v1/internal/logits", {"prompt": "The"}, 400)["error"]["message"]


def test_the_prompt_of_a_chat(shared):
    before = len(shared.backend.requests)
    found = shared.post("/v1/internal/chat-prompt", {"messages": HELLO})
    assert found["prompt"].startswith("<|im_start|>user\nHello") and found["length"] == len(found["prompt"])
    assert shared.post("/v1/internal/chat-prompt", {"messages": [{"role": "user", "content": "x" * 5000}]})["length"] > 5000  # too long, and told
    assert len(shared.backend.requests) == before  # nothing is generated


# --- stopping ---------------------------------------------------------------------------------------------------------------------------


class Stream:
    """A streamed reply whose first chunk has come; `end()` is the rest."""

    def __init__(self, client, path="chat/completions", **fields):
        request = client.build_request("POST", f"/v1/{path}", json={"messages": HELLO, "stream": True, **fields})
        self.response = client.send(request, stream=True)
        self.lines = (line[6:] for line in self.response.iter_lines() if line.startswith("data: "))
        self.first = next(self.lines)

    @property
    def id(self):
        return self.first.partition('"id":"')[2].partition('"')[0]

    def end(self):
        return "".join(self.lines)


class Holding(FakeBackend):
    """Every reply says its first piece, and waits for the gate before the next."""

    def __init__(self):
        super().__init__(features=frozenset({"parallel"}))
        self.gate, self._begun = threading.Semaphore(0), []

    def _wait(self, request):
        if request.cancel in self._begun:
            return super()._wait(request)
        self._begun.append(request.cancel)


def test_a_reply_is_stopped_by_its_id(tmp_path):
    with served(tmp_path, make=Holding) as api, api.client() as client:
        one, other = Stream(client), Stream(client)
        assert api.post("/v1/internal/stop-generation", {"id": one.id}) == {"status": "ok", "stopped": 1}
        assert '"finish_reason":"stop"' in one.end()
        api.backend.gate.release()
        assert "world" in other.end()
        assert api.post("/v1/internal/stop-generation", {"id": one.id})["stopped"] == 0
        for path, fields in [("completions", {"prompt": "x"}), ("messages", {"max_tokens": 9}), ("responses", {"input": "x"})]:
            reply = Stream(client, path, **fields)
            assert api.post("/v1/internal/stop-generation", {"id": reply.id})["stopped"] == 1, path
            assert reply.end()
        assert api.app.stops.stop() == 0


def test_without_an_id_a_client_stops_its_own_and_the_admin_all(tmp_path):
    flags = ("--api-key", "secret", "--admin-key", "master")
    with served(tmp_path, *flags, make=Holding) as api, api.client(**BEARER) as mine, api.client(Authorization="Bearer master") as other:
        one, two = Stream(mine, n=2), Stream(other)
        assert mine.post("/v1/internal/stop-generation").json() == {"status": "ok", "stopped": 2}
        one.end()
        until(lambda: api.backend.at_once == 1)
        again = Stream(mine)
        assert api.post("/v1/internal/stop-generation", {}, Authorization="Bearer master")["stopped"] == 2
        assert again.end() and two.end()


def test_with_one_key_for_everything_nobody_stops_others(tmp_path):
    with served(tmp_path, "--api-key", "secret", make=Holding) as api, api.client(**BEARER) as client:
        stream = Stream(client)
        with api.app.stops.kept("other", "somebody else", [token := threading.Event()]):
            assert api.post("/v1/internal/stop-generation", {}, **BEARER)["stopped"] == 1
        assert not token.is_set() and stream.end()


# --- models -----------------------------------------------------------------------------------------------------------------------------


def test_the_model_is_told(able):
    info = able.get("/v1/internal/model/info")
    assert (info["model_name"], info["loader"], info["context_length"], info["state"]) == ("model.fake", "fake", 2048, "ready")
    assert info["capabilities"] == ["adapters", "embeddings", "logprobs", "parallel"] and "temperature" in info["samplers"]
    assert able.get("/v1/internal/model/list") == {"model_names": ["model.fake", "other.fake"]}
    assert able.post("/v1/internal/model/unload", {}) == {"status": "ok"}
    assert able.get("/v1/internal/model/info")["model_name"] is None
    assert able.post("/v1/internal/encode", {"text": "a"}, 503)["error"]["code"] == "no_model"


def test_a_model_is_loaded_with_its_options(api):
    seen = []
    load = api.engine.loader.load

    def watched(path, options, progress, cancel):
        seen.append((path.name, options.fake_size))
        return load(path, options, progress, cancel)

    loaders.LOADERS = (replace(api.engine.loader, load=watched),)
    answer = api.post("/v1/internal/model/load", {"model_name": "other.fake", "args": {"fake-size": 7}})
    assert (answer["status"], answer["model_name"]) == ("ok", "other.fake") and seen == [("other.fake", 7)]
    assert api.post("/v1/internal/model/load", {"model_name": "model.fake", "loader": "Fake"})["model_name"] == "model.fake"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "model_name"),
        ({"model_name": "nowhere.fake"}, 404, "nowhere.fake"),
        ({"model_name": "../model.fake"}, 400, "model name"),
        ({"model_name": "/etc/passwd"}, 400, "model name"),
        ({"model_name": "other.fake", "loader": "magic"}, 400, "magic"),
        ({"model_name": "other.fake", "args": {"fake_sise": 1}}, 400, "Did you mean 'fake_size'"),
        ({"model_name": "other.fake", "args": {"trust_remote_code": True}}, 400, "trust_remote_code"),
        ({"model_name": "other.fake", "args": {"ctx_size": 1}}, 400, "ctx_size"),  # of another loader
        ({"model_name": "other.fake", "args": {"fake_size": 11}}, 400, "fake_size"),
        ({"model_name": "other.fake", "args": []}, 400, "args"),
        ({"model_name": "openai:x", "args": {"server_url": "http://127.0.0.1:1"}}, 400, "server_url"),
    ],
)
def test_what_cannot_be_loaded_leaves_the_model_in_place(shared, body, status, words):
    assert words in shared.post("/v1/internal/model/load", body, status)["error"]["message"]
    assert len(shared.engine.loaded) == 1 and shared.get("/v1/internal/model/info")["model_name"] == "model.fake"


def test_a_load_that_fails_is_told(api):
    api.engine.errors["other.fake"] = ModelError("The file is broken. Fetch it again.")
    assert "broken" in api.post("/v1/internal/model/load", {"model_name": "other.fake"}, 400)["error"]["message"]
    assert api.get("/v1/internal/model/info")["model_name"] == "model.fake"


def test_a_load_goes_on_without_its_client_and_holds_nobody_up(api):
    api.engine.go.clear()
    with api.client() as client:
        client.timeout = 0.5
        with pytest.raises(Exception, match="timed out"):
            client.post("/v1/internal/model/load", json={"model_name": "other.fake"})
    assert api.get("/health") == {"status": "ok"} and api.get("/v1/internal/model/info")["state"] == "loading"
    assert api.post("/v1/internal/model/load", {"model_name": "model.fake"}, 503)["error"]["code"] == "busy"
    api.engine.go.set()
    until(lambda: api.get("/v1/internal/model/info")["model_name"] == "other.fake", WAIT)


CHANGES = [("model/load", {"model_name": "other.fake"}), ("model/unload", {}), ("lora/load", {"lora_names": []}), ("lora/unload", {})]


def test_in_multi_user_mode_nobody_loads_without_the_admin_key(tmp_path):
    for flags, key in [((), ""), (("--api-key", "secret"), "secret")]:
        with served(tmp_path / (key or "open"), "--multi-user", *flags) as api:
            for path, body in CHANGES:
                error = api.post(f"/v1/internal/{path}", body, 403, **{"x-api-key": key})["error"]
                assert error["code"] == "access_denied" and "--admin-key" in error["message"]
            assert len(api.engine.loaded) == 1 and not api.backend.unloaded
    with served(tmp_path / "admin", "--multi-user", "--api-key", "secret", "--admin-key", "master") as api:
        for path, body in CHANGES:
            api.post(f"/v1/internal/{path}", body, 401, **BEARER)
        assert api.post("/v1/internal/model/load", CHANGES[0][1], Authorization="Bearer master")["model_name"] == "other.fake"


# --- adapters ---------------------------------------------------------------------------------------------------------------------------


def test_adapters_are_used_from_then_on(able):
    assert able.get("/v1/internal/lora/list") == {"lora_names": ["bad.gguf", "deep/two.gguf", "one.gguf"]}
    body = {"lora_names": ["one.gguf", "deep/two.gguf"], "lora_scales": [0.5, 1]}
    assert able.post("/v1/internal/lora/load", body) == {"status": "ok", "lora_names": ["one.gguf", "deep/two.gguf"]}
    assert able.get("/v1/internal/model/info")["lora_names"] == ["one.gguf", "deep/two.gguf"]
    able.post("/v1/chat/completions", {"messages": HELLO})
    assert [(each.path.name, each.scale) for each in able.backend.requests[-1].adapters] == [("one.gguf", 0.5), ("two.gguf", 1.0)]
    assert able.post("/v1/internal/lora/load", {"lora_names": ["one.gguf"]})["lora_names"] == ["one.gguf"]
    assert [path.name for path in able.backend.adapters] == ["one.gguf"]
    able.backend.busy = True  # a reply uses it: it stays in memory, and is not asked for any more
    assert able.post("/v1/internal/lora/unload", {}) == {"status": "ok", "lora_names": []}
    able.post("/v1/chat/completions", {"messages": HELLO})
    assert able.backend.requests[-1].adapters == ()


def test_an_adapter_that_does_not_fit_changes_nothing(able):
    able.post("/v1/internal/lora/load", {"lora_names": ["one.gguf"]})
    assert "does not fit" in able.post("/v1/internal/lora/load", {"lora_names": ["deep/two.gguf", "bad.gguf"]}, 400)["error"]["message"]
    assert [path.name for path in able.backend.adapters] == ["one.gguf"]
    assert able.get("/v1/internal/model/info")["lora_names"] == ["one.gguf"]


@pytest.mark.parametrize(
    ("body", "status"),
    [({}, 400), ({"lora_names": ["../model.fake"]}, 400), ({"lora_names": ["nowhere"]}, 404), ({"lora_names": ["one.gguf"], "lora_scales": []}, 404)],
)
def test_names_of_adapters_are_checked(shared, body, status):
    shared.post("/v1/internal/lora/load", body, status)
    assert shared.app.models.adapters == ()


def test_a_loader_without_adapters_says_so(api):
    (api.app.data.loras / "one.gguf").touch()
    assert "LoRA" in api.post("/v1/internal/lora/load", {"lora_names": ["one.gguf"]}, 400)["error"]["message"]
    assert api.post("/v1/internal/lora/unload", {})["lora_names"] == []


# --- ranking ----------------------------------------------------------------------------------------------------------------------------


def test_documents_are_ranked_by_the_cosine_of_their_vectors(shared):
    body = {"model": "model.fake", "query": "a", "documents": ["b", {"text": "aab"}, "aa", ""]}
    found = shared.post("/v1/rerank", body)
    assert [each["index"] for each in found["results"]] == [2, 1, 0, 3]
    assert [each["relevance_score"] for each in found["results"]] == [1.0, pytest.approx(2 / 5**0.5), 0.0, 0.0]
    assert found["usage"] == {"prompt_tokens": 7, "total_tokens": 7} and found["model"] == "model.fake"
    found = shared.post("/v1/rerank", {**body, "top_n": 1, "return_documents": True})
    assert found["results"] == [{"index": 2, "relevance_score": 1.0, "document": {"text": "aa"}}]


@pytest.mark.parametrize("change", [{"documents": []}, {"documents": [5]}, {"query": None}, {"top_n": 0}])
def test_what_cannot_be_ranked_is_refused(shared, change):
    shared.post("/v1/rerank", {"query": "a", "documents": ["b"], **change}, 400)


def test_a_model_without_embeddings_says_so(api):
    assert "embeddings" in api.post("/v1/rerank", {"query": "a", "documents": ["b"]}, 400)["error"]["message"]
