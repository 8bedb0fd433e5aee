"""Text from elsewhere: any address that fsspec reads (s3://, https://, hf://datasets/…), fetched one file at a time.

    <cache>/downloads/<key>-<name>          a file that was fetched as a whole
                      <key>-<name>.part     one that is being fetched

The key is a hash of the address and of what the storage says of the file's version, so a file that has changed there is fetched
anew. What has arrived stays: the next try, or the next run, asks for the rest where the storage can read from the middle of a
file. A try that fails is repeated, unless the answer is that there is no such file or no permission.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from blake3 import blake3

from onym.errors import DataError, OnymError, storage_error
from onym.storage.lock import NoLocks, lock

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0 while that is unknown)."""

RETRIES = 4
FIRST_WAIT = 1.0
"""Seconds before the first retry; each further one waits twice as long."""

_BLOCK = 4 << 20  # bytes asked for at a time: what a broken connection loses
_WEB = ("http://", "https://")
# What storages call a file's version; each has some of these.
_VERSION = (
    "size",
    "ETag",
    "etag",
    "VersionId",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "mtime",
    "updated",
    "blob_id",
)
_LOCAL = ("file://", "local://")
_T = TypeVar("_T")


@dataclass(frozen=True)
class RemoteFile:
    """A file on some storage.

    Args:
        url: its address, as it is shown.
        size: bytes; 0 where the storage does not say.
        version: a text that is another one when the file is.
        file_system: fsspec's, which reaches it.
        path: what ``file_system`` calls it.
    """

    url: str
    size: int
    version: str
    file_system: Any
    path: str

    @property
    def name(self) -> str:
        """The last part of its path, without the query of a web address."""
        return url_parts(self.url)[-1] if self.url.startswith(_WEB) else self.path.rpartition("/")[2]

    @property
    def address(self) -> str:
        """Its address in the form that the storage gives it: a file may be named in several ways."""
        return str(self.file_system.unstrip_protocol(self.path))


def is_remote(entry: str) -> bool:
    """Whether an entry of --data is an address, not a path on this machine."""
    return "://" in entry and not entry.startswith(_LOCAL)


def local_path(entry: str) -> str:
    """A path on this machine, also where it is written as file://…"""
    return entry.split("://", 1)[1] if entry.startswith(_LOCAL) else entry


def url_parts(url: str) -> list[str]:
    """The host or bucket of an address, and the folders and the file below it; the query of a web address is left out."""
    rest = url.split("://", 1)[1]
    if url.startswith(_WEB):
        rest = unquote(re.split(r"[?#]", rest, maxsplit=1)[0])
    return [part for part in rest.split("/") if part] or [url]


def find(url: str, is_known: Callable[[str], bool]) -> list[RemoteFile]:
    """The files of an address: one file, a folder's files of a known name, hidden ones left out, or those that match a pattern.

    Raises:
        DataError: there is none, it cannot be reached, or a package that it needs is not installed.
    """
    file_system, path = _repeat(url, lambda: _file_system(url))

    def listed() -> dict[str, dict[str, Any]]:
        file_system.invalidate_cache()
        is_web = url.startswith(_WEB)
        if "*" in path or (not is_web and re.search(r"[?\[]", path)):  # ? begins the query of a web address
            found = file_system.glob(path, detail=True)
            files = {name: info for name, info in found.items() if info.get("type") != "directory"}
            if not files:
                raise DataError(f"No file matches '{url}': check the pattern.")
        # Not isdir: asked of a web address, fsspec fetches the file and looks for links in it.
        elif path.endswith("/") if is_web else (info := file_system.info(path)).get("type") == "directory":
            found = file_system.find(path, detail=True)
            files = {name: info for name, info in found.items() if is_known(name) and not _is_hidden(name, path)}
            if not files:
                raise DataError(f"The folder '{url}' holds no files of a kind that is read: name another, or the files.")
        else:
            return {path: file_system.info(path) if is_web else info}
        # A web server's listing says nothing of sizes.
        return {name: file_system.info(name) if is_web else info for name, info in sorted(files.items())}

    def address(name: str) -> str:
        return url if name == path else str(file_system.unstrip_protocol(name))

    return [
        RemoteFile(address(name), int(info.get("size") or 0), _version(info), file_system, name)
        for name, info in _repeat(url, listed).items()
    ]


def fetch(file: RemoteFile, folder: Path, progress: Progress | None = None) -> Path:
    """The file on this machine, in ``folder``: as fetched before, or fetched now.

    Raises:
        DataError: it cannot be fetched.
        StorageError: it cannot be written here.
    """
    key = blake3(f"{file.address}\n{file.version}".encode()).hexdigest()[:32]
    target = folder / f"{key}-{re.sub(r'[^A-Za-z0-9_.-]', '_', file.name)[-100:]}"
    partial = target.with_name(f"{target.name}.part")
    if target.is_file():
        with contextlib.suppress(OSError):
            os.utime(target)  # says when it was last used
        return target
    with _only_one(partial, target):
        if not target.is_file():
            download = _Download(file, partial, progress)
            kept = f" Files fetched so far are kept in '{folder}'."
            _repeat(file.url, download, lambda: download.arrived, kept)
            with _on_disk(target):
                os.replace(partial, target)
    return target


