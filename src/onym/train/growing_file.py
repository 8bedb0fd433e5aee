"""A file of lines that another process appends to, read in pieces: each byte once.

A last line that is cut off is left for the next time. A file that was replaced (another inode), or became shorter, or has other
bytes before the place where the last reading ended, is read anew. The last case is a file that was cut and written on between
two readings, or a new file that got the inode of an old one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_PIECE = 1 << 20  # bytes read at once
_LONGEST_LINE = 1 << 20  # bytes; a longer one is passed on in parts, which are no JSON
_COMPARED = 256  # bytes before the end of what was read


@dataclass(frozen=True)
class Lines:
    """Complete lines that are new."""

    text: bytes
    restarts: bool = False
    """What was read before is not part of the file any more; ``text`` is empty."""


class GrowingFile:
    """Reads what is new in a file. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: tuple[int, int] | None = None
        self._offset = 0
        self._before = b""

    def read(self) -> Iterator[Lines]:
        """The lines that were appended since the last call, at most about a MiB at a time.

        A file that is not there is an empty one; so is one that is no regular file.

        Raises:
            OSError: it cannot be read.
        """
        try:
            regular = stat.S_ISREG(self._path.stat().st_mode)  # to open a pipe would wait for its writer
            file = self._path.open("rb", buffering=0) if regular else None
        except (FileNotFoundError, NotADirectoryError):
            file = None
        if file is None:
            if self._inode is not None:
                yield self._restarted(None)
            return
        with file:
            status = os.fstat(file.fileno())
            inode = (status.st_dev, status.st_ino)
            if inode != self._inode or not self._continues(file):
                known = self._inode is not None
                restarted = self._restarted(inode)
                if known:
                    yield restarted
            yield from self._complete_lines(file, status.st_size)

    def _restarted(self, inode: tuple[int, int] | None) -> Lines:
        self._inode, self._offset, self._before = inode, 0, b""
        return Lines(b"", restarts=True)

    def _continues(self, file: BinaryIO) -> bool:
        """Whether what was read is still there; it is not in a shorter file."""
        return os.pread(file.fileno(), len(self._before), self._offset - len(self._before)) == self._before

    def _complete_lines(self, file: BinaryIO, end: int) -> Iterator[Lines]:
        position, rest = self._offset, b""
        while position < end and (piece := os.pread(file.fileno(), min(_PIECE, end - position), position)):
            position += len(piece)
            rest += piece
            length = rest.rfind(b"\n") + 1 or (len(rest) if len(rest) > _LONGEST_LINE else 0)
            if not length:
                continue
            lines, rest = rest[:length], rest[length:]
            self._offset += length
            self._before = (self._before + lines[-_COMPARED:])[-_COMPARED:]
            yield Lines(lines)
