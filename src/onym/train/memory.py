"""Memory that is freed, and who may have it next.

On a CPU, what a step frees stays in the process for the next step.

A training step on a CPU frees and allocates the same large tensors again and again. The C library returns each large one to
the system, and the next allocation gets new pages, which the kernel fills with zeros at a tenth of the memory's speed. A matrix
product into such a tensor takes a third longer.
"""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 2**30


def keep_freed_memory() -> bool:
    """Make the C library retain freed memory from now on; returns whether it can (glibc on Linux)."""
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(_MMAP_THRESHOLD, _LARGE)) and bool(libc.mallopt(_TRIM_THRESHOLD, _LARGE))


def return_freed_memory() -> None:
    """Return free memory to the system now: what compiling needed is not needed again."""
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def release_gpu_memory(device: torch.device) -> None:
    """Give back what torch keeps of a GPU for later, so that another size or another process can have it; on a CPU, nothing."""
    if device.type == "cuda":
        gc.collect()  # an error's traceback can be part of a cycle, and holds what failed
        torch.cuda.empty_cache()


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
