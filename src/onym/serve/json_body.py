"""Answers as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


def to_json(values: Any) -> bytes:
    """For every reader of JSON: ASCII alone, so that half a surrogate pair is no error, and null for NaN and inf."""
    try:
        text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(values), allow_nan=False, separators=(",", ":"))
    return text.encode()


def json_response(values: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer with these values as its body; nothing may store it."""
    return json_bytes_response(to_json(values), status, headers)


def json_bytes_response(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """The same of what :func:`to_json` made, maybe in another thread."""
    return Response(body, status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
