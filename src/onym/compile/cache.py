"""A cache of compiled code: a restarted run reaches its first step in a fraction of the time.

    <cache>/compiled/<key>/about.json   what the code is valid for, in words; its time says when it was last used
                          …             torch.compile's own files: graphs, kernels, C++ objects, the precompiled header
                    <key>.lock          shared by those that compile; whoever deletes needs it alone

torch caches all of this by itself, but in the system's temporary folder: gone after a restart, and in reach of others. Here it
lies in the user's own cache, under a key of everything that makes compiled code valid, and bounded in size. torch looks up
each graph by a hash of the graph and of its own settings, so what is found under the right key fits, and deleting any of it at
any time costs a compilation and nothing else.

**It is code.** Its place is decided by the machine alone (ONYM_CACHE_DIR, or the system's folder for caches): never by an
option, because a run that came from elsewhere brings its options along, and never by anything in a checkpoint. A folder that
somebody else owns, or could write to, is not used. :mod:`onym.compile.archive` moves it on purpose.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from onym.compile.cache_key import facts, key_of, read_facts
from onym.compile.inductor import HEADERS, Counts, counters, point_at, user_decides
from onym.errors import StorageError, storage_error
from onym.storage.lock import NoLocks, lock

LIMIT_BYTES = 2 << 30
"""Of all keys together. A key has some 160 MB of precompiled header, and a model of one shape 5 MB on a CPU."""
ABOUT = "about.json"
_KEY = re.compile(r"[0-9a-f]{16}")
_TEMPORARY = ".onym-"
_ABANDONED_AFTER_SECONDS = 86_400.0  # a temporary folder whose maker must be gone


@dataclass(frozen=True)
class Entry:
    """The compiled code of one key."""

    key: str
    path: Path
    size: int
    used_at: float
    """Seconds since the epoch."""
    facts: dict[str, str]
    """Empty where they cannot be read."""


class WarmStart:
    """What the cache had; ``str`` of it goes into the line about compiling."""

    def __init__(self) -> None:
        self._before = counters()

    @property
    def counts(self) -> Counts:
        """Of this warm start so far."""
        found, made = counters()
        return Counts(found - self._before[0], made - self._before[1])

    def __str__(self) -> str:
        return f"; {counts}" if (counts := str(self.counts)) else ""


@contextmanager
def warm_start(wanted: bool, warn: Callable[[str], None] = lambda _: None) -> Iterator[WarmStart]:
    """Cache what is compiled in this block; afterwards, delete what was used longest ago.

    Whatever is wrong with the cache is reported in a sentence, and does not stop the program: torch then uses its own cache.

    Args:
        wanted: False where nothing will be compiled.
        warn: is called with the reason why there is no cache.
    """
    descriptor: int | None = None
    folder: Path | None = None
    if wanted and not user_decides(root()):
        try:
            folder = open_folder()
            _forget_unfinished(folder)
            descriptor = _lock(folder, alone=False)
            point_at(folder)
        except (OSError, StorageError) as error:
            folder = None
            reason = storage_error("write", root(), error) if isinstance(error, OSError) else error
            warn(f"Compiled code is not cached for the next start. {reason}")
    try:
        yield WarmStart()
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if folder is not None:
            with suppress(OSError):
                bound(LIMIT_BYTES)


def root() -> Path:
    """Where it all is; decided by the machine, not by a run's options."""
    return Path(os.environ.get("ONYM_CACHE_DIR") or platformdirs.user_cache_dir("onym")).absolute() / "compiled"


def open_folder() -> Path:
    """This machine's folder, made if it is not there, its ``about.json`` written or marked as used now.

    Raises:
        StorageError: somebody else could write code there.
        OSError: it cannot be written.
    """
    here = facts()
    folder = root() / key_of(here)
    root().parent.mkdir(parents=True, exist_ok=True)
    for each in (root(), folder):
        with suppress(FileExistsError):
            each.mkdir(mode=0o700)
    require_private(folder)
    about = folder / ABOUT
    if about.exists():
        os.utime(about)
    else:
        temporary = folder / f"{_TEMPORARY}{os.getpid()}"
        temporary.write_text(json.dumps(here, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, about)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "not writable")
    return folder


def require_private(folder: Path) -> None:
    """Refuse a folder, or one above it, that others could write code into.

    Raises:
        StorageError: they could.
    """
    if not hasattr(os, "geteuid"):
        return
    for each in (folder.parent.parent, folder.parent, folder):
        is_outer = each == folder.parent.parent
        found = each.stat() if is_outer else each.lstat()
        if is_outer and found.st_mode & stat.S_ISVTX:
            continue  # as /tmp: anybody may write, but nobody may move what is another's
        if not stat.S_ISDIR(found.st_mode):
            what = "is no folder"
        elif found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _only_mine(found.st_gid)):
            what = "can be written by others"
        elif found.st_uid not in ({0, os.geteuid()} if is_outer else {os.geteuid()}):
            what = "is another's"
        else:
            continue
        raise StorageError(
            f"'{each}' {what}, and compiled code is run with your rights. Remove the right (chmod go-w), or the folder, or set "
            "ONYM_CACHE_DIR to a folder of your own."
        )