class _Download:
    """Fetches a file, or the rest of it, each time that it is called."""

    def __init__(self, file: RemoteFile, partial: Path, progress: Progress | None) -> None:
        self.file, self.partial, self.progress = file, partial, progress
        self.can_resume = True

    def __call__(self) -> None:
        try:
            self._fetch()
        except (ValueError, NotImplementedError) as error:  # how fsspec says that a file can be read from its beginning alone
            if isinstance(error, OnymError) or not self.can_resume:
                raise
            self.can_resume = False
            self._fetch()

    @property
    def arrived(self) -> int:
        """Bytes that are here, and need not be fetched again."""
        return self.partial.stat().st_size if self.can_resume and self.partial.exists() else 0

    def _fetch(self) -> None:
        size, done = self.file.size, self.arrived
        if size and done > size:
            done = 0
        with _on_disk(self.partial):
            local = self.partial.open("r+b" if done else "wb")
        with local:
            for block in self._blocks(done) if not size or done < size else ():
                with _on_disk(self.partial):
                    local.seek(done)
                    local.write(block)
                    local.flush()
                done += len(block)
                if self.progress:
                    self.progress(f"Fetching {self.file.name}", done, size)
            with _on_disk(self.partial):
                local.truncate(done)
                os.fsync(local.fileno())
        if size and done != size:
            raise ConnectionError(f"it ended after {done:,} of {size:,} bytes")

    def _blocks(self, start: int) -> Iterator[bytes]:
        # Without ranges a web file is a stream, which fsspec gives where the block size is 0.
        size = 0 if self.file.url.startswith(_WEB) and not self.can_resume else _BLOCK
        with self.file.file_system.open(self.file.path, "rb", block_size=size) as remote:
            if start:
                remote.seek(start)
            while block := remote.read(_BLOCK):
                yield block


@contextlib.contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error("keep a fetched file", path, error) from error


@contextlib.contextmanager
def _only_one(partial: Path, target: Path) -> Iterator[None]:
    """Several processes that need a file wait for the one that fetches it."""
    descriptor = None
    with _on_disk(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(NoLocks):
            while (descriptor := lock(partial, os.O_RDWR | os.O_CREAT)) is None:
                time.sleep(0.2)
    try:
        yield
    finally:
        if descriptor is not None:
            if target.is_file():  # fetched by the one that was waited for: ours is an empty file
                partial.unlink(missing_ok=True)
            os.close(descriptor)


def _file_system(url: str) -> tuple[Any, str]:
    protocol = url.split("://", 1)[0]
    options: dict[str, Any] = {}
    try:
        from fsspec.core import url_to_fs

        if url.startswith(_WEB):
            import aiohttp

            # Not five minutes for all of a file, which is the default, but one without a byte.
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
        file_system, path = url_to_fs(url, **options)
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "http": "remote", "https": "remote"}.get(protocol)
        if extra is None and "fsspec" in sys.modules:  # it says which of its many packages this storage needs
            raise DataError(f"'{url}' is remote, and a package for its storage is missing: {_reason(error)}.") from error
        raise DataError(f"'{url}' is remote: pip install 'onym[{extra or 'remote'}]' ({_reason(error)}).") from error
    except ValueError as error:
        raise DataError(f"'{url}' is on a storage that fsspec does not know: {_reason(error)}.") from error
    return file_system, path


def _is_hidden(name: str, folder: str) -> bool:
    return any(part.startswith(".") for part in name.removeprefix(folder).split("/"))


def _version(info: dict[str, Any]) -> str:
    return repr([(name, str(info[name])) for name in _VERSION if info.get(name) is not None])


def _repeat(url: str, action: Callable[[], _T], arrived: Callable[[], int] = lambda: 0, kept: str = "") -> _T:
    """Try an action some times, longer and longer apart. Failures after which more of a file has arrived do not count.

    Raises:
        DataError: it cannot be done, with the reason.
    """
    failures, before = 0, arrived()
    while True:
        try:
            return action()
        except OnymError:
            raise
        except Exception as error:
            cause = _cause(error)
            if _is_final(cause):
                raise DataError(_final_sentence(url, cause)) from error
            if (now := arrived()) > before:
                failures, before = 0, now
            failures += 1
            if failures > RETRIES:
                raise DataError(
                    f"'{url}' could not be read, tried {failures} times: {_reason(cause)}.{kept} "
                    "Check the connection and run the same command again: it goes on from there."
                ) from error
        time.sleep(FIRST_WAIT * 2 ** (failures - 1))


def _cause(error: BaseException) -> BaseException:
    """fsspec reports whatever happens to a request for a web file as a FileNotFoundError, and its cause is the truth."""
    cause = error.__cause__
    is_of_the_web = cause is not None and type(cause).__module__.startswith("aiohttp")
    if isinstance(error, FileNotFoundError) and cause and (is_of_the_web or isinstance(cause, ConnectionError | TimeoutError)):
        return cause
    return error


def _status(error: BaseException) -> int:
    """The number that a server answered with; 0 where there was no answer."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(error, "status", None) or getattr(response, "status_code", response)
    return status if isinstance(status, int) else 0


def _is_final(error: BaseException) -> bool:
    if status := _status(error):
        return 400 <= status < 500 and status not in (408, 425, 429)  # not: too slow, too early, too many
    no_credentials = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")  # botocore's
    return no_credentials or isinstance(error, FileNotFoundError | PermissionError | NotImplementedError | ImportError)


def _final_sentence(url: str, error: BaseException) -> str:
    if _status(error) in (404, 410) or isinstance(error, FileNotFoundError):
        return f"There is no file or folder '{url}': check the address given to --data."
    if _status(error) in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return f"'{url}' may not be read from here ({_reason(error)}): check the address, and the credentials for it."
    return f"'{url}' cannot be read: {_reason(error)}."


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
