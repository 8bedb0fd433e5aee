"""Named tensors and texts -> durable files, with the hash of everything recorded beside it.

Each tensor is hashed and written piece by piece, so that no copy of it is made, by a few threads: while one waits for the disk
another hashes. The state is not copied either, so it must not change until the call returns (``background.py`` copies first).
"""

from __future__ import annotations

import ctypes
import math
import platform
import subprocess
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import IO, Any, cast

import torch
from blake3 import blake3
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from onym.errors import CheckpointError, StorageError
from onym.format.hashing import Hasher, TensorHash, hash_of, unknown
from onym.format.manifest import (
    CONFIG,
    HEADER_KEY,
    MANIFEST,
    MODEL,
    MOST_JSON_BYTES,
    TRAINER,
    FileEntry,
    Header,
    Manifest,
    TensorEntry,
    gc_paused,
    identity_of,
    is_text,
    parse_json,
    require_bounded_json,
)
from onym.format.safetensors import as_bytes, dtype_name, header_of, is_plain
from onym.format.sharded_tensor import PIECES, Part, Pieces, Table, Written, piece_file
from onym.state.model import tensor_identity
from onym.storage import object_store
from onym.storage.local import NewFile, NewFolder, new_file, new_folder
from onym.storage.threads import WORKERS, run_in_threads

Progress = Callable[[int], None]
"""Called with the number of bytes that were written since the last call, from any thread."""

_CHUNK = 1 << 20
_SMALL = 32 << 10
_WRITE_BACK = 16 << 20
_LARGE = 16 << 20
_MARGIN = 64 << 10  # what a manifest and a file system need besides


@dataclass(frozen=True)
class Stored:
    """Tensors ready to be written: each once, with the further names of tied ones."""

    tensors: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict)
    """Further name -> the name it is stored under."""

    @property
    def nbytes(self) -> int:
        """What they need in a file."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def entries(self, hashes: Mapping[str, TensorHash]) -> dict[str, TensorEntry]:
        """What a manifest or header says of them."""
        aliases: dict[str, list[str]] = {}
        for alias, name in self.aliases.items():
            aliases.setdefault(name, []).append(alias)

        def entry(name: str, tensor: Tensor) -> TensorEntry:
            found = hashes[name]
            about = dtype_name(tensor.dtype), list(tensor.shape)
            return TensorEntry(*about, found.blake3, aliases.get(name, []), found.blocks)

        return {name: entry(name, tensor) for name, tensor in self.tensors.items()}

    def unhashed(self) -> dict[str, TensorHash]:
        """In the place of their hashes, as long as these, while they are not known."""
        return {name: unknown(tensor.nbytes) for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn comes to be written, and let go afterwards. Large ones are made one at a time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    aliases: tuple[str, ...] = ()
    """Further names of it."""

    @property
    def nbytes(self) -> int:
        """What it needs in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Box:
    """A part of a tensor: of which one, of what shape that is, and where in it the part begins."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True)
class Content:
    """What one of several processes is to write."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """By the file that they would be in if one process wrote all, and by name."""
    boxes: Mapping[str, Mapping[str, Box]] = field(default_factory=dict)
    """Which part of a tensor these values are, where they are not all of the one that they are named by."""
    table: Table = field(default_factory=Table)
    """What all keep together; what is in it need not be told."""


@dataclass(frozen=True)
class Share:
    """What one of several processes has written of a folder."""

    files: dict[str, FileEntry]
    written: list[Written]
    """What is in no table that all have alike."""
    parts: dict[int, Part] = field(default_factory=dict)
    table: str = ""
    """The digest of that table; see :class:`onym.format.sharded_tensor.Table`."""


_one_large = Lock()


def gather(state: Mapping[str, Any]) -> Stored:
    """See which tensors a state dict has to store; a tied one is kept under the first of its names. Nothing is copied.

    Raises:
        CheckpointError: a value is no tensor, or a tensor has no values to store.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if isinstance(value, LazyTensor):
            tensors[name] = cast(Tensor, value)  # has all of one that is needed until it is written
            aliases |= dict.fromkeys(value.aliases, name)
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} is a {type(value).__name__}, not a tensor: only tensors can be stored in .safetensors. "
                "Take it out of the model's state (get_extra_state), or save to .pth."
            )
        if name == "__metadata__" or (not is_text(name)):
            raise CheckpointError(f"{name!r} cannot be a tensor's name in a .safetensors file: rename the attribute.")
        if value.is_meta or isinstance(value, torch.nn.UninitializedParameter):
            raise CheckpointError(
                f"{name} has no values yet (it is on the meta device, or its layer is lazy): load or initialise the model "
                "before saving it."
            )
        if value.layout != torch.strided:
            raise CheckpointError(f"{name} is {value.layout}, which cannot be stored: store its to_dense().")
        if value.is_quantized:
            raise CheckpointError(f"{name} is quantized ({value.dtype}), which cannot be stored: store its int_repr().")
        if is_traceable_wrapper_subclass(value):
            raise CheckpointError(
                f"{name} is a {type(value).__name__}, a tensor made of others, which cannot be stored: store a plain one "
                "(dequantize() gives it)."
            )
        identity = tensor_identity(value)
        if identity is not None and identity in seen:
            aliases[name] = seen[identity]
            continue
        if identity is not None:
            seen[identity] = name
        tensors[name] = value.detach()
    return Stored(tensors, aliases)


