"""Log-probabilities of completions and chats: of which tokens they are told, where these stand, and what they are called."""

import json

import pytest

from modules.backends.base import Chunk, Timings, TokenLogprob
from modules.streams import token_places
from tests.api.conftest import served
from tests.fakes import FakeBackend

HELLO = [{"role": "user", "content": "Hello"}]


class Telling(FakeBackend):
    """Its script are chunks: lists of (text, tokens). Each token has two alternatives with one text. One character of a prompt is a token."""

    def __init__(self):
        super().__init__(features=frozenset({"parallel", "logprobs"}))
        self.script = [(" P", [" P"]), ("aris", ["aris"]), (".", ["."]), ("\n", ["\n"])]

    def generate(self, request):
        self.requests.append(request)
        done = 0
        if request.prompt_logprobs is not None and len(request.prompt) > 1:
            yield Chunk(prompt_tokens=len(request.prompt), prompt_logprobs=tuple(TokenLogprob(t, chr(t), -1.0) for t in request.prompt[1:]))
        for text, tokens in self.script:
            if request.cancel.cancelled:
                break
            found = tuple(TokenLogprob(n, t, -0.5, ((n, t, -0.5), (n + 50, t, -1.5))) for n, t in enumerate(tokens, done))
            done += len(tokens)
            yield Chunk(text, tuple(range(len(tokens))), logprobs=found, completion_tokens=done)
        yield Chunk(finish_reason="stop", prompt_tokens=len(request.prompt), completion_tokens=done, timings=Timings(decode_seconds=1.0))


@pytest.fixture
def api(tmp_path):
    with served(tmp_path, make=Telling) as made:
        yield made


def streamed(api, path, body):
    with api.client() as client:
        lines = client.post(path, json={**body, "stream": True}).text.splitlines()
    return [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]


def completion(api, body, stream):
    """Text and log-probabilities of a completion, asked for in either way."""
    if not stream:
        choice = api.post("/v1/completions", body)["choices"][0]
        return choice["text"], choice["logprobs"]
    choices = streamed(api, "/v1/completions", body)
    told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    joined = {name: [each for some in told for each in some[name]] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    return "".join(choice["text"] for choice in choices), joined


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [("aris.", " P", [" P"]), ("is.", " Par", [" P", "aris"]), (".x", " Paris.\n", [" P", "aris", ".", "\n"]), (" P", "", [])],
)
def test_tokens_that_begin_in_a_stop_string_or_after_it_are_not_told(api, stream, stop, text, tokens):
    said, told = completion(api, {"prompt": "x", "stop": [stop], "logprobs": 0, "max_tokens": 10}, stream)
    assert (said, (told or {"tokens": []})["tokens"]) == (text, tokens)
    body = {"messages": HELLO, "stop": [stop], "logprobs": True}
    found = streamed(api, "/v1/chat/completions", body) if stream else api.post("/v1/chat/completions", body)["choices"]
    assert [each["token"] for choice in found for each in (choice["logprobs"] or {"content": []})["content"]] == tokens


@pytest.mark.parametrize("stream", [False, True])
def test_parts_of_characters_stand_where_their_character_does_and_have_names_of_their_own(api, stream):
    api.backend.script = [("a", ["a"]), ("", ["�"]), ("", ["�"]), ("字", ["�"]), ("bc😀d", ["b", "c", "�", "�", "d"])]
    said, told = completion(api, {"prompt": "xy", "logprobs": 2, "echo": True}, stream)
    assert said == "xya字bc😀d"
    assert told["text_offset"] == [0, 1, 2, 3, 3, 3, 4, 5, 6, 6, 7]
    assert told["tokens"] == ["x", "y", "a", "token_id:1", "token_id:2", "token_id:3", "b", "c", "token_id:6", "token_id:7", "d"]
    assert list(told["top_logprobs"][2]) == ["a", "token_id:50"] and list(told["top_logprobs"][3]) == ["token_id:1", "token_id:51"]


def test_the_bytes_of_a_part_of_a_character_are_not_made_up(api):
    api.backend.script = [("", ["�"]), ("字", ["�"]), ("ü", ["ü"])]
    entries = api.post("/v1/chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 1})["choices"][0]["logprobs"]["content"]
    assert [each["bytes"] for each in entries] == [None, None, [0xC3, 0xBC]] == [each["top_logprobs"][0]["bytes"] for each in entries]


@pytest.mark.parametrize("stream", [False, True])
def test_of_an_empty_prompt_there_are_none(api, stream):
    api.backend.script = [("ab", ["a", "b"])]
    said, told = completion(api, {"prompt": "", "logprobs": 1, "echo": True, "max_tokens": 5}, stream)
    assert said == "ab" and told["tokens"] == ["a", "b"] and told["text_offset"] == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["x", "xyz"])
def test_of_a_prompt_alone(api, stream, prompt):
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
    said, told = completion(api, body, stream)
    assert said == prompt and told["tokens"] == list(prompt) and told["token_logprobs"] == [None, *[-1.0] * (len(prompt) - 1)]
    assert told["text_offset"] == list(range(len(prompt)))
    answer = api.post("/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == 0 and answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("text", "tokens", "places"),
    [
        ("ab", ["a", "b"], [0, 1]),
        ("", ["�", "�"], [0, 0]),
        ("字字", ["�"] * 6, [0, 0, 0, 1, 1, 1]),
        ("a字b", ["a", "�", "�", "b"], [0, 1, 1, 2]),
        ("ab", ["<s>", "a", "b"], [0, 0, 1]),
        ("a�b", ["a", "�", "b"], [0, 1, 2]),
        ("語 😀", ["�", "�", "�", " �", "�"], [0, 0, 0, 1, 2]),
        ("", [], []),
    ],
)
def test_where_tokens_begin(text, tokens, places):
    assert token_places(text, tokens) == places
