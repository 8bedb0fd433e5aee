"""Who writes here: a lock that the system takes back when its process ends, however it ends.

A lock says that somebody lives; the text beside it says who. The system keeps locks right where process numbers cannot: in
containers, whose numbers mean nothing outside, and when a number is given to another process.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

from onym.errors import StorageError, storage_error

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LEASE = "writer.lease"


class NoLocks(OSError):
    """This system, or this file system, has no locks."""


def this_host() -> str:
    """This machine's name, fit for a file's name."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", platform.node() or "localhost")


def lock(path: Path, flags: int = os.O_RDONLY, *, shared: bool = False) -> int | None:
    """Lock a file or folder until the descriptor that is returned is closed or the process ends; None if another has it.

    ``shared``: several processes can have it, and it is waited for while one has it alone.

    Raises:
        NoLocks: nobody can have it.
        OSError: it is not there, or cannot be opened.
    """
    if fcntl is None:
        raise NoLocks
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise NoLocks from error
    return descriptor


@dataclass(frozen=True)
class Holder:
    """A writer of a run."""

    host: str
    pid: int
    since: str
    """When it began, UTC."""
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} ({self.command})"


class Lease:
    """The right to write to a folder, held by one process at a time.

    Raises:
        StorageError: another one has it; says who, and how to take over.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LEASE
        descriptor = None
        try:
            descriptor = _locked(folder, path)
            previous = holder(folder)
            here = previous is None or previous.host == platform.node()
            alive = previous is not None and descriptor is None and _lives(previous.pid)  # without locks, the number must do
            if previous is not None and (not here or alive):
                if descriptor is not None:
                    os.close(descriptor)
                # Locks may not reach across machines; a process of another one cannot be asked whether it lives.
                raise StorageError(_held(folder, previous, f"If it is gone, delete '{path}' and start again."))
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            mine = Holder(platform.node(), os.getpid(), since, " ".join(sys.argv)[:200])
            data = (json.dumps(asdict(mine)) + "\n").encode()
            if descriptor is None:
                path.write_bytes(data)
            else:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, data, 0)
        except OSError as error:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    path.unlink()
                os.close(descriptor)
            raise storage_error("write", path, error) from error
        if descriptor is not None:
            _held_descriptors.add(descriptor)
        self._path, self._descriptor = path, descriptor
        self._release = weakref.finalize(self, _release, path, descriptor, os.getpid())

    @property
    def holds(self) -> bool:
        """Whether its file is still there: somebody may have deleted the folder."""
        try:
            return self._descriptor is None or os.fstat(self._descriptor).st_ino == self._path.stat().st_ino
        except OSError:
            return False

    def release(self) -> None:
        """Give it back."""
        self._release()


def holder(folder: Path) -> Holder | None:
    """Who wrote here last without giving it back, if anybody."""
    try:
        values = json.loads((folder / LEASE).read_text(encoding="utf-8"))
        return Holder(str(values["host"]), int(values["pid"]), str(values["since"]), str(values["command"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def writer_of(folder: Path) -> Holder | None:
    """Who writes here now, found out without disturbing anybody. A process of another host is assumed to live."""
    last = holder(folder)
    if last is None or last.host != platform.node():
        return last
    return last if _lives(last.pid) or last.pid == os.getpid() else None


def _locked(folder: Path, path: Path) -> int | None:
    """The lease's file, locked; None where there are no locks."""
    patience = 40
    while True:
        try:
            descriptor = lock(path, os.O_RDWR | os.O_CREAT)
        except NoLocks:
            return None
        if descriptor is None and patience and _is_of_a_dead_process(holder(folder)):
            patience -= 1
            time.sleep(0.05)
            continue
        if descriptor is None:
            raise StorageError(_held(folder, holder(folder), "Stop it, or write to another folder."))
        # Whoever had it may have deleted the file between our opening and our locking it.
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
        os.close(descriptor)


def _is_of_a_dead_process(last: Holder | None) -> bool:
    """A program that it was just starting has the lock still, until it runs: for a moment."""
    return last is not None and last.host == platform.node() and last.pid != os.getpid() and not _lives(last.pid)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return pid != os.getpid()


def _held(folder: Path, who: Holder | None, remedy: str) -> str:
    if who is not None and (who.host, who.pid) == (platform.node(), os.getpid()):
        return f"'{folder}' is being written by another Checkpointer of this program: close() it first."
    return f"'{folder}' is being written by {who or 'another process'}; two writers would spoil each other's work. {remedy}"


def _release(path: Path, descriptor: int | None, owner: int) -> None:
    if os.getpid() != owner:
        return
    with contextlib.suppress(OSError):
        if descriptor is None or os.fstat(descriptor).st_ino == path.stat().st_ino:  # else it is another one's
            path.unlink()
    if descriptor is not None:
        _held_descriptors.discard(descriptor)
        os.close(descriptor)


_held_descriptors: set[int] = set()


def _let_go() -> None:
    """A child made by fork shares the locks, and would keep them after its parent is gone."""
    while _held_descriptors:
        os.close(_held_descriptors.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
