"""Anthropic's routes, driven by Anthropic's own client."""

import base64

import anthropic
import pytest

from modules.errors import Busy, EngineDied
from tests.api.conftest import served
from tests.fakes import WAIT, FakeBackend

HELLO = [{"role": "user", "content": "Hello"}]
SAID = {"model": "model.fake", "max_tokens": 50, "messages": HELLO}
WEATHER = {"name": "weather", "description": "", "input_schema": {"type": "object", "properties": {"town": {"type": "string"}}}}
CALLED = ['Look. <tool_call>\n{"name": "weather", "argum', 'ents": {"town": "Oslo"}}\n</tool_call>']


def client_of(api, key="none"):
    return anthropic.Anthropic(base_url=api.url, api_key=key, max_retries=0, timeout=WAIT, _strict_response_validation=True)


def raw_events(api, **more):
    """(name, data) of every event, the ping among them."""
    import json

    with api.client() as client:
        text = client.post("/v1/messages", json={**SAID, "stream": True, **more}).text
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def prompt_of(api):
    return api.backend.decode(api.backend.requests[-1].prompt)


def test_a_whole_answer(api):
    answer = client_of(api).messages.create(**SAID, system="Be brief.", extra_body={"temperature": 0.5, "min_p": 0.2, "seed": 5})
    assert answer.id.startswith("msg_") and (answer.role, answer.type, answer.model) == ("assistant", "message", "model.fake")
    assert [(block.type, block.text) for block in answer.content] == [("text", "Hello world")]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    request = api.backend.requests[-1]
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.cache_read_input_tokens) == (len(request.prompt) - 3, 2, 3)
    assert usage.cache_creation_input_tokens == 0
    assert (request.max_new_tokens, request.sampling.temperature, request.sampling.min_p, request.seed) == (50, 0.5, 0.2, 5)
    assert prompt_of(api).index("Be brief.") < prompt_of(api).index("Hello")


def test_the_events_of_a_stream(api):
    api.backend.script = ["<think>hm", "</think>", "Yes", "!"]
    found = raw_events(api)
    assert [name for name, _ in found] == [
        "message_start", "ping",
        "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert all(name == data["type"] for name, data in found)
    start = found[0][1]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["input_tokens"] == len(api.backend.requests[-1].prompt)
    assert found[2][1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}}
    assert [data["delta"]["type"] for _, data in found if "delta" in data and "index" in data] == [
        "thinking_delta", "signature_delta", "text_delta", "text_delta",
    ]  # fmt: skip
    assert [data["index"] for _, data in found if "index" in data] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert found[-2][1]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None} and found[-2][1]["usage"]["output_tokens"] == 4


def test_the_client_puts_a_stream_together(api):
    api.backend.script = ["<think>hm", "</think>", "Yes"]
    with client_of(api).messages.stream(**SAID) as stream:
        message = stream.get_final_message()
    whole = client_of(api).messages.create(**SAID)
    assert [block.model_dump() for block in message.content] == [block.model_dump() for block in whole.content]
    assert [block.type for block in whole.content] == ["thinking", "text"] and whole.content[0].signature == ""
    assert message.stop_reason == whole.stop_reason == "end_turn" and message.usage.output_tokens == whole.usage.output_tokens


def test_stop_sequences(api):
    api.backend.script = ["one ", "two ", "three"]
    answer = client_of(api).messages.create(**SAID, stop_sequences=["two"])
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("one ", "stop_sequence", "two")
    with client_of(api).messages.stream(**SAID, stop_sequences=["three"]) as stream:
        message = stream.get_final_message()
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("one two ", "stop_sequence", "three")
    answer = client_of(api).messages.create(**SAID, stop_sequences=["no"], extra_body={"stopping_strings": ["two"]})
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)


