"""Named tensors and texts -> durable files and folders, with the hash of everything recorded beside it.

The state is not copied, so it must not change until the call returns (:mod:`onym.checkpoint.background` copies first).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from onym.errors import CheckpointError, StorageError
from onym.format.manifest import (
    CONFIG,
    MANIFEST,
    TRAINER,
    FileEntry,
    Header,
    Manifest,
    gc_paused,
    identity_of,
    main_file,
    parse_json,
    require_bounded_json,
)
from onym.format.provenance import provenance
from onym.format.stored import Stored, gather
from onym.format.tensor_writing import HeaderOf, Progress, TensorFileJob, write_tensors
from onym.storage.paths import storage_of
from onym.storage.protocol import NewFolder

MARGIN_BYTES = 64 << 10
"""What a manifest and a file system need besides the tensors."""


@dataclass(frozen=True)
class About:
    """What a manifest has besides files and tensors."""

    architecture: str | None = None
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parent: Mapping[str, Any] | None = None
    """Step and identity of the checkpoint that this one continues."""


NOTHING = About()


def write_safetensors(
    path: Path,
    state: Mapping[str, Any],
    architecture: str | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write one self-describing .safetensors file, durably. A state may hold :class:`onym.format.stored.LazyTensor`."""
    write_stored(path, gather(state, values=True), architecture, config, progress)


def write_stored(
    path: Path,
    stored: Stored,
    architecture: str | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """As :func:`write_safetensors`, of tensors that are gathered."""
    about = provenance()
    with storage_of(path).new_file(path, stored.nbytes + MARGIN_BYTES) as file:
        job = TensorFileJob(file, stored, lambda entries: Header(entries, architecture, config, identity_of(entries), about))
        write_tensors([job], progress, finish=False)
        job.write_hashes()


def write_files(
    path: Path, tensors: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str], progress: Progress | None = None
) -> None:
    """Write a folder of plain .safetensors files and texts for other programs, durably, without a manifest.

    Args:
        path: its place; nothing may be there.
        tensors: by file name, the named tensors of each .safetensors file.
        texts: by file name, the content of each other file.
        progress: see :data:`onym.format.tensor_writing.Progress`.
    """
    require_replaceable(path)
    gathered = {file: gather(state) for file, state in tensors.items()}
    contents = {name: text.encode() for name, text in texts.items()}
    with storage_of(path).new_folder(path, list(texts or tensors)[-1], _needed(gathered, contents)) as folder:
        write_tensor_files(folder, gathered, progress)
        for name, data in contents.items():
            folder.create(name).write(data)


def write_folder(
    path: Path,
    tensors: Mapping[str, Mapping[str, Any]],
    texts: Mapping[str, str],
    about: About = NOTHING,
    progress: Progress | None = None,
) -> Manifest:
    """Write a checkpoint or model folder, durably, its manifest last.

    Args:
        path: its place.
        tensors: by file name, the named tensors of each .safetensors file.
        texts: by file name, the content of each other file.
        about: the rest of the manifest.
        progress: see :data:`onym.format.tensor_writing.Progress`.
    """
    require_replaceable(path)
    with gc_paused():
        gathered = {file: gather(state, values=True) for file, state in tensors.items()}
    contents = encode_texts(path, texts)
    with storage_of(path).new_folder(path, MANIFEST, _needed(gathered, contents)) as folder:
        jobs = write_tensor_files(folder, gathered, progress)
        with gc_paused():
            entries = {name: job.stored.entries(job.hashes) for name, job in jobs.items()}
            identity = identity_of(entries[main]) if (main := main_file(entries)) in entries else ""
        files = {name: job.entry for name, job in jobs.items()}
        files |= write_texts(folder, contents)
        return write_manifest(folder, path, Manifest(files, entries, identity=identity), about)


def _needed(gathered: Mapping[str, Stored], contents: Mapping[str, bytes]) -> int:
    return sum(stored.nbytes for stored in gathered.values()) + sum(map(len, contents.values())) + MARGIN_BYTES


def write_tensor_files(
    folder: NewFolder, gathered: Mapping[str, Stored], progress: Progress | None, *, describe: bool = False
) -> dict[str, TensorFileJob]:
    """Write the tensor files of a folder and fsync them. ``describe``: each has its hashes in its own header."""
    own_header: HeaderOf | None = (lambda entries: Header(entries, identity=identity_of(entries))) if describe else None
    jobs = {name: TensorFileJob(folder.create(name), stored, own_header) for name, stored in gathered.items()}
    write_tensors(list(jobs.values()), progress, finish=True)
    return jobs


def encode_texts(path: Path, texts: Mapping[str, str]) -> dict[str, bytes]:
    """The bytes of a folder's texts; JSON that could not be read again is refused."""
    for file in (CONFIG, TRAINER):
        parse_json(texts.get(file, "{}"), f"'{path / file}'")
    return {file: text.encode() for file, text in texts.items()}


def write_texts(folder: NewFolder, contents: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Write small files; returns their entries in a manifest."""
    for name, data in contents.items():
        folder.create(name).write(data)
    return {name: FileEntry(len(data), blake3(data).hexdigest(), len(data)) for name, data in contents.items()}


def write_manifest(folder: NewFolder, path: Path, content: Manifest, about: About) -> Manifest:
    """Write the manifest of a folder, its last file.

    Args:
        path: the place of the folder.
        content: the files, tensors and identity.
        about: the rest.
    """
    with gc_paused():
        origin = provenance()
        if CONFIG in content.files:
            origin["config"] = content.files[CONFIG].blake3
        if about.parent:
            origin["parent"] = about.parent
        metrics = dict(about.metrics)
        manifest = Manifest(content.files, content.tensors, about.architecture, about.step, metrics, origin, content.identity)
        text = manifest.to_json().encode()
    require_bounded_json(text, f"The manifest of '{path}'")
    folder.create(MANIFEST).write(text)
    return manifest


def require_replaceable(path: Path) -> None:
    """Check that nothing is at ``path``, or a folder in which Onym wrote every file.

    Raises:
        StorageError: something else is there, which replacing it would delete.
    """
    if storage_of(path).has_leftovers(path, MANIFEST):
        return
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    others = [path.name]
    if path.is_dir():
        others = sorted(entry.name for entry in path.iterdir())
        try:
            ours = Manifest.read(path).files
            others = [name for name in others if name not in ours and name != MANIFEST]
        except (OSError, CheckpointError):
            pass
    if others:
        raise StorageError(
            f"'{path}' holds what Onym did not write ({', '.join(others[:3])}) and would be replaced as a whole: choose "
            "another name, or remove it."
        )
