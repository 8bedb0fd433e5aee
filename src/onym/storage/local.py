"""The few operations that a durable write needs. Everything that Onym keeps reaches a disk through here.

A file or folder is written in a temporary folder beside its place, flushed to the disk, renamed, and the folder that holds
it flushed too: after a crash either the old one or the new one is there, and it is whole. Renaming also leaves a reader that
has the old file mapped undisturbed. On remote storage (``s3://…``) nothing can be renamed: there a file appears when its
upload is complete, and a folder counts from when its manifest is there (:mod:`onym.storage.object_store`).

What a writer that died left behind is told by its name and by a lock that a living one holds; the next writer in the same
folder deletes it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from onym.errors import StorageError, storage_error
from onym.storage import object_store
from onym.storage.lock import NoLocks, lock, this_host

if sys.platform == "win32":
    _FOLDER_FLAGS = 0
else:
    _FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY

TEMPORARY_PREFIX = ".onym-writing-"
_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + r"(?P<host>.*)-[0-9a-f]{12}")

_LARGEST_WRITE = 1 << 20  # larger ones are slower: the chunk stays in the processor's cache, and the kernel in small pages
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_SYNC_FILE_RANGE_WRITE = 2
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Disk:
    """The system calls that change something: the seam at which tests make them fail, and cut the power."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)

    def write(self, descriptor: int, data: memoryview, position: int) -> int:
        return os.pwrite(descriptor, data, position)

    def start_write_back(self, descriptor: int, position: int, length: int) -> None:
        """Let the disk begin with what was written, where the system has a call for that; it would wait for the flush."""
        if _sync_file_range is not None:
            _sync_file_range(descriptor, position, length, _SYNC_FILE_RANGE_WRITE)

    def flush(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def set_mode(self, path: Path, mode: int) -> None:
        path.chmod(mode)

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def flush_folder(self, path: Path) -> None:
        """Return when the folder's entries are on the disk. Windows, which cannot open a folder, does it by itself."""
        if _FOLDER_FLAGS:
            descriptor = os.open(path, _FOLDER_FLAGS)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two names in one step; False where the system or the file system cannot."""
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
        if renameat2 is None:
            return False
        if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            return False
        raise OSError(code, os.strerror(code))

    def remove_file(self, path: Path) -> None:
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        path.rmdir()


disk = Disk()


class NewFile(Protocol):
    """A file in the making."""

    positioned: bool
    """Whether :meth:`write_at` works, from several threads at once."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Append."""

    def write_at(self, data: bytes | memoryview, position: int, /) -> None:
        """Write somewhere."""

    def flush(self) -> None:
        """For those who take it for an open file. Nothing: what is written is flushed once, at the end."""

    def finish(self) -> None:
        """Return when the content is on the disk."""


class _LocalFile:
    positioned = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = disk.create(path)
        self._end = 0

    def write(self, data: bytes | memoryview, /) -> int:
        self.write_at(data, self._end)
        self._end += len(data)
        return len(data)

    def write_at(self, data: bytes | memoryview, position: int, /) -> None:
        rest = memoryview(data)
        while rest:
            done = disk.write(self._descriptor, rest[:_LARGEST_WRITE], position)
            rest, position = rest[done:], position + done

    def start_write_back(self, position: int, length: int) -> None:
        disk.start_write_back(self._descriptor, position, length)

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        if self._descriptor >= 0:
            disk.flush(self._descriptor)
            self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            disk.close(descriptor)


class NewFolder:
    """A folder in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        """Where it is while it is made."""
        self._files: list[_LocalFile] = []

    def create(self, name: str) -> _LocalFile:
        """A file in it."""
        self._files.append(_LocalFile(self.path / name))
        return self._files[-1]

    def finish(self, last: str) -> None:
        """Return when all is on the disk, the file ``last`` after all others."""
        for file in sorted(self._files, key=lambda file: file.path.name == last):
            file.finish()
        disk.flush_folder(self.path)

    def close(self) -> None:
        for file in self._files:
            with suppress(OSError):
                file.close()


@contextmanager
def new_file(path: Path, expected_bytes: int = 0) -> Iterator[NewFile]:
    """Write a file: yields it to be filled, and puts it in place if the block succeeds.

    Args:
        path: where it shall be. A file there is replaced and keeps its mode; a link stays, and what it points to is replaced.
        expected_bytes: if known, what does not fit is refused before anything is written.

    Raises:
        StorageError: the disk refused; the file that was there before is untouched.
    """
    if object_store.is_remote(path):
        with object_store.new_file(path) as file:
            yield file
        return
    try:
        path = path.resolve() if path.is_symlink() else path
        make_folder(path.parent)
        if path.is_dir():
            raise StorageError(f"'{path}' is a folder, not a file: name a file in it.")
        with _temporary_sibling(path) as temporary:
            _require_room(path.parent, expected_bytes, path)
            local = _LocalFile(temporary)
            try:
                yield local
                if path.exists():
                    disk.set_mode(temporary, stat.S_IMODE(path.stat().st_mode))
                local.finish()
            finally:
                local.close()
            disk.rename(temporary, path)
            disk.flush_folder(path.parent)
    except OSError as error:
        raise storage_error("write", path, error) from error


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a small file, durably."""
    data = content.encode() if isinstance(content, str) else content
    with new_file(path, len(data)) as file:
        file.write(data)


@contextmanager
def new_folder(path: Path, last: str, expected_bytes: int = 0) -> Iterator[NewFolder | object_store.RemoteFolder]:
    """Write a folder of files: yields it to be filled, and puts it in place if the block succeeds.

    Args:
        path: where it shall be. A folder that is there already is replaced; whether it may be is for the caller to say.
        last: the file that says the folder is whole; the others reach the disk before it.
        expected_bytes: if known, what does not fit is refused before anything is written.

    Raises:
        StorageError: the disk refused; nothing was changed.
    """
    if object_store.is_remote(path):
        with object_store.new_folder(path, last) as folder:
            yield folder
        return
    try:
        path = path.resolve() if path.is_symlink() else path
        make_folder(path.parent)
        with _temporary_sibling(path) as temporary:
            _require_room(path.parent, expected_bytes, path)
            disk.make_folder(temporary)
            new = NewFolder(temporary)
            try:
                yield new
                new.finish(last)
            finally:
                new.close()
            _put_in_place(temporary, path)
    except OSError as error:
        raise storage_error("write", path, error) from error


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename a folder to its name. One that is there changes places with it, and goes with the temporary folder.

    Where a file system cannot exchange two names, the old one is moved aside first: for a moment nothing is there, and
    :func:`mend` puts it back if the process dies in that moment.
    """
    if not path.exists():
        disk.rename(temporary, path)
    elif disk.exchange(temporary, path):
        disk.flush_folder(temporary.parent)
    else:
        aside = replaced(path)
        disk.rename(path, aside)
        try:
            disk.rename(temporary, path)
        except BaseException:
            disk.rename(aside, path)
            raise
        disk.flush_folder(path.parent)
        with suppress(OSError):
            _remove_tree(aside)
        return
    disk.flush_folder(path.parent)


def replaced(path: Path) -> Path:
    """Where the old folder is while a new one takes its place, on a file system that cannot exchange names."""
    return path.parent / (object_store.REPLACED_PREFIX + path.name)


def repair_interrupted(path: Path) -> None:
    """Put back a folder whose replacing was cut short."""
    aside = replaced(path)
    if aside.is_dir():
        if path.exists():
            _remove_tree(aside)
        else:
            disk.rename(aside, path)
            disk.flush_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each on the disk before the next."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            disk.make_folder(folder)
        except FileExistsError:
            if not folder.is_dir():
                raise
        disk.flush_folder(folder.parent)


@contextmanager
def _temporary_sibling(path: Path) -> Iterator[Path]:
    """A name beside ``path`` that nobody else uses; what is left there at the end is deleted."""
    sweep(path.parent)
    repair_interrupted(path)
    while True:
        folder = path.parent / f"{TEMPORARY_PREFIX}{this_host()}-{secrets.token_hex(6)}"
        disk.make_folder(folder)
        try:
            held = lock(folder)
        except NoLocks:
            held = None
            break
        except FileNotFoundError:
            continue
        if held is not None and folder.is_dir():
            break
        if held is not None:
            os.close(held)
        # Somebody who swept took it for a dead one's before it was locked: again.
    try:
        yield folder / path.name
    finally:
        with suppress(OSError):
            _remove_tree(folder)
        if held is not None:
            os.close(held)


def sweep(folder: Path) -> None:
    """Delete what writers on this host that are dead left in a folder. A living one holds a lock on what is its own."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.name.startswith(TEMPORARY_PREFIX)]
    except OSError:
        return
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        if match is None or match.group("host") != this_host():
            continue
        with suppress(OSError):
            held = lock(folder / name)
            if held is not None:
                try:
                    _remove_tree(folder / name)
                finally:
                    os.close(held)


def remove_folder(path: Path) -> bool:
    """Delete a checkpoint; whether it is gone. It disappears under its name at once, before its files are deleted."""
    if object_store.is_remote(path):
        return object_store.remove_folder(path)
    try:
        with _temporary_sibling(path) as doomed:
            disk.rename(path, doomed)
            disk.flush_folder(path.parent)
        return not doomed.parent.exists()
    except OSError:
        return False


def move_folder(path: Path, target: Path) -> None:
    """Rename a folder within the folder that holds it; durably, or it would be back after a power cut."""
    disk.rename(path, target)
    disk.flush_folder(path.parent)


def remove_file(path: Path) -> None:
    """Delete a file, durably.

    Raises:
        StorageError: the disk refused.
    """
    try:
        disk.remove_file(path)
        disk.flush_folder(path.parent)
    except OSError as error:
        raise storage_error("delete", path, error) from error


def repair_all_interrupted(folder: Path) -> None:
    """Put back every folder in it whose replacing was cut short."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.name.startswith(object_store.REPLACED_PREFIX):
                repair_interrupted(folder / entry.name.removeprefix(object_store.REPLACED_PREFIX))


def _remove_tree(path: Path) -> None:
    """Delete a folder of ours, and all that is in it."""
    for entry in list(os.scandir(path)):
        if entry.is_dir(follow_symlinks=False):
            _remove_tree(Path(entry.path))
        else:
            disk.remove_file(Path(entry.path))
    disk.remove_folder(path)


def _require_room(folder: Path, needed: int, path: Path) -> None:
    """Refuse what cannot fit, before an hour of writing shows it."""
    if not needed:
        return
    usage = shutil.disk_usage(folder)
    if usage.total and needed > usage.free:
        raise StorageError(
            f"Could not write '{path}': {_megabytes(needed)} are needed and {_megabytes(usage.free)} left, so the disk "
            "is full: free some space, or choose a folder on another disk."
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"
