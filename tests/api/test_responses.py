"""OpenAI's Responses, driven by OpenAI's own client with its strict validation."""

import json
from dataclasses import replace
from unittest import mock

import openai
import pytest

from modules.backends.base import Chunk, TokenLogprob
from modules.errors import DataError, EngineDied, NotFound
from modules.store import Store, StoredResponse, responses
from tests.api.conftest import served, serving
from tests.api.test_openai import client_of
from tests.fakes import FakeBackend

WEATHER = {"type": "function", "name": "weather", "strict": False, "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}
CALLED = ['Look. <tool_call>\n{"name": "weather", "argum', 'ents": {"town": "Oslo"}}\n</tool_call>']


def ask(api, input="Hello", **more):
    return client_of(api).responses.create(model="model.fake", input=input, **more)


def prompt_of(api):
    return api.backend.decode(api.backend.requests[-1].prompt)


def grammatical():
    return FakeBackend(features=frozenset({"grammar", "parallel"}))


def test_a_whole_answer(api):
    answer = ask(api, instructions="Be brief.", temperature=0.5, max_output_tokens=20, metadata={"a": "b"}, extra_body={"min_p": 0.2, "seed": 5})
    assert answer.id.startswith("resp_") and (answer.status, answer.model, answer.output_text) == ("completed", "model.fake", "Hello world")
    assert [item.type for item in answer.output] == ["message"] and answer.output[0].status == "completed"
    assert (answer.instructions, answer.temperature, answer.max_output_tokens, answer.metadata) == ("Be brief.", 0.5, 20, {"a": "b"})
    request, usage = api.backend.requests[-1], answer.usage
    assert (request.max_new_tokens, request.sampling.temperature, request.sampling.min_p, request.seed) == (20, 0.5, 0.2, 5)
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (len(request.prompt), 2, len(request.prompt) + 2)
    assert usage.input_tokens_details.cached_tokens == 3 and usage.output_tokens_details.reasoning_tokens == 0
    assert prompt_of(api).index("Be brief.") < prompt_of(api).index("Hello")


def test_the_events_of_a_stream(api):
    api.backend.script = ["<think>hm", "</think>", "Yes", "!"]
    found = list(ask(api, stream=True))
    assert [each.type.removeprefix("response.") for each in found] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert [each.sequence_number for each in found] == list(range(len(found)))
    assert found[0].response.status == "in_progress" and found[0].response.output == []
    assert [each.output_index for each in found if hasattr(each, "output_index")] == [0] * 6 + [1] * 7
    last = found[-1].response
    assert last.output_text == "Yes!" and last.output[0].content[0].text == "hm" and last.usage.output_tokens_details.reasoning_tokens > 0
    assert found[7].item == last.output[0] and found[-2].item == last.output[1]
    assert {each.item_id for each in found if hasattr(each, "item_id")} == {item.id for item in last.output}
    assert client_of(api).responses.retrieve(last.id).output == last.output


def test_an_answer_that_was_cut_off(api):
    def cut(request):
        yield Chunk("Hel", (1,), prompt_tokens=4, completion_tokens=1)
        yield Chunk(finish_reason="length", prompt_tokens=4, completion_tokens=1)

    api.backend.generate = cut
    answer = ask(api, max_output_tokens=1)
    assert (answer.status, answer.incomplete_details.reason, answer.output[0].status) == ("incomplete", "max_output_tokens", "incomplete")
    assert [each.type for each in ask(api, max_output_tokens=1, stream=True)][-2:] == ["response.output_item.done", "response.incomplete"]


def test_an_answer_that_failed(api):
    api.backend.error = EngineDied("It died.")
    found = list(ask(api, stream=True))
    assert found[-1].type == "response.failed" and found[-1].response.error.message == "It died." and found[-1].response.status == "failed"
    assert [each.sequence_number for each in found] == list(range(len(found)))
    with pytest.raises(openai.InternalServerError, match="It died"):
        ask(api)
    api.backend.script = []
    with pytest.raises(openai.InternalServerError, match="It died"):
        ask(api, stream=True)


def test_log_probabilities(tmp_path):
    def make():
        backend = FakeBackend(features=frozenset({"logprobs"}))

        def generate(request):
            backend.requests.append(request)
            yield Chunk("Hi", (1,), completion_tokens=1, logprobs=(TokenLogprob(1, "Hi", -0.5, ((1, "Hi", -0.5), (2, "Ho", -1.5))),))
            yield Chunk(finish_reason="stop", completion_tokens=1)

        backend.generate = generate
        return backend

    with served(tmp_path, make=make) as api:
        (entry,) = ask(api, top_logprobs=2).output[0].content[0].logprobs
        assert (entry.token, entry.logprob, [other.token for other in entry.top_logprobs]) == ("Hi", -0.5, ["Hi", "Ho"])
        (entry,) = ask(api, include=["message.output_text.logprobs"]).output[0].content[0].logprobs
        assert entry.top_logprobs == []
        (delta,) = [each for each in ask(api, top_logprobs=1, stream=True) if each.type == "response.output_text.delta"]
        assert delta.logprobs[0].token == "Hi"


# --- what is kept -----------------------------------------------------------------------------------------------------------------------


def test_a_later_request_goes_on_from_an_earlier_one(api):
    api.backend.script = ["<think>secret</think>", "I am Bob."]
    first = ask(api, "Who are you?", instructions="Be brief.")
    second = ask(api, "And now?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    ask(api, "Finally?", previous_response_id=second.id, instructions="Be long.")
    prompt = prompt_of(api)
    places = [prompt.index(words) for words in ("Be long.", "Who are you?", "I am Bob.", "And now?", "Finally?")]
    assert places == sorted(places) and "Be brief." not in prompt and prompt.count("I am Bob.") == 2


def test_kept_responses_outlive_the_server(api):
    first = ask(api, "Who are you?")
    api.app.store.close()
    reopened = replace(api.app, store=Store.open(api.app.data.database))
    with serving(reopened) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True)
        assert client.responses.retrieve(first.id) == first
        client.responses.create(model="", input="And now?", previous_response_id=first.id)
    reopened.store.close()
    assert "Who are you?" in prompt_of(api)


def test_input_items(api):
    api.backend.script = CALLED
    image = {"type": "input_image", "image_url": "data:image/png;base64,eA=="}
    items = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "snow"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Three"}]},
    ]
    with pytest.raises(openai.BadRequestError, match="image"):
        ask(api, [{"role": "user", "content": [image]}])
    client = client_of(api)
    answer = ask(api, items)
    found = client.responses.input_items.list(answer.id, order="asc", limit=4)
    assert [item.type for item in found.data] == ["message", "message", "reasoning", "function_call"] and found.has_more
    assert found.data[2].id == "rs_1" and found.data[1].content[0].type == "output_text"
    rest = client.responses.input_items.list(answer.id, order="asc", after=found.last_id)
    assert [item.type for item in rest.data] == ["function_call_output", "message"] and not rest.has_more
    assert [item.id for item in client.responses.input_items.list(answer.id)] == [item.id for item in [*found.data, *rest.data]][::-1]
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list(answer.id, after="nowhere")


