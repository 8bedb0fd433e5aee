"""pieces.json: which boxes make a tensor, found again whatever the cut, refused where they do not, and small."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onym.errors import CheckpointError
from onym.format.manifest import MODEL, FileEntry, Manifest
from onym.format.sharded_tensor import Layout, Part, Pieces, ShardedTensor, Table, Written, assemble, piece_file, tabled

Shape = tuple[int, ...]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Shape, Layout]:
    """A shape, and a grid that cuts it anywhere; each box is some process's."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
    bounds = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))}) for size in shape]
    boxes = itertools.product(*(itertools.pairwise(each) for each in bounds))
    parts = [Part(draw(st.integers(0, 3)), tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in boxes]
    return shape, Layout(tuple(sorted(parts, key=lambda part: part.start)))


def manifest_of(pieces: Pieces) -> Manifest:
    return Manifest(dict.fromkeys(pieces.files, FileEntry(1, "0" * 64, 1)), {})


@given(cuts(), st.data())
def test_a_box_is_found_in_the_parts_that_have_something_of_it(cut: tuple[Shape, Layout], data: st.DataObject) -> None:
    shape, layout = cut
    assert layout.wrong(shape) is None
    bounds = [tuple(sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in shape]
    found = list(layout.overlapping(bounds))  # type: ignore[arg-type]
    wanted = [
        part
        for part in layout.parts
        if all(max(a, at) < min(b, at + size) for (a, b), at, size in zip(bounds, part.start, part.size, strict=True))
    ]
    assert found == wanted


@given(cuts(), st.data())
def test_a_layout_that_is_not_all_of_it_is_refused(cut: tuple[Shape, Layout], data: st.DataObject) -> None:
    shape, layout = cut
    at = data.draw(st.integers(0, len(layout.parts) - 1))
    assert Layout((*layout.parts[:at], *layout.parts[at + 1 :])).wrong(shape) is not None
    if shape and len(layout.parts) > 1:
        doubled = list(layout.parts)
        doubled[at] = doubled[at - 1]
        assert Layout(tuple(doubled)).wrong(shape) is not None


@given(cuts(), cuts())
def test_what_is_written_is_read(one: tuple[Shape, Layout], other: tuple[Shape, Layout]) -> None:
    named = {
        "a": ShardedTensor("float32", *one, ("tied", "too")),
        "b": ShardedTensor("bfloat16", *other),
        "c": ShardedTensor("float32", one[0], Layout(tuple(one[1].parts))),  # equal, not the same object
    }
    pieces = Pieces({MODEL: named, "empty.safetensors": {}}, {"step": 3}, "model.", {"step": ["step"]})
    read = Pieces.read(pieces.to_json(), manifest_of(pieces), "pieces.json")
    assert read == pieces
    assert read.files == pieces.files
    assert len(json.loads(pieces.to_json())["layouts"]) == len({one[1].parts, other[1].parts})


def test_the_same_pieces_under_another_name_are_a_tied_tensor() -> None:
    written = [
        Written(MODEL, name, "float32", (4,), Part(process, (2 * process,), (2,)), same_as)
        for process in (0, 1)
        for name, same_as in (("a", ""), ("b", "a"), ("c", "a" if process == 0 else ""))
    ]
    tensors = assemble(written)[MODEL]
    assert tensors["a"].aliases == ("b",)
    assert set(tensors) == {"a", "c"}, "what only one process has as one is not one"
    assert tensors["a"].layout is tensors["c"].layout


def test_many_processes_make_no_large_file() -> None:
    """Tensors and processes add up, they do not multiply: 64 times as many processes, with 300 tensors of two shapes."""

    def bytes_of(processes: int) -> int:
        rows = {f"layers.{n}.weight": ("float32", (8192, 16 << n % 2), n % 2) for n in range(300)}
        parts = [
            {number: Part(p, (p * 8192 // processes, 0), (8192 // processes, 16 << number)) for number in (0, 1)}
            for p in range(processes)
        ]
        pieces = Pieces(tabled(Table({MODEL: rows}), parts))
        text = pieces.to_json()
        Pieces.read(text, manifest_of(pieces), "pieces.json")
        return len(text)

    few, many = bytes_of(8), bytes_of(512)
    assert many < 3 * few


def test_one_that_would_take_for_ever_to_check_is_refused_soon() -> None:
    """Right as it is, and nobody's: in each direction hundreds of boxes begin at the same place."""
    side = 500
    parts = [[0, [row, column], [1, 1]] for row in range(side) for column in range(side)]
    entry = {"dtype": "float32", "shape": [side, side], "layout": 0}
    text = {"layouts": [parts], "tensors": {MODEL: {"a": entry}}, "objects": {}, "prefix": "", "paths": {}}
    manifest = Manifest({piece_file(MODEL, 0): FileEntry(1, "0" * 64, 1)}, {})
    with pytest.raises(CheckpointError, match="beside each other"):
        Pieces.read(json.dumps(text), manifest, "pieces.json")


@pytest.mark.parametrize("process", [True, -1, 1.0, "0", None, 2**63])
def test_a_process_has_a_number(process: Any) -> None:
    entry = {"dtype": "float32", "shape": [1], "layout": 0}
    text = {"layouts": [[[process, [0], [1]]]], "tensors": {MODEL: {"a": entry}}, "objects": {}, "prefix": "", "paths": {}}
    with pytest.raises(CheckpointError, match="damaged"):
        Pieces.read(json.dumps(text), Manifest({piece_file(MODEL, 0): FileEntry(1, "0" * 64, 1)}, {}), "pieces.json")


def test_volumes_are_counted_exactly() -> None:
    """2^63 numbers overflow no count."""
    shape = (2**40, 2**30)
    assert Layout((Part(0, (0, 0), shape),)).wrong(shape) is None
    assert math.prod(shape) == 2**70
