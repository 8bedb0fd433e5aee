"""The disk under a folder: its kind, its room, and how fast it writes durably."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from onym.errors import ConfigError, StorageError, storage_error

IN_MEMORY = {"tmpfs", "ramfs"}
IN_CONTAINER = {"overlay", "aufs"}
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "afs", "9p"}
_NETWORK_BY_FUSE = ("fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.goofys", "fuse.glusterfs", "fuse.ceph")

_WRITTEN = 2**28  # bytes, as much as a small checkpoint
_WRITTEN_QUICKLY = 2**24
_PIECE = 2**26  # bytes between two flushes, so that a slow disk does not hold everything up
_LONGEST = 4.0  # seconds, after which no further piece is begun


@dataclass(frozen=True)
class Disk:
    """What a folder stands on."""

    folder: str
    kind: str
    """As the system names the file system: ext4, nfs4, tmpfs; "unknown" where it does not."""
    free: int
    """Bytes."""
    bytes_per_second: float | None
    """Written and flushed; None where it could not be measured."""
    trouble: str = ""
    """Why nothing can be written there."""

    @property
    def on_network(self) -> bool:
        """Whether it is on another computer."""
        return self.kind in NETWORK or self.kind.startswith(_NETWORK_BY_FUSE)


def look_at(folder: Path, *, quick: bool) -> Disk:
    """Find out about the disk under a folder, which need not exist yet, and is not made.

    Raises:
        ConfigError: it is not a folder.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"'{existing}' is a file, not a folder: name another one in the place of '{folder}'.")
    speed, trouble, free = None, "", 0
    try:
        free = shutil.disk_usage(existing).free
        speed = write_speed(existing, min(_WRITTEN_QUICKLY if quick else _WRITTEN, free // 4))
    except OSError as error:
        trouble = str(storage_error("write", folder, error))
    except StorageError as error:
        trouble = str(error)
    return Disk(str(folder), file_system(existing), free, speed, trouble)


def write_speed(folder: Path, count: int) -> float | None:
    """Bytes a second at which a file reaches the disk; None for none at all.

    The file has no name (``O_TMPFILE``, or deleted while it is open), so no file remains, not even after a SIGKILL.
    What is written is random, for there are file systems that compress.
    """
    random = os.urandom(min(count, 2**20))
    done = 0
    with tempfile.TemporaryFile(dir=folder, buffering=0, prefix=".onym-doctor-") as file:
        start = time.perf_counter()
        while done < count and time.perf_counter() - start < _LONGEST:
            for _ in range(0, min(_PIECE, count - done), len(random)):
                done += file.write(random)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
    return done / seconds if done else None


def file_system(path: Path, mounts: str | None = None) -> str:
    """The kind of file system that a path is on.

    Args:
        path: one that exists.
        mounts: the text of ``/proc/self/mountinfo``; this machine's by default.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
        except OSError:
            return "unknown"
    found, longest = "unknown", -1
    resolved = path.resolve()
    for line in mounts.splitlines():
        about, separator, source = line.partition(" - ")
        fields = about.split()
        if not separator or len(fields) < 5:
            continue
        mounted = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields[4]))  # \040 is a blank
        if resolved.is_relative_to(mounted) and len(mounted.parts) >= longest:  # the last of equals lies over the others
            found, longest = source.split()[0], len(mounted.parts)
    return found
