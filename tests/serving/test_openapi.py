"""The schema of the server: its limits are those of the reader, and answers have the form that it gives."""

import jsonschema
import pytest
from support import tiny_serving
from support.serving import answering, send

from pjrlhf.serving.bodies import ChatBody, CompletionBody
from pjrlhf.serving.catalogue import Catalogue

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "what is rain ?"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    model = tiny_serving.model(tmp_path_factory.mktemp("base"))
    engine = tiny_serving.engine(model)
    catalogue = Catalogue(model, ("P1A", "P2B", "P3A"), tiny_serving.bank(model), soups={"calm": {"P1A": 0.7}})
    with answering(catalogue, engine, key="secret") as place:
        yield place


@pytest.fixture(scope="module")
def schema(place):
    status, schema, _ = send(place, None, "/openapi.json", "GET")
    assert status == 200
    return schema


def check(schema, part, value):
    jsonschema.validate(value, {**part, "components": schema["components"]})


def test_every_field_that_is_read_is_in_the_schema(schema):
    for path, body in ((CHAT, ChatBody), (TEXT, CompletionBody)):
        content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        found = schema["components"]["schemas"][content["$ref"].rpartition("/")[2]]
        assert set(found["properties"]) == set(body.model_fields) and found["additionalProperties"] is False


def test_paths_and_queries_have_parameters(schema):
    found = {one["name"]: one for one in schema["paths"]["/v1/users"]["get"]["parameters"]}
    assert {name: (one["in"], one["required"]) for name, one in found.items()} == {
        "limit": ("query", False),
        "after": ("query", False),
    }
    assert (found["limit"]["schema"]["minimum"], found["limit"]["schema"]["maximum"]) == (1, 1000)
    (one,) = schema["paths"]["/v1/users/{id}/next"]["post"]["parameters"]
    assert (one["name"], one["in"], one["required"]) == ("id", "path", True)
    bodies = {
        path: found["post"]["requestBody"]["required"] for path, found in schema["paths"].items() if "post" in found
    }
    assert {path for path, required in bodies.items() if not required} == {"/v1/users/{id}/next"}


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({}, True),
        ({"temperature": 2}, True),
        ({"temperature": 2.01}, False),
        ({"top_p": 0}, False),
        ({"n": 128.0, "max_tokens": 1}, True),
        ({"n": 129}, False),
        ({"n": True}, False),
        ({"stop": ["a"] * 16}, True),
        ({"stop": ["a"] * 17}, False),
        ({"stop": ""}, False),
        ({"logit_bias": {"3": 100}}, True),
        ({"logit_bias": {"x": 1}}, False),
        ({"logit_bias": {"3": 101}}, False),
        ({"mix": {"P1A": -100}}, True),
        ({"mix": {"P1A": -101}}, False),
        ({"response_format": {"type": "text"}}, True),
        ({"response_format": {"type": "json_object"}}, False),
        ({"tools": []}, True),
        ({"tools": [1]}, False),
        ({"seed": 2**63}, False),
        ({"frequency_penalty": -2.5}, False),
        ({"min_p": None}, True),
        ({"surprise": 1}, False),
    ],
)
def test_the_schema_and_the_reader_agree(place, schema, change, right):
    body = {"model": "base", "max_tokens": 1, "prompt": "what"} | change
    part = schema["paths"][TEXT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    status, _, _ = send(place, body, TEXT, Authorization="Bearer secret")
    assert status == (200 if right else 400)
    if right:
        check(schema, part, body)
    else:
        with pytest.raises(jsonschema.ValidationError):
            check(schema, part, body)


def test_answers_have_the_form_that_the_schema_gives(place, schema):
    key = {"Authorization": "Bearer secret"}

    def form(path, method, status="200"):
        operation = schema["paths"][path][method.lower()]
        return operation["responses"][status]["content"]["application/json"]["schema"]

    chat = {"model": "calm", "messages": QUESTION, "max_tokens": 4, "logprobs": True, "top_logprobs": 2, "user": "ana"}
    text = {"model": "base", "prompt": ["a", "b"], "max_tokens": 4, "logprobs": 2, "echo": True, "n": 2, "best_of": 3}
    for path, body in ((CHAT, chat), (TEXT, text)):
        status, answer, _ = send(place, body, path, **key)
        assert status == 200
        check(schema, form(path, "POST"), answer)
        for wrong, status in (({**body, "n": 0}, 400), ({**body, "model": "x"}, 404)):
            found, answer, _ = send(place, wrong, path, **key)
            assert found == status
            check(schema, form(path, "POST", "default"), answer)
    for path, name in (("/v1/models", ""), ("/v1/models/{name}", "calm"), ("/health", "")):
        status, answer, _ = send(place, None, path.replace("{name}", name), "GET", **key)
        assert status == 200
        check(schema, form(path, "GET"), answer)
    assert schema["paths"][CHAT]["post"]["security"] and "security" not in schema["paths"]["/health"]["get"]