@pytest.mark.parametrize(("kind", "thinks"), [("enabled", True), ("adaptive", True), ("disabled", False)])
def test_thinking_is_asked_for(tmp_path, kind, thinks):
    def make():
        backend = FakeBackend()
        backend.chat_template = "{{ messages[-1].content }} {% if enable_thinking %}THINK{% else %}NOT{% endif %}"
        return backend

    with served(tmp_path, make=make) as api:
        asked = {"type": kind, "budget_tokens": 1024} if kind == "enabled" else {"type": kind}
        answer = client_of(api).messages.with_raw_response.create(**SAID, thinking=asked)
        assert ("THINK" in prompt_of(api)) == thinks
        assert ("thinking.budget_tokens" in answer.headers.get("x-ignored", "")) == (kind == "enabled")


def test_a_last_message_of_the_assistant_is_gone_on_with(api):
    client_of(api).messages.create(**{**SAID, "messages": [*HELLO, {"role": "assistant", "content": "My name is"}]})
    assert prompt_of(api).endswith("My name is")


# --- tools ------------------------------------------------------------------------------------------------------------------------------


def test_a_tool_is_called(api):
    api.backend.script = CALLED
    answer = client_of(api).messages.create(**SAID, tools=[WEATHER])
    text, call = answer.content
    assert answer.stop_reason == "tool_use" and text.text.strip() == "Look."
    assert call.type == "tool_use" and call.id.startswith("toolu_") and (call.name, call.input) == ("weather", {"town": "Oslo"})
    with client_of(api).messages.stream(**SAID, tools=[WEATHER]) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use" and message.content[-1].input == {"town": "Oslo"}
    found = [data for name, data in raw_events(api, tools=[WEATHER]) if data.get("index") == 1]
    assert [data["type"] for data in found] == ["content_block_start", "content_block_delta", "content_block_stop"]
    assert found[0]["content_block"]["input"] == {} and found[1]["delta"] == {"type": "input_json_delta", "partial_json": '{"town": "Oslo"}'}


def test_half_a_character_in_what_a_tool_is_called_with_becomes_a_question_mark(api):
    api.backend.script = ['<tool_call>{"name": "weather", "arguments": {"town": "\\ud800"}}</tool_call>']
    tools = [{"name": "weather", "input_schema": {"type": "object"}}]
    assert api.post("/v1/messages", {"messages": HELLO, "max_tokens": 9, "tools": tools})["content"][0]["input"] == {"town": "?"}


def test_results_reach_the_prompt_in_their_order(api):
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "secret", "signature": ""},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"town": "Oslo"}},
                {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {"town": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "snow"},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "no such town"}], "is_error": True},
                {"type": "text", "text": "Well?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    client_of(api).messages.create(**{**SAID, "messages": messages}, tools=[WEATHER])
    prompt = prompt_of(api)
    places = [prompt.index(words) for words in ("Hello", "Let me look.", "Oslo", "Rome", "snow", "Error: no such town", "Well?")]
    assert places == sorted(places) and "secret" not in prompt


def test_only_one_call_where_they_may_not_be_parallel(api):
    api.backend.script = [*CALLED, *CALLED, "more"]
    assert len([b for b in client_of(api).messages.create(**SAID, tools=[WEATHER]).content if b.type == "tool_use"]) == 2
    answer = client_of(api).messages.create(**SAID, tools=[WEATHER], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [b.type for b in answer.content] == ["text", "tool_use"] and answer.stop_reason == "tool_use"
    assert api.backend.requests[-1].cancel.cancelled


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_required_call_is_enforced(tmp_path, choice):
    with served(tmp_path, make=lambda: FakeBackend(features=frozenset({"grammar", "parallel"}))) as api:
        api.backend.script = ['{"name": "weather", "arg', 'uments": {"town": "Oslo"}}']
        answer = client_of(api).messages.create(**SAID, tools=[WEATHER], tool_choice=choice)
        assert api.backend.requests[-1].json_schema and answer.stop_reason == "tool_use"
        assert [(block.name, block.input) for block in answer.content] == [("weather", {"town": "Oslo"})]


def test_no_tool_where_none_may_be_called(api):
    api.backend.script = CALLED
    answer = client_of(api).messages.create(**SAID, tools=[WEATHER], tool_choice={"type": "none"})
    assert [block.type for block in answer.content] == ["text"] and "weather" not in prompt_of(api)


# --- errors -----------------------------------------------------------------------------------------------------------------------------

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(b"x").decode()}}


