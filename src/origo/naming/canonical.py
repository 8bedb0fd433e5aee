"""The walk: a name as the wrapped model writes it <-> the name that the model's author gave.

A name from ``state_dict()`` is followed through the modules, segment by segment. Where a wrapper stands, the segment that
the wrapper added is dropped; where a real module stands, the segment is kept. So what is dropped depends on the type of the
object that stands there, never on how a segment is spelled: a real attribute called ``module`` or ``_orig_mod`` keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from origo.errors import ConfigError
from origo.naming.wrappers import wrapper_of, wrapper_prefixes


@dataclass
class _Place:
    """Where a prefix of a raw name leads: the module there, and the canonical prefix with its trailing dot."""

    module: nn.Module | None  # None past a name that a state-dict hook made up: no module stands there
    canonical: str


def canonical_names(model: nn.Module, raw_names: Iterable[str]) -> dict[str, str]:
    """Map names as ``model.state_dict()`` gives them to canonical ones, in the same order.

    Raises:
        ConfigError: two names come out the same.

    >>> import torch
    >>> model = torch.compile(nn.Sequential(nn.Linear(1, 1)))
    >>> canonical_names(model, model.state_dict())
    {'_orig_mod.0.weight': '0.weight', '_orig_mod.0.bias': '0.bias'}
    """
    places: dict[str, _Place] = {}

    def place_of(prefix: str) -> _Place:
        """The place that ``prefix``, with its trailing dot, leads to; found once for all names that share it."""
        if prefix not in places:
            if not prefix:
                places[prefix] = _Place(model, "")
            else:
                parent, segment = _split_last(prefix[:-1])
                places[prefix] = _step(place_of(parent), segment)
        return places[prefix]

    names: dict[str, str] = {}
    for raw in raw_names:
        prefix, leaf = _split_last(raw)
        names[raw] = place_of(prefix).canonical + leaf
    if len(set(names.values())) < len(names):
        first: dict[str, str] = {}
        raw, canonical = next((raw, name) for raw, name in names.items() if first.setdefault(name, raw) != raw)
        raise ConfigError(
            f"{first[canonical]!r} and {raw!r} would both be called {canonical!r}: a wrapper has a parameter or child of the "
            "same name as the model inside it. Rename it in the wrapper."
        )
    return names


def recover_names(foreign: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Match names that wrappers have polluted to a model's canonical names.

    Two names match when they are equal once every segment that a wrapper could have added is left out of both. A name that
    matches none, or that shares its match with another one, is not in the result.

    >>> recover_names(["_orig_mod.module.0.weight"], ["0.weight", "0.bias"])
    {'_orig_mod.module.0.weight': '0.weight'}
    """
    prefixes = wrapper_prefixes()

    def by_skeleton(names: Iterable[str]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in names:
            segments = name.split(".")
            skeleton = [segment for segment in segments[:-1] if segment not in prefixes] + segments[-1:]
            groups.setdefault(".".join(skeleton), []).append(name)
        return groups

    known_groups = by_skeleton(known)
    return {
        group[0]: known_groups[skeleton][0]
        for skeleton, group in by_skeleton(foreign).items()
        if len(group) == 1 and len(known_groups.get(skeleton, ())) == 1
    }


def _step(place: _Place, segment: str) -> _Place:
    """One segment further from ``place``."""
    module = place.module
    while module is not None and (wrapper := wrapper_of(module)) is not None:
        inner = module._modules[wrapper.inner]
        if not wrapper.hides_prefix:
            if segment == wrapper.inner:
                return _Place(inner, place.canonical)
            break
        module = inner  # its hooks took the segment out already
    return _Place(None if module is None else module._modules.get(segment), f"{place.canonical}{segment}.")


def _split_last(name: str) -> tuple[str, str]:
    """``"a.b.c"`` as ``("a.b.", "c")``."""
    head, dot, leaf = name.rpartition(".")
    return head + dot, leaf
