"""Further clients that the API is a drop-in for: LangChain, LiteLLM and llm. Each connects with its own code and nothing is patched in it."""

import json
import subprocess
import sys

import pytest
from pydantic import BaseModel

from tests.api.conftest import served
from tests.fakes import WAIT, FakeBackend

HELLO = [{"role": "user", "content": "Hello"}]
CALL = ['Look. <tool_call>\n{"name": "weather", "argum', 'ents": {"town": "Oslo"}}\n</tool_call>']


class Person(BaseModel):
    name: str
    age: int


def weather(town: str) -> str:
    """The weather of a town."""
    return f"Snow in {town}."


@pytest.fixture
def able(tmp_path):
    """The API with a scripted engine that has grammars and log-probabilities."""
    with served(tmp_path, make=lambda: FakeBackend(features=frozenset({"grammar", "parallel", "logprobs"}))) as made:
        yield made


# --- LangChain --------------------------------------------------------------------------------------------------------------------------


def langchain(api, **options):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model="model.fake", base_url=f"{api.url}/v1", api_key="none", timeout=WAIT, max_retries=0, **options)


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_asks(able, responses):
    answer = langchain(able, temperature=0.5, use_responses_api=responses).invoke("Hello", max_tokens=7)
    assert answer.text == "Hello world" and answer.usage_metadata["output_tokens"] == 2
    assert answer.usage_metadata["input_token_details"]["cache_read"] == 3
    request = able.backend.requests[-1]
    assert (request.max_new_tokens, request.sampling.temperature) == (7, 0.5)


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_streams(able, responses):
    chunks = list(langchain(able, stream_usage=True, use_responses_api=responses).stream("Hello"))
    assert [c.text for c in chunks if c.text] == ["Hello", " world"]
    assert [c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata] == [2]


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_calls_tools(able, responses):
    able.backend.script = CALL
    model = langchain(able, use_responses_api=responses).bind_tools([weather])
    for answer in (model.invoke("Hello"), sum_of(model.stream("Hello"))):
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("weather", {"town": "Oslo"}) and call["id"].startswith("call_")
        assert answer.text.strip() == "Look." and not answer.invalid_tool_calls


def sum_of(chunks):
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_forces_a_tool(able, responses):
    able.backend.script = ['{"name": "weather", "arguments": {"town": "Oslo"}}']
    answer = langchain(able, use_responses_api=responses).bind_tools([weather], tool_choice="weather").invoke("Hello")
    assert answer.tool_calls[0]["args"] == {"town": "Oslo"} and json.loads(able.backend.requests[-1].json_schema)


@pytest.mark.parametrize("responses", [False, True])
@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
def test_langchain_has_structured_output(able, method, responses):
    said = '{"name": "Ada", "age": 36}'
    able.backend.script = [f'{{"name": "Person", "arguments": {said}}}' if method == "function_calling" else said]
    model = langchain(able, use_responses_api=responses).with_structured_output(Person, method=method)
    assert model.invoke("Who is it?") == Person(name="Ada", age=36)
    assert able.backend.requests[-1].json_schema


def test_langchain_reads_what_is_wrong(able):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="tokens"):
        langchain(able).invoke("x" * 5000)


# --- LiteLLM ----------------------------------------------------------------------------------------------------------------------------


def litellm_asked(api, way="openai", **options):
    """What LiteLLM answers, `way` being the one of its providers that it asks with."""
    import litellm

    litellm.telemetry = False
    base = api.url if way == "anthropic" else f"{api.url}/v1"
    return litellm.completion(model=f"{way}/model.fake", api_base=base, api_key="none", timeout=WAIT, num_retries=0, messages=HELLO, **options)


@pytest.fixture(autouse=True)
def no_fetched_prices(monkeypatch):
    """LiteLLM would fetch its list of prices; it carries one too."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")


WAYS = ["openai", "hosted_vllm", "anthropic"]


@pytest.mark.parametrize("way", WAYS)
def test_litellm_asks(able, way):
    answer = litellm_asked(able, way, max_tokens=7, temperature=0.5)
    assert answer.choices[0].message.content == "Hello world" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 2
    request = able.backend.requests[-1]
    assert (request.max_new_tokens, request.sampling.temperature) == (7, 0.5)


@pytest.mark.parametrize("way", WAYS)
def test_litellm_streams(able, way):
    chunks = list(litellm_asked(able, way, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello world"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)] == [2]


@pytest.mark.parametrize("way", WAYS)
def test_litellm_calls_tools(able, way):
    able.backend.script = CALL
    parameters = {"type": "object", "properties": {"town": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "description": "x", "parameters": parameters}}]
    answer = litellm_asked(able, way, tools=tools).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and call.function.name == "weather" and json.loads(call.function.arguments) == {"town": "Oslo"}


def test_litellm_reads_what_is_wrong(able):
    import litellm

    able.app.models.unload()
    with pytest.raises(litellm.ServiceUnavailableError, match="No model"):
        litellm_asked(able)


# --- llm --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llm(able, tmp_path, monkeypatch):
    """Simon Willison's llm, which finds the API in its extra-openai-models.yaml."""
    folder = tmp_path / "llm"
    folder.mkdir()
    more = "\n  supports_tools: true\n  supports_schema: true"
    (folder / "extra-openai-models.yaml").write_text(
        f"- model_id: local\n  model_name: model.fake\n  api_base: {able.url}/v1{more}\n", encoding="utf-8"
    )
    monkeypatch.setenv("LLM_USER_PATH", str(folder))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    import llm

    return llm


def test_llm_asks_and_streams(able, llm):
    model = llm.get_model("local")
    assert model.prompt("Hello", stream=False, temperature=0.5).text() == "Hello world"
    assert able.backend.requests[-1].sampling.temperature == 0.5
    response = model.prompt("Hello", system="Be kind.")
    assert [piece for piece in response if piece] == ["Hello", " world"]
    assert "Be kind." in able.backend.decode(able.backend.requests[-1].prompt)


def test_llm_goes_on_with_a_conversation(able, llm):
    conversation = llm.get_model("local").conversation()
    conversation.prompt("First").text()
    conversation.prompt("Second").text()
    prompt = able.backend.decode(able.backend.requests[-1].prompt)
    assert prompt.index("First") < prompt.index("Hello world") < prompt.index("Second")


@pytest.mark.parametrize("stream", [True, False])
def test_llm_calls_tools(able, llm, stream):
    able.backend.script = CALL
    (call,) = llm.get_model("local").prompt("Hello", tools=[weather], stream=stream).tool_calls()
    assert (call.name, call.arguments) == ("weather", {"town": "Oslo"})


def test_llm_has_structured_output(able, llm):
    able.backend.script = ['{"name": "Ada", "age": 36}']
    assert json.loads(llm.get_model("local").prompt("Who?", schema=Person).text()) == {"name": "Ada", "age": 36}
    assert able.backend.requests[-1].json_schema


def test_llm_on_the_command_line(able, llm):
    done = subprocess.run([sys.executable, "-m", "llm", "-m", "local", "Hello"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "Hello world", done.stderr
