"""What a format says of itself: how it is recognised, which of its tensors are which of ours, what its settings mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onym.convert.mapping import Rule, Shape
from onym.convert.sources import Contents
from onym.gpt.config import GPTConfig


@dataclass(frozen=True)
class NamedShapes:
    """What has to be recognised: an opened file or folder, its names without wrappers."""

    contents: Contents
    shapes: Mapping[str, Shape]
    """By name, wrappers left out."""

    @property
    def names(self) -> list[str]:
        """Names without wrappers."""
        return list(self.shapes)

    def shape(self, *names: str) -> Shape | None:
        """Of the first of these that is there."""
        return next((self.shapes[name] for name in names if name in self.shapes), None)

    def has(self, pattern: str) -> bool:
        """Whether a whole name matches a regular expression."""
        return any(re.fullmatch(pattern, name) for name in self.shapes)


@dataclass(frozen=True)
class Stated:
    """What a format's own settings say of the model."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a GPTConfig."""
    source: str = ""
    """Where that stands, as ``config.json``."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Our field -> what they call it."""
    not_ours: str | None = None
    """Where the settings ask for another model than a GPT-2, which part."""


@dataclass(frozen=True)
class Format:
    """One layout of somebody's GPT."""

    name: str
    """For ``--to`` and reports."""
    title: str
    """In a sentence: "nanoGPT's GPT"."""
    recognise: Callable[[NamedShapes], str | None]
    """By what it is known, in words; None where it is not this one."""
    rules: tuple[Rule, ...] = ()
    """Their tensors and ours. None where the architecture is another one."""
    stated: Callable[[NamedShapes], Stated] = lambda found: Stated()
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that hold nothing learned: masks."""
    prefix: str = ""
    """A segment that all its names may have or lack."""
    not_ours: str | None = None
    """Which part of the architecture a GPT-2 does not have, where that is sure from the layout."""
    always_tied: bool = False
    """Whether its model has one matrix for both ends, whatever a file holds."""
    lacks: Callable[[GPTConfig], dict[str, str]] = lambda config: {}
    """What it cannot hold of a model: a word for ``--drop``, and a sentence."""
    biases: Callable[[GPTConfig], list[str]] = lambda config: []
    """The modules that need a bias there and have none here; zeros do not change what they compute."""
