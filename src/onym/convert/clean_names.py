"""Names without what wrappers added to them, where there is no model to look at.

Some segments no author gives to an attribute (``_orig_mod``); they go wherever they are. Others somebody may have meant
(``module``, ``model``); they go where every name begins with them, or where a known layout appears without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from onym.errors import CheckpointError
from onym.names.wrappers import AVERAGE_COUNTER, wrapper_prefixes

_ROOTS = ("module", "model")  # what DDP, Lightning modules and many trainers call the model inside


def clean_names(
    names: Iterable[str], *, thorough: bool = False, roots: Collection[str] = _ROOTS
) -> tuple[dict[str, str], dict[str, int]]:
    """Stored name -> name without wrappers, and how often each wrapper's segment was removed.

    Args:
        names: all names of the file.
        thorough: remove ``module`` and ``model`` wherever they are.
        roots: what is removed where every name begins with it.

    Raises:
        CheckpointError: two tensors would have one name.

    >>> clean_names(["module._orig_mod.h.weight", "module._orig_mod.h.bias"])
    ({'module._orig_mod.h.weight': 'h.weight', 'module._orig_mod.h.bias': 'h.bias'}, {'module': 2, '_orig_mod': 2})
    """
    everywhere = {prefix for prefix in wrapper_prefixes() if prefix.startswith("_")} | (set(_ROOTS) if thorough else set())
    removed: Counter[str] = Counter()
    split: dict[str, list[str]] = {}
    for name in names:
        *path, last = name.split(".")
        split[name] = [*(segment for segment in path if segment not in everywhere), last]
        removed.update(segment for segment in path if segment in everywhere)
    counted = [segments for segments in split.values() if segments[-1] != AVERAGE_COUNTER]
    while counted and counted[0][0] in roots and all(len(each) > 1 and each[0] == counted[0][0] for each in counted):
        removed[counted[0][0]] += len(counted)
        for segments in counted:
            del segments[0]
    cleaned = {name: ".".join(segments) for name, segments in split.items()}
    taken: dict[str, str] = {}
    for name, clean in cleaned.items():
        if taken.setdefault(clean, name) != name:
            raise CheckpointError(
                f"{taken[clean]!r} and {name!r} would both be {clean!r}: the file holds two models, or one of them twice. Save "
                "the one that is wanted by itself."
            )
    ordered = ["module", "model", *sorted(removed)]
    return cleaned, {segment: removed[segment] for segment in dict.fromkeys(ordered) if removed[segment]}
