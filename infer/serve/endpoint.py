"""One record per operation of the API, from which its route and its part of the OpenAPI document are made."""

import dataclasses
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from infer.serve.errors import ApiError

Body = TypeVar("Body")
_ENCODER = msgspec.json.Encoder()
_MOST_IGNORED = 20  # names in the header


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An operation: a method on a path.

    handler: async (request, body) → a Struct or other value that is sent as JSON, or a Response. body: the request's
    JSON as `request`, None if that is None. response: the type of that JSON; None: the body is a text of `media_type`.
    events: the type of the JSON in server-sent events, for operations that stream on request. query: names of
    parameters in the URL's query, and their types. status: of a success. errors: statuses of errors beside 400, which
    are always in the document, for whoever reads it.

    A type of a request may have a class variable `refused`, {name of a known field that is not supported: the value
    that changes nothing}. Any other value is refused by name.
    """

    method: str
    path: str
    handler: Callable[[Request, Any], Awaitable[Any]]
    summary: str
    request: Any = None
    response: Any = None
    events: Any = None
    query: Mapping[str, type] = dataclasses.field(default_factory=dict)
    media_type: str = "application/json"
    status: int = 200
    errors: tuple[int, ...] = ()

    def route(self) -> Route:
        """Return the route for Starlette."""

        async def call(request: Request) -> Response:
            body, ignored = None, list[str]()
            if self.request is not None:
                body, ignored = decode(await request.body(), self.request)
            answer = await self.handler(request, body)
            response = answer if isinstance(answer, Response) else json_response(answer, self.status)
            if ignored:
                response.headers["x-isoflop-ignored"] = _header(ignored)
            return response

        return Route(self.path, call, methods=[self.method], name=f"{self.method} {self.path}")


def json_response(value: Any, status: int = 200) -> Response:
    """Return a Struct, or anything that msgspec encodes, as JSON."""
    return Response(_ENCODER.encode(value), status, media_type="application/json")


def decode(data: bytes, kind: type[Body]) -> tuple[Body, list[str]]:
    """Return the JSON as this type, and the names of its fields that the type does not have, such as "messages[0].x".

    Raises ApiError 400 with the field's name if the JSON is malformed or has other types, or a refused field.
    """
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = "it is empty" if not data.strip() else str(error) or "it is nested too deeply"
        raise ApiError(400, f"the body is not valid JSON: {what}", code="invalid_json") from error
    if isinstance(raw, dict):
        for name, harmless in getattr(kind, "refused", {}).items():
            if raw.get(name) is not None and raw[name] != harmless:
                raise ApiError(
                    400, f"{name} is not supported here; leave it out", param=name, code="unsupported_parameter"
                )
    try:
        value = msgspec.convert(raw, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _of_validation(str(error), raw) from error
    return value, list(_unknown(raw, value))


def _of_validation(message: str, raw: Any) -> ApiError:
    """Return msgspec's "Expected `int`, got `str` - at `$.n`" with the field's name and value first."""
    what, _, where = message.rpartition(" - at `$") if " - at `$" in message else (message, "", "")
    param = where.rstrip("`").removeprefix(".") or None
    if "missing required field" in what:
        missing = what.rsplit("`", 2)[-2]
        param = f"{param}.{missing}" if param else missing
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    given = ""
    if param in (raw if isinstance(raw, dict) else ()) and isinstance(raw[param], int | float | str):
        given = f"={json.dumps(raw[param])[:40]}"
    what = what[:1].lower() + what[1:]
    return ApiError(400, f"{param or 'the body'}{given}: {what}", param=param, code="invalid_type")


def _unknown(raw: Any, value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of keys in `raw` that the Struct made from it does not have."""
    if isinstance(value, msgspec.Struct) and isinstance(raw, dict):
        fields = {field.encode_name: field.name for field in msgspec.structs.fields(value)}
        for key, part in raw.items():
            if part is None:
                continue
            if key in fields:
                yield from _unknown(part, getattr(value, fields[key]), f"{path}{key}.")
            elif key not in getattr(value, "refused", {}):
                yield f"{path}{key}"
    elif isinstance(value, list) and value and isinstance(value[0], msgspec.Struct):
        for index, (part, one) in enumerate(zip(raw, value, strict=True)):
            yield from _unknown(part, one, f"{path.removesuffix('.')}[{index}].")


def _header(names: list[str]) -> str:
    """Return names, which the client chose, as the value of a header: printable ASCII of limited length."""
    shown = [json.dumps(name)[1:-1][:80] for name in names[:_MOST_IGNORED]]
    return ", ".join([*shown, "..."] if len(names) > len(shown) else shown)
