"""The few operations that a durable write needs. Everything that Origo keeps reaches the disk through here.

A file or folder is written under a temporary name beside its place, flushed to the disk, renamed, and the folder that holds
it flushed too: after a crash either the old one or the new one is there, and it is whole. Renaming also leaves a reader that
has the old file mapped undisturbed.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from origo.errors import StorageError, storage_error

TEMPORARY_PREFIX = ".origo-writing-"


def flush_file(path: Path) -> None:
    """Return when the file's content is on the disk."""
    _flush(path, os.O_RDONLY)


def flush_folder(path: Path) -> None:
    """Return when the folder's entries are on the disk. Systems that cannot open a folder (Windows) do it by themselves."""
    if os.name == "posix":
        _flush(path, os.O_RDONLY | os.O_DIRECTORY)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file: yields a temporary path to write to, and puts it in place if the block succeeds.

    Raises:
        StorageError: the disk refused; the file that was there before is untouched.
    """
    try:
        make_folder(path.parent)
        if path.is_dir():
            raise StorageError(f"'{path}' is a folder, not a file: name a file in it.")
        with _temporary_sibling(path) as temporary:
            yield temporary
            # As the file that was there, or as the umask says: some writers make their files private.
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask())
            flush_file(temporary)
            os.replace(temporary, path)
            flush_folder(path.parent)
    except OSError as error:
        raise storage_error("write", path, error) from error


@contextmanager
def new_folder(path: Path, last: str) -> Iterator[Path]:
    """Write a folder of files: yields a temporary folder to fill, and puts it in place if the block succeeds.

    Args:
        path: where it shall be. A folder that is there already is replaced; whether it may be is for the caller to say.
        last: the file that says the folder is whole; the others reach the disk before it.

    Raises:
        StorageError: the disk refused; nothing was changed.
    """
    try:
        make_folder(path.parent)
        with _temporary_sibling(path) as temporary:
            temporary.mkdir()
            yield temporary
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
                os.chmod(file, 0o666 & ~_umask())
                flush_file(file)
            flush_folder(temporary)
            _put_in_place(temporary, path)
    except OSError as error:
        raise storage_error("write", path, error) from error


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename a folder to its name. One that is there is moved aside first, back if that fails, and deleted last."""
    aside = None
    if path.is_dir():
        aside = path.with_name(f"{TEMPORARY_PREFIX}replaced-{os.getpid()}-{path.name}")
        os.replace(path, aside)
    try:
        os.replace(temporary, path)
    except BaseException:
        if aside is not None:
            os.replace(aside, path)
        raise
    flush_folder(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each on the disk before the next."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


@contextmanager
def _temporary_sibling(path: Path) -> Iterator[Path]:
    """A name beside ``path`` that nobody else uses; what is left there at the end is deleted."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=path.parent) as folder:
        yield Path(folder) / path.name


def remove_folder(path: Path) -> bool:
    """Delete a folder of ours; whether it is gone. It disappears under its name at once, before its files are deleted."""
    doomed = path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}")
    try:
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    except OSError:
        return False
    return True


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