def entries() -> list[Entry]:
    """All keys, the newest first."""
    found = []
    for path in _folders():
        used_at, about = 0.0, dict[str, str]()
        with suppress(OSError, ValueError):
            used_at = (path / ABOUT).stat().st_mtime
            about = read_facts((path / ABOUT).read_bytes())
        found.append(Entry(path.name, path, sum(status.st_size for _, status in _files(path)), used_at, about))
    return sorted(found, key=lambda entry: entry.used_at, reverse=True)


def clear() -> tuple[int, list[str]]:
    """Delete everything but what is being compiled into at this moment.

    Returns:
        Bytes freed, and the keys that are in use.
    """
    freed, busy = 0, []
    for entry in entries():
        if _delete(entry.path):
            freed += entry.size
        else:
            busy.append(entry.key)
    return freed + _sweep(older_than_seconds=0), busy


def bound(limit: int) -> int:
    """Delete what was used longest ago until all of it together is below ``limit`` bytes, but nothing that is in use.

    Other machines' keys are deleted entirely; of this machine's, single files. torch compiles again what it misses.

    Returns:
        Bytes freed.
    """
    freed = _sweep(_ABANDONED_AFTER_SECONDS)
    there = entries()
    excess = sum(entry.size for entry in there) - limit
    mine = key_of(facts()) if excess > 0 else ""
    for entry in reversed(there):
        if excess > 0 and entry.key != mine and _delete(entry.path):
            excess, freed = excess - entry.size, freed + entry.size
    if excess > 0 and (root() / mine).is_dir():
        freed += _thin(root() / mine, excess)
    return freed


def _thin(folder: Path, excess: int) -> int:
    descriptor = _lock(folder, alone=True)
    if descriptor is None:
        return 0
    freed = 0
    try:
        used = _used_here(folder)
        units: dict[Path, list[tuple[Path, os.stat_result]]] = {}
        for file, status in _files(folder):
            # Triton's files of one kernel are in a folder of their own, and torch takes any of them for all of them.
            unit = file.parent if "triton" in file.relative_to(folder).parts[:-1] else file
            units.setdefault(unit, []).append((file, status))
        for files in sorted(units.values(), key=lambda each: max(max(status.st_mtime, status.st_atime) for _, status in each)):
            kept = any(file in used or file.name == ABOUT or HEADERS in file.parts for file, _ in files)
            files.sort(key=lambda each: not each[0].name.startswith("__grp__"))  # which says that the others are there
            for file, status in files if freed < excess and not kept else []:
                with suppress(OSError):
                    file.unlink()
                    freed += status.st_size
    finally:
        os.close(descriptor)
    return freed


def _forget_unfinished(folder: Path) -> None:
    """Delete what a compiler was killed over, or a machine that went down: torch takes whatever has the right name.

    Files that are empty by intent, marks and locks, are left; and all of them where another process compiles now.
    """
    descriptor = _lock(folder, alone=True)
    if descriptor is None:
        return
    try:
        for file, status in _files(folder):
            if file.suffix == ".tmp" or (status.st_size == 0 and file.suffix not in (".lock", ".loads", ".done")):
                with suppress(OSError):
                    file.unlink()
    finally:
        os.close(descriptor)


def _used_here(folder: Path) -> set[Path]:
    """The modules of this process that are from the folder, and the entries that name them."""
    modules = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    used = {path for path in modules if folder in path.parents}
    for level in ("fxgraph", "aotautograd"):  # an entry holds its module's name, and one of autograd those of its graphs
        names = [path.name.partition(".")[0].encode() for path in used] + [p.parent.name.encode() for p in used]
        for file, _ in _files(folder / level):
            with suppress(OSError):
                content = file.read_bytes()
                used |= {file} if any(len(name) > 40 and name in content for name in names) else set()
    return used


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All files below a folder; one that another process deletes meanwhile is skipped."""
    for above, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                yield Path(above, name), Path(above, name).lstat()


def _folders() -> list[Path]:
    with suppress(OSError):
        return sorted(
            path for path in root().iterdir() if _KEY.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        )
    return []


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder beside the keys that is gone after the block, or swept a day after its process died."""
    return tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=root(), ignore_cleanup_errors=True)


def _delete(folder: Path) -> bool:
    """Whether it is gone: moved out of the way at once, so that nobody finds half of it."""
    descriptor = _lock(folder, alone=True)
    if descriptor is None:
        return False
    try:
        with temporary_folder() as aside:
            os.replace(folder, Path(aside, folder.name))
        return True
    except OSError:
        return not folder.exists()
    finally:
        os.close(descriptor)


def _sweep(older_than_seconds: float) -> int:
    """Delete what a process left that died while it imported or deleted."""
    freed = 0
    for path in root().glob(f"{_TEMPORARY}*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime >= older_than_seconds:
                freed += sum(status.st_size for _, status in _files(path))
                shutil.rmtree(path, ignore_errors=True)
    return freed


def _lock(folder: Path, *, alone: bool) -> int | None:
    """A descriptor that holds the key's lock until it is closed; None where others use the key and it was to be alone.

    Where the file system has no locks, it is as if nobody else were there: torch compiles again what is missing.
    """
    path, flags = folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT
    try:
        return lock(path, flags, shared=not alone)
    except NoLocks:
        return os.open(path, flags, 0o600)


def _only_mine(group: int) -> bool:
    """Whether it is the group of this user alone that many systems make, and let write by default."""
    import grp
    import pwd

    try:
        found, me = grp.getgrgid(group), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return found.gr_name == me.pw_name and group == me.pw_gid and set(found.gr_mem) <= {me.pw_name}
