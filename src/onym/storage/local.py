"""Files and folders of this machine: written completely or not at all, whatever happens.

A file or folder is written in a temporary folder beside its place, fsynced and renamed, and the folder that holds it is fsynced
too: after a crash either the old one or the new one is there. A reader that has the old file mapped is not disturbed.

A temporary folder is locked by its writer. The next writer in the same folder deletes those whose writer is dead.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from mmap import ACCESS_COPY, mmap
from pathlib import Path

from onym.errors import CheckpointError, StorageError, storage_error
from onym.storage.disk import disk
from onym.storage.lock import NoLocks, lock, this_host
from onym.storage.protocol import NewFile
from onym.units import format_size

is_local = True
TEMPORARY_PREFIX = ".onym-writing-"
_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + r"(?P<host>.*)-[0-9a-f]{12}")
_REPLACED_PREFIX = ".onym-replaced-"
_LARGEST_WRITE = 1 << 20  # larger ones are slower: the data stays in the processor's cache, and the kernel in small pages

_NOT_MAPPED = (errno.ENODEV, errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)
"""What a file system says that maps no files, as some of FUSE's do."""


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

    def finish(self) -> None:
        if self._descriptor >= 0:
            disk.flush(self._descriptor)
            self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            disk.close(descriptor)


class LocalFolder:
    """A folder that is being written, under a temporary name. Other ranks open it by its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[_LocalFile] = []

    def create(self, name: str) -> _LocalFile:
        """A file in it."""
        self._files.append(_LocalFile(self.path / name))
        return self._files[-1]

    def finish(self, last: str) -> None:
        """Return when all is durable, the file ``last`` after all others."""
        for file in sorted(self._files, key=lambda file: file.path.name == last):
            file.finish()
        disk.flush_folder(self.path)

    def close(self) -> None:
        for file in self._files:
            with suppress(OSError):
                file.close()

    def discard(self) -> None:
        """Delete it, from whichever process: those that still write to it find no folder for another file."""
        self.close()
        if remove_folder(self.path, ""):
            with suppress(OSError):
                disk.remove_folder(self.path.parent)


class MappedFile:
    """A file that is being read."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.nbytes = os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self.descriptor, end - start, start)

    def read_into(self, buffer: memoryview, position: int) -> int:
        """Fill a buffer from a position; returns how many bytes there were."""
        return os.preadv(self.descriptor, [buffer], position)

    def map(self) -> mmap | bytearray:
        """Its content as private memory, never written to the file: read when it is touched, or now where the mount refuses."""
        try:
            return mmap(self.descriptor, 0, access=ACCESS_COPY)
        except OSError as error:
            if error.errno not in _NOT_MAPPED:
                raise
        content = bytearray(self.nbytes)
        done = 0
        while done < self.nbytes and (count := self.read_into(memoryview(content)[done:], done)):
            done += count
        return content

    def stamp(self) -> tuple[int, int]:
        """Equal while nobody writes to it."""
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns


def can_be_mapped(path: Path) -> bool:
    """Whether a file has bytes and its file system maps them."""
    file = MappedFile(path)
    try:
        mmap(file.descriptor, min(file.nbytes, 1), access=ACCESS_COPY).close()
        return True
    except (OSError, ValueError):
        return False


def open_file(path: Path) -> MappedFile:
    """See :class:`onym.storage.protocol.Storage`, also for the others."""
    return MappedFile(path)


def read_all(path: Path, most: int) -> bytes | None:
    """The content of a small file."""
    if not path.is_file():
        return None
    if path.stat().st_size > most:
        raise CheckpointError(f"'{path}' has more than {most:,} bytes, which are not read.")
    return path.read_bytes()


def size(path: Path) -> int:
    """Bytes in a file; a link is refused."""
    if path.is_symlink() or not path.is_file():
        raise OSError(errno.EINVAL, "it is a link, or not a file")
    return path.stat().st_size


def list_names(path: Path) -> list[str]:
    """The names in a folder; OSError where it cannot be listed."""
    try:
        return os.listdir(path)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []


def has_folder(path: Path, last: str) -> bool:
    """A folder appears by a rename, so it is complete."""
    return path.is_dir()


def has_leftovers(path: Path, last: str) -> bool:
    """Never: leftovers have names of their own."""
    return False


