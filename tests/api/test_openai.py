"""OpenAI's routes, driven by OpenAI's own client with its strict validation."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from modules.backends.base import Chunk
from modules.errors import Busy, EngineDied
from tests.api.conftest import served
from tests.fakes import WAIT, FakeBackend, until

HELLO = [{"role": "user", "content": "Hello"}]


def client_of(api, key="none", strict=True):
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0, timeout=WAIT, _strict_response_validation=strict)


def test_a_whole_answer(api):
    answer = client_of(api).chat.completions.create(model="model.fake", messages=HELLO, max_tokens=7, temperature=0.5)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason, answer.model) == ("assistant", "Hello world", "stop", "model.fake")
    assert answer.usage.completion_tokens == 2 and answer.usage.total_tokens == answer.usage.prompt_tokens + 2
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    request = api.backend.requests[-1]
    assert (request.max_new_tokens, request.sampling.temperature) == (7, 0.5)


def test_a_stream(api):
    stream = client_of(api).chat.completions.create(model="model.fake", messages=HELLO, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert [c.choices[0].delta.role for c in chunks[:1]] == ["assistant"]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello world"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 2
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1


def test_without_include_usage_no_chunk_has_it(api):
    with api.client() as client:
        text = client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True}).text
    assert text.endswith("data: [DONE]\n\n") and '"usage"' not in text


def test_several_answers_have_indices_of_their_own(api):
    stream = list(client_of(api).chat.completions.create(model="", messages=HELLO, n=3, stream=True))
    for index in range(3):
        mine = [c.choices[0] for c in stream if c.choices and c.choices[0].index == index]
        assert "".join(c.delta.content or "" for c in mine) == "Hello world"
        assert [c.finish_reason for c in mine if c.finish_reason] == ["stop"]
    assert len({request.seed for request in api.backend.requests}) == 3
    assert [c.index for c in client_of(api).chat.completions.create(model="", messages=HELLO, n=2).choices] == [0, 1]


def test_thinking_is_told_apart(api):
    api.backend.script = ["<think>hm", "</think>", "Yes"]
    message = client_of(api).chat.completions.create(model="", messages=HELLO).choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes", "hm")
    chunks = client_of(api).chat.completions.create(model="", messages=HELLO, stream=True)
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "hm"
    assert "".join(d.content or "" for d in deltas) == "Yes"


def test_a_stop_string_ends_it(api):
    api.backend.script = ["one ", "two ", "three"]
    choice = client_of(api).chat.completions.create(model="", messages=HELLO, stop=["two"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("one ", "stop")
    choice = client_of(api).completions.create(model="", prompt="x", stop="three").choices[0]
    assert (choice.text, choice.finish_reason) == ("one two ", "stop")


def test_completions(api):
    answer = client_of(api).completions.create(model="", prompt=["a", "b"], n=2, echo=True)
    assert [c.text for c in answer.choices] == ["aHello world", "aHello world", "bHello world", "bHello world"]
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert api.backend.requests[0].max_new_tokens == 512
    # OpenAI's own chunks have finish_reason null until the last, which its client's types do not know.
    stream = list(client_of(api, strict=False).completions.create(model="", prompt=[72, 105], stream=True, echo=True))
    assert "".join(c.choices[0].text for c in stream if c.choices) == "HiHello world"
    assert api.backend.requests[-1].prompt == (72, 105)


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({}, 512),
        ({"max_tokens": 7}, 7),
        ({"max_new_tokens": 9}, 9),
        ({"max_tokens": 7, "max_new_tokens": 9}, 7),
        ({"auto_max_new_tokens": True}, None),
    ],
)
def test_how_long_a_completion_may_be(api, fields, length):
    api.post("/v1/completions", {"prompt": "x", **fields})
    assert api.backend.requests[-1].max_new_tokens == length


def test_a_truncation_length_bounds_the_prompt(api):
    error = api.post("/v1/completions", {"prompt": "x" * 30, "truncation_length": 20}, 400)["error"]
    assert error["code"] == "context_length_exceeded" and "raise truncation_length" in error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": HELLO, "temperature": -1}, "temperature"),
        ({"messages": HELLO, "top_logprobs": 3}, "logprobs"),
        ({"messages": HELLO, "functions": [{}]}, "tools"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "video"),
        ({"messages": HELLO, "response_format": {"type": "xml"}}, "response_format"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0]"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HELLO, "logit_bias": {"the": 1}}, "logit_bias"),
        ({"messages": HELLO, "preset": "nowhere"}, "preset"),
        ({"messages": HELLO, "character": "../../etc/passwd"}, "character"),
        ({"messages": HELLO, "continue_": True}, "continue_"),
        ({"messages": HELLO, "stop": ["x"] * 17}, "stop"),
    ],
)
def test_what_cannot_be_followed_is_an_error_in_openais_form(api, body, words):
    with api.client() as client:
        response = client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert 400 <= response.status_code < 500 and words in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and api.backend.requests == []


@pytest.mark.parametrize("content", [b"{", b"[]", b'"x"', b"", b"null"])
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "multipart/form-data"])
def test_a_body_that_is_none_is_refused(api, content, kind):
    with api.client() as client:
        response = client.post("/v1/chat/completions", content=content, headers={"Content-Type": kind})
    assert response.status_code == 400 and set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_what_is_not_followed_is_told_in_a_header(api):
    with api.client() as client:
        response = client.post("/v1/chat/completions", json={"messages": HELLO, "model": "gpt-9", "store": True})
    assert response.status_code == 200
    assert "gpt-9" in response.headers["x-ignored"] and "store is unknown" in response.headers["x-ignored"]
    assert response.json()["model"] == "model.fake"


def test_what_fails_has_its_status(api):
    api.backend.script, api.backend.error = [], Busy("The queue is full.", 3)
    with pytest.raises(openai.InternalServerError) as caught:
        client_of(api).chat.completions.create(model="", messages=HELLO, stream=True)
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "3"
    api.backend.error = EngineDied("It died.")
    with pytest.raises(openai.InternalServerError, match="It died"):
        client_of(api).chat.completions.create(model="", messages=HELLO)
    api.backend.script = ["so far"]
    with pytest.raises(openai.APIError, match="It died"):
        list(client_of(api).chat.completions.create(model="", messages=HELLO, stream=True))
    with api.client() as client:
        api.app.models.unload()
        response = client.post("/v1/chat/completions", json={"messages": HELLO})
    assert response.status_code == 503 and "No model" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(api, stream):
    import threading

    api.backend.gate = threading.Semaphore(1)
    with api.client() as client:
        request = client.build_request("POST", "/v1/chat/completions", json={"messages": HELLO, "stream": stream}, timeout=WAIT if stream else 0.5)
        if stream:
            response = client.send(request, stream=True)
            next(response.iter_lines())
            response.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.send(request)
    until(lambda: api.backend.closed == 1)
    assert api.backend.requests[0].cancel.cancelled


def test_a_client_that_goes_away_before_the_first_word_frees_its_place(api):
    import threading

    api.backend.gate = threading.Semaphore(0)
    with api.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True}, timeout=0.5)
    until(lambda: api.backend.closed == 1)
    assert api.backend.requests[0].cancel.cancelled


def test_a_stream_begins_while_the_prompt_is_being_read(api, monkeypatch):
    import threading

    read, write = threading.Event(), api.backend.generate

    def generate(request):
        yield Chunk(prompt_tokens=1000, prefill_done=10)
        assert read.wait(WAIT)
        yield from write(request)

    monkeypatch.setattr(api.backend, "generate", generate)
    with api.client() as client, client.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "stream": True}) as response:
        assert response.status_code == 200  # its headers have come before its first word
        read.set()
        assert "Hello" in response.read().decode()


def test_too_long_a_prompt(api):
    with pytest.raises(openai.BadRequestError) as caught:
        client_of(api).chat.completions.create(model="", messages=[{"role": "user", "content": "x" * 5000}])
    assert caught.value.code == "context_length_exceeded"


def test_models(api):
    client = client_of(api)
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"model.fake", "other.fake"}
    assert models["model.fake"].context_length == 2048 and models["model.fake"].loaded and not models["other.fake"].loaded
    assert client.models.retrieve("other.fake").id == "other.fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nowhere")


def test_a_request_loads_the_model_that_it_names_where_that_is_allowed(tmp_path):
    with served(tmp_path, "--load-on-request", "--max-loaded-models", "2") as api:
        client = client_of(api)
        for name in ("other.fake", "model.fake", "gpt-7"):
            answer = client.chat.completions.with_raw_response.create(model=name, messages=HELLO)
            assert answer.parse().model == ("model.fake" if name == "gpt-7" else name)
            assert ("gpt-7" in answer.headers.get("X-Ignored", "")) == (name == "gpt-7")
        assert [model.loaded for model in client.models.list()] == [True, True]
        assert [len(backend.requests) for backend in api.engine.loaded] == [2, 1]
        assert api.app.models.status().name == "model.fake"
        told = client_of(api, strict=False).completions.create(model="other.fake", prompt="x", stream=True)
        assert {chunk.model for chunk in told} == {"other.fake"}


def test_without_leave_the_loaded_model_answers_and_says_so(api):
    answer = client_of(api).chat.completions.with_raw_response.create(model="other.fake", messages=HELLO)
    assert answer.parse().model == "model.fake" and "other.fake" in answer.headers["X-Ignored"]


def test_what_is_not_offered_says_so(api):
    with pytest.raises(openai.APIStatusError) as caught:
        client_of(api).images.generate(prompt="a cat", model="x")
    assert caught.value.status_code == 501 and "image" in str(caught.value)


# --- tools ------------------------------------------------------------------------------------------------------------------------------

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}}
SAID = ['Look. <tool_call>\n{"name": "weather", "argum', 'ents": {"town": "Oslo"}}\n</tool_call>']


def grammatical():
    return FakeBackend(features=frozenset({"grammar", "parallel"}))


def test_a_tool_is_called(api):
    api.backend.script = SAID
    choice = client_of(api).chat.completions.create(model="", messages=HELLO, tools=[WEATHER]).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "weather" and call.function.arguments == '{"town": "Oslo"}'
    assert call.id.startswith("call_") and choice.message.content.strip() == "Look."
    chunks = list(client_of(api).chat.completions.create(model="", messages=HELLO, tools=[WEATHER], stream=True))
    (delta,) = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices and c.choices[0].delta.tool_calls]
    assert (delta.index, delta.function.name, delta.function.arguments) == (0, "weather", '{"town": "Oslo"}') and delta.id
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_result_reaches_the_prompt(api):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_1", "content": "snow"}]
    client_of(api).chat.completions.create(model="", messages=messages, tools=[WEATHER])
    prompt = api.backend.decode(api.backend.requests[-1].prompt)
    assert "Oslo" in prompt and "snow" in prompt and "weather" in prompt


def test_a_required_call_is_enforced(tmp_path):
    with served(tmp_path, make=grammatical) as api:
        api.backend.script = ['[{"name": "weather", "arg', 'uments": {"town": "Oslo"}}]']
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            if choice != "required":
                api.backend.script = ['{"name": "weather", "arguments": {"town": "Oslo"}}']
            answer = client_of(api).chat.completions.create(model="", messages=HELLO, tools=[WEATHER], tool_choice=choice)
            assert api.backend.requests[-1].json_schema
            assert answer.choices[0].message.tool_calls[0].function.name == "weather" and answer.choices[0].finish_reason == "tool_calls"
            assert answer.choices[0].message.content is None


def test_without_grammars_what_must_be_enforced_is_refused(api):
    with pytest.raises(openai.BadRequestError, match="grammar"):
        client_of(api).chat.completions.create(model="", messages=HELLO, tools=[WEATHER], tool_choice="required")
    with pytest.raises(openai.BadRequestError, match="grammar"):
        client_of(api).chat.completions.create(model="", messages=HELLO, response_format={"type": "json_object"})


def test_a_schema_outside_the_subset_names_its_keyword(tmp_path):
    with served(tmp_path, make=grammatical) as api:
        schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "x+"}}}
        with pytest.raises(openai.BadRequestError, match="pattern"):
            client_of(api).chat.completions.create(
                model="", messages=HELLO, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            )


# --- the real engine --------------------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_the_real_engine(real_api):
    client = client_of(real_api)
    said = {"model": "", "messages": HELLO, "max_tokens": 12, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**said, logprobs=True, top_logprobs=2)
    streamed = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**said, stream=True) if c.choices)
    assert whole.choices[0].message.content == streamed != ""
    entries = whole.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries).startswith(streamed) and all(len(entry.top_logprobs) == 2 for entry in entries)
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"


@pytest.mark.engine
def test_parallel_requests_keep_their_own_text_usage_and_probabilities(real_api):
    client = client_of(real_api)

    def ask(number):
        said = [{"role": "user", "content": f"Tell a story about {'a fox and ' * number}a hen."}]
        answer = client.chat.completions.create(
            model="", messages=said, max_tokens=6 + number, seed=number, logprobs=True, top_logprobs=number, extra_body={"ban_eos_token": True}
        )
        choice = answer.choices[0]
        assert choice.message.content and "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
        assert {len(entry.top_logprobs) for entry in choice.logprobs.content} == {number}
        return answer.usage.completion_tokens, answer.usage.prompt_tokens

    with ThreadPoolExecutor(4) as pool:
        usage = list(pool.map(ask, range(1, 9)))
    assert [completion for completion, _ in usage] == [6 + number for number in range(1, 9)]
    steps = {after - before for (_, before), (_, after) in itertools.pairwise(usage)}
    assert len(steps) == 1 and steps.pop() > 0  # each prompt is longer than the one before by the same words


@pytest.mark.engine
def test_prompt_logprobs(real_api):
    # Nothing stands before the first token: null, as OpenAI answers it, and as its client's types do not know.
    answer = client_of(real_api, strict=False).completions.create(model="", prompt="The cat sat on the mat", max_tokens=0, echo=True, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "The cat sat on the mat" == "".join(logprobs.tokens)
    assert logprobs.token_logprobs[0] is None and all(value < 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])


@pytest.mark.engine
def test_json_is_enforced(real_api):
    import json

    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}}, "required": ["name", "age"]}
    answer = client_of(real_api).chat.completions.create(
        model="",
        messages=[{"role": "user", "content": "Make up a person."}],
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"name", "age"}
