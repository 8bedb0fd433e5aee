"""Memory that a step frees is kept for the next one.

A training step on a CPU frees and takes the same large tensors again and again. The C library gives each large one back to the
system, and the next one is new pages, which the system fills with zeros first, at a tenth of the memory's speed. A product
whose result is such a tensor takes a third longer.
"""

from __future__ import annotations

import ctypes
import gc
import sys

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 2**30


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, from now on; whether it can. It is glibc's to say, on Linux."""
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(_MMAP_THRESHOLD, _LARGE)) and bool(libc.mallopt(_TRIM_THRESHOLD, _LARGE))


def give_back_freed_memory() -> None:
    """Give back what is free now: what compiling needed is not needed again."""
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