def test_a_response_can_be_forgotten(api):
    client = client_of(api)
    first = ask(api)
    second = ask(api, previous_response_id=first.id)
    client.responses.delete(first.id)
    for attempt in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            attempt(first.id)
    assert client.responses.retrieve(second.id).id == second.id
    for gone in (first.id, second.id, "resp_nowhere"):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(api, previous_response_id=gone)
        assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_what_is_not_to_be_stored_is_not(api):
    answer = ask(api, store=False)
    assert answer.store is False
    with pytest.raises(openai.NotFoundError):
        client_of(api).responses.retrieve(answer.id)


def test_a_response_that_cannot_be_kept_says_so(api):
    with mock.patch.object(Store, "save_response", side_effect=DataError("The disk is full.")):
        assert (ask(api).output_text, ask(api).store) == ("Hello world", False)


def test_a_response_belongs_to_its_key(tmp_path):
    with served(tmp_path, "--api-key", "one", "--admin-key", "two") as api:
        client, other = client_of(api, "one"), client_of(api, "two")
        answer = client.responses.create(model="", input="Hello")
        assert client.responses.retrieve(answer.id).id == answer.id
        for attempt in (other.responses.retrieve, other.responses.delete, other.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                attempt(answer.id)
        with pytest.raises(openai.BadRequestError, match="no response"):
            other.responses.create(model="", input="Hello", previous_response_id=answer.id)


def test_only_so_many_are_kept(tmp_path):
    store = Store.open(tmp_path / "x.sqlite3")
    kept = {"items": [], "body": {"output": []}}

    def there(id):
        try:
            return bool(store.response_chain("me", id))
        except NotFound:
            return False

    with mock.patch.object(responses, "MAX_RESPONSES", 3):
        for id, previous in (("a", None), ("b", None), ("c", None), ("a2", "a")):
            store.save_response("me", StoredResponse(id, previous, **kept))
        assert [there(id) for id in ("a", "b", "c", "a2")] == [True, False, True, True]
        assert [each.id for each in store.response_chain("me", "a2")] == ["a", "a2"]
        with pytest.raises(NotFound):
            store.response_chain("other", "a2")
    with mock.patch.object(responses, "MAX_RESPONSES_SIZE", 100):
        store.save_response("me", StoredResponse("d", None, [{"text": "x" * 60}], {}))
        assert [there(id) for id in ("c", "d")] == [False, True]
    store.close()


# --- tools and formats ------------------------------------------------------------------------------------------------------------------


def test_a_tool_is_called_and_answered(api):
    api.backend.script = CALLED
    answer = ask(api, tools=[WEATHER])
    text, call = answer.output
    assert (call.type, call.name, call.arguments, call.status) == ("function_call", "weather", '{"town": "Oslo"}', "completed")
    assert text.content[0].text.strip() == "Look." and answer.tools[0].name == "weather"
    api.backend.script = ["Snow."]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "snow"}
    assert ask(api, [result], tools=[WEATHER], previous_response_id=answer.id).output_text == "Snow."
    by_id = prompt_of(api)
    ask(api, [{"role": "user", "content": "Hello"}, *(item.model_dump() for item in answer.output), result], tools=[WEATHER])
    assert prompt_of(api) == by_id and by_id.index("Look.") < by_id.rindex("Oslo") < by_id.index("snow")


