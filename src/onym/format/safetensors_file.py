"""A .safetensors file that is open for reading: mapped where it is on this machine, else fetched in ranges."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from onym.errors import CheckpointError
from onym.format.hashing import BLOCK, blocks_of
from onym.format.manifest import TensorEntry, gc_paused
from onym.format.safetensors import (
    as_bytes,
    as_stored,
    dtype_called,
    from_bytes,
    from_stored,
    header_length,
    is_plain,
    parse_header,
)
from onym.format.tensors import Damage, TensorFile
from onym.state.chunks import Chunk, contiguous_strides
from onym.storage.local import MappedFile
from onym.storage.paths import storage_of
from onym.storage.protocol import OpenFile
from onym.storage.threads import WORKERS, run_in_threads

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_READ_BYTES = 1 << 20
_ONCE_BYTES = ("float8_e8m0fnu", "float4_e2m1fn_x2")
"""What earlier versions stored as bytes, before the format had names for it."""
_UNIT_BYTES = 16 * BLOCK  # of a large tensor, what a thread checks at a time


@gc_paused()
def open_safetensors(path: Path) -> SafetensorsFile:
    """Open a file and check its header.

    Raises:
        CheckpointError: it cannot be read, or it is damaged.
    """
    try:
        file = storage_of(path).open_file(path)
        return MappedSafetensors(path, file) if isinstance(file, MappedFile) else FetchedSafetensors(path, file)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}.") from error


class SafetensorsFile(TensorFile):
    """What both kinds have in common: the header, and what a manifest adds to it."""

    def __init__(self, path: Path, file: OpenFile) -> None:
        self.data_start = header_length(file.read(0, 8), file.nbytes, path)
        self.start = file.read(0, self.data_start)
        self.placed, self.metadata = parse_header(self.start[8:], file.nbytes - self.data_start, path)
        # Stock safetensors records a tied tensor's further names as metadata entries: further name -> stored name. Where Onym
        # has not written them they may be anything ({"base": "w"}), so only what ends alike ("head.weight") is taken for one.
        aliases = {
            alias: name
            for alias, name in self.metadata.items()
            if name in self.placed and alias not in self.placed and "." in alias and alias.split(".")[-1] == name.split(".")[-1]
        }
        known = {name: from_stored(placed.dtype, placed.shape) for name, placed in self.placed.items()}
        self._dtypes = {name: dtype for name, (dtype, _) in known.items()}
        super().__init__(
            path,
            {name: shape for name, (_, shape) in known.items()},
            {name: dtype or self.placed[name].dtype for name, dtype in self._dtypes.items()},
            aliases,
            {},
        )

    def adopt(self, entries: Mapping[str, TensorEntry]) -> None:
        """Take dtypes, shapes, aliases, hashes and order from a manifest or from Onym's own entry in the header.

        Raises:
            CheckpointError: they do not agree with the header.
        """
        for name, entry in entries.items():
            placed, stored = self.placed.get(name), as_stored(entry.dtype, entry.shape)
            if stored is None:
                import torch

                raise CheckpointError(
                    f"{name} in '{self.path}' has the dtype {entry.dtype}, which torch {torch.__version__} does not have: "
                    "pip install --upgrade torch."
                )
            before = ("U8", tuple(entry.shape)) if entry.dtype in _ONCE_BYTES else stored
            agrees = placed is not None and (placed.dtype, placed.shape) in (stored, before)
            if placed is None or not agrees or len(entry.blocks) not in (0, 64 * blocks_of(placed.end - placed.start)):
                raise CheckpointError(f"'{self.path}' is damaged: it holds other tensors than were written.")
        aliases = [alias for entry in entries.values() for alias in entry.aliases]
        if len(set(aliases)) != len(aliases) or not entries.keys().isdisjoint(aliases):
            raise CheckpointError(f"'{self.path}' is damaged: a tensor has a name that is another's.")
        if len(entries) != len(self.placed):
            raise CheckpointError(f"'{self.path}' is damaged: it holds other tensors than were written.")
        self.shapes = {name: tuple(entry.shape) for name, entry in entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in entries.items()}
        self._dtypes = dict(self.dtypes)
        self.aliases = {alias: name for name, entry in entries.items() for alias in entry.aliases}
        self.hashes = {name: entry.hash for name, entry in entries.items()}

    def read_into(self, name: str, target: Tensor, chunk: Chunk | None = None, *, verify: bool = True) -> None:
        """As of any file; contiguous memory is read into directly, and hashed while it is in the processor's cache."""
        stored = self._stored_name(name)
        self._forget_if_changed()
        shape, dtype = self.shapes[stored], self._dtype(stored)
        wanted = tuple(target.shape)
        if wanted == shape and (chunk is None or not any(chunk.offsets)):
            first, end = 0, self._nbytes(stored)
        else:
            chunk = Chunk.full(shape) if chunk is None else chunk
            if wanted != chunk.sizes or not chunk.is_within(shape):
                raise CheckpointError(f"{name} in '{self.path}' has the shape {shape}, which does not contain {chunk}.")
            first, end = (at * dtype.itemsize for at in chunk.span(shape))
        if first == end:
            return
        is_direct = end - first == target.nbytes and target.dtype == dtype and is_plain(target)
        into = as_bytes(target).numpy().data if is_direct else None
        try:
            data = self._span(stored, (first, end), into, verify and stored in self.hashes and stored not in self._verified)
        except OSError as error:
            raise CheckpointError(f"'{self.path}' cannot be read: {error.strerror or error}.") from error
        if data is not None:
            elements = from_bytes(data, dtype, ((end - first) // dtype.itemsize,))
            target.copy_(elements.as_strided(wanted, contiguous_strides(shape)))

    @abstractmethod
    def _span(self, name: str, span: tuple[int, int], into: memoryview | None, verify: bool) -> Tensor | None:
        """Some bytes of a tensor; None if they were read into ``into``."""

    @abstractmethod
    def _bytes(self, name: str) -> Tensor:
        """All bytes of a tensor, not verified."""

    def _read(self, name: str) -> Tensor:
        dtype = self._dtype(name)
        try:
            return from_bytes(self._bytes(name), dtype, self.shapes[name])
        except RuntimeError as error:  # a shape whose strides no machine can count
            raise CheckpointError(f"{name} in '{self.path}' cannot be a tensor: {error}.") from error

    def _dtype(self, name: str) -> torch.dtype:
        dtype = dtype_called(self._dtypes[name] or "")
        if dtype is None:
            raise CheckpointError(f"{name} in '{self.path}' has the dtype {self.dtypes[name]}, which torch does not have.")
        return dtype

    def _damage(self, name: str) -> Damage:
        return Damage(
            self.path.name,
            name,
            f"'{self.path}' is damaged: the bytes of {name!r} are not those that were written. Use another checkpoint, "
            "or fetch the file again.",
        )

    def _nbytes(self, name: str) -> int:
        return self.placed[name].end - self.placed[name].start

    def _position(self, name: str) -> int:
        return self.data_start + self.placed[name].start

    def _block_bytes(self, name: str) -> int:
        """How many bytes of a tensor are verified together."""
        has_blocks = name in self.hashes and self.hashes[name].blocks
        return BLOCK if has_blocks else max(self._nbytes(name), 1)


class MappedSafetensors(SafetensorsFile):
    """A file of this machine. Verified tensors are not verified again until the file is written to."""

    def __init__(self, path: Path, file: MappedFile) -> None:
        self._file = file
        self._map: Tensor | None = None
        self._stamp = (0, 0)
        self._verified_blocks: dict[str, set[int]] = {}
        super().__init__(path, file)

    def _span(self, name: str, span: tuple[int, int], into: memoryview | None, verify: bool) -> Tensor | None:
        if (into is not None or verify) and not self._scan(name, span, into, verify):
            raise CheckpointError(self._damage(name).reason)
        position = self._position(name)
        return None if into is not None else self._mapped()[position + span[0] : position + span[1]]

    def _bytes(self, name: str) -> Tensor:
        position = self._position(name)
        return self._mapped()[position : position + self._nbytes(name)]

    def _mapped(self) -> Tensor:
        if self._map is None:
            import torch

            self._map = torch.frombuffer(self._file.map(), dtype=torch.uint8)
        return self._map

    def _forget_if_changed(self) -> None:
        stamp = self._file.stamp()
        if stamp != self._stamp:
            self._verified, self._verified_blocks, self._stamp = set(), {}, stamp

    def _scan(self, name: str, span: tuple[int, int], into: memoryview | None = None, verify: bool = True) -> bool:
        """Read some bytes of a tensor: verify the blocks that they are in, and copy them ``into`` a buffer.

        Returns:
            Whether the file has all of them, as they were written.
        """
        start, end = span
        data_start, nbytes, block = self._position(name), self._nbytes(name), self._block_bytes(name)
        expected, verified = self.hashes.get(name), self._verified_blocks.setdefault(name, set())
        buffer: memoryview | None = None
        for number in range(start // block, -(-end // block)):
            position, stop = number * block, min((number + 1) * block, nbytes)
            to_verify = verify and expected is not None and number not in verified
            if not to_verify:  # only the wanted bytes of this block
                position, stop = (max(position, start), min(stop, end)) if into is not None else (stop, stop)
            hasher = blake3()
            while position < stop:
                size = min(_READ_BYTES, stop - position)
                is_direct = into is not None and start <= position and position + size <= end
                if into is not None and is_direct:
                    part = into[position - start : position - start + size]
                else:
                    buffer = buffer or memoryview(bytearray(_READ_BYTES))
                    part = buffer[:size]
                done = self._file.read_into(part, data_start + position)
                if not done:
                    return False
                if to_verify:
                    hasher.update(part[:done])  # while it is in the processor's cache
                if into is not None and not is_direct:
                    low, high = max(position, start), min(position + done, end)
                    if low < high:
                        into[low - start : high - start] = part[low - position : high - position]
                position += done
            if to_verify:
                assert expected is not None
                if hasher.hexdigest() != expected.block(number):
                    return False
                verified.add(number)
        return True

    def _check(self, names: list[str], *, reused: bool = True) -> Iterator[Damage]:
        checkable = [name for name in names if name in self.hashes]
        units = self._units(checkable)
        threads = WORKERS if sum(map(self._nbytes, checkable)) > 4 * _READ_BYTES else 1
        damaged, stamp = set[str](), self._stamp
        try:
            run_in_threads(lambda number: damaged.update(self._damaged_in(units[number::threads])), threads)
        except OSError as error:
            raise CheckpointError(f"'{self.path}' cannot be read: {error.strerror or error}.") from error
        if self._stamp == stamp:  # else another thread has seen that the file has changed
            self._verified |= set(checkable) - damaged
        return iter([self._damage(name) for name in self.shapes if name in damaged] if damaged else [])

    @gc_paused()
    def _units(self, names: list[str]) -> list[tuple[str, int, int]]:
        """What a thread verifies at a time (a tensor, and a span of its bytes), largest first."""
        units = list[tuple[str, int, int]]()
        for name in names:
            nbytes = self._nbytes(name)
            if nbytes <= _UNIT_BYTES or not self.hashes[name].blocks:
                units.append((name, 0, nbytes))
            else:
                units += [(name, start, min(start + _UNIT_BYTES, nbytes)) for start in range(0, nbytes, _UNIT_BYTES)]
        return sorted(units, key=lambda unit: unit[1] - unit[2])

    def _damaged_in(self, units: list[tuple[str, int, int]]) -> Iterator[str]:
        for name, start, end in units:
            if end <= _READ_BYTES:  # there may be a great many
                data = self._file.read(self._position(name), self._position(name) + end)
                agrees = blake3(data).hexdigest() == self.hashes[name].blake3
            else:
                agrees = self._scan(name, (start, end))
            if not agrees:
                yield name


class FetchedSafetensors(SafetensorsFile):
    """A file in an object store. The bytes that were verified are the ones that are used; nothing else is cached."""

    def __init__(self, path: Path, file: OpenFile) -> None:
        self._file = file
        self._fetched: dict[str, bytes] = {}
        super().__init__(path, file)

    def _span(self, name: str, span: tuple[int, int], into: memoryview | None, verify: bool) -> Tensor | None:
        """No more is fetched than the blocks that the bytes are verified by."""
        start, end = span
        block = self._block_bytes(name) if verify else 1
        first, stop = start // block * block, min(-(-end // block) * block, self._nbytes(name))
        data = self._file.read(self._position(name) + first, self._position(name) + stop)
        if len(data) < stop - first or (verify and not self._agrees(name, data, first // block)):
            raise CheckpointError(self._damage(name).reason)
        import torch

        return torch.frombuffer(bytearray(data[start - first : end - first]), dtype=torch.uint8)

    def _bytes(self, name: str) -> Tensor:
        import torch

        data = self._fetched.pop(name) if name in self._fetched else self._fetch(name)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8, device="cpu")

    def _fetch(self, name: str) -> bytes:
        return self._file.read(self._position(name), self._position(name) + self._nbytes(name))

    def _agrees(self, name: str, data: bytes, first: int = 0) -> bool:
        """Whether these are a tensor's bytes, from block ``first`` on."""
        block = self._block_bytes(name)
        return all(
            blake3(data[number * block : (number + 1) * block]).hexdigest() == self.hashes[name].block(first + number)
            for number in range(max(-(-len(data) // block), 1))
        )

    def _check(self, names: list[str], *, reused: bool = True) -> Iterator[Damage]:
        checkable = sorted((name for name in names if name in self.hashes), key=self._nbytes, reverse=True)
        threads = WORKERS if sum(map(self._nbytes, checkable)) > 4 * _READ_BYTES else 1
        damaged = set[str]()

        def work(number: int) -> None:
            for name in checkable[number::threads]:
                data = self._fetch(name)
                if not self._agrees(name, data):
                    damaged.add(name)
                if reused:
                    self._fetched[name] = data

        run_in_threads(work, threads)
        return iter([self._damage(name) for name in self.shapes if name in damaged])
