"""What a storage has to do. :mod:`onym.storage.local` and :mod:`onym.storage.object_store` are the two implementations.

A file or folder appears completely or not at all. A folder is complete when the file that its writer names as the last one
is there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class NewFile(Protocol):
    """A file that is being written."""

    positioned: bool
    """Whether :meth:`write_at` works, from several threads at once."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Append."""

    def write_at(self, data: bytes | memoryview, position: int, /) -> None:
        """Write somewhere."""

    def start_write_back(self, position: int, length: int) -> None:
        """Let the disk begin with what was written; otherwise it waits for the fsync."""

    def finish(self) -> None:
        """Return when the content is durable."""


class NewFolder(Protocol):
    """A folder that is being written."""

    def create(self, name: str) -> NewFile:
        """A file in it."""


class OpenFile(Protocol):
    """A file that is being read."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    def read(self, start: int, end: int) -> bytes:
        """Some of its bytes."""


class Storage(Protocol):
    """The operations that depend on where a path is."""

    is_local: bool
    """Whether its files can be mapped and locked, and other programs and ranks find them under the same path."""

    def open_file(self, path: Path) -> OpenFile:
        """Open a file for reading."""

    def read_all(self, path: Path, most: int) -> bytes | None:
        """The content of a small file; None where there is no file. CheckpointError where it has more than ``most`` bytes."""

    def size(self, path: Path) -> int:
        """Bytes in a file; OSError where there is none."""

    def list_names(self, path: Path) -> list[str]:
        """The names in a folder; none where there is no folder."""

    def has_folder(self, path: Path, last: str) -> bool:
        """Whether there is a folder, with its file ``last`` where that makes it complete."""

    def has_leftovers(self, path: Path, last: str) -> bool:
        """Whether an interrupted writer left files there, which may be overwritten."""

    def new_file(self, path: Path, expected_bytes: int = 0) -> AbstractContextManager[NewFile]:
        """Write a file: it appears when the block has succeeded."""

    def new_folder(self, path: Path, last: str, expected_bytes: int = 0) -> AbstractContextManager[NewFolder]:
        """Write a folder: it appears when the block has succeeded, and replaces one that is there."""

    def move_folder(self, path: Path, target: Path, last: str) -> None:
        """Rename a folder, durably; at each moment one of the two is complete."""

    def remove_folder(self, path: Path, last: str) -> bool:
        """Delete a folder; returns whether it is gone. It stops being complete at once."""

    def remove_file(self, path: Path) -> None:
        """Delete a file, durably."""
