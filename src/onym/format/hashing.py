"""The hash of a tensor: BLAKE3 of its bytes, or, if it is larger than a block, BLAKE3 of its blocks' hashes.

So a chunk of a large tensor is verified by the blocks that it is in, and still each byte is hashed once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from blake3 import blake3

BLOCK = 4 << 20
"""Bytes. Part of the format: another size gives another hash."""
NO_HASH = "0" * 64


class TensorHash(NamedTuple):  # a file may have a hundred thousand, and these are made fastest
    """The expected hash of a tensor's bytes."""

    blake3: str
    """In hexadecimal: of the bytes, or of the blocks' hashes."""
    blocks: str = ""
    """In hexadecimal, the concatenated hashes of the blocks; empty for a tensor that is not larger than a block."""

    @property
    def agrees(self) -> bool:
        """Whether ``blake3`` is the hash of the blocks' hashes."""
        return not self.blocks or blake3(bytes.fromhex(self.blocks)).hexdigest() == self.blake3

    def block(self, number: int) -> str:
        """The hash of a block, counted from 0; a tensor without blocks is one block."""
        return self.blocks[64 * number : 64 * (number + 1)] if self.blocks else self.blake3


def blocks_of(nbytes: int) -> int:
    """How many blocks so many bytes are hashed in; 0 for one hash of all."""
    return -(-nbytes // BLOCK) if nbytes > BLOCK else 0


def unknown(nbytes: int) -> TensorHash:
    """A placeholder, as long as the hash of so many bytes."""
    return TensorHash(NO_HASH, NO_HASH * blocks_of(nbytes))


def hash_of(data: Any) -> TensorHash:
    """The hash of bytes in memory."""
    if len(data) <= BLOCK:
        return TensorHash(blake3(data).hexdigest())
    hasher = Hasher(len(data))
    hasher.update(data)
    return hasher.result()


class Hasher:
    """The hash of bytes that come in parts.

    Args:
        nbytes: how many will come.
    """

    def __init__(self, nbytes: int) -> None:
        self._current, self._filled = blake3(), 0
        self._done: list[bytes] | None = [] if blocks_of(nbytes) else None

    def update(self, data: Any) -> None:
        """Take the next bytes."""
        if self._done is None:
            self._current.update(data)
            return
        view = memoryview(data)
        while len(view):
            part = view[: BLOCK - self._filled]
            self._current.update(part)
            self._filled += len(part)
            if self._filled == BLOCK:
                self._end_block(self._done)
            view = view[len(part) :]

    def result(self) -> TensorHash:
        """The hash of all bytes."""
        if self._done is None:
            return TensorHash(self._current.hexdigest())
        if self._filled:
            self._end_block(self._done)
        blocks = b"".join(self._done)
        return TensorHash(blake3(blocks).hexdigest(), blocks.hex())

    def _end_block(self, done: list[bytes]) -> None:
        done.append(self._current.digest())
        self._current, self._filled = blake3(), 0
