"""LangChain's own standard suite for chat models, with its client of OpenAI and this API; over Chat Completions and over Responses.

The engine behind it is scripted, but is told nothing beside what the API gives it: it reads the prompt and the schema, as a model would.
"""

import inspect
import json
import os
import re

import pytest

pytest.importorskip("langchain_tests")
pytest.importorskip("langchain_openai")

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests.chat_models import ChatModelTests

from tests.api.conftest import served
from tests.fakes import WAIT, FakeBackend


class Obliging(FakeBackend):
    """Calls the offered tool until it has a result, fills in the schema it must follow, and says something else to everything else."""

    def __init__(self) -> None:
        super().__init__(features=frozenset({"grammar", "parallel", "logprobs"}), context_length=16_000)

    def generate(self, request):
        prompt = self.decode(request.prompt)
        asked = prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        self.script = pieces(self.reply(prompt, asked, request.json_schema))
        yield from super().generate(request)

    def reply(self, prompt: str, asked: str, schema: str) -> str:
        if schema:
            whole = json.loads(schema)
            return json.dumps(example(whole, whole, asked), ensure_ascii=False)
        offered = re.search(r"<tools>\n(.*?)\n</tools>", prompt, re.DOTALL)
        if offered and not asked.startswith("<tool_response>"):
            tool = json.loads(offered[1].splitlines()[0])
            call = {"name": tool["name"], "arguments": example(tool["parameters"], tool["parameters"], asked)}
            return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
        return ("<think>So it is.</think>" if "think" in asked else "") + "It is as it is."


def pieces(text: str) -> list[str]:
    return [text[at : at + 5] for at in range(0, len(text), 5)]


def example(schema, root, asked):
    """Something that follows `schema`, with the numbers and names that are in the question."""
    if "$ref" in schema:
        found = root
        for step in schema["$ref"].split("/")[1:]:
            found = found[step]
        return example(found, root, asked)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return example(schema["anyOf"][0], root, asked)
    if schema.get("type") == "array":
        return [example(schema["items"], root, asked)]
    if schema.get("type") in ("integer", "number"):
        return int((re.findall(r"\d+", asked) or ["7"])[0])
    if schema.get("type") == "string":
        return (re.findall(r"'(.+?)'", asked) or ["Naïve 好"])[0]
    if "properties" in schema:
        return {name: example(inner, root, asked) for name, inner in schema["properties"].items()}
    return dict.fromkeys(re.findall(r"'(\w+)'", asked), "so") if schema == {"type": "object"} else {}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    if asked := os.environ.get("TGW_LANGCHAIN_URL"):  # benchmarks/langchain_suite.py: a real model
        yield asked
        return
    with served(tmp_path_factory.mktemp("langchain"), make=Obliging) as made:
        yield f"{made.url}/v1"


for each in vars(ChatModelIntegrationTests).values():
    if inspect.iscoroutinefunction(each):
        pytest.mark.asyncio(loop_scope="module")(each)  # one loop: ChatOpenAI keeps its connections from one model to the next


class TestChatCompletions(ChatModelIntegrationTests):
    responses = False

    @pytest.fixture(autouse=True)
    def at(self, address):
        self.address = address

    # What the suite asks for by properties: fixtures come too late for its own `model`, which this stands in for.
    @pytest.fixture
    def model(self, request, address):
        self.address = address
        return ChatOpenAI(**self.standard_chat_model_params, **self.chat_model_params, **getattr(request, "param", None) or {})

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {"model": "model.fake", "base_url": self.address, "api_key": "none", "use_responses_api": self.responses}

    @property
    def standard_chat_model_params(self):
        return {"temperature": 0, "timeout": WAIT, "max_retries": 0, "stream_usage": True}

    has_tool_choice = True
    supports_json_mode = True
    supports_anthropic_inputs = True
    supports_image_inputs = supports_image_tool_message = False  # the scripted engine sees none, and the suite fetches its own from the web
    supports_audio_inputs = supports_pdf_inputs = supports_pdf_tool_message = False  # nothing here takes them
    supports_model_override = False  # the loaded model answers, and says its own name
    supported_usage_metadata_details = {  # noqa: RUF012  the suite reads it from the class
        "invoke": ["reasoning_output", "cache_read_input"],
        "stream": ["reasoning_output", "cache_read_input"],
    }

    def asked(self, text, stream):
        model = ChatOpenAI(**self.standard_chat_model_params, **self.chat_model_params)
        if not stream:
            return model.invoke(text)
        whole = None
        for chunk in model.stream(text):
            whole = chunk if whole is None else whole + chunk
        return whole

    def invoke_with_reasoning_output(self, *, stream=False):
        answer = self.asked("Please think.", stream)
        assert answer.usage_metadata["output_token_details"]["reasoning"] > 0
        return answer

    def invoke_with_cache_read_input(self, *, stream=False):
        answer = self.asked("Hello", stream)
        assert answer.usage_metadata["input_token_details"]["cache_read"] == 3
        return answer


class TestResponses(TestChatCompletions):
    responses = True


def test_the_suite_asks_for_nothing_that_is_left_out_here():
    """A property of a newer suite must be answered with thought, not with its default."""
    asked = {name for name in vars(ChatModelTests) if name.startswith(("supports_", "has_", "returns_", "supported_"))}
    unnamed = asked - set(vars(TestChatCompletions))
    assert unnamed <= {"has_tool_calling", "has_structured_output", "returns_usage_metadata", "supports_image_urls", "supports_video_inputs"}
