"""The OpenAPI document, generated from the endpoints and their types."""

import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from infer.serve.endpoint import Endpoint
from infer.serve.errors import ErrorResponse

_PLACE = "#/components/schemas/{name}"
_ERRORS = {
    400: "The request is wrong.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or object.",
    413: "The body is too large.",
    429: "The queue is full; try again after Retry-After.",
    500: "The server failed.",
    503: "The server is shutting down.",
}


def document(endpoints: Sequence[Endpoint], *, keys: bool) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document. keys: requests must carry an API key."""
    types = [ErrorResponse]
    for endpoint in endpoints:
        given = (endpoint.request, endpoint.response, endpoint.events, *endpoint.query.values())
        types += [kind for kind in given if kind is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template=_PLACE)
    schema_of = dict(zip(map(_key, types), schemas, strict=True))
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        path = re.sub(r"{(\w+):\w+}", r"{\1}", endpoint.path)  # Starlette's {model:path}
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, schema_of)
    result: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "isoflop serve", "version": importlib.metadata.version("isoflop")},
        "paths": paths,
        "components": {"schemas": components},
    }
    if keys:
        result["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        result["security"] = [{"key": []}]
    return result


def endpoint_of(endpoints: Sequence[Endpoint], *, keys: bool) -> Endpoint:
    """Return the endpoint of the document, /openapi.json, in which it stands too."""

    async def answer(request: Request, body: None) -> Response:
        return Response(encoded, media_type="application/json")

    own = Endpoint("GET", "/openapi.json", answer, "This document.", response=dict[str, Any])
    encoded = msgspec.json.encode(document([*endpoints, own], keys=keys))
    return own


def _operation(endpoint: Endpoint, schema_of: dict[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {endpoint.media_type: {}}
    if endpoint.response is not None:
        content[endpoint.media_type]["schema"] = schema_of[_key(endpoint.response)]
    elif not endpoint.media_type.startswith("application/json"):
        content[endpoint.media_type]["schema"] = {"type": "string"}
    if endpoint.events is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}, "itemSchema": schema_of[_key(endpoint.events)]}
    responses: dict[str, Any] = {str(endpoint.status): {"description": "Success.", "content": content}}
    error = {"application/json": {"schema": schema_of[_key(ErrorResponse)]}}
    for status in sorted({*endpoint.errors, 400}):
        responses[str(status)] = {"description": _ERRORS.get(status, "An error."), "content": error}
    responses["default"] = {"description": "An error.", "content": error}
    operation: dict[str, Any] = {"summary": endpoint.summary, "responses": responses}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)", endpoint.path)
    ]
    parameters += [
        {"name": name, "in": "query", "schema": schema_of[_key(kind)]} for name, kind in endpoint.query.items()
    ]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.request is not None:
        schema = schema_of[_key(endpoint.request)]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _key(kind: Any) -> str:
    """Return a hashable name of a type; two spellings of a union are two types."""
    return repr(kind)
