"""Every error that a user can meet.

Each is one sentence (or a few) to a person: what was found, what was expected, and what to do. They derive from
``ValueError``, so a library user can catch them without importing anything; the command line prints the sentence and
exits with code 2. A violated assumption of our own is an ``assert``, never one of these.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class OnymError(ValueError):
    """Base of all errors that are about the user's input or surroundings rather than about a defect in Onym."""


class ConfigError(OnymError):
    """An option or a configuration value that cannot work."""


class DataError(OnymError):
    """Text that cannot be read, or too little of it."""


class TokenizerError(OnymError):
    """A tokenizer that cannot be found, read or used."""


class CheckpointError(OnymError):
    """A checkpoint or weight file that is missing, damaged, or not what it was taken for."""


class NoWeightsError(CheckpointError):
    """A file or folder that holds no model's weights that can be read. That says nothing of damage."""


class StorageError(OnymError):
    """The disk said no: full, read-only, no permission, gone."""


class RunError(OnymError):
    """A run folder that cannot be continued with the options given."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the known name closest to ``name``, or an empty string."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class ReportedElsewhere(OnymError):
    """The error was reported by another process already; this one only exits."""


LESS_MEMORY = "lower --micro-batch or --context-length, give --gradient-checkpointing, or take a smaller --preset"
"""What to do where memory is too small for training."""


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises OutOfMemoryError on a GPU, and a plain RuntimeError on the CPU and for what cuBLAS and cuDNN need."""
    said = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def storage_error(action: str, path: Path | str, error: OSError) -> StorageError:
    """Put an ``OSError`` into a sentence.

    Args:
        action: what was being done, as "write the token cache".
        path: the file or folder it was done to.
        error: what the system answered.
    """
    remedies = {
        errno.ENOSPC: "the disk is full: free some space, or choose a folder on another disk",
        errno.EDQUOT: "your disk quota is used up: free some space, or choose a folder elsewhere",
        errno.EFBIG: "the file would be larger than is allowed here: raise the limit, or choose another folder",
        errno.EACCES: "permission denied: make it writable for you, or choose another folder",
        errno.EPERM: "not permitted: make it writable for you, or choose another folder",
        errno.EROFS: "the file system is read-only: choose a folder elsewhere",
        errno.ENOENT: "a folder on the way to it does not exist and cannot be made: choose another folder",
        errno.ENOTDIR: "something on the way to it is a file, not a folder: choose another folder",
        errno.EEXIST: "something on the way to it is a file, not a folder: choose another folder",
        errno.EISDIR: "it is a folder, not a file: choose another name",
    }
    reason = remedies.get(error.errno or 0, f"the system says '{error.strerror or error}'")
    return StorageError(f"Could not {action} at '{path}': {reason}.")
