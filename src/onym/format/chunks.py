"""Boxes of a tensor: where they begin and end, how large they are, and which of its numbers they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Bounds = Sequence[tuple[int, int]]
"""Of a tensor, in each dimension: where a part of it begins, and where it ends."""


def all_of(shape: tuple[int, ...]) -> Bounds:
    """The box that is the whole tensor."""
    return [(0, size) for size in shape]


def size_of(box: Bounds) -> tuple[int, ...]:
    """Its shape."""
    return tuple(end - start for start, end in box)


def slices(box: Bounds) -> tuple[slice, ...]:
    """What a tensor is indexed with for it."""
    return tuple(slice(start, end) for start, end in box)


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor in one piece, in numbers."""
    return tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))


def span(box: Bounds, shape: tuple[int, ...]) -> tuple[int, int]:
    """Which of a tensor's numbers, one after the other, are those from the first to the last of a box."""
    if any(start == end for start, end in box):
        return 0, 0
    strides = strides_of(shape)
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    return first, first + sum((end - start - 1) * stride for (start, end), stride in zip(box, strides, strict=True)) + 1


def box_of(index: Any, shape: tuple[int, ...]) -> tuple[Bounds, tuple[int | slice, ...]] | None:
    """The box that an index asks for, and how the dimensions that it gives one number for are dropped from it afterwards.

    None for what is no box: masks, steps, new dimensions; and for what the tensor itself has to refuse.
    """
    given = index if isinstance(index, tuple) else (index,)
    if len(given) > len(shape):
        return None
    box: list[tuple[int, int]] = []
    dropped: list[int | slice] = []
    for each, size in zip([*given, *[slice(None)] * (len(shape) - len(given))], shape, strict=True):
        if type(each) is int and -size <= each < size:
            box.append((each % size, each % size + 1))
            dropped.append(0)
        elif isinstance(each, slice) and each.step in (None, 1):
            start, end, _ = each.indices(size)
            box.append((start, max(start, end)))
            dropped.append(slice(None))
        else:
            return None
    return box, tuple(dropped)