def said(*blocks):
    return {"messages": [{"role": "user", "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role"),
        ({"temperature": -1}, "temperature"),
        (said(IMAGE), "images"),
        (said({"type": "image", "source": {"type": "url", "url": "http://x"}}), "not fetched"),
        (said({"type": "document"}), "document"),
        (said({"type": "tool_result"}), "tool_use_id"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "x"}]}, "input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool"),
        ({"tools": [WEATHER], "tool_choice": {"type": "any"}}, "grammar"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"thinking": {"type": "sometimes"}}, "thinking"),
        ({"output_config": {"effort": "huge"}}, "reasoning_effort"),
        ({"messages": [*HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "x", "input": {}}]}]}, "tool_result"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "context"),
    ],
)
def test_what_cannot_be_followed_is_an_error_in_anthropics_form(api, changed, words):
    api.post("/v1/messages", {**SAID, **changed}, 400)
    with pytest.raises(anthropic.BadRequestError) as caught:
        client_of(api).post("/v1/messages", body={**SAID, **changed}, cast_to=object)
    body = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error" and words in body["error"]["message"]
    assert set(body["error"]) == {"type", "message"} and api.backend.requests == []


def test_an_image_reaches_a_model_that_sees(tmp_path):
    def make():
        backend = FakeBackend(features=frozenset({"images"}))
        backend.image_marker = "<here>"
        return backend

    with served(tmp_path, make=make) as api:
        result = {"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]}
        found = raw_events(api, **said({"type": "text", "text": "Look: "}, IMAGE, result))
        request = api.backend.requests[-1]
        assert request.images == (b"x", b"x") and "Look: <here>" in request.prompt
        assert found[0][1]["message"]["usage"]["input_tokens"] == len(request.prompt)


def test_what_fails_has_its_kind(api):
    api.backend.script, api.backend.error = [], Busy("The queue is full.", 3)
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error") as caught:
        client_of(api).messages.create(**SAID, stream=True)
    assert caught.value.response.headers["retry-after"] == "3"
    api.backend.script, api.backend.error = ["so far"], EngineDied("It died.")
    with pytest.raises(anthropic.APIStatusError, match="It died"):
        list(client_of(api).messages.create(**SAID, stream=True))
    name, last = raw_events(api)[-1]
    assert name == last["type"] == "error" and last["error"] == {"type": "api_error", "message": "It died."}
    with pytest.raises(anthropic.APIStatusError, match="It died"):
        client_of(api).messages.create(**SAID)


def test_what_is_not_followed_is_told_in_a_header(api):
    answer = client_of(api).messages.with_raw_response.create(**{**SAID, "model": "claude-9"}, service_tier="auto", metadata={"user_id": "1"})
    assert "service_tier is unknown" in answer.headers["x-ignored"] and "claude-9" in answer.headers["x-ignored"]
    assert "metadata" not in answer.headers["x-ignored"] and answer.parse().content[0].text == "Hello world"


def test_the_key(tmp_path):
    with served(tmp_path, "--api-key", "secret") as api:
        assert client_of(api, "secret").messages.create(**SAID).content
        with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
            client_of(api, "wrong").messages.create(**SAID)


def test_tokens_are_counted(api):
    asked = {"model": "model.fake", "messages": HELLO, "system": "Be brief.", "tools": [WEATHER]}
    count = client_of(api).messages.count_tokens(**asked).input_tokens
    assert api.backend.requests == []
    answer = client_of(api).messages.create(max_tokens=5, **asked)
    assert count == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    long = client_of(api).messages.count_tokens(model="", messages=[{"role": "user", "content": "x" * 5000}])
    assert long.input_tokens > 5000


@pytest.mark.engine
def test_the_real_engine(real_api):
    client = client_of(real_api)
    asked = {"model": "", "messages": HELLO, "max_tokens": 12, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert whole.content[0].text == streamed.content[0].text != ""
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 12) == (streamed.stop_reason, streamed.usage.output_tokens)
    total = client.messages.count_tokens(model="", messages=HELLO).input_tokens
    assert total == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert streamed.usage.cache_read_input_tokens > 0
