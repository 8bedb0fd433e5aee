"""A source of text as it was asked for, on the command line: its name, its share, and where it is.

Imports neither torch nor numpy, because the options do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from onym.errors import ConfigError

PERIOD = 4096
"""Sequences in which each source of a mixture has its exact share."""


@dataclass(frozen=True)
class SourceSpec:
    """One source as it was asked for.

    >>> SourceSpec.parse("code:0.3:data/code")
    SourceSpec(name='code', weight=0.3, data=('data/code',))
    """

    name: str
    weight: float
    data: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> SourceSpec:
        """A source of ``--mix``, ``NAME:WEIGHT:PATH``.

        Raises:
            ConfigError: it is none.
        """
        name, weight, path = (*text.split(":", 2), "", "")[:3]
        try:
            share = float(weight)
        except ValueError:
            share = 0.0
        plain = name and name.isprintable() and not name.startswith(".") and not set(name) & set("/\\")
        if not plain or not path or not 0 < share < float("inf"):
            raise ConfigError(
                f"--mix '{text}' is no source: give its name, its weight (more than 0) and its path, as in web:0.7:data/web."
            )
        return cls(name, share, (path,))
