"""The OpenAPI schema of a server, from its endpoints and the models that read their bodies."""

import re
from collections.abc import Sequence
from typing import Any

import pydantic
from pydantic.json_schema import JsonSchemaMode
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pjrlhf import __version__
from pjrlhf.serving.protocol import Body, ErrorBody
from pjrlhf.serving.service import Endpoint


def endpoint(endpoints: Sequence[Endpoint], key: bool) -> Endpoint:
    """/openapi.json, of endpoints that have a summary.

    Args:
      key: requests must bring an API key.
    """
    schema = schema_of(endpoints, key)

    async def show(request: Request) -> Response:
        return JSONResponse(schema)

    return Endpoint("GET", "/openapi.json", show, open=True)


def schema_of(endpoints: Sequence[Endpoint], key: bool) -> dict[str, Any]:
    """The schema in OpenAPI 3.1."""
    described = [one for one in endpoints if one.summary]
    modes: dict[Any, JsonSchemaMode] = {ErrorBody: "serialization"}
    modes |= {one.answer: "serialization" for one in described if one.answer is not None}
    modes |= {one.body: "validation" for one in described if one.body is not None}
    schemas, definitions = pydantic.TypeAdapter.json_schemas(
        [(kind, mode, pydantic.TypeAdapter(kind)) for kind, mode in modes.items()],
        ref_template="#/components/schemas/{model}",
    )

    def json_of(kind: Any) -> dict[str, Any]:
        return {"application/json": {"schema": schemas[kind, modes[kind]]}}

    paths: dict[str, Any] = {}
    for one in described:
        names = re.findall(r"{(\w+)", one.path)
        answers = json_of(one.answer) if one.answer is not None else {"text/plain": {"schema": {"type": "string"}}}
        if one.streams:
            answers |= {"text/event-stream": {}}  # OpenAPI 3.1 has no way to say what an event holds
        operation: dict[str, Any] = {
            "summary": one.summary,
            "responses": {
                "200": {"description": "Done", "content": answers},
                "default": {"description": "Not done; the message says why", "content": json_of(ErrorBody)},
            },
        }
        if names:
            text = {"type": "string", "minLength": 1}
            operation["parameters"] = [{"name": x, "in": "path", "required": True, "schema": text} for x in names]
        if one.query is not None:
            operation["parameters"] = [*operation.get("parameters", []), *_query(one.query)]
        if one.body is not None:
            operation["requestBody"] = {"required": not one.body.optional, "content": json_of(one.body)}
        if key and not one.open:
            operation["security"] = [{"key": []}]
        paths.setdefault(re.sub(r"{(\w+):\w+}", r"{\1}", one.path), {})[one.method.lower()] = operation
    components: dict[str, Any] = {"schemas": definitions.get("$defs", {})}
    if key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "pjrlhf serve", "version": __version__},
        "paths": paths,
        "components": components,
    }


def _query(model: type[Body]) -> list[dict[str, Any]]:
    """The parameters of a query."""
    schema = model.model_json_schema()
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": part}
        for name, part in schema["properties"].items()
    ]
