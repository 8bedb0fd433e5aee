"""chunks.json: which chunks make up a tensor, found again in any layout, refused where they do not, and small."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onym.errors import CheckpointError
from onym.format.chunk_index import ChunkIndex, ShardedTensor
from onym.format.layout import Layout, Shard, shard_file
from onym.format.manifest import MODEL, FileEntry, Manifest
from onym.format.rank_files import ShardTable, WrittenChunk, assemble
from onym.state.chunks import Chunk

Shape = tuple[int, ...]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Shape, Layout]:
    """A shape, and a grid that divides it anywhere; each chunk is some rank's."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
    bounds = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))}) for size in shape]
    grid = itertools.product(*(itertools.pairwise(each) for each in bounds))
    chunks = [Chunk(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in grid]
    shards = [Shard(draw(st.integers(0, 3)), chunk) for chunk in chunks]
    return shape, Layout(tuple(sorted(shards, key=lambda shard: shard.chunk.offsets)))


def manifest_of(index: ChunkIndex) -> Manifest:
    return Manifest(dict.fromkeys(index.files, FileEntry(1, "0" * 64, 1)), {})


@given(layouts(), st.data())
def test_a_chunk_is_found_in_the_shards_that_have_elements_of_it(cut: tuple[Shape, Layout], data: st.DataObject) -> None:
    shape, layout = cut
    assert layout.problem(shape) is None
    bounds = [tuple(sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in shape]
    found = list(layout.overlapping(Chunk(tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))))
    wanted = [
        shard
        for shard in layout.shards
        if all(
            max(a, at) < min(b, at + size)
            for (a, b), at, size in zip(bounds, shard.chunk.offsets, shard.chunk.sizes, strict=True)
        )
    ]
    assert found == wanted


@given(layouts(), st.data())
def test_a_layout_that_is_not_all_of_it_is_refused(cut: tuple[Shape, Layout], data: st.DataObject) -> None:
    shape, layout = cut
    at = data.draw(st.integers(0, len(layout.shards) - 1))
    assert Layout((*layout.shards[:at], *layout.shards[at + 1 :])).problem(shape) is not None
    if shape and len(layout.shards) > 1:
        doubled = list(layout.shards)
        doubled[at] = doubled[at - 1]
        assert Layout(tuple(doubled)).problem(shape) is not None


@given(layouts(), layouts())
def test_what_is_written_is_read(one: tuple[Shape, Layout], other: tuple[Shape, Layout]) -> None:
    named = {
        "a": ShardedTensor("float32", *one, ("tied", "too")),
        "b": ShardedTensor("bfloat16", *other),
        "c": ShardedTensor("float32", one[0], Layout(tuple(one[1].shards))),  # equal, not the same object
    }
    index = ChunkIndex({MODEL: named, "empty.safetensors": {}}, {"step": 3}, "model.", {"step": ["step"]})
    read = ChunkIndex.read(index.to_json(), manifest_of(index), "chunks.json")
    assert read == index
    assert read.files == index.files
    assert len(json.loads(index.to_json())["layouts"]) == len({one[1].shards, other[1].shards})


def test_the_same_chunks_under_another_name_are_a_tied_tensor() -> None:
    written = [
        WrittenChunk(MODEL, name, "float32", (4,), Shard(rank, Chunk((2 * rank,), (2,))), same_as)
        for rank in (0, 1)
        for name, same_as in (("a", ""), ("b", "a"), ("c", "a" if rank == 0 else ""))
    ]
    tensors = assemble(written)[MODEL]
    assert tensors["a"].aliases == ("b",)
    assert set(tensors) == {"a", "c"}, "what only one rank has as one is not one"
    assert tensors["a"].layout is tensors["c"].layout


def test_many_processes_make_no_large_file() -> None:
    """Tensors and processes add up, they do not multiply: 64 times as many processes, with 300 tensors of two shapes."""

    def bytes_of(processes: int) -> int:
        rows = {f"layers.{n}.weight": ("float32", (8192, 16 << n % 2), n % 2) for n in range(300)}
        chunks = [
            {number: Chunk((p * 8192 // processes, 0), (8192 // processes, 16 << number)) for number in (0, 1)}
            for p in range(processes)
        ]
        index = ChunkIndex(ShardTable({MODEL: rows}).assemble(chunks))
        text = index.to_json()
        ChunkIndex.read(text, manifest_of(index), "chunks.json")
        return len(text)

    few, many = bytes_of(8), bytes_of(512)
    assert many < 3 * few


def test_one_that_would_take_for_ever_to_check_is_refused_soon() -> None:
    """Right as it is, and nobody's: in each direction hundreds of chunks begin at the same place."""
    side = 500
    parts = [[0, [row, column], [1, 1]] for row in range(side) for column in range(side)]
    entry = {"dtype": "float32", "shape": [side, side], "layout": 0}
    text = {"layouts": [parts], "tensors": {MODEL: {"a": entry}}, "objects": {}, "prefix": "", "paths": {}}
    manifest = Manifest({shard_file(MODEL, 0): FileEntry(1, "0" * 64, 1)}, {})
    with pytest.raises(CheckpointError, match="beside each other"):
        ChunkIndex.read(json.dumps(text), manifest, "chunks.json")


@pytest.mark.parametrize("rank", [True, -1, 1.0, "0", None, 2**63])
def test_a_rank_is_a_number(rank: Any) -> None:
    entry = {"dtype": "float32", "shape": [1], "layout": 0}
    text = {"layouts": [[[rank, [0], [1]]]], "tensors": {MODEL: {"a": entry}}, "objects": {}, "prefix": "", "paths": {}}
    with pytest.raises(CheckpointError, match="damaged"):
        ChunkIndex.read(json.dumps(text), Manifest({shard_file(MODEL, 0): FileEntry(1, "0" * 64, 1)}, {}), "chunks.json")


def test_volumes_are_counted_exactly() -> None:
    """2^63 numbers overflow no count."""
    shape = (2**40, 2**30)
    assert Layout((Shard(0, Chunk.full(shape)),)).problem(shape) is None
    assert math.prod(shape) == 2**70
