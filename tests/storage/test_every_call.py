"""Killed at any system call that writes, nothing is lost. All of them with ONYM_PROVE=1 in the environment, else a sample."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_a_kill_at_any_system_call_loses_nothing(tmp_path: Path) -> None:
    most = 100_000 if os.environ.get("ONYM_PROVE") else 60
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", str(tmp_path), str(most)], capture_output=True, text=True, check=False
    )
    if "strace cannot attach" in done.stderr:
        pytest.skip("this system does not let strace attach")
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    told = json.loads(done.stdout)
    assert told["tried"] == min(most, told["points"])
    assert told["killed before the end"] > 0.8 * told["tried"]
    assert {"openat", "pwrite64", "fsync", "rename", "mkdir"} <= set(told["calls"])
