"""Compiled code moved on purpose: one machine's key in a .tar.gz, and back into the cache of a machine that is its equal.

An archive is read as if somebody hostile had made it: only plain files with plain names, only under this machine's key, no
more bytes than the cache may have, nothing in place before all of it was read. That does not make it safe: what is in it is
code that runs with the user's rights at the next compilation. So importing asks for trust in so many words.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO

from onym.compile import cache
from onym.compile.cache import ABOUT
from onym.compile.cache_key import facts, key_of, read_facts
from onym.errors import CheckpointError, ConfigError, storage_error

_MOST_FILES = 100_000
_LARGEST_ABOUT = 1 << 16
_LARGEST_READ = 1 << 20  # at once: names and headers are read at once, and are small in an honest archive
_NOT_MOVED = ("locks", ".lock", ".tmp")


def export_cache(target: Path) -> int:
    """Write this machine's compiled code to a .tar.gz; returns the number of files.

    Raises:
        ConfigError: there is none yet.
        StorageError: it cannot be written.
    """
    folder = cache.root() / key_of(facts())
    if not (folder / ABOUT).is_file():
        raise ConfigError(f"There is no compiled code of this machine in '{cache.root()}' yet: onym train makes some.")
    cache.require_private(folder)
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and _is_moved(path)]
    files.sort(key=lambda path: (path != folder / ABOUT, path))  # about.json first: a reader can refuse before the rest
    temporary = target.with_name(f".onym-writing-{target.name}-{os.getpid()}")
    try:
        with tarfile.open(temporary, "w:gz", compresslevel=3) as archive:
            for path in files:
                with suppress(FileNotFoundError), path.open("rb") as file:  # another process may be making room
                    entry = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}")
                    entry.size, entry.mode = os.fstat(file.fileno()).st_size, 0o600
                    archive.addfile(entry, file)
        os.replace(temporary, target)
    except OSError as error:
        raise storage_error("write the compiled code", target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return len(files)


def import_cache(source: Path, *, trusted: bool) -> int:
    """Take over what :func:`export_cache` wrote on a machine that is equal; returns how many files are new here.

    Files that are there already stay as they are.

    Raises:
        ConfigError: ``trusted`` is False; or the code was compiled for another machine.
        CheckpointError: the file is no such archive, or holds more than one may.
        StorageError: the cache cannot be written, or is open to others.
    """
    if not trusted:
        raise ConfigError(
            f"'{source}' holds compiled code, which would run with your rights: import it only if you made it yourself or "
            "trust whoever did, and confirm it with --i-trust-it."
        )
    try:
        stream = source.open("rb")
    except OSError as error:
        raise storage_error("read the archive", source, error) from error
    with stream:
        try:
            folder = cache.open_folder()
            with cache.temporary_folder() as name:
                _unpack(source, stream, Path(name), folder.name)
                return _take_over(Path(name), folder)
        except OSError as error:
            raise storage_error("write compiled code", cache.root(), error) from error


def _unpack(source: Path, stream: IO[bytes], place: Path, key: str) -> None:
    try:
        with gzip.GzipFile(fileobj=stream) as unzipped:
            bounded = _Bounded(unzipped)
            archive = tarfile.open(fileobj=bounded, mode="r:")  # noqa: SIM115  # closed with what it reads
            names: set[PurePosixPath] = set()
            for entry in archive:
                name = PurePosixPath(entry.name)
                _require_plain(source, entry, name)
                if not names:
                    _require_same_machine(source, archive, entry, name)
                if name.parts[0] != key or name in names or len(names) >= _MOST_FILES:
                    raise _bad(source, f"'{entry.name}' is in it, which does not belong there")
                names.add(name)
                target = place.joinpath(*name.parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                content = archive.extractfile(entry)
                assert content is not None
                with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    shutil.copyfileobj(content, file, _LARGEST_READ)
                if target.stat().st_size != entry.size:
                    raise _bad(source, "it ends too early")
            if not names:
                raise _bad(source, "it is empty")
            while bounded.read(_LARGEST_READ):  # to the end, where gzip's checksum is
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, UnicodeError, ValueError) as error:
        if isinstance(error, ConfigError | CheckpointError):
            raise
        raise _bad(source, str(error) or "it ends too early") from error


def _require_plain(source: Path, entry: tarfile.TarInfo, name: PurePosixPath) -> None:
    """A file, with a name that leads nowhere else on any system."""
    odd = any(not char.isprintable() or char in '\\:*?"<>|' for char in entry.name)
    if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.sparse:
        raise _bad(source, f"'{entry.name}' is no plain file")
    if odd or name.is_absolute() or ".." in name.parts or len(name.parts) < 2 or str(name) != entry.name:
        raise _bad(source, f"'{entry.name}' leads out of it")


def _require_same_machine(source: Path, archive: tarfile.TarFile, entry: tarfile.TarInfo, name: PurePosixPath) -> None:
    content = archive.extractfile(entry)
    if name.name != ABOUT or len(name.parts) != 2 or entry.size > _LARGEST_ABOUT or content is None:
        raise _bad(source, f"it does not begin with {ABOUT}")
    theirs, ours = read_facts(content.read(_LARGEST_ABOUT)), facts()
    for fact in (*ours, *theirs):
        if theirs.get(fact) != ours.get(fact):
            raise ConfigError(
                f"'{source}' was compiled for another machine, {fact}: {theirs.get(fact, 'not said')!r} there, "
                f"{ours.get(fact, 'not known')!r} here. Nothing was imported; compile here instead."
            )


def _take_over(place: Path, folder: Path) -> int:
    added = 0
    # Entries last: what they name is there before they are found.
    paths = [path for path in place.rglob("*") if path.is_file()]
    for path in sorted(paths, key=lambda path: path.relative_to(place).parts[0] in ("fxgraph", "aotautograd")):
        target = folder / path.relative_to(place)
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not target.exists():
            os.replace(path, target)
            added += 1
    return added


def _is_moved(path: Path) -> bool:
    return path.parent.name not in _NOT_MOVED and path.suffix not in _NOT_MOVED and not path.name.startswith(".")


def _bad(source: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"'{source}' was not written by onym tools cache export, or was changed since: {what}. Nothing was imported."
    )


class _Bounded(io.RawIOBase):
    """A stream that refuses to become larger than the cache may be, or to be read in large pieces."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LARGEST_READ:
            raise ValueError("a part of it is too large")
        self._require_within(self.tell() + size)
        return self._stream.read(size)

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self._require_within(position)
        return self._stream.seek(position, whence)

    @staticmethod
    def _require_within(position: int) -> None:
        if position > cache.LIMIT_BYTES:
            raise ValueError(f"it is larger than {cache.LIMIT_BYTES >> 20} MiB, the most that the cache may have")