@contextmanager
def new_file(path: Path, expected_bytes: int = 0) -> Iterator[NewFile]:
    """Write a file: yields it to be filled, and renames it to its place if the block succeeds.

    Args:
        path: its place. A file there is replaced and its mode stays; a link stays, and its target is replaced.
        expected_bytes: if known, a file that does not fit is refused before anything is written.

    Raises:
        StorageError: the disk refused; the file that was there before is untouched.
    """
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


@contextmanager
def new_folder(path: Path, last: str, expected_bytes: int = 0) -> Iterator[LocalFolder]:
    """Write a folder of files: yields it to be filled, and renames it to its place if the block succeeds.

    Args:
        path: its place. A folder there is replaced; the caller decides whether it may be.
        last: the file that is fsynced after all others.
        expected_bytes: if known, a folder that does not fit is refused before anything is written.

    Raises:
        StorageError: the disk refused; nothing was changed.
    """
    try:
        path = path.resolve() if path.is_symlink() else path
        make_folder(path.parent)
        with _temporary_sibling(path) as temporary:
            _require_room(path.parent, expected_bytes, path)
            disk.make_folder(temporary)
            new = LocalFolder(temporary)
            try:
                yield new
                new.finish(last)
            finally:
                new.close()
            put_in_place(temporary, path)
    except OSError as error:
        raise storage_error("write", path, error) from error


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a folder to its place. One that is there is exchanged with it, and deleted with the temporary folder.

    Where a file system cannot exchange two names, the old one is moved aside first: for a moment nothing is there, and
    :func:`repair_interrupted` moves it back if the process dies in that moment.
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
    """The old folder while a new one is renamed, on a file system that cannot exchange names."""
    return path.parent / (_REPLACED_PREFIX + path.name)


def repair_interrupted(path: Path) -> None:
    """Move a folder back whose replacement was interrupted."""
    aside = replaced(path)
    if aside.is_dir():
        if path.exists():
            _remove_tree(aside)
        else:
            disk.rename(aside, path)
            disk.flush_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each durable before the next."""
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
    """A path in a locked folder beside ``path``; the folder is deleted at the end."""
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
        # Another writer deleted it before it was locked: try again.
    try:
        yield folder / path.name
    finally:
        with suppress(OSError):
            _remove_tree(folder)
        if held is not None:
            os.close(held)


def unfinished(path: Path) -> Path | None:
    """The newest folder that is being written to be put at ``path``."""
    path = path.resolve() if path.is_symlink() else path
    names = [name for name in list_names(path.parent) if name.startswith(TEMPORARY_PREFIX)]
    folders = [folder for name in names if (folder := path.parent / name / path.name).is_dir()]
    return max(folders, key=lambda folder: folder.stat().st_mtime_ns, default=None)


def sweep(folder: Path) -> None:
    """Delete the temporary folders of dead writers of this host. A living writer holds a lock on its own."""
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


def remove_folder(path: Path, last: str) -> bool:
    """Delete a folder: it is renamed first, so it disappears at once."""
    try:
        with _temporary_sibling(path) as doomed:
            disk.rename(path, doomed)
            disk.flush_folder(path.parent)
        return not doomed.parent.exists()
    except OSError:
        return False


def move_folder(path: Path, target: Path, last: str) -> None:
    """Rename a folder within the folder that holds it."""
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
    """Move every folder in it back whose replacement was interrupted."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.name.startswith(_REPLACED_PREFIX):
                repair_interrupted(folder / entry.name.removeprefix(_REPLACED_PREFIX))


def _remove_tree(path: Path) -> None:
    """Delete a folder and everything in it."""
    for entry in list(os.scandir(path)):
        if entry.is_dir(follow_symlinks=False):
            _remove_tree(Path(entry.path))
        else:
            disk.remove_file(Path(entry.path))
    disk.remove_folder(path)


def _require_room(folder: Path, needed: int, path: Path) -> None:
    """Refuse what does not fit before anything is written."""
    usage = shutil.disk_usage(folder)
    if needed and usage.total and needed > usage.free:
        raise StorageError(
            f"Could not write '{path}': {format_size(needed)} are needed and {format_size(usage.free)} left, so the disk "
            "is full: free some space, or choose a folder on another disk."
        )
