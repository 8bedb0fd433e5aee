"""Whether compiling pays: what it costs once, against what it saves a step, over the steps that are to come.

    1. a step is timed as the model is written
    2. what compiling costs and saves is known from the last run of this shape here, or else assumed from what was measured
       elsewhere (docs/performance.md)
    3. the way with the largest gain is chosen; where none gains anything, the model is not compiled. Half of a cost counts: the
       code is cached, and the next run, or this one when it continues, finds it
    4. what it did cost and save is reported, and remembered for the next run

What is remembered decides nothing but time. A run continues as it began: another way rounds otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from onym.compile.cache import root
from onym.compile.in_place import Compilation, How
from onym.storage.paths import replace_file

_FILE = "costs.json"
_MOST_SHAPES = 200
_COUNTS = 0.5  # the part of a cost that this run has to earn back
_WARM = 0.15  # of a cold start's time, where the code is found: 0.10 to 0.13 of it (docs/performance.md)
_COLD_SECONDS = 8.0  # what takes longer was compiled, not found


@dataclass(frozen=True)
class Costs:
    """What compiling costs and gives."""

    seconds: float
    """Once, to the end of the first step."""
    saved: float
    """Share of a step's forward and backward passes."""


# On two idle cores, micro and nano: 31 to 34 s and 0.21 to 0.35, 52 s on a slower day, 63 s with AVX2 alone; blocks 23 s and
# 0.05. The middle is assumed. A GPU's are those of the book's ladder and other projects' reports, not tried here.
_ASSUMED: dict[bool, dict[How, Costs]] = {
    True: {"whole": Costs(48.0, 0.25), "blocks": Costs(35.0, 0.05)},
    False: {"whole": Costs(45.0, 0.18), "blocks": Costs(20.0, 0.12)},
}


def choose(
    steps: int, eager_seconds: float, on_cpu: bool, known: Mapping[How, Costs], ways: Sequence[How] = ("whole", "blocks")
) -> How:
    """How to compile for ``steps`` more steps, each of which takes ``eager_seconds`` without: one of ``ways``, or not at all.

    >>> choose(2000, 0.5, True, {}), choose(20, 0.5, True, {})
    ('whole', 'off')
    >>> choose(200, 0.5, True, {"whole": Costs(4.0, 0.25)})  # its code is there already
    'whole'
    """
    costs = {**_ASSUMED[on_cpu], **known}
    left: dict[How, float] = {
        how: steps * eager_seconds * each.saved - _COUNTS * each.seconds for how, each in costs.items() if how in ways
    }
    best = max(left, key=lambda how: left[how])
    return best if left[best] > 0 else "off"


def recall(shape: Mapping[str, Any]) -> dict[How, Costs]:
    """What is known of this shape on this machine."""
    found = _read().get(_name(shape), {})
    return {how: Costs(**found[how]) for how in ("whole", "blocks") if how in found}


def remember(shape: Mapping[str, Any], compilation: Compilation) -> None:
    """For the next run, what did save something: the rest may have been a busy machine, and nobody would try again.

    A cache that cannot be written is no reason to stop.
    """
    if not compilation.compiled or not compilation.saved_seconds > 0:
        return
    all_known = _read()
    saved = compilation.saved_seconds / compilation.eager_seconds
    seconds = seconds_next_time(compilation.seconds)
    known = {**all_known.pop(_name(shape), {}), compilation.how: asdict(Costs(seconds, saved))}
    newest = dict(list(all_known.items())[-_MOST_SHAPES:])
    with suppress(Exception):
        root().mkdir(parents=True, exist_ok=True)
        replace_file(root() / _FILE, json.dumps({**newest, _name(shape): known}))


def seconds_next_time(seconds: float) -> float:
    """Of what took so many seconds: what was compiled now is found the next time.

    >>> seconds_next_time(40.0), seconds_next_time(5.0)
    (6.0, 5.0)
    """
    return seconds * (_WARM if seconds > _COLD_SECONDS else 1.0)


def _read() -> dict[str, Any]:
    try:
        values = json.loads((root() / _FILE).read_text(encoding="utf-8"))
        assert all(isinstance(each["seconds"] + each["saved"], float) for known in values.values() for each in known.values())
    except (OSError, ValueError, AssertionError, AttributeError, KeyError, TypeError):
        return {}
    return dict(values)


def _name(shape: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
