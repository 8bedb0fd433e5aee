"""Empty files in the cache of compiled code: of a compiler that was killed, or a machine that went down."""

from __future__ import annotations

import os
from pathlib import Path

from onym.compile import cache
from onym.compile.cache import ABOUT, open_folder, warm_start
from tests.compile.test_cache import here

__all__ = ["here"]  # fixtures


def test_marks_and_what_others_write_now_are_left(here: Path) -> None:
    folder = open_folder()
    for name in ("a.so", "b.lock", "c.so.loads", ".12.34.tmp", "d/e.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "whole.so").write_bytes(b"code")
    other = cache._lock(folder, alone=False)
    assert other is not None
    with warm_start(True):
        assert (folder / "a.so").exists(), "another process compiles"
    os.close(other)
    with warm_start(True):
        left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {"b.lock", "c.so.loads", "whole.so", ABOUT}
