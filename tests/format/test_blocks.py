"""Large tensors are hashed in blocks: a part of one is checked by the blocks that it lies in, and is never wrong."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import onym
from onym.errors import CheckpointError
from onym.format.hashing import BLOCK, NO_HASH, Hasher, hash_of
from onym.format.manifest import MANIFEST, MODEL, sealed
from onym.format.reader import read_checkpoint
from onym.state.chunks import Chunk
from onym.storage import local, object_store
from onym.storage.paths import as_path

SHAPE = (3, 1000, 1000)  # 12 MB of float32: two blocks and most of a third


class Holder(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.small = nn.Parameter(torch.rand(7, 5, generator=generator))
        self.large = nn.Parameter(torch.rand(*shape, generator=generator))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    path, model = tmp_path_factory.mktemp("blocks") / "model", Holder(*SHAPE)
    onym.save(model, path)
    return path, model.large.detach()


def begins(file: Path, name: str = "large") -> int:
    """Where in a file the bytes of a tensor are."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        start: int = 8 + length + json.loads(opened.read(length))[name]["data_offsets"][0]
    return start


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte[0] ^ 1]))


def boxes(draw: Any) -> tuple[Any, ...]:
    index: list[Any] = []
    for size in SHAPE[: draw(st.integers(1, 3))]:
        start, end = draw(st.integers(-size, size)), draw(st.none() | st.integers(-size, size))
        index.append(draw(st.sampled_from([start % size, slice(start, end), slice(None), -1])))
    return tuple(index)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_part_is_that_part_or_an_error(saved: tuple[Path, Tensor], data: st.DataObject) -> None:
    """Of a file with one changed byte: the error comes if the byte is in a block that has something of the part."""
    path, values = saved
    index = boxes(data.draw)
    wanted = values[index]
    assert torch.equal(read_checkpoint(path).part("large", index), wanted)
    numbers = torch.arange(values.numel()).view(SHAPE)[index].reshape(-1)
    changed = data.draw(st.integers(0, values.nbytes - 1))
    file = path / MODEL
    at = begins(file) + changed
    flip(file, at)
    try:
        first, last = (int(numbers.min()) * 4, int(numbers.max()) * 4 + 3) if len(numbers) else (0, -1)
        if first // BLOCK <= changed // BLOCK <= last // BLOCK:
            with pytest.raises(CheckpointError, match="the bytes of 'large' are not those that were written"):
                read_checkpoint(path).part("large", index)
        else:
            assert torch.equal(read_checkpoint(path).part("large", index), wanted)
        with pytest.raises(CheckpointError, match="'large'"):
            read_checkpoint(path).tensor("large")
    finally:
        flip(file, at)


@pytest.mark.parametrize("index", [5, slice(2, 4), (slice(None), 3), (..., 1), [0, 2], slice(None, None, 2), None, ()])
def test_whatever_a_tensor_can_be_indexed_with(saved: tuple[Path, Tensor], index: Any) -> None:
    path, _ = saved
    checkpoint = read_checkpoint(path)
    assert torch.equal(checkpoint.part("small", index), checkpoint.tensor("small")[index])


@pytest.mark.parametrize("index", [7, -8, (0, 0, 0), "small"])
def test_what_it_cannot(saved: tuple[Path, Tensor], index: Any) -> None:
    with pytest.raises((IndexError, TypeError)):
        read_checkpoint(saved[0]).part("small", index)


