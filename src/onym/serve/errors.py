"""What went wrong with a request: an HTTP status, and a body as OpenAI's clients read it."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response

from onym.serve.json_body import json_response

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP.
        message: one sentence with a remedy.
        type: of the body; that of the status by default.
        param: the field of the request that it is about.
        code: what programs tell errors apart by, as ``context_length_exceeded``.
        headers: further ones of the answer, as ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, object]:
        """The body, also that of an event in mid-stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def error_response(error: ApiError) -> Response:
    """The answer."""
    return json_response(error.to_dict(), error.status, error.headers)
