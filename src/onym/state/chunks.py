"""A chunk of a tensor, with the fields of DCP's ChunkStorageMetadata: the one type for a rectangular region, everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where a region of a tensor begins and how large it is, in each dimension.

    >>> chunk = Chunk((2, 0), (3, 4))
    >>> chunk.slices
    (slice(2, 5, None), slice(0, 4, None))
    >>> chunk.intersection(Chunk((0, 1), (4, 2)))
    Chunk(offsets=(2, 1), sizes=(2, 2))
    """

    offsets: Shape
    sizes: Shape

    @classmethod
    def full(cls, shape: Shape) -> Chunk:
        """All of a tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def ends(self) -> Shape:
        """The first index after it, in each dimension."""
        return tuple(map(int.__add__, self.offsets, self.sizes))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of it in its tensor."""
        return tuple(map(slice, self.offsets, self.ends))

    @property
    def is_empty(self) -> bool:
        """Whether it has no elements."""
        return 0 in self.sizes

    def is_within(self, shape: Shape) -> bool:
        """Whether a tensor of this shape has it."""
        return len(self.offsets) == len(self.sizes) == len(shape) and all(
            offset >= 0 <= size and offset + size <= whole
            for offset, size, whole in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def intersection(self, other: Chunk) -> Chunk:
        """The elements of both; empty where there are none."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        return Chunk(offsets, tuple(max(0, min(ends) - at) for at, *ends in zip(offsets, self.ends, other.ends, strict=True)))

    def relative_to(self, other: Chunk) -> Chunk:
        """The same elements, counted from where another chunk begins."""
        return Chunk(tuple(map(int.__sub__, self.offsets, other.offsets)), self.sizes)

    def span(self, shape: Shape) -> tuple[int, int]:
        """Its first element and the one after its last, in a contiguous tensor of this shape."""
        if self.is_empty:
            return 0, 0
        strides = contiguous_strides(shape)
        first = sum(map(int.__mul__, self.offsets, strides))
        return first, first + sum((size - 1) * stride for size, stride in zip(self.sizes, strides, strict=True)) + 1


def contiguous_strides(shape: Shape) -> Shape:
    """The strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))


def chunk_of_index(index: Any, shape: Shape) -> tuple[Chunk, tuple[int | slice, ...]] | None:
    """The chunk that an index selects, and the index that then drops the dimensions indexed by a number.

    None for what selects no chunk (masks, steps, new dimensions), and for what the tensor itself has to refuse.
    """
    given = index if isinstance(index, tuple) else (index,)
    if len(given) > len(shape):
        return None
    bounds: list[tuple[int, int]] = []
    dropped: list[int | slice] = []
    for each, size in zip([*given, *[slice(None)] * (len(shape) - len(given))], shape, strict=True):
        if type(each) is int and -size <= each < size:
            bounds.append((each % size, 1))
            dropped.append(0)
        elif isinstance(each, slice) and each.step in (None, 1):
            start, end, _ = each.indices(size)
            bounds.append((start, max(0, end - start)))
            dropped.append(slice(None))
        else:
            return None
    return Chunk(tuple(start for start, _ in bounds), tuple(size for _, size in bounds)), tuple(dropped)
