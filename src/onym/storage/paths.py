"""Which storage a path is on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from onym.errors import ConfigError
from onym.storage import local, object_store
from onym.storage.protocol import Storage

_LOCAL = ("file://", "local://")


def storage_of(path: Path) -> Storage:
    """The storage that a path is on: a ``Path`` is on this machine, everything else is one of fsspec's."""
    return local if isinstance(path, Path) else object_store


def is_local(path: Path) -> bool:
    """Whether a path is on this machine."""
    return storage_of(path).is_local


NO_MODELS = tuple(
    f".{name}"
    for name in "ckpt pkl pickle h5 hdf5 onnx gguf npz npy pt2 zip tar gz tgz xz 7z json".split()  # noqa: SIM905
)
"""Endings of files that no model is written to, and that nobody means as a folder's name."""


def ending(path: Path) -> str:
    """What a path's ending says of its kind, in lower case: ``.pth.tar`` of ``model_best.pth.tar``, ``.pt`` of ``m.PT``."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    return before + last if last == ".tar" else last


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path on this machine, or, from a text like ``s3://bucket/run``, one in an object store that is used in the same way.

    ``~`` is the user's home folder, as in a shell.

    Raises:
        ConfigError: it is remote, and a package that it needs is not installed; there is no such home folder; or no system has
            such a path.
    """
    if not isinstance(path, str):
        path = path if hasattr(path, "joinpath") else Path(path)
        return _expanded(path) if isinstance(path, Path) else path  # type: ignore[return-value]
    if path.startswith(_LOCAL):
        return Path(path.split("://", 1)[1])
    if "://" not in path:
        return _expanded(Path(path))
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


def _expanded(path: Path) -> Path:
    if "\0" in str(path):
        raise ConfigError(f"{str(path)[:80]!r} has a zero byte in it, which no path can have.")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"'{path}' begins with a home folder that is not known here: write the full path.") from error


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a small file, durably."""
    data = content.encode() if isinstance(content, str) else content
    with storage_of(path).new_file(path, len(data)) as file:
        file.write(data)
