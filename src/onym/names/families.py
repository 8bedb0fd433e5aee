"""Model families register themselves with the library: their architecture, their formats, their hints for diagnoses.

A program calls :func:`onym.register_architecture` and :func:`onym.register_format`. An installed package names a function that
makes these calls as an entry point of the group ``onym.families``; it is called when the first file or model has to be
recognised. Onym's own GPT does the same.
"""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import entry_points

FAMILIES = "onym.families"
"""The group of entry points by which packages register their model families."""


@functools.cache
def load_families() -> None:
    """Let every installed model family register itself, once. One that fails is skipped with a warning."""
    for family in entry_points(group=FAMILIES):
        try:
            family.load()()
        except Exception as error:
            warnings.warn(f"The model family {family.name!r} ({family.value}) cannot be loaded: {error}", stacklevel=2)
