"""What tokenising leaves for the next start: how much of it there is, and what of it may be deleted.

    <cache>/tokens/<key>/        tokenised text; ``.used`` is locked while a process has it open, its time says when that was
                   .writing-*    tokens that are being written, or that an interrupted process left; ``.lock-<key>`` says which
            tokenizers/*.json    trained tokenizers; their time says when they were last used
            downloads/<key>-*    fetched files, the same; ``.part``: one that is being fetched, or was, locked by who fetches it
            .tokenizer-*         text on which a tokenizer is being trained

All of it can be made again from the text, and costs the time for that. Only what has the name of one of these is ever deleted,
and never through a link, so a wrong folder loses nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from onym.data.tokens import USED
from onym.storage.lock import NoLocks, lock

LIMIT_BYTES = 50 * 10**9
"""Of all of it together, where no other limit is given: ten billion tokens of 2 bytes, and the files they came from."""
HOUR, DAY, WEEK = 3_600.0, 86_400.0, 604_800.0

Kind = Literal["tokens", "tokenizer", "download", "interrupted"]

_NAMES: dict[Kind, tuple[tuple[str, re.Pattern[str]], ...]] = {
    "tokens": (("tokens", re.compile(r"[0-9a-f]{32}")),),
    "tokenizer": (("tokenizers", re.compile(r"[0-9a-f]{32}-.*\.json")),),
    "download": (("downloads", re.compile(r"[0-9a-f]{32}-.*(?<!\.part)")),),
    "interrupted": (
        ("tokens", re.compile(r"\.writing-.*")),
        ("downloads", re.compile(r"[0-9a-f]{32}-.*\.part")),
        (".", re.compile(r"\.tokenizer-.*")),
    ),
}


@dataclass(frozen=True)
class Entry:
    """A file or folder that tokenising left."""

    kind: Kind
    path: Path
    bytes: int
    used_at: float
    """Seconds since the epoch; of what is unfinished, when it was last written to."""
    description: Mapping[str, Any] = field(default_factory=dict)
    """What tokens.json says; empty where there is none, or it cannot be read."""

    @property
    def in_use(self) -> bool:
        """Whether a process has it open, or writes it, as far as locks can say."""
        with _alone(self) as alone:
            return not alone


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` did."""

    deleted: tuple[Entry, ...]
    in_use: tuple[Entry, ...]
    """What it would have deleted next, and another process uses."""
    bytes_left: int

    @property
    def bytes_freed(self) -> int:
        """Of what was deleted."""
        return sum(entry.bytes for entry in self.deleted)


def entries(cache: Path) -> list[Entry]:
    """All of it, by kind, what was used last first."""
    found = []
    for kind, names in _NAMES.items():
        of_kind = [
            _entry(kind, path)
            for folder, name in names
            for path in _inside(cache / folder)
            if name.fullmatch(path.name) and not path.is_symlink() and path.is_dir() == _is_folder(kind, path)
        ]
        found += sorted(of_kind, key=lambda entry: entry.used_at, reverse=True)
    return found


def prune(cache: Path, limit: int = LIMIT_BYTES, idle_seconds: float = HOUR) -> Pruned:
    """Delete what was used longest ago until all of it together is below ``limit`` bytes, and what was interrupted a day ago.

    Nothing is deleted that another process has open or writes. Where the file system has no locks, the time has to do.

    Args:
        cache: the cache folder.
        limit: bytes; with 0 everything goes that is not in use.
        idle_seconds: what was used within them stays.
    """
    now, there = time.time(), entries(cache)
    left = sum(entry.bytes for entry in there)
    deleted, in_use = [], []
    # Within a day, the same command goes on from what it left. Nothing can lock a temporary folder: an hour must say that its
    # process is dead.
    for entry in there:
        idle = DAY if limit else 0.0 if _lock_file(entry) else HOUR
        if entry.kind == "interrupted" and now - entry.used_at >= idle and _delete(entry):
            deleted.append(entry)
            left -= entry.bytes
    is_tokenising = any(_is_locked(path) for path in _inside(cache / "tokens") if path.name.startswith(".lock-"))
    for entry in sorted(there, key=lambda entry: entry.used_at):
        if entry.kind == "interrupted" or left <= limit or now - entry.used_at < idle_seconds:
            continue
        if (entry.kind != "download" or not is_tokenising) and _delete(entry):  # downloads are read while tokens are written
            deleted.append(entry)
            left -= entry.bytes
        else:
            in_use.append(entry)
    return Pruned(tuple(deleted), tuple(in_use), left)


def bound(cache: Path) -> int:
    """Called after tokenising: :func:`prune` what nobody has used for a week. It may have cost hours to make.

    Returns:
        Bytes freed.
    """
    return prune(cache, idle_seconds=WEEK).bytes_freed


def _entry(kind: Kind, path: Path) -> Entry:
    size, newest = 0, 0.0
    for each in [path, *_below(path)]:
        with suppress(OSError):
            status = each.lstat()
            size += 0 if each.is_dir() else status.st_size
            newest = max(newest, status.st_mtime)
    description: Mapping[str, Any] = {}
    if kind == "tokens":
        with suppress(OSError):
            newest = (path / USED).stat().st_mtime
        with suppress(OSError, ValueError, RecursionError):
            read = json.loads((path / "tokens.json").read_text(encoding="utf-8"))
            description = read if isinstance(read, dict) else {}
    return Entry(kind, path, size, newest, description)


def _below(path: Path) -> Iterator[Path]:
    for above, _, names in os.walk(path):
        yield from (Path(above, name) for name in names)


def _inside(folder: Path) -> list[Path]:
    with suppress(OSError):
        return list(folder.iterdir())
    return []


def _is_folder(kind: Kind, path: Path) -> bool:
    return kind == "tokens" or (kind == "interrupted" and path.suffix != ".part")


def _lock_file(entry: Entry) -> Path | None:
    """What whoever uses an entry has locked."""
    if entry.kind == "tokens":
        return entry.path / USED
    if entry.kind == "interrupted" and entry.path.suffix == ".part":
        return entry.path
    of_tokens = re.fullmatch(r"\.writing-([0-9a-f]{32})", entry.path.name)
    return entry.path.with_name(f".lock-{of_tokens[1]}") if of_tokens else None


@contextmanager
def _alone(entry: Entry) -> Iterator[bool]:
    """Whether no other process uses an entry; in the block, none can begin to."""
    path, descriptor = _lock_file(entry), None
    try:
        descriptor = lock(path, os.O_RDWR) if path else None
        alone = path is None or descriptor is not None
    except (NoLocks, FileNotFoundError):
        alone = True
    except OSError:  # another user's
        alone = False
    try:
        yield alone
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = lock(path, os.O_RDWR)
    except OSError:
        return False
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def _delete(entry: Entry) -> bool:
    """Whether it is gone; False where it is in use, or not ours to delete."""
    with _alone(entry) as alone:
        if not alone:
            return False
        try:
            if entry.kind == "tokens":  # out of the way at once, so that nobody finds half of it
                with tempfile.TemporaryDirectory(
                    prefix=".writing-", dir=entry.path.parent, ignore_cleanup_errors=True
                ) as aside:
                    os.replace(entry.path, Path(aside, entry.path.name))
            elif entry.path.is_dir():
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink()
        except OSError:
            return not entry.path.exists()
    return True
