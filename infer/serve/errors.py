"""Errors of the API in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from infer.service import QueueFull
from model.errors import InputError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "overloaded_error"}


class ErrorBody(msgspec.Struct):
    """What was wrong; param: the field of the request, such as "messages[0].content"."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct):
    """The body of every response whose status is 400 or above."""

    error: ErrorBody


class ApiError(Exception):
    """An error that the client is told.

    type: by default that of the status. param: the field of the request that was wrong. code: a name for programs, such
    as "context_length_exceeded". retry_after: seconds after which the client should try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        default = "server_error" if status >= 500 else "invalid_request_error"
        self.status, self.retry_after = status, retry_after
        self.body = ErrorBody(message, type or _TYPES.get(status, default), param, code)
        self.headers = dict(headers or {})

    def encode(self) -> bytes:
        """Return the JSON of the body."""
        return msgspec.json.encode(ErrorResponse(self.body))

    def response(self) -> Response:
        """Return the response, with Retry-After in whole seconds."""
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after)))
        return Response(self.encode(), self.status, headers, "application/json")


def as_api_error(error: Exception) -> ApiError:
    """Return the error that a client is told about an exception: nothing of an unexpected one but that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, QueueFull):
        return ApiError(429, f"the server is busy: {error}", code="queue_full", retry_after=error.retry_after)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=error.headers)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


async def respond(request: Request, error: Exception) -> Response:
    """Answer with an exception: the handler of all of them."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        allowed = (error.headers or {}).get("Allow")
        what = "there is no" if error.status_code == 404 else "wrong method:"
        hint = f"; allowed are {allowed}" if allowed else "; /openapi.json lists all paths"
        message = f"{what} {request.method} {request.url.path}{hint}"
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()
    return as_api_error(error).response()


HANDLERS = dict.fromkeys((ApiError, InputError, QueueFull, HTTPException, Exception), respond)
"""For `Starlette(exception_handlers=…)`."""
