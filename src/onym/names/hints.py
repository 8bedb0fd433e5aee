"""What a model family adds to a diagnosis: the names of its configuration's fields, and whose names a file has.

Registered from outside; without any, a diagnosis speaks of sizes alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from onym.names.families import load_families

Size = Literal["blocks", "vocabulary", "context", "width", "qkv_bias", "bias"]
"""What a diagnosis can find to differ."""


@dataclass(frozen=True)
class Hints:
    """Of one model family."""

    sign: str
    """A regular expression that matches the start of some parameter's name in every model of the family."""
    fields: Mapping[Size, str] = field(default_factory=dict)
    """What its configuration calls these sizes: ``{"blocks": "n_layers"}``."""
    layouts: Mapping[str, str] = field(default_factory=dict)
    """Whose names these are, as "the book's GPTModel", and a regular expression that finds one of them."""


_HINTS: list[Hints] = []


def register_hints(hints: Hints) -> None:
    """Let diagnoses speak of a family's configuration by its own names."""
    if hints not in _HINTS:
        _HINTS.append(hints)


def field_of(size: Size, names: Iterable[str]) -> str | None:
    """What the configuration of the model with these parameters calls a size; None where no family claims it."""
    load_families()
    names = list(names)
    for hints in _HINTS:
        if size in hints.fields and any(re.match(hints.sign, name) for name in names):
            return hints.fields[size]
    return None


def layout_of(names: Iterable[str]) -> str | None:
    """Whose names these are, in words; None where no family knows them."""
    load_families()
    names = list(names)
    layouts = ((title, sign) for hints in _HINTS for title, sign in hints.layouts.items())
    return next((title for title, sign in layouts if any(re.search(sign, name) for name in names)), None)
