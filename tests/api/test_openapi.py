"""The OpenAPI document, and what the API answers to requests that are generated from it. `benchmarks.fuzz_api` asks for longer."""

import functools
import json

import pytest

from modules.api.keys import OPEN
from tests.api.conftest import served
from tests.fakes import FakeBackend

HELLO = '"messages": [{"role": "user", "content": "x"}]'
TOOL = '"tools": [{"type": "function", "function": {"name": "a", "parameters": %s}}]'


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    with served(tmp_path_factory.mktemp("document")) as api:
        return api.get("/openapi.json")


def test_the_document_is_valid(document):
    pytest.importorskip("schemathesis")
    from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

    assert document["openapi"].startswith("3.1.")
    OPENAPI_31_VALIDATOR.validate(document)


def test_each_reference_leads_somewhere_and_each_schema_is_one(document):
    import jsonschema

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) <= known and "HTTPValidationError" not in str(document)
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def references(part):
    if isinstance(part, dict):
        yield from [part["$ref"]] if isinstance(part.get("$ref"), str) else []
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from references(inner)


def test_the_errors_of_each_route_are_told_in_its_form(document):
    for path, routes in document["paths"].items():
        for method, route in routes.items():
            statuses, where = {int(status) for status in route["responses"]}, f"{method} {path}"
            assert 422 not in statuses and {403, 500} <= statuses and (401 in statuses) == (path not in OPEN), where
            assert ("requestBody" in route) == (413 in statuses), where
            assert (statuses & {200, 501}) in ({200}, {501}), where
            for status in statuses - {200}:
                schema = route["responses"][str(status)]["content"]["application/json"]["schema"]["$ref"]
                assert schema.endswith("/AnthropicError" if path.startswith("/v1/messages") else "/Error"), where
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        assert set(document["paths"][path]["post"]["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}


def test_names_of_operations_are_unique(document):
    names = [route["operationId"] for routes in document["paths"].values() for route in routes.values()]
    assert len(names) == len(set(names)) == 36


# --- generated requests -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzz():
    """The machinery of `benchmarks.fuzz_api`, a served API and its schema."""
    pytest.importorskip("schemathesis")
    from benchmarks import fuzz_api

    with fuzz_api.scripted() as (api, schema):
        yield fuzz_api, api, {operation.label: operation for operation in fuzz_api.operations(schema)}


@pytest.mark.parametrize("group", ["/v1/chat", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/internal", "the rest"])
@pytest.mark.parametrize("mode", [0, 1], ids=["good", "bad"])
def test_generated_requests_get_documented_answers(fuzz, group, mode):
    import requests

    machine, api, operations = fuzz
    groups = ("/v1/chat", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/internal")
    found = machine.Found()
    with requests.Session() as session:
        for operation in operations.values():
            if next((each for each in groups if operation.path.startswith(each)), "the rest") == group:
                examples = 1 if not (operation.body or operation.path_parameters) else 8 if group != "the rest" else 4
                machine.drive(operation, machine.MODES[mode], examples, 0, functools.partial(found.look, api, session=session))
    assert not found.faults, "\n\n".join(f"{name}: {kind}\n{text}" for (name, kind), text in found.faults.items())
    assert found.statuses


# --- what was found so ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def able(tmp_path):
    with served(tmp_path, make=lambda: FakeBackend(features=frozenset({"grammar", "parallel"}))) as made:
        yield made


@pytest.mark.parametrize(
    ("path", "body"),
    [
        # What Python takes for JSON and cannot write again.
        ("responses", '{"input": "x", "metadata": {"a": "\\ud800"}}'),
        ("responses", '{"input": [{"role": "user", "content": "\\udfff"}]}'),
        ("responses", '{"input": "x", "text": {"format": {"type": "text", "x": NaN}}}'),
        ("responses", '{"input": "x", "tools": [{"type": "function", "name": "a", "parameters": {"x": -Infinity}}]}'),
        ("messages", '{"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]}'),
        ("chat/completions", f'{{{HELLO}, "response_format": {{"type": "json_schema", "schema": {{"properties": {{"\\ud800": {{"x": 1}}}}}}}}}}'),
        ("responses", '{"input": "x", "tools": [{"type": "function", "name": "a", "parameters": {"x": 1e999}}]}'),
        ("responses", b'{"input": "x", "instructions": "\xed\xa0\x80"}'),
        ("responses", '{"input": "x", "instructions": "\\ud800"}'.encode("utf-16")),
        # Lists and objects where a name is expected.
        ("chat/completions", f'{{{HELLO}, "tool_choice": {{"function": 1}}, {TOOL % "{}"}}}'),
        ("chat/completions", f'{{{HELLO}, "tool_choice": {{"name": ["a"]}}, {TOOL % "{}"}}}'),
        ("chat/completions", f'{{{HELLO}, "tool_choice": "required", {TOOL % """{"type": {}}"""}}}'),
        ("chat/completions", f'{{{HELLO}, "response_format": {{"type": "json_schema", "schema": {{"type": [[]]}}}}}}'),
        ("responses", '{"input": [{"type": ["message"]}]}'),
    ],
)
def test_what_cannot_be_is_refused(able, path, body):
    with able.client() as client:
        response = client.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"].endswith((".", "'")), response.text
    assert able.backend.requests == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_in_any_unicode_encoding_is_read(able, encoding):
    body = json.dumps({"messages": [{"role": "user", "content": "Größe"}]}, ensure_ascii=False).encode(encoding)
    with able.client() as client:
        assert client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}).status_code == 200
    assert "Größe" in able.backend.decode(able.backend.requests[0].prompt)


def test_whole_characters_in_two_halves_are_let_in(able):
    body = json.dumps({"messages": [{"role": "user", "content": "😀"}]})
    assert "\\ud83d" in body
    with able.client() as client:
        assert client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}).status_code == 200
    assert "😀" in able.backend.decode(able.backend.requests[0].prompt)


@pytest.mark.parametrize("name", ["a\r\nSet-Cookie: a=b", "\x00", " ", "\x7f", "ü\u2028", "x" * 999 + " y"])
def test_no_name_breaks_out_of_the_header_that_tells_it(able, name):
    with able.client() as client:
        response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], name: 1})
    assert response.status_code == 200 and "set-cookie" not in response.headers
    assert response.headers["x-ignored"].isprintable() and response.headers["x-ignored"].isascii()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_too_long_a_body_has_its_documented_status(able, path):
    from modules.api import server

    with able.client() as client:
        response = client.post(path, content=b" " * (server.MAX_BODY_BYTES + 1), headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and "64 MB" in response.json()["error"]["message"]