def test_a_part_is_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of 64 MB, which begins and ends within a block: what is read is that and the rest of these two, once."""
    model = Holder(16_000, 1000)
    onym.save(model, tmp_path / "model")
    read: list[int] = []

    def counted(descriptor: int, buffers: list[Any], position: int) -> int:
        read.append(done := preadv(descriptor, buffers, position))
        return done

    preadv = os.preadv
    checkpoint = read_checkpoint(tmp_path / "model")
    monkeypatch.setattr(local.os, "preadv", counted)
    part = checkpoint.part("large", slice(5_000, 6_000))
    assert torch.equal(part, model.large[5_000:6_000])
    assert len(part) * 4000 <= sum(read) <= len(part) * 4000 + 2 * BLOCK
    read.clear()
    assert torch.equal(checkpoint.part("large", slice(5_100, 5_900)), model.large[5_100:5_900])  # these blocks are known
    assert sum(read) == 800 * 4000


def test_of_remote_storage_no_more_is_fetched(saved: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec, values = pytest.importorskip("fsspec"), saved[1]
    pytest.importorskip("upath")
    memory = fsspec.filesystem("memory")
    memory.put(str(saved[0]), "/blocks-of-a-model", recursive=True)
    checkpoint = read_checkpoint(as_path("memory://blocks-of-a-model"))
    fetched: list[int] = []

    def counted(path: Path, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return read_range(path, start, end)

    read_range = object_store.read_range
    checkpoint.model.names  # noqa: B018  # the header is read
    monkeypatch.setattr(object_store, "read_range", counted)
    assert torch.equal(checkpoint.part("large", (1, slice(100, 110))), values[1, 100:110])
    assert fetched == [BLOCK]
    assert torch.equal(checkpoint.part("large", (1, slice(100, 110)), verify=False), values[1, 100:110])
    assert fetched == [BLOCK, 40_000]
    with memory.open("/blocks-of-a-model/" + MODEL, "r+b") as file:  # the first byte of the second block
        content = bytearray(file.read())
    content[begins(saved[0] / MODEL) + BLOCK] ^= 1
    memory.pipe("/blocks-of-a-model/" + MODEL, bytes(content))
    changed = read_checkpoint(as_path("memory://blocks-of-a-model"))
    assert torch.equal(changed.part("large", 0), values[0])
    for index in ((1, slice(100, 110)), (slice(None), 5)):
        with pytest.raises(CheckpointError, match="'large'"):
            changed.part("large", index)


def test_a_tensor_that_several_threads_check(tmp_path: Path) -> None:
    """Each some blocks of it: a changed byte anywhere is found, and only the tensor that has it is damaged."""
    onym.save(Holder(20_000, 1000), tmp_path / "model")  # 80 MB
    file = tmp_path / "model" / MODEL
    start = begins(file)
    for at in (0, 67_108_863, 67_108_864, 79_999_999):
        flip(file, start + at)
        assert [damage.tensor for damage in read_checkpoint(tmp_path / "model").damages()] == ["large"]
        flip(file, start + at)
    assert not list(read_checkpoint(tmp_path / "model").damages())


def test_a_file_that_ends_early_in_a_block(saved: tuple[Path, Tensor], tmp_path: Path) -> None:
    """While it is open: when it was opened, its size was right."""
    onym.save(Holder(*SHAPE), tmp_path / "model")
    checkpoint = read_checkpoint(tmp_path / "model")
    assert torch.equal(checkpoint.part("large", 0), saved[1][0])
    os.truncate(tmp_path / "model" / MODEL, begins(tmp_path / "model" / MODEL) + BLOCK + 10)
    assert torch.equal(checkpoint.part("large", 0), saved[1][0])
    with pytest.raises(CheckpointError, match="'large'"):
        checkpoint.part("large", 1)


@pytest.mark.parametrize(
    "chunk",
    [Chunk((0, 0), (8, 5)), Chunk((-1, 0), (7, 5)), Chunk((3, 0), (-1, 5)), Chunk((0,), (7,)), Chunk((0, 0, 0), (7, 5, 1))],
)
def test_a_chunk_that_is_not_in_it(saved: tuple[Path, Tensor], chunk: Chunk) -> None:
    target = torch.zeros([max(size, 0) for size in chunk.sizes])
    with pytest.raises(CheckpointError, match="has the shape"):
        read_checkpoint(saved[0]).model.read_into("small", target, chunk, verify=False)


def test_a_part_of_what_is_sparse_in_a_pth(tmp_path: Path) -> None:
    sparse = torch.eye(4).to_sparse()
    torch.save({"sparse": sparse, "weight": torch.arange(12.0).view(3, 4)}, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert torch.equal(checkpoint.part("sparse", 1).to_dense(), torch.eye(4)[1])
    assert checkpoint.part("weight", (slice(1, 3), 2)).tolist() == [6, 10]


def resealed(path: Path, change: dict[str, Any]) -> None:
    """A folder whose manifest says something else of the large tensor, and is itself right."""
    manifest = json.loads((path / MANIFEST).read_text())
    entry = manifest["tensors"][MODEL]["large"]
    entry.update(change)
    manifest["tensors"][MODEL]["large"] = {key: value for key, value in entry.items() if value is not None}
    lines = []
    for name, each in sorted(manifest["tensors"][MODEL].items()):
        lines.append(f"{len(name)} {name} {each['dtype']} {','.join(map(str, each['shape']))} {each['blake3']}\n")
    manifest["identity"] = blake3("".join(lines).encode()).hexdigest()
    (path / MANIFEST).write_text(sealed(json.dumps({**manifest, "blake3": NO_HASH})))


def test_a_file_of_before_blocks(tmp_path: Path) -> None:
    """Its large tensors have one hash, of their bytes."""
    model = Holder(*SHAPE)
    onym.save(model, tmp_path / "model")
    whole = blake3(model.large.detach().numpy().tobytes()).hexdigest()
    resealed(tmp_path / "model", {"blake3": whole, "blocks": None})
    read_checkpoint(tmp_path / "model").verify()
    assert torch.equal(read_checkpoint(tmp_path / "model").part("large", 1), model.large[1])
    onym.load(tmp_path / "model", into=(other := Holder(*SHAPE)))
    assert torch.equal(other.large, model.large)
    flip(tmp_path / "model" / MODEL, begins(tmp_path / "model" / MODEL) + 11_999_999)
    for read in (lambda c: c.part("large", 0), lambda c: c.tensor("large"), lambda c: c.verify()):
        with pytest.raises(CheckpointError, match="'large'"):
            read(read_checkpoint(tmp_path / "model"))


@pytest.mark.parametrize("what", ["short", "long", "other", "no hex", "a list", "spaces", "of a small one"])
def test_blocks_that_are_none(tmp_path: Path, what: str) -> None:
    """They are held against the size of the tensor and its hash when a folder is opened."""
    model = Holder(*SHAPE)
    onym.save(model, tmp_path / "model")
    bytes_ = model.large.detach().numpy().tobytes()
    hashes = [blake3(bytes_[start : start + BLOCK]).digest() for start in range(0, len(bytes_), BLOCK)]
    blocks: Any = {
        "short": hashes[:2],
        "long": [*hashes, hashes[0]],
        "other": hashes[::-1],
        "of a small one": [blake3(bytes_).digest()],
    }.get(what, hashes)
    change = {"blocks": b"".join(blocks).hex(), "blake3": blake3(b"".join(blocks)).hexdigest()}
    if what == "other":
        del change["blake3"]
    change["blocks"] = {"no hex": "x" * 192, "a list": [change["blocks"]], "spaces": change["blocks"] + "  "}.get(
        what, change["blocks"]
    )
    resealed(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path / "model").verify()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3 * BLOCK + 5), st.integers(0, 2**32))
def test_a_hash_is_the_same_however_the_bytes_come(nbytes: int, seed: int) -> None:
    rng = random.Random(seed)
    data = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()
    hasher, position = Hasher(nbytes), 0
    while position < nbytes:
        step = rng.choice([1, 1 << 16, 1 << 20, BLOCK - 1, BLOCK, BLOCK + 1, nbytes])
        hasher.update(data[position : position + step])
        position += step
    assert hasher.result() == hash_of(data)
    assert hash_of(data).agrees