def test_the_events_of_a_call(api):
    api.backend.script = CALLED
    found = [each for each in ask(api, tools=[WEATHER], stream=True) if getattr(each, "output_index", None) == 1]
    assert [each.type.removeprefix("response.") for each in found] == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip
    assert found[0].item.arguments == "" and found[1].delta == found[2].arguments == found[3].item.arguments == '{"town": "Oslo"}'


def test_only_one_call_where_they_may_not_be_parallel(api):
    api.backend.script = [*CALLED, *CALLED]
    assert [item.type for item in ask(api, tools=[WEATHER]).output] == ["message", "function_call"] * 2
    answer = ask(api, tools=[WEATHER], parallel_tool_calls=False)
    assert [item.type for item in answer.output] == ["message", "function_call"] and answer.status == "completed"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_required_call_is_enforced(tmp_path, choice):
    with served(tmp_path, make=grammatical) as api:
        api.backend.script = ['{"name": "weather", "arguments": {"town": "Oslo"}}']
        answer = ask(api, tools=[WEATHER], tool_choice=choice)
        assert api.backend.requests[-1].json_schema and [item.name for item in answer.output] == ["weather"]


def test_a_schema_is_enforced(tmp_path):
    with served(tmp_path, make=grammatical) as api:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
        answer = ask(api, text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}})
        assert json.loads(api.backend.requests[-1].json_schema) == schema and answer.text.format.name == "x"
        ask(api, text={"format": {"type": "json_object"}})
        assert json.loads(api.backend.requests[-1].json_schema) == {"type": "object"}


# --- what cannot be followed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"role": "tool", "content": "x"}]}, "role"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input_file"),
        ({"input": [{"role": "user", "content": 3}]}, "content"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "output"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "web_search"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools[0]"),
        ({"input": "x", "tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"input": "x", "tools": [WEATHER], "tool_choice": "required"}, "grammar"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "conversation": "conv_1"}, "conversation"),
        ({"input": "x", "prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "response_format"),
        ({"input": "x", "top_logprobs": 2}, "logprobs"),
        ({"input": "x", "temperature": -1}, "temperature"),
        ({"input": "x" * 5000}, "context"),
    ],
)
def test_what_cannot_be_followed_is_an_error(api, body, words):
    error = api.post("/v1/responses", body, 400)["error"]
    assert set(error) == {"message", "type", "param", "code"} and words in error["message"] and api.backend.requests == []


def test_what_is_not_followed_is_told_in_a_header(api):
    more = {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low", "summary": "auto"}, "max_tool_calls": 3}
    answer = client_of(api).responses.with_raw_response.create(model="gpt-9", input="x", text={"verbosity": "low"}, **more)
    told = answer.headers["x-ignored"]
    for words in ("gpt-9", "reasoning.encrypted_content", "reasoning.summary", "text.verbosity", "max_tool_calls is unknown"):
        assert words in told
    assert answer.parse().reasoning.effort == "low"


def test_the_oldest_turns_go_where_that_is_wished(api):
    turns = [{"role": role, "content": f"{role}{turn} " + "x" * 300} for turn in range(5) for role in ("user", "assistant")]
    items = [{"role": "system", "content": "Rules."}, *turns, {"role": "user", "content": "Last."}]
    with pytest.raises(openai.BadRequestError, match="context"):
        ask(api, items)
    assert ask(api, items, truncation="auto", max_output_tokens=100).truncation == "auto"
    prompt = prompt_of(api)
    assert "Rules." in prompt and "Last." in prompt and "user4" in prompt and "user0" not in prompt
    assert 2048 - 100 - 2 * 330 < len(prompt) <= 2048 - 100
    with pytest.raises(openai.BadRequestError, match="context"):
        ask(api, "x" * 5000, truncation="auto")


# --- the real engine --------------------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_the_real_engine(real_api):
    client = client_of(real_api)
    asked = {"model": "", "input": "Hello", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**asked)
    streamed = list(client.responses.create(**asked, stream=True))[-1].response
    assert whole.output_text == streamed.output_text != "" and whole.status == streamed.status == "incomplete"
    assert whole.usage.output_tokens == 12
    more = client.responses.create(**{**asked, "input": "And you?"}, previous_response_id=whole.id)
    assert more.usage.input_tokens > whole.usage.input_tokens and more.usage.input_tokens_details.cached_tokens > 0
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}
    text = {"format": {"type": "json_schema", "name": "person", "schema": schema, "strict": True}}
    answer = client.responses.create(model="", input="How old is Bob?", max_output_tokens=60, text=text)
    assert set(json.loads(answer.output_text)) == {"age"}
