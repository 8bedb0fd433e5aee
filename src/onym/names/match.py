"""Names that somebody else's wrappers have polluted, matched to those of a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

from onym.names.wrappers import wrapper_prefixes

_MOST_WRAPPERS = 12  # in one name; the ways to leave some out double with each


def recover_names(foreign: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Match names that wrappers have polluted to a model's canonical names.

    Wrappers only ever add segments, so a name is matched by leaving out some of those that a wrapper could have added. Where
    all names share such segments at their start, these are the wrappers of the root, and go first.

    Args:
        foreign: all names of the file. A name that the model has too may still be another one's with a wrapper's segment more,
            so those that fit as they are have to be given as well.
        known: all names of the model.

    Returns:
        Foreign name -> known name. One that is right as it is, that matches none or more than one, or that shares its match
        with another one, is left out; where all that match say what is around the root, the others are given without it too.

    >>> recover_names(["_orig_mod.module.0.weight"], ["0.weight", "0.bias"])
    {'_orig_mod.module.0.weight': '0.weight'}
    >>> recover_names(["_orig_mod.0.weight", "_orig_mod.0.scale"], ["0.weight", "0.bias"])
    {'_orig_mod.0.weight': '0.weight', '_orig_mod.0.scale': '0.scale'}
    """
    foreign, known_names, prefixes = list(foreign), set(known), wrapper_prefixes()
    if known_names.issuperset(foreign):
        return {}
    roots = [""]  # ever longer: the wrappers that may be around the root
    while foreign and (shared := _shared_segment(foreign, roots[-1])) in prefixes:
        roots.append(f"{roots[-1]}{shared}.")
        if all(name.removeprefix(roots[-1]) in known_names for name in foreign):
            return {name: name.removeprefix(roots[-1]) for name in foreign}

    matches: dict[str, list[str]] = {}
    for name in foreign:
        found = known_names.intersection({name, *_without_some(name, prefixes)})
        if len(found) == 1:
            matches.setdefault(found.pop(), []).append(name)
    matched = {names[0]: match for match, names in matches.items() if len(names) == 1}
    for root in roots[1:]:
        if matched and all(name.removeprefix(root) == match for name, match in matched.items()):
            return {name: name.removeprefix(root) for name in foreign}
    return {name: match for name, match in matched.items() if name != match}


def renamed_state(state: Mapping[str, Any], names: Mapping[str, str]) -> OrderedDict[str, Any]:
    """A state dict under other names, with the layout versions of its modules, which PyTorch stores in ``_metadata``."""
    out: OrderedDict[str, Any] = OrderedDict((names.get(name, name), value) for name, value in state.items())
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, Mapping):
        modules = {name.rpartition(".")[0]: new.rpartition(".")[0] for name, new in names.items()}
        out._metadata = OrderedDict((modules.get(path, path), version) for path, version in versions.items())  # type: ignore[attr-defined]
    return out


def _without_some(name: str, prefixes: frozenset[str]) -> Iterator[str]:
    """``name`` without one or more of the segments that a wrapper could have added."""
    segments = name.split(".")
    removable = [index for index, segment in enumerate(segments[:-1]) if segment in prefixes]
    if len(removable) > _MOST_WRAPPERS:
        return
    for count in range(1, len(removable) + 1):
        for removed in combinations(removable, count):
            yield ".".join(segment for index, segment in enumerate(segments) if index not in removed)


def _shared_segment(names: list[str], root: str) -> str | None:
    """The segment after ``root`` that all names have, if they have one in common."""
    segments = {name.removeprefix(root).partition(".")[0] for name in names}
    return segments.pop() if len(segments) == 1 else None
