"""Remote storage through fsspec, as paths of universal_pathlib: ``s3://bucket/run``, ``gs://…``, ``memory://…``.

Nothing there can be renamed, and a file appears when its upload is complete. So a folder is written in place, its manifest
last: without that it is no checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from onym.errors import CheckpointError, ConfigError, OnymError, StorageError

REPLACED_PREFIX = ".onym-replaced-"
"""What a folder is called while a new one takes its place, where two names cannot be exchanged."""

_LOCAL = ("file://", "local://")


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path on this machine, or, from a text like ``s3://bucket/run``, one on remote storage that is used in the same way.

    Raises:
        ConfigError: it is remote, and what is needed for that is not installed.
    """
    if not isinstance(path, str):
        return path if hasattr(path, "joinpath") else Path(path)  # type: ignore[return-value]
    if path.startswith(_LOCAL):
        return Path(path.split("://", 1)[1])
    if "://" not in path:
        return Path(path)
    protocol = path.split("://", 1)[0]
    try:
        from upath import UPath

        remote: Any = UPath(path)
        remote.fs  # noqa: B018  # imports what the protocol needs
    except ImportError as error:
        extra = "s3" if protocol in ("s3", "s3a") else "remote"
        raise ConfigError(f"'{path}' is remote: pip install 'onym[{extra}]' ({error}).") from error
    except ValueError as error:
        raise ConfigError(f"'{path}' is on a storage that fsspec does not know: {error}.") from error
    path_like: Path = remote
    return path_like


def is_remote(path: Path) -> bool:
    """Whether it is one of fsspec's."""
    return not isinstance(path, Path)


class _RemoteFile:
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

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        if not self._finished:
            self._file.close()
            self._file.commit()
            self._finished = True

    def discard(self) -> None:
        """Leave nothing of it. Closing would publish what there is."""
        if not self._finished:
            with suppress(Exception):
                self._file.discard()
            with suppress(Exception):
                self._file.closed = True  # or it would be published when it is collected


@contextmanager
def new_file(path: Path) -> Iterator[_RemoteFile]:
    """Upload a file; it appears when the block has succeeded."""
    with translate_errors(path):
        file = _RemoteFile(path)
        try:
            yield file
            file.finish()
        except BaseException:
            file.discard()
            raise


class RemoteFolder:
    """A folder in the making."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, _RemoteFile] = {}

    def create(self, name: str) -> _RemoteFile:
        """A file in it."""
        self._files[name] = _RemoteFile(self._path / name)
        return self._files[name]

    def finish(self, last: str) -> None:
        """Return when all files are there, ``last`` after all others."""
        for name in sorted(self._files, key=lambda name: name == last):
            self._files[name].finish()

    def discard(self) -> None:
        """Leave nothing of it."""
        for file in self._files.values():
            file.discard()
        remove_folder(self._path)


@contextmanager
def new_folder(path: Path, last: str) -> Iterator[RemoteFolder]:
    """Upload a folder, whose file ``last`` makes it count. One that is there is moved aside, and back if that fails."""
    aside = path.parent / (REPLACED_PREFIX + path.name)
    with translate_errors(path):
        refresh(path)
        replacing = (path / last).exists()
        if replacing:
            move_folder(path, aside)
        folder = RemoteFolder(path)
        try:
            yield folder
            folder.finish(last)
        except BaseException:
            folder.discard()
            if replacing:
                with suppress(Exception):
                    move_folder(aside, path)
            raise
        if replacing:
            remove_folder(aside)


def remove_folder(path: Path) -> bool:
    """Delete a checkpoint, its manifest first; whether it is gone."""
    from onym.format.manifest import MANIFEST

    try:
        names = sorted(names_in(path), key=lambda name: name != MANIFEST)
        for name in names:
            (path / name).unlink()
        with suppress(Exception):
            path.rmdir()  # object stores have no folders to remove
        return True
    except Exception:  # each storage has errors of its own
        return False


def read_range(path: Path, start: int, end: int) -> bytes:
    """Some bytes of a file."""
    if start == end:
        return b""  # some storages take an empty range for the whole
    where: Any = path
    with translate_errors(path, "read"):
        try:
            data: bytes = where.fs.cat_file(where.path, start=start, end=end)
        except FileNotFoundError as error:
            raise CheckpointError(f"'{path}' is not there any more.") from error
    return data


def read_all(path: Path, most: int) -> bytes | None:
    """The content of a small file; None where there is none. That it cannot be asked for is an error, and says so."""
    where: Any = path
    with translate_errors(path, "read"):
        try:
            if where.fs.size(where.path) > most:
                raise StorageError(f"'{path}' has more than {most:,} bytes, which are not read.")
            data: bytes = where.fs.cat_file(where.path)
            return data
        except FileNotFoundError:
            return None


def refresh(path: Path) -> None:
    """Forget what was listed: another process may have written since."""
    if is_remote(path):
        where: Any = path
        where.fs.invalidate_cache()


def names_in(path: Path) -> list[str]:
    """What is in a folder; nothing where there is none."""
    refresh(path)
    with translate_errors(path, "list what is"):
        try:
            return [entry.name for entry in path.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []


def move_folder(path: Path, target: Path) -> None:
    """Copy a checkpoint and delete it, so that at each moment one of the two is whole."""
    from onym.format.manifest import MANIFEST

    here: Any = path
    there: Any = target
    with translate_errors(path, "move what is"):
        for name in sorted(names_in(path), key=lambda name: name == MANIFEST):
            here.fs.cp_file((here / name).path, (there / name).path)
    remove_folder(path)


def size(path: Path) -> int:
    """How many bytes a file has.

    Raises:
        FileNotFoundError: there is none.
        StorageError: the storage does not say.
    """
    where: Any = path
    where.fs.invalidate_cache()
    try:
        return int(where.fs.size(where.path))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise StorageError(f"Could not read at '{path}': the storage says '{error}'.") from error


@contextmanager
def translate_errors(path: Path, action: str = "write") -> Iterator[None]:
    """Put what a storage's library raises into a sentence."""
    try:
        yield
    except OnymError:
        raise
    except Exception as error:
        raise StorageError(f"Could not {action} at '{path}': the storage says '{error or type(error).__name__}'.") from error