def in_memory(tensor: Tensor) -> Tensor:
    """The values in one piece of this machine's memory; itself if it is that already."""
    if isinstance(tensor, LazyTensor):
        made: Tensor = tensor.make().detach()
        return in_memory(made)
    if tensor.layout != torch.strided:
        raise CheckpointError("One of the tensors is sparse, which is not written here: take its to_dense() first.")
    if is_plain(tensor):
        return tensor
    return tensor.to("cpu").resolve_conj().resolve_neg().contiguous()


def tensor_hash(tensor: Tensor) -> TensorHash:
    """The hash of a tensor's bytes."""
    return hash_of(as_bytes(in_memory(tensor)).numpy().data)


def write_safetensors(
    path: Path,
    state: Mapping[str, Any],
    architecture: str | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write one self-describing .safetensors file, durably. A state may hold tensors that are :class:`Made` on the way."""
    stored = gather(state)
    about = provenance()

    @gc_paused()
    def header(hashes: Mapping[str, TensorHash]) -> tuple[bytes, list[str]]:
        entries = stored.entries(hashes)
        ours = Header(entries, architecture, config, identity_of(entries), about)
        return header_of(_described(stored), {**stored.aliases, HEADER_KEY: ours.to_json()})

    start, order = header(stored.unhashed())
    with new_file(path, len(start) + stored.nbytes + _MARGIN) as file:
        if not file.positioned:  # its beginning has to be right when it is sent
            start, order = header({name: tensor_hash(tensor) for name, tensor in stored.tensors.items()})
        job = _Job(file, stored, start, order)
        _write_all([job], progress)
        if file.positioned:
            file.write_at(header(job.hashes)[0], 0)


def write_pth(path: Path, state: Mapping[str, Any]) -> None:
    """Write a plain state dict for ``torch.load(path, weights_only=True)``, durably. Tied tensors stay tied."""
    stored = gather({name: value for name, value in state.items() if isinstance(value, Tensor)})
    plain = {name: _alone(tensor) for name, tensor in stored.tensors.items()}
    ordered = OrderedDict(
        (name, plain[stored.aliases.get(name, name)] if isinstance(value, Tensor) else value) for name, value in state.items()
    )
    if hasattr(state, "_metadata"):  # the layout versions of the modules, which their load_state_dict asks for
        ordered._metadata = state._metadata  # type: ignore[attr-defined]
    write_pickle(path, ordered, stored.nbytes)


def write_pickle(path: Path, content: Any, expected_bytes: int = 0) -> None:
    """Write what ``torch.load(path, weights_only=True)`` opens, durably."""
    with new_file(path, expected_bytes + _MARGIN) as file:
        failed: list[OSError] = []

        class Sink:
            """torch closes its zip after a failed write, fails again over that, and hides the first error."""

            flush = file.flush

            def write(self, data: bytes | memoryview) -> int:
                try:
                    return file.write(data)
                except OSError as error:
                    failed.append(error)
                    raise

        try:
            torch.save(content, cast(IO[bytes], Sink()))
        except KeyError as error:  # int4 and the like
            raise CheckpointError(f"torch.save cannot write this model ({error.args[0]}): save to .safetensors.") from error
        except RuntimeError as error:
            raise failed[0] if failed else error from None


def write_files(
    path: Path, tensors: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str], progress: Progress | None = None
) -> None:
    """Write a folder of plain .safetensors files and texts for other programs, durably, without a manifest of ours.

    Args:
        path: where it shall be; nothing may be there.
        tensors: by file name, the named tensors of each .safetensors file.
        texts: by file name, the content of each other file.
        progress: see :data:`Progress`.
    """
    require_replaceable(path)
    gathered = {file: gather(state) for file, state in tensors.items()}
    needed = sum(stored.nbytes for stored in gathered.values()) + sum(len(text.encode()) for text in texts.values()) + _MARGIN
    last = list(texts or tensors)[-1]
    with new_folder(path, last, needed) as folder:
        jobs = [
            _Job(folder.create(name), stored, *header_of(_described(stored), stored.aliases))
            for name, stored in gathered.items()
        ]
        _write_all(jobs, progress, finish=True)
        for name, text in texts.items():
            folder.create(name).write(text.encode())


def _alone(tensor: Tensor) -> Tensor:
    """Without the rest of the memory that it is a view of, which ``torch.save`` would write too."""
    plain = in_memory(tensor)
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()


def write_folder(
    path: Path,
    tensors: Mapping[str, Mapping[str, Any]],
    texts: Mapping[str, str],
    *,
    architecture: str | None = None,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    parent: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write a checkpoint or model folder, durably, its manifest last.

    Args:
        path: where it shall be.
        tensors: by file name, the named tensors of each .safetensors file.
        texts: by file name, the content of each other file.
        architecture, step, metrics: for the manifest.
        parent: the step and the identity of the checkpoint that this one goes on from.
        progress: see :data:`Progress`.
    """
    require_replaceable(path)
    with gc_paused():
        gathered = {file: gather(state) for file, state in tensors.items()}
    contents = _encoded(path, texts)
    needed = sum(stored.nbytes for stored in gathered.values()) + sum(map(len, contents.values())) + _MARGIN
    with new_folder(path, MANIFEST, needed) as folder:
        jobs = _write_tensor_files(folder, gathered, progress)
        files = {name: job.entry for name, job in jobs.items()}
        with gc_paused():
            entries = {name: job.stored.entries(job.hashes) for name, job in jobs.items()}
            identity = identity_of(entries[MODEL]) if MODEL in entries else ""
        return _complete(folder, path, files, contents, entries, identity, architecture, step, metrics, parent)


def write_share(folder: NewFolder, number: int, content: Content, progress: Progress | None = None) -> Share:
    """Write what one of several processes has of a folder, to the disk, the hashes in the files' headers.

    Args:
        folder: that all of them fill.
        number: the process's.
        progress: see :data:`Progress`.
    """
    own = {file: piece_file(file, number) for file, state in content.tensors.items() if state}
    pieces: list[tuple[str, str, Written]] = []
    named: dict[str, dict[str, Tensor]] = {}
    for file in own:
        for kept_as, values in content.tensors[file].items():
            box = content.boxes.get(file, {}).get(kept_as, Box(kept_as, tuple(values.shape), (0,) * values.dim()))
            part = Part(number, box.start, tuple(values.shape))
            name = part.name(box.name, box.shape)
            if name in named.get(own[file], {}):
                raise CheckpointError(f"{name!r} is a tensor's name and would be that of another one's piece: rename it.")
            named.setdefault(own[file], {})[name] = values
            pieces.append((own[file], name, Written(file, box.name, dtype_name(values.dtype), box.shape, part)))
    with gc_paused():
        gathered = {name: gather(state) for name, state in named.items()}
    jobs = _write_tensor_files(folder, gathered, progress, described=True)
    tensor = {(file, name): written.name for file, name, written in pieces}
    same = {(file, a): tensor[file, stored] for file, job in jobs.items() for a, stored in job.stored.aliases.items()}
    untold = [
        replace(written, same_as=same.get((file, name), ""))
        for file, name, written in pieces
        if written.name not in content.table.tensors.get(written.file, {})
    ]
    return Share({name: job.entry for name, job in jobs.items()}, untold, content.table.parts, content.table.digest)


def complete_folder(
    folder: NewFolder,
    path: Path,
    files: Mapping[str, FileEntry],
    pieces: Pieces,
    texts: Mapping[str, str],
    *,
    architecture: str | None = None,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    parent: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write what makes a whole of what several processes wrote: the texts, ``pieces.json``, and the manifest.

    Args:
        folder: with all of their files on the disk.
        path: where it shall be.
        files: all that they have written.
        pieces: what is in them; some of it is of the model.
        texts, architecture, step, metrics, parent: as in :func:`write_folder`.
    """
    pieces.require_whole(f"'{path}'")
    with gc_paused():
        contents = _encoded(path, texts) | {PIECES: pieces.to_json().encode()}
        require_bounded_json(contents[PIECES], f"'{path / PIECES}'")  # else it could not be read again
        identity = pieces.identity(files)
    return _complete(folder, path, dict(files), contents, {}, identity, architecture, step, metrics, parent)


def _encoded(path: Path, texts: Mapping[str, str]) -> dict[str, bytes]:
    for file in (CONFIG, TRAINER):
        parse_json(texts.get(file, "{}"), f"'{path / file}'")  # what could not be read again is not written
    return {file: text.encode() for file, text in texts.items()}


def _write_tensor_files(
    folder: NewFolder | object_store.RemoteFolder,
    gathered: Mapping[str, Stored],
    progress: Progress | None,
    described: bool = False,
) -> dict[str, _Job]:
    """Write some files whole, to the disk. ``described``: each says the hashes of its tensors itself."""

    def job_of(name: str, stored: Stored) -> _Job:
        def header(hashes: Mapping[str, TensorHash]) -> tuple[bytes, list[str]]:
            if not described:
                return header_of(_described(stored), stored.aliases)
            entries = stored.entries(hashes)
            ours = Header(entries, identity=identity_of(entries))
            return header_of(_described(stored), {**stored.aliases, HEADER_KEY: ours.to_json()})

        job = _Job(folder.create(name), stored, *header(stored.unhashed()))
        if described:
            job.final_start = lambda hashes: header(hashes)[0]
        return job

    with gc_paused():
        jobs = {name: job_of(name, stored) for name, stored in gathered.items()}
    _write_all(list(jobs.values()), progress, finish=True)
    for job in jobs.values():
        job.finish()  # of an empty one no thread did it
    return jobs


def _complete(
    folder: NewFolder | object_store.RemoteFolder,
    path: Path,
    files: dict[str, FileEntry],
    contents: Mapping[str, bytes],
    entries: dict[str, dict[str, TensorEntry]],
    identity: str,
    architecture: str | None,
    step: int | None,
    metrics: Mapping[str, float] | None,
    parent: Mapping[str, Any] | None,
) -> Manifest:
    """The texts, and the manifest last."""
    for name, data in contents.items():
        folder.create(name).write(data)
        files[name] = FileEntry(len(data), blake3(data).hexdigest(), len(data))
    with gc_paused():
        about = (
            provenance()
            | ({"config": files[CONFIG].blake3} if CONFIG in files else {})
            | ({"parent": parent} if parent else {})
        )
        manifest = Manifest(files, entries, architecture, step, dict(metrics or {}), about, identity)
        text = manifest.to_json().encode()
    require_bounded_json(text, f"The manifest of '{path}'")
    folder.create(MANIFEST).write(text)
    return manifest


def require_replaceable(path: Path) -> None:
    """See that nothing is at ``path``, or a folder of which Onym wrote every file.

    Raises:
        StorageError: something else is there; replacing it would delete it.
    """
    if object_store.is_remote(path) and object_store.read_all(path / MANIFEST, MOST_JSON_BYTES) is None:
        return  # an upload that was cut short: what it left is written over
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    theirs = [path.name]
    if path.is_dir():
        try:
            ours = Manifest.read(path).files
            theirs = sorted(entry.name for entry in path.iterdir() if entry.name not in ours and entry.name != MANIFEST)
        except (OSError, CheckpointError):
            theirs = sorted(entry.name for entry in path.iterdir())
    if theirs:
        raise StorageError(
            f"'{path}' holds what Onym did not write ({', '.join(theirs[:3])}) and would be replaced as a whole: choose "
            "another name, or remove it."
        )


def _described(stored: Stored) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.tensors.items()}


class _Job:
    """A tensor file being written: its start (the header), and units of work, which several threads take from."""

    def __init__(self, file: NewFile, stored: Stored, start: bytes, order: list[str]) -> None:
        self.file, self.stored, self.start = file, stored, start
        self.hashes: dict[str, TensorHash] = {}
        self.units: deque[tuple[int, list[str]]] = deque()
        position, small, small_bytes = len(start), list[str](), 0
        for name in order:  # many small ones are one unit
            nbytes = stored.tensors[name].nbytes
            if nbytes >= _SMALL or small_bytes + nbytes > _CHUNK:
                self._add(position - small_bytes, small)
                small, small_bytes = [], 0
            if nbytes >= _SMALL:
                self._add(position, [name])
            else:
                small.append(name)
                small_bytes += nbytes
            position += nbytes
        self._add(position - small_bytes, small)
        self.final_start: Callable[[Mapping[str, TensorHash]], bytes] | None = None
        """Makes the start as it is to be once all hashes are known; of the same length."""
        self._lock, self._finished = Lock(), False

    @property
    def entry(self) -> FileEntry:
        """What a manifest says of the file."""
        return FileEntry(len(self.start) + self.stored.nbytes, blake3(self.start).hexdigest(), len(self.start))

    def finish(self) -> None:
        """Flush the file; the thread that comes first does it."""
        with self._lock:
            mine, self._finished = not self._finished, True
        if mine and self.final_start is not None:
            self.start, self.final_start = self.final_start(self.hashes), None
            self.file.write_at(self.start, 0)
        if mine:
            self.file.finish()

    def _add(self, position: int, names: list[str]) -> None:
        if names:
            self.units.append((position, names))


def _write_all(jobs: list[_Job], progress: Progress | None, *, finish: bool = False) -> None:
    """Hash and write tensor files. A thread takes units of a file of its own first, then helps with the others'.

    Args:
        jobs: the files; their hashes are filled in.
        progress: told of what was written.
        finish: flush each file as soon as it is complete, while others are still written.
    """
    for job in jobs:
        job.file.write(job.start)
    told = progress or (lambda written: None)
    if not all(job.file.positioned for job in jobs):
        for job in jobs:
            for _, names in job.units:
                for name in names:
                    _put(job, [name], None, told)
            if finish:
                job.file.finish()
        return
    failed = False

    def work(number: int) -> None:
        nonlocal failed
        first = number % len(jobs)
        order = jobs[first:] + jobs[:first]
        while not failed:
            for job in order:
                try:
                    position, names = job.units.popleft()
                    break
                except IndexError:
                    continue
            else:
                return
            try:
                _put(job, names, position, told)
                if finish and len(job.hashes) == len(job.stored.tensors):
                    job.finish()
            except BaseException:
                failed = True
                raise

    total = sum(job.stored.nbytes for job in jobs)
    if jobs:
        run_in_threads(work, WORKERS if total > 4 * _CHUNK else 1)


def _put(job: _Job, names: list[str], position: int | None, told: Progress) -> None:
    """Write one tensor, or small ones that follow each other, at a position or at the end of the file."""
    if len(names) > 1 or (position is not None and job.stored.tensors[names[0]].nbytes < _SMALL):
        parts: dict[str, bytes] = {}
        for name in names:
            tensor = in_memory(job.stored.tensors[name])
            parts[name] = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""
        data = b"".join(parts.values())
        assert position is not None
        job.file.write_at(data, position)
        # Only now: the thread that finds all hashes there takes the file for complete, and flushes it.
        job.hashes.update({name: hash_of(part) for name, part in parts.items()})
        told(len(data))
        return
    tensor = job.stored.tensors[names[0]]
    with _one_large if isinstance(tensor, LazyTensor) and tensor.nbytes > _LARGE else nullcontext():
        _put_large(job, names[0], position, told)


def _put_large(job: _Job, name: str, position: int | None, told: Progress) -> None:
    view = as_bytes(in_memory(job.stored.tensors[name])).numpy().data
    hasher = Hasher(len(view))
    sent = 0
    start_write_back = getattr(job.file, "start_write_back", None)
    for begin in range(0, len(view), _CHUNK):
        chunk = view[begin : begin + _CHUNK]
        hasher.update(chunk)  # while it is in the processor's cache
        if position is None:
            job.file.write(chunk)
        else:
            job.file.write_at(chunk, position + begin)
            end = begin + len(chunk)
            if start_write_back and (end - sent >= _WRITE_BACK or (end == len(view) and end - sent >= _CHUNK)):
                start_write_back(position + sent, end - sent)
                sent = end
        told(len(chunk))
    job.hashes[name] = hasher.result()


def provenance() -> dict[str, Any]:
    """When, where, and with which versions something is written."""
    about = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onym": version("onym"),
    }
    commit = _git_commit()
    return {**about, "git": commit} if commit else about


@cache
def _git_commit() -> str | None:
    """The commit that the working folder is at, with ``-dirty`` where tracked files differ from it."""
    try:
        said = subprocess.run(
            ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None if said.returncode == 0 else None
