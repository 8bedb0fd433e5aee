"""The system calls that change a disk: the seam at which tests make them fail, kill the process, and cut the power."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import warnings
from functools import cache
from pathlib import Path

_FOLDER_FLAGS = 0 if sys.platform == "win32" else os.O_RDONLY | os.O_DIRECTORY
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_SYNC_FILE_RANGE_WRITE = 2
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Disk:
    """One method for each system call."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)

    def write(self, descriptor: int, data: memoryview, position: int) -> int:
        return os.pwrite(descriptor, data, position)

    def start_write_back(self, descriptor: int, position: int, length: int) -> None:
        """Let the disk begin with what was written, where the system has a call for that."""
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
        """Return when the folder's entries are durable. Windows, which cannot open a folder, does it by itself."""
        if _FOLDER_FLAGS:
            descriptor = os.open(path, _FOLDER_FLAGS)
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
                _note_no_folder_fsync(path.stat().st_dev)
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


@cache
def _note_no_folder_fsync(device: int) -> None:
    """Say it once of each file system: shares of Samba and VirtualBox, and some of FUSE, have no fsync of folders."""
    warnings.warn(
        "This file system cannot fsync a folder, so after a power cut the newest checkpoint may be missing; the files "
        "themselves are durable.",
        stacklevel=2,
    )


disk = Disk()
