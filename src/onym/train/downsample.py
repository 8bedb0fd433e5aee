"""A long curve as few points that look like it: no spike is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def downsample(y: Values, points: int) -> NDArray[np.intp]:
    """Which values of a curve to draw: the first, the last, and of each bucket between them the least and the greatest.

    Args:
        y: finite values, in their order.
        points: the most that are chosen; at least 2.

    Returns:
        Indices in ascending order; all where ``y`` is not longer than ``points``.

    >>> downsample(np.array([0.0, 1, 9, 1, 1, 1, -9, 1, 2]), 6).tolist()
    [0, 1, 2, 5, 6, 8]
    """
    if len(y) <= points:
        return np.arange(len(y))
    buckets, inner = (points - 2) // 2, y[1:-1]
    if not buckets:
        return np.array([0, len(y) - 1])
    size = -(-len(inner) // buckets)
    full = len(inner) // size
    rows = inner[: full * size].reshape(full, size)
    starts = np.arange(full) * size + 1
    chosen: list[Any] = [[0, len(y) - 1], starts + rows.argmin(axis=1), starts + rows.argmax(axis=1)]
    if len(rest := inner[full * size :]):
        chosen.append(full * size + 1 + np.array([rest.argmin(), rest.argmax()]))
    return np.unique(np.concatenate(chosen))


def visible(x: Values, start: float | None, end: float | None) -> slice:
    """The part of a curve between two values of x, with the points next to it, so that a line leaves the picture at its edges.

    Args:
        x: ascending; where it is not, a value counts as the greatest so far.

    >>> visible(np.array([0.0, 10, 20, 30, 40]), 12, 25)
    slice(1, 4, None)
    """
    if start is None and end is None:
        return slice(0, len(x))
    ascending = np.maximum.accumulate(x)
    first = 0 if start is None else int(np.searchsorted(ascending, start, "left")) - 1
    last = len(x) if end is None else int(np.searchsorted(ascending, end, "right")) + 1
    return slice(max(0, first), min(len(x), last))
