"""What the commands that tell something share: plain tables, ages, and one JSON object instead."""

from __future__ import annotations

import json
import math
import time
from calendar import timegm
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from origo.store import remote


def print_json(values: Mapping[str, Any]) -> None:
    """One object on standard output; numbers that JSON cannot hold become texts."""
    print(json.dumps(_plain(values), indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def print_table(rows: Sequence[Sequence[str]], indent: str = "  ") -> None:
    """Columns as wide as they have to be; nothing is cut off."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print((indent + "  ".join(cells)).rstrip())


def print_facts(facts: Mapping[str, str | None]) -> None:
    """Names and values, those that are None left out."""
    print_table([(name, value) for name, value in facts.items() if value])


def age(written: str | None) -> str:
    """How long ago a time of a manifest was, in words."""
    try:
        seconds = time.time() - timegm(time.strptime(written or "", "%Y-%m-%dT%H:%M:%SZ"))
    except ValueError:
        return "?"
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def bytes_of(path: Path, names: Sequence[str]) -> int:
    """How large some files of a folder are together."""
    return sum(remote.size(path / name) if remote.is_remote(path) else (path / name).stat().st_size for name in names)
