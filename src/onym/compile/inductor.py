"""Where torch's compiler caches what it makes, and what it finds there: the only file that uses torch's private API.

What is not where torch 2.13 has it is left alone; that costs time, and nothing else.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onym.units import plural

HEADERS = "precompiled_headers"
_set_here: dict[str, str] = {}  # environment variables that were set by this module, not by the user


@dataclass(frozen=True)
class Counts:
    """Graphs that were needed: how many were found compiled, and how many were not."""

    found: int
    made: int

    def __str__(self) -> str:
        if not self.made:
            return f"warm, {plural(self.found, 'graph')} from the cache" if self.found else ""
        return f"{self.found} of {plural(self.found + self.made, 'graph')} from the cache" if self.found else "cold"


def user_decides(ours: Path) -> bool:
    """Whether the place was set by the user, not by this module, a parent that did the same, or torch itself.

    Args:
        ours: the folder above those that :func:`point_at` is called with.
    """
    current = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return not (
        current is None
        or current == _set_here.get("TORCHINDUCTOR_CACHE_DIR")
        or Path(current).parent == ours
        or current == _torchs_own_place()
    )


def _torchs_own_place() -> str | None:
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        return str(default_cache_dir())
    except ImportError:
        return None


def point_at(folder: Path) -> None:
    """torch looks at the environment when it compiles, not when it is imported; but for the place of its header."""
    for name, value in (("TORCHINDUCTOR_CACHE_DIR", str(folder)), ("TRITON_CACHE_DIR", str(folder / "triton"))):
        if name == "TORCHINDUCTOR_CACHE_DIR" or os.environ.get(name) in (None, _set_here.get(name)):
            os.environ[name] = _set_here[name] = value
    # Six seconds of g++ at a start with everything else in the cache, where the temporary folder has been emptied.
    with suppress(Exception):  # the place of torch 2.13; where it is another one, the header is made anew
        import torch._inductor.codecache as codecache

        for name, place in (("_HEADER_DIR", folder / HEADERS), ("_HEADER_LOCK_DIR", folder / HEADERS / "locks")):
            if hasattr(codecache, name):
                setattr(codecache, name, str(place))
    with suppress(Exception):
        from torch._inductor.cpu_vec_isa import VecISA

        _try_once(VecISA)


def _try_once(instructions: type[Any]) -> None:
    """Let a set of instructions that was tried under this key not be tried again.

    torch builds a library with each set that the processor has, and loads it in a Python of its own to see whether it can: at
    each start, although the library is in the cache. That was 1.1 of the 4.3 seconds of a warm start.
    """
    probe = instructions._probe_load
    if hasattr(probe, "of_torch"):
        return

    def remembered(self: object, library: str) -> bool:
        mark = Path(f"{library}.loads")
        loads = mark.exists() or probe(self, library)
        if loads:
            with suppress(OSError):
                mark.touch()
        return bool(loads)

    remembered.of_torch = probe  # type: ignore[attr-defined]
    instructions._probe_load = remembered


def forget_broken(error: str) -> bool:
    """Delete a library that a compiler was killed over; whether there was one, so that it is worth trying again.

    torch lets the linker write to the library's own name, and takes whatever has that name for finished. A linker writes the
    header that a library begins with last of all, so one that is cut short does not load, and the error names it.
    """
    named = re.match(r"(/.+\.so): (file too short|invalid ELF header)", error)
    if named is None:
        return False
    try:
        Path(named[1]).unlink()
    except OSError:
        return False
    with suppress(Exception):  # what this process remembers of it
        import torch._dynamo
        from torch._inductor.utils import clear_caches

        clear_caches()
        torch._dynamo.reset()
    return True


def counters() -> tuple[int, int]:
    """Graphs found, and graphs compiled, by this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return 0, 0
    counted = dynamo.counters["inductor"]
    return int(counted["fxgraph_cache_hit"]), int(counted["fxgraph_cache_miss"] + counted["fxgraph_cache_bypass"])
