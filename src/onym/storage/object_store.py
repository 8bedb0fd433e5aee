"""Object stores through fsspec, as paths of universal_pathlib: ``s3://bucket/run``, ``gs://…``, ``memory://…``.

An object cannot be renamed, and it appears when its upload is complete. So a folder is written in place, its manifest last:
without that it is not a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from onym.errors import CheckpointError, OnymError, StorageError
from onym.storage.protocol import NewFile

is_local = False
_REPLACED_PREFIX = ".onym-replaced-"


class _Upload:
    positioned = False

    def __init__(self, path: Path) -> None:
        where: Any = path
        self._file: Any = where.fs.open(where.path, "wb", autocommit=False)
        self._finished = False

    def write(self, data: bytes | memoryview, /) -> int:
        self._file.write(data)
        return len(data)

    def write_at(self, data: bytes | memoryview, position: int, /) -> None:
        raise AssertionError("an upload is written from its beginning to its end")

    def start_write_back(self, position: int, length: int) -> None:
        pass

    def finish(self) -> None:
        if not self._finished:
            self._file.close()
            self._file.commit()
            self._finished = True

    def discard(self) -> None:
        """Abort it. Closing would publish what was uploaded so far."""
        if not self._finished:
            with suppress(Exception):
                self._file.discard()
            with suppress(Exception):
                self._file.closed = True  # or it would be published when it is collected


class _UploadedFolder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.files: dict[str, _Upload] = {}

    def create(self, name: str) -> _Upload:
        self.files[name] = _Upload(self._path / name)
        return self.files[name]


@dataclass(frozen=True)
class _Object:
    path: Path

    @cached_property
    def nbytes(self) -> int:
        return size(self.path)

    def read(self, start: int, end: int) -> bytes:
        return read_range(self.path, start, end)


def open_file(path: Path) -> _Object:
    """See :class:`onym.storage.protocol.Storage`, also for the others."""
    return _Object(path)


@contextmanager
def new_file(path: Path, expected_bytes: int = 0) -> Iterator[NewFile]:
    """Upload a file."""
    with translate_errors(path):
        file = _Upload(path)
        try:
            yield file
            file.finish()
        except BaseException:
            file.discard()
            raise


@contextmanager
def new_folder(path: Path, last: str, expected_bytes: int = 0) -> Iterator[_UploadedFolder]:
    """Upload a folder, its file ``last`` after all others. One that is there is moved aside, and back if the upload fails."""
    aside = path.parent / (_REPLACED_PREFIX + path.name)
    with translate_errors(path):
        refresh(path)
        replacing = (path / last).exists()
        if replacing:
            move_folder(path, aside, last)
        folder = _UploadedFolder(path)
        try:
            yield folder
            for name in sorted(folder.files, key=lambda name: name == last):
                folder.files[name].finish()
        except BaseException:
            for file in folder.files.values():
                file.discard()
            remove_folder(path, last)
            if replacing:
                with suppress(Exception):
                    move_folder(aside, path, last)
            raise
        if replacing:
            remove_folder(aside, last)


def remove_folder(path: Path, last: str) -> bool:
    """Delete a folder's objects, ``last`` first."""
    try:
        for name in sorted(list_names(path), key=lambda name: name != last):
            (path / name).unlink()
        with suppress(Exception):
            path.rmdir()  # object stores have no folders to remove
        return True
    except Exception:  # each storage has errors of its own
        return False


def move_folder(path: Path, target: Path, last: str) -> None:
    """Copy a folder, ``last`` after all others, and delete it."""
    here: Any = path
    there: Any = target
    with translate_errors(path, "move what is"):
        for name in sorted(list_names(path), key=lambda name: name == last):
            here.fs.cp_file((here / name).path, (there / name).path)
    remove_folder(path, last)


def remove_file(path: Path) -> None:
    """Delete an object."""
    path.unlink()


def read_range(path: Path, start: int, end: int) -> bytes:
    """Some bytes of an object."""
    if start == end:
        return b""  # some storages return the full object for an empty range
    where: Any = path
    with translate_errors(path, "read"):
        try:
            data: bytes = where.fs.cat_file(where.path, start=start, end=end)
        except FileNotFoundError as error:
            raise CheckpointError(f"'{path}' is not there any more.") from error
    return data


def read_all(path: Path, most: int) -> bytes | None:
    """The content of a small object; None where there is none. A storage that does not answer is an error."""
    where: Any = path
    with translate_errors(path, "read"):
        try:
            if where.fs.size(where.path) > most:
                raise CheckpointError(f"'{path}' has more than {most:,} bytes, which are not read.")
            data: bytes = where.fs.cat_file(where.path)
            return data
        except FileNotFoundError:
            return None


def size(path: Path) -> int:
    """Bytes in an object."""
    where: Any = path
    refresh(path)
    try:
        return int(where.fs.size(where.path))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise StorageError(f"Could not read at '{path}': the storage says '{error}'.") from error


def list_names(path: Path) -> list[str]:
    """The names in a folder."""
    refresh(path)
    with translate_errors(path, "list what is"):
        try:
            return [entry.name for entry in path.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []


def has_folder(path: Path, last: str) -> bool:
    """Whether a folder is complete."""
    refresh(path)
    with translate_errors(path, "look for checkpoints"):
        return (path / last).exists()


def has_leftovers(path: Path, last: str) -> bool:
    """An interrupted upload leaves a folder without its last file."""
    try:
        size(path / last)
    except FileNotFoundError:
        return True
    return False


def refresh(path: Path) -> None:
    """Drop cached listings: another process may have written since."""
    where: Any = path
    where.fs.invalidate_cache()


@contextmanager
def translate_errors(path: Path, action: str = "write") -> Iterator[None]:
    """Turn exceptions of a storage's library into a sentence."""
    try:
        yield
    except OnymError:
        raise
    except Exception as error:
        raise StorageError(f"Could not {action} at '{path}': the storage says '{error or type(error).__name__}'.") from error
