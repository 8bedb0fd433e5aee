"""Checkpoint folders that another program writes, made durable and verifiable: fsynced, with the hash of every file in a seal.

A folder without its seal is unfinished: the program was killed while it wrote, or before the disk had everything.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path, PurePosixPath

from blake3 import blake3

from onym.errors import CheckpointError, storage_error
from onym.format.hashing import NO_HASH
from onym.format.manifest import malformed_is_damaged, parse_json, require_seal, sealed
from onym.storage.disk import disk
from onym.storage.paths import replace_file
from onym.storage.threads import WORKERS, run_in_threads

SEAL = "onym-seal.json"
_PIECE = 4 << 20


def seal(folder: Path) -> None:
    """Fsync and hash the files of a folder, and record them in it, last.

    Raises:
        StorageError: the disk refused.
    """
    try:
        paths = sorted(_files(folder), key=lambda path: -path.stat().st_size)
        waiting, hashes = iter(paths), dict[Path, str]()

        def work(_: int) -> None:
            for path in waiting:  # each file goes to one thread
                hashes[path] = _hash(path, flush=True)

        run_in_threads(work, max(1, min(WORKERS, len(paths))))
        for inner in {path.parent for path in paths}:
            disk.flush_folder(inner)
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "blake3": hashes[path]}
            for path in sorted(paths)
        }
        replace_file(folder / SEAL, sealed(json.dumps({"files": files, "blake3": NO_HASH})))
        disk.flush_folder(folder.parent)
    except OSError as error:
        raise storage_error("make a checkpoint durable", folder, error) from error


def require_sealed(folder: Path) -> None:
    """Read every byte of a folder.

    Raises:
        CheckpointError: it has no seal, or is not as it was sealed.
    """
    if not (folder / SEAL).is_file():
        raise CheckpointError(f"'{folder}' is unfinished: the program that wrote it was stopped. Take an earlier one.")
    what = f"The seal '{folder / SEAL}'"
    with malformed_is_damaged(what):
        text = (folder / SEAL).read_text(encoding="utf-8")
        require_seal(text, what)
        for name, entry in parse_json(text, what)["files"].items():
            path = folder / name
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError("it names a file outside its folder")
            try:
                same = path.is_file() and path.stat().st_size == entry["bytes"] and _hash(path) == entry["blake3"]
            except OSError as error:
                raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
            if not same:
                raise CheckpointError(f"'{path}' is damaged: it is not what was written. Take an earlier checkpoint.")


def newest_sealed(root: Path, name: str) -> Path | None:
    """The newest folder that is as it was sealed; newer ones that are not are warned of.

    Args:
        root: where the folders are.
        name: a regular expression of their names, with the number of the step as its group.
    """
    found = [(int(match[1]), path) for path in root.glob("*") if (match := re.fullmatch(name, path.name)) and path.is_dir()]
    for _, path in sorted(found, reverse=True):
        try:
            require_sealed(path)
            return path
        except CheckpointError as error:
            warnings.warn(f"Passed over '{path}': {error}", stacklevel=3)
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(Path(place, name) for place, _, names in os.walk(folder) for name in names if name != SEAL)


def _hash(path: Path, *, flush: bool = False) -> str:
    """The hash of a file's content, read in pieces: mapping it costs more than reading. ``flush``: it is fsynced too."""
    hasher, piece = blake3(), bytearray(_PIECE)
    with path.open("rb+" if flush else "rb", buffering=0) as file:
        while count := file.readinto(piece):
            hasher.update(memoryview(piece)[:count])
        if flush:
            disk.flush(file.fileno())
    return hasher.hexdigest()
