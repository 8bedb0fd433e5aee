"""Tensor files written and hashed at once, by a few threads.

Each tensor is hashed and written in small parts, so it is not copied, and its bytes are hashed while they are in the CPU cache;
while one thread waits for the disk another one hashes. The tensors must not change until the call returns.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from threading import Lock

from blake3 import blake3

from onym.format.hashing import Hasher, TensorHash, hash_of, unknown
from onym.format.manifest import HEADER_KEY, FileEntry, Header, TensorEntry, gc_paused
from onym.format.safetensors import as_bytes, header_of
from onym.format.stored import LazyTensor, Stored, in_memory, tensor_hash
from onym.storage.protocol import NewFile
from onym.storage.threads import WORKERS, run_in_threads

Progress = Callable[[int], None]
"""Called with the number of bytes that were written since the last call, from any thread."""
HeaderOf = Callable[[dict[str, TensorEntry]], Header]
"""Makes Onym's own entry in the header of a file; always of the same length, whatever the hashes."""

_WRITE_BYTES = 1 << 20
_SMALL = 32 << 10
_WRITE_BACK = 16 << 20
_LARGE = 16 << 20
_one_large = Lock()


class TensorFileJob:
    """A tensor file that is being written, as units of work for several threads.

    Args:
        file: the new file.
        stored: its tensors.
        own_header: for a file with its hashes in its own header.
    """

    def __init__(self, file: NewFile, stored: Stored, own_header: HeaderOf | None = None) -> None:
        self.file, self.stored = file, stored
        self.hashes: dict[str, TensorHash] = {}
        self.units: deque[tuple[int, list[str]]] = deque()
        self._own_header = own_header
        self._lock, self._finished = Lock(), False
        known = {name: unknown(tensor.nbytes) for name, tensor in stored.tensors.items()}
        if own_header and not file.positioned:  # the header is uploaded first, so it has to be right at once
            known = {name: tensor_hash(tensor) for name, tensor in stored.tensors.items()}
        self.start, order = self._start(known)
        position, small, small_bytes = len(self.start), list[str](), 0
        for name in order:  # many small tensors are one unit
            nbytes = stored.tensors[name].nbytes
            if nbytes >= _SMALL or small_bytes + nbytes > _WRITE_BYTES:
                self._add(position - small_bytes, small)
                small, small_bytes = [], 0
            if nbytes >= _SMALL:
                self._add(position, [name])
            else:
                small.append(name)
                small_bytes += nbytes
            position += nbytes
        self._add(position - small_bytes, small)

    @property
    def entry(self) -> FileEntry:
        """The file's entry in a manifest."""
        return FileEntry(len(self.start) + self.stored.nbytes, blake3(self.start).hexdigest(), len(self.start))

    def write_hashes(self) -> None:
        """Write the header again, now that the hashes are known."""
        if self._own_header and self.file.positioned:
            self.start, _ = self._start(self.hashes)
            self.file.write_at(self.start, 0)

    def finish(self) -> None:
        """Complete and fsync the file; the first thread that calls this does it."""
        with self._lock:
            is_first, self._finished = not self._finished, True
        if is_first:
            self.write_hashes()
            self.file.finish()

    @gc_paused()
    def _start(self, hashes: Mapping[str, TensorHash]) -> tuple[bytes, list[str]]:
        ours = {HEADER_KEY: self._own_header(self.stored.entries(hashes)).to_json()} if self._own_header else {}
        return header_of(self.stored.tensors, {**self.stored.aliases, **self.stored.metadata, **ours})

    def _add(self, position: int, names: list[str]) -> None:
        if names:
            self.units.append((position, names))


def write_tensors(jobs: list[TensorFileJob], progress: Progress | None, *, finish: bool) -> None:
    """Hash and write tensor files. Each thread takes units of a file of its own first, then of the others.

    Args:
        jobs: the files; their hashes are filled in.
        progress: see :data:`Progress`.
        finish: fsync each file as soon as it is complete, while others are still being written.
    """
    report = progress or (lambda written: None)
    for job in jobs:
        job.file.write(job.start)
    if all(job.file.positioned for job in jobs):
        _write_in_threads(jobs, report, finish)
    else:
        for job in jobs:
            for _, names in job.units:
                for name in names:
                    _write_large(job, name, None, report)
    if finish:
        for job in jobs:
            job.finish()  # also of one without tensors, which no thread did


def _write_in_threads(jobs: list[TensorFileJob], report: Progress, finish: bool) -> None:
    failed = False

    def work(number: int) -> None:
        nonlocal failed
        first = number % len(jobs)
        for job in jobs[first:] + jobs[:first]:
            while not failed:
                try:
                    position, names = job.units.popleft()
                except IndexError:
                    break
                try:
                    _write_unit(job, names, position, report)
                    if finish and len(job.hashes) == len(job.stored.tensors):
                        job.finish()
                except BaseException:
                    failed = True
                    raise

    if jobs:
        run_in_threads(work, WORKERS if sum(job.stored.nbytes for job in jobs) > 4 * _WRITE_BYTES else 1)


def _write_unit(job: TensorFileJob, names: list[str], position: int, report: Progress) -> None:
    """Write one large tensor, or small ones that follow each other."""
    first = job.stored.tensors[names[0]]
    if first.nbytes >= _SMALL:
        with _one_large if isinstance(first, LazyTensor) and first.nbytes > _LARGE else nullcontext():
            _write_large(job, names[0], position, report)
        return
    parts: dict[str, bytes] = {}
    for name in names:
        tensor = in_memory(job.stored.tensors[name])
        parts[name] = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""
    data = b"".join(parts.values())
    job.file.write_at(data, position)
    # Only after the write: the thread that finds all hashes there takes the file for complete, and fsyncs it.
    job.hashes.update({name: hash_of(part) for name, part in parts.items()})
    report(len(data))


def _write_large(job: TensorFileJob, name: str, position: int | None, report: Progress) -> None:
    """Write a tensor at a position, or at the end of the file."""
    view = as_bytes(in_memory(job.stored.tensors[name])).numpy().data
    hasher = Hasher(len(view))
    sent = 0
    for begin in range(0, len(view), _WRITE_BYTES):
        part = view[begin : begin + _WRITE_BYTES]
        hasher.update(part)
        end = begin + len(part)
        if position is None:
            job.file.write(part)
        else:
            job.file.write_at(part, position + begin)
            if end - sent >= _WRITE_BACK or (end == len(view) and end - sent >= _WRITE_BYTES):
                job.file.start_write_back(position + sent, end - sent)
                sent = end
        report(len(part))
    job.hashes[name] = hasher.result()
