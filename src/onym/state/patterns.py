"""Names that are chosen by patterns, as ``skip_mismatched=["head.*"]``."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from onym.errors import ConfigError, nearest
from onym.names.mismatch import Cause, Described, Differences, clip

_SHOWN = 3


def require_patterns(patterns: str | Iterable[str], names: Iterable[str]) -> list[str]:
    """The patterns as a list, each of which matches one of the names.

    Raises:
        ConfigError: one matches none, which is a misspelling.
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    known = list(names) if given else []
    for pattern in given:
        if not isinstance(pattern, str):
            raise ConfigError(f'skip_mismatched takes names and patterns of names, as ["head.*"], not {pattern!r}.')
        if not any(matches([pattern], name) for name in known):
            parts = {name[:end] for name in known for end, each in enumerate(f"{name}.") if each == "."}
            raise ConfigError(
                f"skip_mismatched has {pattern!r}, which is no name of the model's{nearest(pattern.rstrip('.*'), parts)}."
            )
    return given


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the patterns is the name, a module that it is in, or matches it (``*``, ``?``)."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def skipping(differences: Differences, model: Described) -> list[Cause]:
    """What ``skip_mismatched`` would do, where most of a model's tensors have the stored shapes."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in differences.shapes))
    if not modules or 2 * len(differences.shapes) > len(model) or len(modules) > _SHOWN:
        return []
    patterns = [f"{module}.*" if module else name for module, name in zip(modules, differences.shapes, strict=False)]
    shown = ", ".join(f'"{clip(pattern)}"' for pattern in patterns)
    return [Cause(f"Or skip_mismatched=[{shown}] loads all others and leaves these as the model built them.", 0)]
