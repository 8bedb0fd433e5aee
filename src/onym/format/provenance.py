"""When, where and with which versions something is written."""

from __future__ import annotations

import platform
import subprocess
import time
from functools import cache
from threading import Thread
from typing import Any

import torch

from onym.version import own_version


def provenance() -> dict[str, Any]:
    """As JSON values, for a manifest or header."""
    about = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onym": own_version(),
    }
    if _asking is not None:
        _asking.join()
    commit = _git_commit()
    return {**about, "git": commit} if commit else about


_asking: Thread | None = None


def ask_ahead() -> None:
    """Ask git in the background, so that no save waits for it: in a large repository it takes seconds."""
    global _asking
    if _asking is None:
        _asking = Thread(target=_git_commit, name="onym-git", daemon=True)
        _asking.start()


@cache
def _git_commit() -> str | None:
    """The commit that the working folder is at, with ``-dirty`` where tracked files differ from it. Asked once.

    Neither question takes the lock of the repository's index (``git describe --dirty`` does): a process that is killed at this
    moment leaves nothing in what is the user's. Nor do they start the file system monitor that a repository may name.
    """
    quietly = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false"]
    try:
        commit, changes = (
            subprocess.run([*quietly, *question], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
            for question in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changes else commit
